"""Which arithmetic, memory layout and compilation train fastest on this machine: a few real steps with each, then a choice.

fp32 is kept unless another mode is at least 15 % faster beyond the spread of the timings, and its loss and gradients agree with
those of fp32: the loss to 5 %, the gradient of all weights to a cosine of 0.8. The cosine is not nearer to 1 because adversarial
steps go by signs, and rounding flips them where the gradient is nearly zero.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yopo_ext.training.run.progress import Progress

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

GAIN = 1.15  # how many times faster than fp32 a mode must be
LOSS_BOUND, COSINE_BOUND = 0.05, 0.8
ROUNDS = 3  # timed steps of a mode, after one that warms up
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Mode:
    """How the passes are computed."""

    precision: Precision = "32-true"
    channels_last: bool = False
    compile: bool = False

    def __str__(self) -> str:
        parts = [{"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}[self.precision]]
        return " ".join(parts + ["channels_last"] * self.channels_last + ["compiled"] * self.compile)

    @property
    def options(self) -> str:
        """The mode spelled out for the command line."""
        layout, compiled = ("--" + "no-" * (not on) for on in (self.channels_last, self.compile))
        return f"--precision {self.precision} {layout}channels-last {compiled}compile"


@dataclass(frozen=True)
class Trial:
    """What a mode did: seconds of its steps, and how far it is from the first mode tried."""

    mode: Mode
    seconds: tuple[float, ...] = ()
    loss_error: float = 0.0  # relative
    cosine: float = 1.0  # between the gradients
    failure: str | None = None  # why it cannot be run here

    @property
    def agrees(self) -> bool:
        return self.failure is None and self.loss_error <= LOSS_BOUND and self.cosine >= COSINE_BOUND

    @property
    def typical(self) -> float:
        return statistics.median(self.seconds)


Step = Callable[[], tuple[float, Tensor]]  # one training step; returns its loss and gradient, all weights in one vector


def supported_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Those that this device computes in hardware, fp32 first."""
    if device.type == "cuda":
        bf16: tuple[Precision, ...] = ("bf16-mixed",) if torch.cuda.is_bf16_supported(including_emulation=False) else ()
        return ("32-true", *bf16, "16-mixed")
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # without it bf16 is emulated, and slow
    return ("32-true", "bf16-mixed") if known() else ("32-true",)


def modes_to_try(
    device: torch.device, precision: Precision | None, channels_last: bool | None, *, convolutional: bool = True
) -> list[Mode]:
    """All combinations of what is not given; the first one is what the others are held against."""
    precisions = supported_precisions(device) if precision is None else (precision,)
    layouts = ((False, True) if convolutional else (False,)) if channels_last is None else (channels_last,)
    return [Mode(p, layout) for p, layout in itertools.product(precisions, layouts)]


def run_trials(
    steps: Sequence[tuple[Mode, Callable[[], Step]]], device: torch.device, *, shown: bool = False
) -> list[Trial]:
    """Run every mode's steps in turn, so that a machine that slows down slows all modes alike.

    Each mode comes with a function that builds its step. A mode that cannot be built or run, because there is no compiler or too
    little memory, say, is reported as failed; the first mode must run. A mode that is slower than the first in the first round is
    not timed again. With `shown` it says how far it is.
    """
    progress = Progress("rehearsal", len(steps) * (1 + ROUNDS), shown=shown, unit="step")
    if shown:
        progress.say(f"a few steps each in {', '.join(str(mode) for mode, _ in steps)}")
    with closing(progress):
        return _run_trials(steps, device, progress)


