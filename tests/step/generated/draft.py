"""Draws a model and what happens to it from a seed: first layer, surroundings, and two to four steps with changes between.

A draft holds names and seeds only, so that the same model can be made as often as it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from changes import CHANGES
from definition import Settings
from first_layers import KINDS, Kind
from networks import BODIES, FRONTS, WRAPPERS, BorrowsWeight, Net
from parts import randomise
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
# What torch.compile sees of a model that changed; hooks that come late it ignores, by its own documentation.
CHANGES_WHEN_COMPILED = (
    "optimizer_step", "data_in_place", "data_replaced", "weights_loaded", "mode_switched", "normalisation_changed",
    "slope_changed", "batch_norm_settings_changed",
)  # fmt: skip


@dataclass
class Step:
    """One call: what changed before it, the batch, the arguments, and what it is compared with."""

    change: str
    seed: int
    settings: Settings
    call: str = "yopo"  # or "trades"
    oracle: str = "definition"  # or "plain": training passes, for eps = 0
    loss: str = "cross_entropy"
    batch: int = 3
    images: str = "uniform"
    start: str = "inside"
    keeps_gradients: bool = False
    bn_mode: str = "eval"
    options: tuple[str, ...] = ()


@dataclass
class Draft:
    """A model and its steps."""

    seed: int
    kind: str
    channels: int
    size: tuple[int, int]
    front: str
    body: str
    checkpoint: str
    scope: str
    wrapper: str
    out: str
    dtype: str
    mode: str
    named: str  # how `first_layer` is given
    steps: list[Step] = field(default_factory=list)

    def __str__(self) -> str:
        model = (
            f"{self.kind} on {self.channels}x{self.size[0]}x{self.size[1]}, front {self.front}, body {self.body}, "
            f"checkpoint {self.checkpoint} of {self.scope}, wrapper {self.wrapper}, output {self.out}, {self.dtype}, "
            f"mode {self.mode}, first_layer by {self.named}"
        )
        return "\n".join([f"seed {self.seed}: {model}", *(f"  step {i}: {step}" for i, step in enumerate(self.steps))])


@dataclass
class Built:
    """A model made from a draft."""

    net: Net
    model: nn.Module  # the net in its wrapper
    prefix: str
    kind: Kind

    def layer(self, named: str) -> nn.Module | None:
        """The module that ends the first layer; None where the model has none that first_layer=None may find."""
        if named != "none":
            return self.net.first
        return None if self.kind.found is None else self.net.first.get_submodule(self.kind.found)

    def argument(self, named: str) -> Any:
        """What is given as `first_layer`."""
        name = f"{self.prefix}first"
        return {
            "none": None, "name": name, "module": self.net.first, "sequence": [f"{self.prefix}front", self.net.first],
        }[named]  # fmt: skip


def draw(seed: int) -> Draft:
    """The draft of a seed."""
    r = Random(seed)
    kind = r.choice(list(KINDS))
    front = r.choice(["none"] * 6 + ["normalise", "normalise", "inline", "clamp", "pad", "repeat"])
    wrapper = "none"
    if r.random() < 0.35:
        wrapper = r.choice(
            [w for w in WRAPPERS if w != "none"]
            if r.random() < 0.1
            else ["sequential", "holder", "partial", "data_parallel"]
        )
    checkpoint = r.choice(["none"] * 5 + ["reentrant", "not", "not", "selective"])
    draft = Draft(
        seed=seed, kind=kind, channels=r.choice([1, 2, 3, 3]), size=(r.randint(6, 9), r.randint(6, 9)), front=front,
        body=r.choice(list(BODIES)), checkpoint=checkpoint, scope=r.choice(["body", "all"]), wrapper=wrapper,
        out=r.choice(["tensor"] * 5 + ["tuple", "dict", "object"]),
        dtype=r.choice(["float64"] * 9 + ["float32", "float32", "bfloat16", "autocast"]),
        mode=r.choice(["train"] * 5 + ["eval", "eval", "batch_norm_eval", "first_eval"]),
        named=r.choice(["name", "name", "module", "module", "none"]),
    )  # fmt: skip
    if r.random() < {"pad": 0.85, "repeat": 0.85, "clamp": 0.5, "normalise": 0.5}.get(front, 0.0):
        draft.named = "sequence"
    if checkpoint == "selective" and draft.body in ("in_place", "bn"):
        draft.body = "plain"  # torch forbids to overwrite what a selective checkpoint keeps
    if draft.dtype == "bfloat16" and (wrapper.startswith("compiled") or kind in ("orthogonal", "weight_norm")):
        draft.dtype = "float64"  # in bfloat16 such a weight, or its gradient, is mostly rounding
    if kind == "linear" and draft.body == "bn" and draft.dtype != "float64":
        draft.body = "plain"  # a BatchNorm over three values
    draft.steps = [_step(r, draft, i) for i in range(r.choice([2, 2, 3, 4]))]
    return draft


def _step(r: Random, draft: Draft, i: int) -> Step:
    exact = draft.dtype == "float64"
    names = CHANGES_WHEN_COMPILED if draft.wrapper.startswith("compiled") else list(CHANGES)
    change = r.choice(names) if i and r.random() < 0.8 else "none"
    if change == "parametrised" and draft.dtype == "bfloat16":
        change = "none"  # the norm's gradient is a difference of large terms
    step = Step(change, r.randrange(2**31), Settings())
    step.oracle = "plain" if not exact or r.random() < 0.35 else "definition"
    step.call = "trades" if step.oracle == "definition" and r.random() < 0.2 else "yopo"
    step.loss = r.choice(["cross_entropy"] * 3 + ["smoothed", "squares", "calls_model"])
    step.batch = r.choice([2, 3, 4])
    step.images = r.choice(["uniform", "uniform", "saturated", "saturated", "dark", "channels_last"])
    if "group_norm" in (draft.body, draft.kind) and step.images == "channels_last":
        step.images = "uniform"  # torch 2.13: GroupNorm's backward ends the process where its input wants no gradient
    if step.images == "dark" and not exact:
        step.images = "uniform"  # a BatchNorm divides by the deviation of a constant
    step.keeps_gradients = r.random() < 0.3
    s = step.settings
    s.outer_steps, s.inner_steps = r.choice([1, 2, 2, 3]), r.choice([1, 2, 3])
    s.gradient = r.choice(["paper", "paper", "full", "released"])
    s.reduction = r.choice([None, None, "sum", "mean"])
    s.bounds = r.choice([(0.0, 1.0)] * 4 + [None, (-0.05, 1.2)])
    if r.random() < 0.2:
        s.mean, s.std = (
            ([0.5], [0.25])
            if r.random() < 0.5
            else ([0.4, 0.5, 0.6][: draft.channels], [0.3, 0.2, 0.25][: draft.channels])
        )
    if step.oracle == "plain":
        s.eps, step.start = 0.0, "zero"
        s.step_size = r.choice([0.0, 0.03])
        s.norm = r.choice(["linf", "l2"])
        if step.loss == "calls_model" or draft.body in ("borrows",) or draft.kind == "parameter_elsewhere":
            s.gradient = r.choice(["paper", "full"])  # for "released" only the layer's own gradient would be twice
    else:
        s.norm = r.choice(["linf", "linf", "l2"])
        if s.norm == "l2":
            s.eps, s.step_size = 0.8, 0.3
        elif r.random() < 0.25:
            s.eps = r.choice(
                [
                    torch.linspace(0.05, 0.1, draft.channels).double()[:, None, None],
                    torch.linspace(0.05, 0.1, step.batch).double()[:, None, None, None],
                ]
            )
        step.start = r.choice(["zero", "inside", "inside", "outside"])
        s.train_on = r.choice(["all", "all", "all", "last"])
        if step.call == "trades":
            step.bn_mode, step.loss = r.choice(["eval", "train"]), r.choice(["cross_entropy", "smoothed"])
            s.train_on, s.reduction, s.gradient = "all", None, "none"
            step.start = r.choice(["inside", "outside"])
    if step.loss == "calls_model" and draft.checkpoint != "none" and step.oracle == "definition":
        step.loss = "cross_entropy"  # its own recomputation is nothing that the definition tells apart
    drawn = [o for o in ("forward", "backward", "after_pass", "skip") if r.random() < 0.12]
    if step.call == "trades" or step.oracle == "plain":
        drawn = [o for o in drawn if o != "after_pass"]
    step.options = tuple(drawn)
    return step


def build(draft: Draft, wrapped: bool) -> Built:
    """The model of a draft, the same every time."""
    torch.manual_seed(draft.seed)
    r = Random(draft.seed)
    c, size = draft.channels, draft.size
    if draft.front == "pad":
        size = size[0] + 2, size[1] + 2
    kind = KINDS[draft.kind](r, c, size)
    front = FRONTS[draft.front](r, c)
    # What a recomputed forward does to a layer that moves its own state, torch leaves open.
    scope = "body" if kind.stateful else draft.scope
    checkpoint = draft.checkpoint
    if checkpoint == "selective" and any(getattr(m, "inplace", False) for m in kind.module.modules()):
        checkpoint = "not"  # torch forbids to overwrite what a selective checkpoint keeps
    if draft.wrapper.startswith("compiled") and (kind.random or draft.body in ("dropout", "bn") or _has_buffers(kind)):
        checkpoint = "none"  # torch.compile recomputes with other random numbers, and takes buffers for inputs
    net = Net(kind.module, BODIES[draft.body](kind.channels), front, checkpoint, scope, draft.out)
    randomise(net)
    weight = next((p for p in kind.module.parameters() if p.is_leaf and p.requires_grad), None)
    if isinstance(net.body, BorrowsWeight) and weight is not None:
        net.body.borrowed = weight
    dtype = DTYPES[draft.dtype]
    net.to(dtype)
    _set_mode(net, draft.mode)
    model, prefix = WRAPPERS[draft.wrapper](net) if wrapped else (net, "")
    return Built(net, model, prefix, kind)


def _has_buffers(kind: Kind) -> bool:
    return next(kind.module.buffers(), None) is not None


def _set_mode(net: Net, mode: str) -> None:
    net.train(mode != "eval")
    if mode == "first_eval":
        net.first.eval()
    if mode == "batch_norm_eval":
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def batch(draft: Draft, step: Step, fixed_shape: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, eta_0) of a step."""
    g = torch.Generator().manual_seed(step.seed)
    h, w = draft.size
    if not fixed_shape and step.seed % 5 == 0:
        h, w = h + 1, w
    x = torch.rand(step.batch, draft.channels, h, w, generator=g, dtype=torch.float64)
    if step.images == "saturated":
        x[0, :, :3], x[1, :, 3:] = 0, 1
    elif step.images == "dark":
        x[:] = 0
    elif step.images == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 3, (step.batch,), generator=g)
    noise = torch.rand(x.shape, generator=g, dtype=torch.float64) * 2 - 1
    eta = 0.05 * noise if step.start != "zero" else torch.zeros_like(x)
    s = step.settings
    if step.start == "inside" and s.bounds is not None:
        eta = torch.clamp(x + eta, *s.bounds) - x
    dtype = torch.float64 if draft.dtype == "float64" else torch.float32
    return x.to(dtype), y, eta.to(dtype)
