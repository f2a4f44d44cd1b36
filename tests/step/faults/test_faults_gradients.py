"""Gradients that other parts of a training loop look at: none may be missing, doubled or counted in silence."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from fault_oracle import Make, Net, agrees, batch, conv, net, plain_passes, same_model, trades_agrees
from fault_rows import AS_EXPECTED, EAGER, ONE_PROCESS, REFERENCE, TWO_PROCESSES, Row, Setting, cells
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from yopo_ext import trades_yopo_step, yopo_step

FIRST = r"\bfirst_layer\b"
HERE = (EAGER, REFERENCE)
NOT_COMPILED = (EAGER, TWO_PROCESSES, REFERENCE)


# --- parameters from elsewhere ---


class Borrowing(nn.Module):
    """Uses a parameter that another module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lent = conv(), []

    def forward(self, u: Tensor) -> Tensor:
        return self.conv(u) * self.lent[0]


class Lender(Net):
    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.scale = nn.Parameter(torch.tensor(1.5))


def lent_in_a_list() -> nn.Module:
    model: Any = net(Borrowing, Lender)()
    model.first.lent.append(model.scale)
    return model


def lent_inside_a_reentrant_checkpoint() -> nn.Module:
    class Recomputed(Lender):
        def forward(self, u: Tensor) -> Tensor:
            return checkpoint(super().forward, u, use_reentrant=True)

    model: Any = net(Borrowing, Recomputed)()
    model.first.lent.append(model.scale)
    return model


def lent_in_a_closure() -> nn.Module:
    model: Any = net(lambda: nn.Sequential(conv(), nn.ReLU()), Lender)()
    model.first[1].forward = lambda z: torch.tanh(z * model.scale)
    return model


def lent_by_a_module() -> nn.Module:
    """The kernel belongs to a module of the body."""
    model: Any = net(lambda: nn.Sequential(nn.Identity(), conv()))()
    other = nn.Conv2d(6, 4, 3, bias=False).double()
    model.body[2] = other
    model.first[0].forward = lambda u: u * other.weight.abs().mean()
    return model


# --- selective checkpointing ---


