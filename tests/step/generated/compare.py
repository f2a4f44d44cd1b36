"""Takes the steps of a draft with the package and with an oracle, and says how they compare."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from both_ways import defined, logits_of, package, plain_passes, set_seeds
from changes import CHANGES
from definition import Result
from draft import DTYPES, Built, Draft, Step, batch, build, draw
from networks import without_checkpoints
from torch import Tensor

import yopo_ext

PACKAGE = str(Path(yopo_ext.__file__).parent)
ARGUMENTS = sorted(
    {*inspect.signature(yopo_ext.yopo_step).parameters, *inspect.signature(yopo_ext.trades_yopo_step).parameters}
)
NAMES_AN_ARGUMENT = re.compile(rf"\b({'|'.join(ARGUMENTS)})\b")
# Of the largest gradient of a step. In low precision a step is held against a plain pass of the same dtype, for gross faults.
TOLERANCE = {"float64": 1e-8, "float32": 2e-3, "bfloat16": 0.1, "autocast": 0.1}


@dataclass
class Outcome:
    """What the steps of a draft came to.

    status: "equal"; "refused" by an error that names an argument, where the model may be refused; "ambiguous", a gradient has no
    certain sign; "invalid", the model does not run without the package; "differs".
    step: the step that ended it. steps: how many were equal before, `plain` of them to plain passes.
    """

    status: str
    message: str = ""
    step: int = -1
    steps: int = 0
    plain: int = 0


class DifferenceError(AssertionError):
    """The package does something else than the oracle."""


def outcome(seed: int) -> Outcome:
    """Take the steps of a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draft = draw(seed)
        try:
            return _take(draft)
        finally:
            if draft.wrapper.startswith("compiled"):
                torch._dynamo.reset()


def _take(draft: Draft) -> Outcome:
    set_seeds(draft.seed)
    mine = build(draft, wrapped=True)
    set_seeds(draft.seed)
    theirs = build(draft, wrapped=False)
    expectation, plain = None, 0
    for i, step in enumerate(draft.steps):
        if step.change != "none":
            for built in (mine, theirs):
                set_seeds(step.seed)
                try:
                    expectation = CHANGES[step.change](built.net, Random(step.seed)) or expectation
                except (
                    RuntimeError,
                    ValueError,
                    KeyError,
                    AttributeError,
                ) as error:  # two changes that torch does not combine
                    return Outcome("invalid", f"{step.change}: {_first_line(error)}", i, i, plain)
            _fit_dtype(draft, mine, theirs)
        if not step.keeps_gradients:
            for built in (mine, theirs):
                built.net.zero_grad()
        try:
            found = _one(draft, step, mine, theirs, expectation)
        except DifferenceError as error:
            return Outcome("differs", str(error), i, i, plain)
        if found is not None:
            return Outcome(*found, i, i, plain)
        plain += step.oracle == "plain"
    return Outcome("equal", "", -1, len(draft.steps), plain)


def _fit_dtype(draft: Draft, *both: Built) -> None:
    """What a change made has the model's dtype."""
    for built in both:
        built.net.to(DTYPES[draft.dtype])


def _one(draft: Draft, step: Step, mine: Built, theirs: Built, expectation: Any) -> tuple[str, str] | None:
    """None where both come to the same."""
    x, y, eta = batch(draft, step, mine.kind.fixed_shape)
    layer = theirs.layer(draft.named)
    plain = step.oracle == "plain"
    if layer is None:  # what is accepted all the same is compared with plain passes
        if not plain:
            plain, eta, step.settings.eps, step.call = True, torch.zeros_like(eta), 0.0, "yopo"
            step.settings.train_on = "all"
            step.options = tuple(o for o in step.options if o != "after_pass")
        if step.settings.gradient != "full":
            step.settings.gradient = "paper"
    oracle_fails = ""
    set_seeds(step.seed)
    try:
        with without_checkpoints() if _recomputes(theirs) and not plain else nullcontext():
            result = (plain_passes if plain else defined)(draft, step, theirs, layer, x, y, eta)
    except Exception as error:
        if expectation != "error" and not (isinstance(error, AssertionError) and "did not come" in str(error)):
            return "invalid", f"{type(error).__name__}: {_first_line(error)}"
        result, oracle_fails = Result(eta), _first_line(error)
    before = _state(mine)
    set_seeds(step.seed)
    try:
        got = package(draft, step, mine, x, y, eta)
    except Exception as error:
        return _refused(draft, step, mine, error, before, expectation)
    if expectation == "error":
        raise DifferenceError(
            "accepted a model whose input reaches the output beside the first layer, or which runs it twice"
        )
    if oracle_fails:
        return "invalid", oracle_fails
    if not _finite(theirs) or result.ambiguous:
        return "ambiguous", ""
    _same(draft, step, mine, theirs, got, result, plain)
    return None


def _recomputes(built: Built) -> bool:
    """Whether a checkpoint recomputes the first layer: the definition runs it once, torch a second time in backward."""
    return built.net.checkpoint != "none" and built.net.scope == "all"


def may_refuse(draft: Draft, step: Step, built: Built) -> bool:
    """Whether a refusal by name is as good as the right result."""
    if built.kind.may_refuse or (draft.named == "none" and built.kind.found is None):
        return True
    if draft.front in ("pad", "repeat") and draft.named != "sequence":
        return True
    twice = draft.kind == "clamped_and_normalised" and draft.front != "none"
    clamps = draft.front == "clamp" or draft.kind == "clamped_and_normalised"
    s = step.settings
    inside = s.bounds == (0.0, 1.0) and s.mean is None and step.start != "outside" and not twice
    return clamps and not inside


