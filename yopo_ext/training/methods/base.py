"""What a training method is, what it may do, and what it costs."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from yopo_ext import threat
from yopo_ext.model_state import evaluating
from yopo_ext.training.data.batches import Batch, Frame, PerSample
from yopo_ext.training.option import option as option  # for the methods, beside what else they need

BNMode = Literal["eval", "train"]
Start = Literal["zero", "uniform", "corners"]


@dataclass(frozen=True)
class Cost:
    """Passes through the network spent on one batch, in units of (forward = input gradient = weight gradient = 1)."""

    forwards: int
    input_grads: int
    weight_grads: int

    @property
    def total(self) -> int:
        return self.forwards + self.input_grads + self.weight_grads

    def as_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total": self.total}

    def __str__(self) -> str:
        return f"{self.total} ({self.forwards}f + {self.input_grads}i + {self.weight_grads}w)"


@dataclass(frozen=True)
class ThreatModel(threat.ThreatModel):
    """Which perturbations are allowed, in pixel units, and how the model wants its pixels normalised."""

    eps: float
    step_size: float = 0.0  # methods have their own
    norm: Literal["linf", "l2"] = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Learner(Protocol):
    """The trainer as a method sees it."""

    network: nn.Module  # the bare model: attacks run it, so that no attack is seen by DDP
    replica: (
        nn.Module
    )  # the model whose backward reduces gradients over the processes; `network` if there is one process
    first_layer: str | None
    threat: ThreatModel
    classes: int
    generator: torch.Generator  # seeded afresh for every batch
    kept: dict[str, PerSample]  # what the method keeps of every training sample: `Method.keeps`
    carried: dict[str, Tensor]  # what the method hands from one batch to the next
    progress: float  # how much of the run will be done when the epoch under way ends, 0..1
    inputs: list[Tensor]  # what `replica` was called with for this batch, if `Method.watches_inputs`

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of pixels x [B, C, H, W], through `replica`, at the run's precision."""

    def predict(self, x: Tensor) -> Tensor:
        """The same through `network`, for passes that train nothing."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The training loss (mean cross-entropy, with label smoothing if configured)."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients (scaled where the precision asks for it)."""

    def update(self) -> None:
        """One weight update from the accumulated gradients, then zero them."""

    def attack(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """The perturbation `attacks.pgd` finds under the threat model; `options` are pgd's."""

    def autocast(self) -> Any:
        """The precision context for calling `network` or `replica` directly."""


@dataclass(frozen=True)
class Outcome:
    """What a method reports of a batch, detached: the last pass's loss and logits, for the progress display."""

    loss: Tensor
    logits: Tensor
    alignment: Tensor | None = None  # agreement of the attack's gradient signs with those of the training pass, -1..1


@dataclass(frozen=True)
class Method:
    """A way to spend passes on a batch. Subclasses are the rows of `methods.METHODS`; their fields are its options."""

    name: ClassVar[str]
    numbers: ClassVar[tuple[str, ...]] = ()  # options that a name such as "yopo-5-3" sets
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")  # of the threat models it works under
    selects_by: ClassVar[Literal["robust", "clean"]] = "robust"  # validation accuracy that picks the best checkpoint

    def cost(self) -> Cost:
        """Passes per batch."""
        raise NotImplementedError

    def train(self, learner: Learner, batch: Batch) -> Outcome:
        """Spend them, including every weight update."""
        raise NotImplementedError

    def check(self, threat: ThreatModel) -> None:
        """Raise ValueError if the method does not work under this threat model."""
        step_size = getattr(self, "step_size", None)
        if step_size is not None and not step_size > 0.0:
            raise ValueError(f"step_size must be > 0; got {step_size}")
        if threat.norm not in self.norms:
            raise ValueError(
                f"norm must be {' or '.join(map(repr, self.norms))} for method {self.name!r}; got {threat.norm!r}"
            )

    @property
    def lr_scale(self) -> float:
        """The default learning rate relative to that of PGD training on the same data set."""
        return 1.0

    @property
    def keeps(self) -> dict[str, Start]:
        """Names of the tensors in `Learner.kept`, and how each starts.

        "uniform": in the admissible ball; "corners": at -eps or +eps per value, not projected on the pixel bounds.
        """
        return {}

    @property
    def watches_inputs(self) -> bool:
        """Whether `Learner.inputs` is wanted."""
        return False

    def restarts(self, epoch: int) -> bool:
        """Whether what is kept starts afresh with this epoch (the first has number 0)."""
        every = getattr(self, "reset_every", None)
        return every is not None and epoch > 0 and epoch % every == 0

    @property
    def frame(self) -> Frame:
        """The frame of what is kept: see `PerSample`."""
        return "image"

    @property
    def spec(self) -> str:
        """The shortest text from which `methods.parse` makes this method again: name-numbers:option=value:..."""
        parts = ["-".join([self.name, *(str(getattr(self, number)) for number in self.numbers)])]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in self.numbers and value != f.default:
                parts.append(f"{f.name.replace('_', '-')}={value}")
        return ":".join(parts)


def train_on(learner: Learner, x: Tensor, y: Tensor) -> Outcome:
    """One weight update from the loss at x: a forward, an input gradient, a weight gradient."""
    logits = learner.forward(x)
    loss = learner.loss(logits, y)
    learner.backward(loss)
    learner.update()
    return Outcome(loss.detach(), logits.detach())


@torch.no_grad()
def logits_before(learner: Learner, x: Tensor, bn_mode: BNMode) -> Tensor:
    """The model's logits at x without a graph, in the attack's mode: one forward."""
    with evaluating(learner.network) if bn_mode == "eval" else nullcontext():
        return learner.predict(x)


def default_step(step_size: float | None, threat: ThreatModel, fraction: float) -> float:
    """The given step size, or `fraction` of eps."""
    return fraction * threat.eps if step_size is None else step_size
