"""One training step of YOPO (`yopo_step`) and of TRADES with a YOPO adversary (`trades_yopo_step`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .compilation import not_traced
from .first_layer.full_pass import Gradients
from .model_state import evaluating, frozen_parameters, unsynchronised
from .problem import Forward, LossFunction, Problem
from .threat import ThreatModel
from .validation import Constants


class StepResult(NamedTuple):
    """What a step computed; everything detached, nothing read back from the device.

    Attributes:
        loss: scalar, of the last pass (`trades_yopo_step`: of the update), not divided by the number of passes.
        losses: [outer_steps], the loss that each pass met, in order (`trades_yopo_step`: the divergence).
        logits: the model's output in the last pass (`trades_yopo_step`: at the perturbed input of the update).
        perturbation: [B, C, H, W], eta after the last inner step, in the units of x.
    """

    loss: Tensor
    losses: Tensor
    logits: Any
    perturbation: Tensor


@not_traced  # in a compiled function a graph break; a model that is compiled itself stays so inside a step
def yopo_step(
    model: nn.Module,
    x: Tensor,
    y: Any,
    *,
    first_layer: nn.Module | str | Sequence[nn.Module | str] | None = None,
    loss_fn: LossFunction = F.cross_entropy,
    outer_steps: int = 5,
    inner_steps: int = 3,
    eps: Constants = 8 / 255,
    step_size: Constants = 2 / 255,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0),
    mean: Constants | None = None,
    std: Constants | None = None,
    gradient: Literal["paper", "released", "full"] = "paper",
    reduction: Literal["mean", "sum"] | None = None,
    train_on: Literal["all", "last"] = "all",
    init: Literal["uniform", "zero"] | Tensor = "uniform",
    forward: Forward | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    after_pass: Callable[[int], Any] | None = None,
    generator: torch.Generator | None = None,
    on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
    validate: bool | None = None,
) -> StepResult:
    """Accumulate into `.grad` the gradients of one YOPO-m-n step (Zhang et al., NeurIPS 2019).

    Each of the m = `outer_steps` full passes, at the perturbed input x + eta, gives the gradients of the layers above
    the first and the costate p = dL/d(first-layer output); with p fixed, n = `inner_steps` projected gradient steps on
    <p, first_layer(x + eta)> move eta. The model runs in the modes it is in, once per pass (BatchNorm statistics move m
    times). Nothing is zeroed and no optimizer is stepped; the cost is 3m units (forward = input gradient = weight
    gradient = 1), 2m + 1 with `train_on="last"`. Before the first pass through a model, and when its modules, modes or the
    kind of x change, one eager forward on at most two synthetic images finds the first layer; it leaves the model,
    `.grad` and random states as they are (not restored: contents of mutable attributes, and what hooks do elsewhere).

    Args:
        model: called as `model(u)`, u = x + eta, or (u - mean) / std if those are given, in the dtype of a model in half
            precision. May be wrapped in torch.compile, DistributedDataParallel, fully_shard or Lightning Fabric (then give
            `backward=fabric.backward`). Its output must depend on the input through the first layer only.
        x: images [B, C, H, W], float32 or float64, within `bounds`.
        y: passed on to `loss_fn`; for cross-entropy int64 labels [B].
        first_layer: a submodule or its dotted name: a convolution, a Sequential of [normalisation,] convolution
            [, BatchNorm2d] [, activation], or any other module (through autograd, slower, said once). A sequence of
            modules or names: modules that run one after the other from the input. None: the one that a timm model
            declares, or else the first Conv2d or Linear that is executed on the input. Constants by which the model
            normalises its input before that layer are found, and found anew when they change.
        loss_fn: `loss_fn(model output, y)` -> scalar, to be lowered by the weights and raised by eta.
        outer_steps, inner_steps: m >= 1, n >= 1.
        eps, step_size: radius of the ball and length of an inner step, >= 0, in the units of x; numbers, one per channel
            ([C] or [C, 1, 1]), or tensors that broadcast to x (L2: numbers).
        norm: "linf" or "l2".
        bounds: (lo, hi) of a pixel, as eps; None: unbounded.
        mean, std: input normalisation, numbers or one per channel, std > 0.
        gradient: which gradient pass j adds to `.grad`. "full": the ordinary gradient at x + eta_j, for all layers.
            "paper": the same above the first layer; in the first layer the gradient of <p_j, first_layer(x + eta_{j+1})>,
            that is, at the perturbation the inner steps arrived at. "released": as the authors' code, the sum of both in
            the first layer; its random start is not projected on `bounds`, and where it leaves them the first
            inner step does not move it.
        reduction: "mean" or "sum" over the passes that train; None: "mean", for "released" "sum". Losses are
            reported undivided.
        train_on: "last" computes no weight gradient in the passes before the last.
        init: eta_0: "uniform" in the ball, projected; "zero"; or a tensor like x, taken as it is.
        forward: called as `forward(model, u)` instead of `model(u)`: for other signatures, several inputs, or outputs that
            hold the logits. The inspection calls it with the unwrapped model.
        backward: called instead of `loss.backward()`, for instance `lambda loss: scaler.scale(loss).backward()`.
        after_pass: called with j when the gradients of pass j are complete and reduced over processes, if it trains;
            it may step and zero an optimizer (gradients are divided by m all the same, unless `reduction="sum"`).
        generator: for the random start, on x's device.
        on_nonfinite: a loss that is not finite: "ignore" (never looks), "skip" (`.grad` and buffers as before the
            step, or the last `after_pass`), "raise" (the same, then FloatingPointError). The latter two read one
            flag back from the device.
        validate: whether to check values of x and y; None: on CPU always, on CUDA in the first call for a model.

    Returns:
        StepResult.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed; before any `.grad` or buffer
            changes. What a pass shows only later (another way from the input to the output that is new, on an accelerator one
            step late) is raised after it: gradients that were None are None again, others the message calls unusable.
        FloatingPointError: see `on_nonfinite`.
    """
    validation.choice("gradient", gradient, ("paper", "released", "full"))
    validation.choice("train_on", train_on, ("all", "last"))
    if reduction is not None:
        validation.choice("reduction", reduction, ("mean", "sum"))
    one_update = after_pass is None  # else every pass is an update of its own, and a mean would divide its step
    mean_over_passes = reduction == "mean" or (reduction is None and gradient != "released" and one_update)
    with torch.inference_mode(False), torch.enable_grad():
        problem = Problem(
            model=model, x=x, y=y, first_layer=first_layer, loss_fn=loss_fn, outer_steps=outer_steps,
            inner_steps=inner_steps, threat=ThreatModel(eps, step_size, norm, bounds), mean=mean, std=std, forward=forward,
            backward=backward, after_pass=after_pass, generator=generator, on_nonfinite=on_nonfinite, validate=validate,
            mask_start=gradient == "released",
        )  # fmt: skip
        eta = problem.start(init, project=gradient != "released")
        problem.begin()
        if train_on == "all":
            problem.warn_of_optimizers_in_hooks()
        scale = 1.0 / outer_steps if mean_over_passes and train_on == "all" else 1.0
        gradients = Gradients(before=gradient != "paper", after=gradient != "full")
        losses: list[Tensor] = []
        for j in range(outer_steps):
            last = j == outer_steps - 1
            if train_on == "all" or last:
                synchronise = last or after_pass is not None
                eta, loss, output = problem.full_pass(
                    eta, problem.objective, gradients, scale=scale, synchronise=synchronise
                )
            else:
                with frozen_parameters(problem.model), frozen_parameters(problem.trained_loss):
                    eta, loss, output = problem.full_pass(eta, problem.objective, NO_GRADIENTS, synchronise=False)
            losses.append(loss)
            if last or (after_pass is not None and train_on == "all"):
                if not problem.guard.accepts(losses):
                    break
                if after_pass is not None:
                    after_pass(j)
                    if not last:
                        problem.guard.remember()
        losses += [torch.full_like(losses[0], math.nan)] * (outer_steps - len(losses))
        return StepResult(loss, torch.stack(losses), output, eta)


@not_traced
def trades_yopo_step(
    model: nn.Module,
    x: Tensor,
    y: Any,
    *,
    beta: float = 6.0,
    first_layer: nn.Module | str | Sequence[nn.Module | str] | None = None,
    loss_fn: LossFunction = F.cross_entropy,
    outer_steps: int = 5,
    inner_steps: int = 3,
    eps: Constants = 8 / 255,
    step_size: Constants = 2 / 255,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[Constants, Constants] | None = (0.0, 1.0),
    mean: Constants | None = None,
    std: Constants | None = None,
    bn_mode: Literal["eval", "train"] = "eval",
    init: Literal["normal"] | Tensor = "normal",
    forward: Forward | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    generator: torch.Generator | None = None,
    on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
    validate: bool | None = None,
) -> StepResult:
    """Accumulate into `.grad` the gradient of one TRADES update whose adversary is YOPO-m-n.

    m = `outer_steps` passes without weight gradients raise KL(f(x) || f(x + eta)), the clean logits computed once and
    held; each is followed by n = `inner_steps` steps in the first layer. Then one update of

        loss_fn(f(x), y) + beta * KL(f(x) || f(x + eta)) / B

    with gradients through both branches. Costs 1 + 2m + 6 units.

    Args:
        beta: weight of the divergence, >= 0.
        bn_mode: "eval" runs the adversary's passes in evaluation mode; "train" in the modes the model is in.
        init: eta_0: "normal" is 0.001 * N(0, 1), projected; or a tensor like x, but not zero, where the divergence
            has no gradient.
        The others as in `yopo_step`. The model must return logits [B, classes].

    Returns:
        StepResult: loss and logits (at x + eta) of the update; losses are the divergences that the m passes met.

    Raises:
        As `yopo_step`.
    """
    validation.choice("bn_mode", bn_mode, ("eval", "train"))
    validation.number("beta", beta, 0.0)
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as attack:
        problem = Problem(
            model=model, x=x, y=y, first_layer=first_layer, loss_fn=loss_fn, outer_steps=outer_steps,
            inner_steps=inner_steps, threat=ThreatModel(eps, step_size, norm, bounds), mean=mean, std=std, forward=forward,
            backward=backward, after_pass=None, generator=generator, on_nonfinite=on_nonfinite, validate=validate,
        )  # fmt: skip
        model = problem.model
        if bn_mode == "eval":
            attack.enter_context(evaluating(model))
        problem.begin()
        eta = problem.small_start(init, 1e-3)
        attack.enter_context(frozen_parameters(model))
        full_pass = problem.full_pass
        losses: list[Tensor] = []
        with torch.no_grad(), unsynchronised(model):
            clean = _logits(full_pass.output(0.0)).log_softmax(1)
        for _ in range(outer_steps):
            eta, loss, _ = full_pass(
                eta, lambda output: _divergence(_logits(output), clean), NO_GRADIENTS, scale=float(max(len(x), 1)),
                synchronise=False,
            )  # fmt: skip
            losses.append(loss)
        attack.close()
        with unsynchronised(model):  # which also keeps the second forward from overwriting buffers of the first
            clean_output = full_pass.output(0.0)
        logits = _logits(full_pass.output(eta))
        divergence = _divergence(logits, _logits(clean_output).log_softmax(1))
        loss = loss_fn(clean_output, problem.y) + beta * divergence
        full_pass.descend(loss)
        problem.guard.accepts([*losses, loss.detach()])
        return StepResult(loss.detach(), torch.stack(losses), logits.detach(), eta)


NO_GRADIENTS = Gradients(before=False, after=False)


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model must return logits [B, classes]; got {got}")
    return output if output.dtype == torch.float64 else output.float()


def _divergence(logits: Tensor, log_reference: Tensor) -> Tensor:
    """KL(reference || softmax(logits)) / B; with log targets, whose gradient is finite where a probability is zero."""
    return F.kl_div(logits.log_softmax(1), log_reference, reduction="batchmean", log_target=True)