def _refused(draft: Draft, step: Step, mine: Built, error: Exception, before: Any, expectation: Any) -> tuple[str, str]:
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    text = f"{type(error).__name__}: {error}"
    by_package = frames[-1].startswith(PACKAGE) and isinstance(error, ValueError | TypeError | RuntimeError)
    if "selective activation checkpoint has been mutated" in text:
        return "invalid", text[:120]
    if not by_package or not NAMES_AN_ARGUMENT.search(str(error)):
        raise DifferenceError(f"an error that names no argument, from {Path(frames[-1]).name}: {text[:400]}")
    if expectation != "error" and not may_refuse(draft, step, mine):
        raise DifferenceError(f"refused: {text[:400]}")
    in_pass = any(Path(name).name in ("full_pass.py", "passes.py") for name in frames)
    _unchanged(mine, before, in_pass, text)
    return "refused", re.sub(r"\[[\d, ]*\]|\d+", "#", text)[:120]


def _unchanged(mine: Built, before: Any, in_pass: bool, text: str) -> None:
    gradients, buffers, modes, wants = before
    for (name, p), gradient in zip(mine.net.named_parameters(), gradients, strict=True):
        if gradient is None and p.grad is not None:
            raise DifferenceError(f"{name}.grad is left by a refused step: {text[:200]}")
        if gradient is not None and "unusable" not in text and (p.grad is None or not torch.equal(p.grad, gradient)):
            raise DifferenceError(f"{name}.grad changed in a refused step: {text[:200]}")
    if [m.training for m in mine.net.modules()] != modes or [p.requires_grad for p in mine.net.parameters()] != wants:
        raise DifferenceError(f"modes or requires_grad changed in a refused step: {text[:200]}")
    now = dict(mine.net.named_buffers())
    if in_pass:
        return
    for name in now.keys() | buffers.keys():
        if name not in now or name not in buffers or not torch.equal(now[name], buffers[name]):
            raise DifferenceError(f"buffer {name} changed in a step refused before its passes: {text[:200]}")


def _state(built: Built) -> Any:
    net = built.net
    return (
        [None if p.grad is None else p.grad.clone() for p in net.parameters()], {n: b.clone() for n, b in net.named_buffers()},
        [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
    )  # fmt: skip


# --- comparing ---


def _finite(built: Built) -> bool:
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in built.net.parameters())


def _same(draft: Draft, step: Step, mine: Built, theirs: Built, got: Any, result: Result, plain: bool) -> None:
    tolerance = TOLERANCE[draft.dtype]
    what = f"{'plain passes' if plain else 'the definition'}"
    gradients = [p.grad for p in theirs.net.parameters() if p.grad is not None]
    largest = max([float(g.abs().max()) for g in gradients if g.numel()], default=0.0)
    trades = step.call == "trades"
    losses = torch.stack(result.losses[:-1] if trades else result.losses)
    _close("losses", got.losses, losses, tolerance, what)
    _close("loss", got.loss, result.losses[-1], tolerance, what)
    logits = logits_of(result.output).detach()
    _close("logits", logits_of(got.logits), logits, tolerance, what)
    if not plain:
        _close("perturbation", got.perturbation, result.eta, tolerance, what)
    for (name, p), q in zip(mine.net.named_parameters(), theirs.net.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            known = p.grad if q.grad is None else q.grad
            if bool(known.any()):
                raise DifferenceError(f"{name}.grad is {'None' if p.grad is None else 'not None'}, unlike {what}")
            continue
        if q.grad is None:
            continue
        if draft.dtype in ("bfloat16", "autocast"):  # single elements may be rounding alone
            error, size = float((p.grad - q.grad).double().norm()), sum(float(g.double().norm()) for g in gradients)
            if not error <= tolerance * max(size, 1e-3):
                raise DifferenceError(f"{name}.grad is off by a norm of {error:.2e} of {size:.2e} from {what}")
        else:
            _close(f"{name}.grad", p.grad, q.grad, tolerance, what, largest)
    ours, expected = dict(mine.net.named_buffers()), dict(theirs.net.named_buffers())
    if ours.keys() != expected.keys():
        raise DifferenceError(f"buffers {sorted(ours.keys() ^ expected.keys())} are not in both, unlike {what}")
    for name, value in expected.items():
        if _recomputes(mine) and (not plain or name.startswith("first.")):
            # A BatchNorm that is recomputed moves its statistics once or twice, as its place in the step gives it.
            value.data = ours[name].detach().clone()
        _close(f"buffer {name}", ours[name], value, tolerance, what)
    if [m.training for m in mine.net.modules()] != [m.training for m in theirs.net.modules()]:
        raise DifferenceError("modes changed")


def _close(name: str, mine: Tensor, expected: Tensor, tolerance: float, what: str, largest: float = 0.0) -> None:
    if mine.shape != expected.shape:
        raise DifferenceError(f"{name} has shape {list(mine.shape)}, {what} {list(expected.shape)}")
    if mine.requires_grad and not name.endswith("grad"):
        raise DifferenceError(f"{name} has a graph")
    if expected.numel() == 0:
        return
    mine, expected = mine.detach().double(), expected.detach().double()
    scale = max(float(expected.abs().max()), largest, 1e-3)
    worst = float((mine - expected).abs().max())
    if not worst <= tolerance * scale:
        raise DifferenceError(f"{name} is off by {worst:.2e} of {scale:.2e} from {what}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:150]