def _run_trials(
    steps: Sequence[tuple[Mode, Callable[[], Step]]], device: torch.device, progress: Progress
) -> list[Trial]:
    trials: list[Trial] = []
    ready: dict[Mode, Step] = {}
    expected: tuple[float, Tensor] | None = None
    for mode, build in steps:
        try:
            step = build()
            loss, gradient = step()
            for _ in range(5):  # a scaler of fp16's gradients starts high and comes down by halves
                if bool(gradient.isfinite().all()):
                    break
                loss, gradient = step()
        except Exception as error:
            if expected is None:
                raise
            progress.advance(1 + ROUNDS)
            trials.append(Trial(mode, failure=str(error).partition("\n")[0] or type(error).__name__))
            continue
        expected = (loss, gradient) if expected is None else expected
        size = (gradient.norm() * expected[1].norm()).clamp(min=torch.finfo(torch.float32).tiny)
        cosine = float(gradient @ expected[1] / size)
        error_of_loss = abs(loss - expected[0]) / max(abs(expected[0]), 1e-12)
        nan = float("nan")  # compares as no agreement
        trials.append(Trial(mode, loss_error=error_of_loss, cosine=cosine if loss == loss else nan))
        ready[mode] = step
        progress.advance()
    seconds: dict[Mode, list[float]] = {mode: [] for mode in ready}
    first = next(iter(ready))
    for number in range(ROUNDS):
        for mode, step in ready.items():
            progress.advance()
            if number > 0 and seconds[mode][0] > seconds[first][0]:
                continue
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            seconds[mode].append(time.perf_counter() - started)
    return [dataclasses.replace(trial, seconds=tuple(seconds.get(trial.mode, ()))) for trial in trials]


def best(trials: Sequence[Trial]) -> Trial:
    """The fastest mode that agrees with the first and is faster beyond the spread of the timings; else the first."""
    first = trials[0]
    faster = [t for t in trials[1:] if t.agrees and GAIN * max(t.seconds) <= min(first.seconds)]
    return min([*faster] or [first], key=lambda trial: trial.typical)


def report(trials: Sequence[Trial], chosen: Trial, what: str) -> list[str]:
    """Three lines: what was measured, what is chosen, and how to have it again."""
    measured = ", ".join(
        f"{t.mode} {'failed' if t.failure else f'{1e3 * t.typical:.0f} ms'}{'' if t.failure or t.agrees else ' (inexact)'}"
        for t in trials
    )
    first = trials[0]
    why = "no other is 15 % faster beyond the spread"
    if chosen is not first:
        why = (
            f"{first.typical / chosen.typical:.2f} times as fast as {first.mode}; its loss differs by "
            f"{100 * chosen.loss_error:.2g} %, the cosine between the gradients is {chosen.cosine:.3f}"
        )
    return [
        f"{what}: {measured}",
        f"chosen: {chosen.mode} ({why}); evaluation stays in fp32",
        f"the same again: {chosen.mode.options}",
    ]


def fastest_mode(
    model: nn.Module,
    step: Callable[[nn.Module, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    precision: Precision | None = None,
    channels_last: bool | None = None,
    shown: bool = True,
) -> Mode:
    """The mode in which a training step of your own is fastest here, by the rule above. Leaves no trace.

        mode = fastest_mode(model, lambda m, x, y: yopo_ext.yopo_step(m, x, y, eps=8 / 255, step_size=2 / 255).loss, x, y)

    Args:
        model: on its device, in training mode; copies of it are run.
        step: called as step(copy, x, y) under autocast; accumulates the gradients of the copy's weights and returns the loss. It
            must not update weights. For "16-mixed", which is tried only where it is given, it scales its loss itself.
        x: [B, C, H, W], y: one batch on the model's device.
        precision, channels_last: what is not to be chosen.
        shown: print the three lines of `report` on standard output.

    Returns:
        The mode. `torch.autocast(device, dtype)` and `model.to(memory_format=torch.channels_last)` are for the caller.
    """
    device = x.device
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    modes = modes_to_try(device, precision, channels_last, convolutional=convolutional)
    if precision is None:
        modes = [mode for mode in modes if mode.precision != "16-mixed"]

    def build(mode: Mode) -> Step:
        layout: Any = torch.channels_last if mode.channels_last else torch.contiguous_format
        copied: Any = copy.deepcopy(model)
        copied, pixels = copied.to(memory_format=layout), x.contiguous(memory_format=layout)

        def run() -> tuple[float, Tensor]:
            copied.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            dtype = DTYPES.get(mode.precision)
            with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
                loss = step(copied, pixels, y)
            return float(loss), _flat([p.grad for p in copied.parameters()])

        return run

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trials = run_trials([(mode, partial(build, mode)) for mode in modes], device, shown=shown)
    chosen = best(trials)
    if shown:
        print("\n".join(report(trials, chosen, f"steps of {len(x)} images")), flush=True)
    return chosen.mode


def _flat(gradients: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([g.detach().float().flatten() for g in gradients if g is not None])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