def selective(first: Callable[[], nn.Module], part: str, saved: str = "convolution") -> Make:
    """Keeps some results of `part` and computes the others again."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    class Selective(Net):
        def forward(self, u: Tensor) -> Tensor:
            if part == "model":
                return checkpoint(super().forward, u, use_reentrant=False, context_fn=contexts)
            if part == "first":
                return self.body(checkpoint(self.first, u, use_reentrant=False, context_fn=contexts))
            return checkpoint(self.body, self.first(u), use_reentrant=False, context_fn=contexts)

    return net(first, Selective)


def evaluated(model: nn.Module, k: int) -> None:
    """A recomputed BatchNorm moves its buffers twice, by its place in the checkpoint."""
    model.eval()


# --- per-sample gradients ---


def capture(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    module.activations = [*getattr(module, "activations", []), inputs[0].detach()]


def per_sample(module: Any, grad_input: Any, grad_output: tuple[Tensor]) -> None:
    """grad_sample of a convolution or a linear layer from what came in and what comes back."""
    u, p = module.activations.pop(), grad_output[0]
    for i in range(len(u)):
        parameters = list(module.parameters())
        with torch.enable_grad():
            output = module.__class__.forward(module, u[i : i + 1])
            found = torch.autograd.grad(output, parameters, p[i : i + 1])
        for parameter, g in zip(parameters, found, strict=True):
            kept = parameter.grad_sample
            parameter.grad_sample = g[None] if i == 0 else torch.cat([kept, g[None]])


def sampled(model: nn.Module) -> nn.Module:
    """The hooks that opacus puts on every layer."""
    for parameter in model.parameters():
        parameter.grad_sample = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(capture)
            module.register_full_backward_hook(per_sample)
    return model


class GradSampleModule(nn.Module):
    """A wrapper as opacus makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._module = sampled(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


# --- optimizers in hooks ---


def optimizer_in_hook(which: str, expected: int, call: Callable[..., Any] = yopo_step, **options: Any):
    """How often two steps warn and name `after_pass`."""

    def run(setting: Setting) -> None:
        model: Any = net(conv)()
        chosen = {
            "all": model.parameters(),
            "first": model.first.parameters(),
            "body": [model.body[-1].weight],
            "none": [],
        }
        for parameter in chosen[which]:
            optimizer = torch.optim.SGD([parameter], lr=0.01)

            def update(p: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)
        wrapped = setting.wrap(model)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for k in range(2):
                x, y, _ = batch(k, setting.rank)
                call(wrapped, x, y, first_layer="first", **({"outer_steps": 3} | options))
        said = [str(warning.message) for warning in seen if "after_pass" in str(warning.message)]
        with setting.together():
            assert len(said) == expected, f"{len(said)} warnings name after_pass, expected {expected}: {said}"

    return run


# --- accumulation ---


def accumulated(nan_in: int | None, scaled: bool, m: int, first: Callable[[], nn.Module] = conv):
    """Three micro-batches, the first two under the caller's `no_sync`; one may hold a NaN, on one process.

    The third is reduced, and with it what the others left, as DistributedDataParallel reduces `.grad`: also where the
    third itself is left out.
    """

    def run(setting: Setting) -> None:
        ours, theirs = net(first)().eval(), net(first)().eval()
        wrapped: Any = setting.wrap(ours)
        parallel = setting.name == TWO_PROCESSES
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for k in range(3):
            x, y, _ = batch(k, setting.rank)
            bad = nan_in == k and setting.rank == (1 if parallel else 0)
            factor = float("nan") if bad else 1.0
            quiet = parallel and k < 2
            with wrapped.no_sync() if quiet else nullcontext():
                yopo_step(
                    wrapped, x, y, first_layer="first", outer_steps=m, reduction="sum", eps=0.0, step_size=0.0,
                    loss_fn=lambda output, y, factor=factor: factor * F.cross_entropy(output, y),
                    backward=lambda loss: scaler.scale(loss).backward(), on_nonfinite="skip",
                )  # fmt: skip
                if parallel:
                    with setting.together():
                        assert wrapped.require_backward_grad_sync == (not quiet)
            if nan_in != k:
                plain_passes(theirs, x, y, F.cross_entropy, m, backward=lambda loss: scaler.scale(loss).backward())
        same_model(setting, ours, theirs, rtol=1e-9, atol=1e-8)

    return run


# --- reentrant checkpointing ---


class Reentrant(Net):
    """A front, then everything else inside a reentrant checkpoint, which has a backward only if its input wants one."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.front = nn.Identity()

    def forward(self, u: Tensor) -> Tensor:
        return checkpoint(super().forward, self.front(u), use_reentrant=True)


class Flattening(Net):
    def __init__(self, first: nn.Module) -> None:
        super().__init__(first, flat=True)

    def forward(self, u: Tensor) -> Tensor:
        return checkpoint(super().forward, u, use_reentrant=True)


class Padded(Reentrant):
    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.front = nn.ZeroPad2d(1)


def wanted(u: Tensor) -> Tensor:
    return u.detach().requires_grad_()


# --- hooks of parameters ---


def reflected() -> nn.Module:
    return nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")


def hooked(first: Callable[[], nn.Module]) -> Make:
    """Hooks change the gradient of every parameter, once."""

    def make() -> nn.Module:
        model = net(first)()
        for p in model.parameters():
            p.register_hook(lambda g: 0.5 * g)
        return model

    return make


ROWS = [
    Row("a reentrant checkpoint", "behind the first module of a sequence",
        agrees(net(conv, Padded), ["front", "first"], kinds=["plain", "sum", "full"], plain_input=wanted),
        settings=NOT_COMPILED),
    Row("a reentrant checkpoint", "around a flattening, layer not named",
        agrees(net(lambda: nn.Linear(168, 6), Flattening), ["first"], first_layer=None, kinds=["plain", "sum", "released"],
               plain_input=wanted), settings=HERE),
    Row("a reentrant checkpoint", "around a BatchNorm before the layer, not named",
        agrees(lambda: net(lambda: nn.Sequential(nn.BatchNorm2d(3), conv()), Reentrant)().eval(), kinds=["plain"],
               first_layer=None, plain_input=wanted), FIRST, settings=HERE),
    Row("a reentrant checkpoint", "TRADES", trades_agrees(lambda: net(conv, Reentrant)().eval(), given=wanted), settings=HERE),
    *(
        Row("a hook of a parameter", name, agrees(hooked(first), ["first"], kinds=["plain", "sum", "full", "released"]),
            settings=NOT_COMPILED)
        for name, first in (
            ("convolution", conv), ("autograd layer", lambda: nn.Sequential(conv(), nn.Tanh())),
            ("affine autograd layer", reflected),
        )
    ),
    *(
        Row(
            "a first layer that uses a parameter from elsewhere", name,
            agrees(make, kinds=["plain", "sum"], first_layer="first", plain_input=wanted), FIRST, or_equal=True, settings=where,
        )
        for name, make, where in (
            ("in a list", lent_in_a_list, (EAGER, TWO_PROCESSES, REFERENCE)),
            ("in a closure", lent_in_a_closure, HERE),
            ("in a list, inside a reentrant checkpoint", lent_inside_a_reentrant_checkpoint, HERE),
            ("of a module of the body", lent_by_a_module, HERE),
        )
    ),
    *(
        Row(
            "selective checkpointing with several passes", name,
            agrees(make, ["first"], change=evaluated, kinds=["definition", "sum", "released"]), settings=where,
        )
        for name, make, where in (
            ("of the model", selective(conv, "model"), (*ONE_PROCESS, TWO_PROCESSES)),
            ("of the first layer", selective(lambda: nn.Sequential(conv(), nn.ReLU()), "first"), NOT_COMPILED),
            ("of the body", selective(conv, "body"), NOT_COMPILED),
            ("of the model, autograd layer", selective(lambda: nn.Sequential(conv(), nn.Tanh()), "model"), NOT_COMPILED),
            ("of the model, affine autograd layer", selective(reflected, "model"), NOT_COMPILED),
            ("of the model, everything kept", selective(conv, "model", ""), NOT_COMPILED),
        )
    ),
    Row(
        "per-sample gradients", "a wrapper as of opacus",
        agrees(net(conv), kinds=["plain"], first_layer=lambda model: model.first, wrap=GradSampleModule),
        rf"{FIRST}|\bmodel\b", settings=HERE,
    ),
    Row(
        "per-sample gradients", "hooks without a wrapper",
        agrees(lambda: sampled(net(conv)()), kinds=["plain"], first_layer="first"), rf"{FIRST}|\bmodel\b", settings=HERE,
    ),
    Row(
        "per-sample gradients", "TRADES, hooks without a wrapper",
        trades_agrees(lambda: sampled(net(conv)())), rf"{FIRST}|\bmodel\b", settings=HERE,
    ),
    *(
        Row("an optimizer in a post-accumulate-grad hook", name, optimizer_in_hook(which, expected, **options), settings=where)
        for name, which, expected, options, where in (
            ("of every parameter", "all", 1, {}, NOT_COMPILED),
            ("of the first layer", "first", 1, {}, HERE),
            ("of a weight of the body", "body", 1, {}, HERE),
            ("sum", "all", 1, {"reduction": "sum"}, HERE),
            ("none (guard)", "none", 0, {}, NOT_COMPILED),
            ("one pass (guard)", "all", 0, {"outer_steps": 1}, HERE),
            ("after_pass is given (guard)", "all", 0, {"after_pass": lambda j: None}, HERE),
            ("trains on the last pass only (guard)", "all", 0, {"train_on": "last"}, HERE),
            ("TRADES, one update (guard)", "all", 0, {"call": trades_yopo_step}, HERE),
        )
    ),
    *(
        Row(
            "accumulation with no_sync, GradScaler and skip", f"{name}, NaN in micro-batch {nan_in}",
            accumulated(nan_in, scaled, m, first), settings=NOT_COMPILED,
        )
        for name, scaled, m, first in (
            ("one pass", True, 1, conv), ("two passes", True, 2, conv), ("not scaled", False, 2, conv),
            ("autograd layer", True, 2, lambda: nn.Sequential(conv(), nn.Tanh())),
        )
        for nan_in in (None, 0, 1, 2)
        if nan_in is not None or m == 2
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
