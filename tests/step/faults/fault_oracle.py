"""Steps on any model beside plain autograd in fp64: by the invariant at eps = 0, and by the definition.

The models are made twice from the same seed, so that nothing has to be copied.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fault_rows import COMPILED, INDUCTOR, ORACLE, REFERENCE, TWO_PROCESSES, Setting, seed
from torch import Tensor, nn

from yopo_ext import trades_yopo_step, yopo_step

EPS, SIGMA = 0.1, 0.03
CLASSES = 5
Make = Callable[[], nn.Module]
Forward = Callable[[nn.Module, Tensor], Any]
LossFunction = Callable[[Any, Any], Tensor]


def batch(k: int = 0, rank: int = 0, size: int = 4, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th batch of a process: (x with saturated pixels, y, an admissible eta_0)."""
    generator = torch.Generator().manual_seed(100 * rank + k)
    x = torch.rand(size, channels, 8, 7, generator=generator, dtype=torch.float64)
    x[0, :, :3], x[1, :, :3] = 0, 1
    y = torch.randint(0, CLASSES, (size,), generator=generator)
    eta = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1) * EPS
    return x, y, torch.clamp(x + eta, 0, 1) - x


class Net(nn.Module):
    """`first` gives 6 channels (with flat: takes flattened images and gives 6 features)."""

    def __init__(self, first: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.first, self.flat = first, flat
        if flat:
            self.body = nn.Sequential(nn.Tanh(), nn.Linear(6, CLASSES))
        else:
            self.body = nn.Sequential(
                nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                nn.Linear(16, CLASSES),
            )  # fmt: skip

    def forward(self, u: Tensor) -> Tensor:
        return self.body(self.first(u.flatten(1) if self.flat else u))


def net(first: Callable[[], nn.Module], kind: Callable[[nn.Module], nn.Module] = Net) -> Make:
    """Makes the same model every time."""

    def make() -> nn.Module:
        seed(11)
        model = kind(first()).double()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        return model.train()

    return make


class Standardise(nn.Module):
    """(u - mean) / std with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]))

    def forward(self, u: Tensor) -> Tensor:
        return (u - self.mean[:, None, None]) / self.std[:, None, None]


class Normalised(Net):
    """A network that normalises its input itself."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.norm = Standardise()

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(self.norm(u))


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 6, 3)


def call(model: nn.Module, u: Tensor) -> Any:
    return model(u)


def same(name: str, mine: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """AssertionError with the name where two tensors (or None) differ."""
    if mine is None or expected is None:
        assert mine is expected, f"{name} is {mine}, expected {expected}"
        return
    torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def same_model(
    setting: Setting, mine: nn.Module, theirs: nn.Module, *, factors: dict[str, float] | None = None,
    buffers: bool = True, rtol: float = 1e-9, atol: float = 1e-11,
) -> None:  # fmt: skip
    """Both have the same gradients (theirs averaged over processes, times `factors`) and buffers."""
    names = [name for name, _ in theirs.named_parameters()]
    expected = setting.average([p.grad for p in theirs.parameters()])
    ours = dict(mine.named_parameters())
    with setting.together():
        for name, gradient in zip(names, expected, strict=True):
            factor = (factors or {}).get(name, 1.0)
            same(f"{name}.grad", ours[name].grad, None if gradient is None else factor * gradient, rtol, atol)
        if buffers and setting.rank == 0:  # DistributedDataParallel sends the buffers of rank 0 to the others
            same_buffers(mine, theirs, rtol, atol)


def same_buffers(mine: nn.Module, theirs: nn.Module, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    ours, expected = dict(mine.named_buffers()), dict(theirs.named_buffers())
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        same(name, ours[name], value, rtol, atol)


@contextmanager
def untouched(model: nn.Module, buffers: bool = True) -> Iterator[None]:
    """AssertionError if the block raises and leaves gradients, modes or (unless told otherwise) buffers changed."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    kept = {name: b.clone() for name, b in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        said = f" (after {type(error).__name__}: {' '.join(str(error).split())[:150]})"
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            same(f"{name}.grad{said}", p.grad, gradient, 0, 0)
        assert [module.training for module in model.modules()] == modes, f"modes{said}"
        assert [p.requires_grad for p in model.parameters()] == wants, f"requires_grad{said}"
        if buffers:
            now = dict(model.named_buffers())
            assert now.keys() == kept.keys(), f"buffers {now.keys() ^ kept.keys()}{said}"
            for name, value in kept.items():
                same(f"{name}{said}", now[name], value, 0, 0)
        raise


def plain_passes(
    model: nn.Module, x: Tensor, y: Any, loss_fn: LossFunction, m: int = 1, forward: Forward = call,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Tensor:  # fmt: skip
    """m ordinary training passes without an adversary: gradients add up."""
    for _ in range(m):
        loss = loss_fn(forward(model, x), y)
        backward(loss)
    return loss.detach()


def _random_state() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


class _Chain:
    """The first layer: modules that run one after the other on prepare(u), as they were when this was made."""

    def __init__(self, parts: Sequence[nn.Module], prepare: Callable[[Tensor], Tensor], state: Any) -> None:
        self.parts, self.prepare, self.state = copy.deepcopy(list(parts)), prepare, state

    def __call__(self, u: Tensor, parts: Sequence[nn.Module] | None = None) -> Tensor:
        """Always from the state at the start; through `parts` if the caller wants to see their parameters."""
        outside = _random_state()
        _set_random_state(self.state)
        z = self.prepare(u)
        for part in copy.deepcopy(self.parts) if parts is None else parts:
            z = part(z)
        _set_random_state(outside)
        return z

    def freeze(self, u: Tensor) -> None:
        """Give every BatchNorm the biased statistics that it has on u, in each of its calls."""

        def frozen(bn: Any, statistics: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
            calls = itertools.cycle(statistics)

            def forward(z: Tensor) -> Tensor:
                variance, mean = next(calls)
                return F.batch_norm(z, mean, variance, bn.weight, bn.bias, False, 0.0, bn.eps)

            return forward

        found: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        handles = []
        for module in nn.ModuleList(self.parts).modules():
            own = "forward" not in vars(module)
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and own
                and (module.training or module.running_mean is None)
            ):

                def keep(bn: Any, inputs: tuple[Tensor]) -> None:
                    z = inputs[0].detach()
                    dims = [d for d in range(z.dim()) if d != 1]
                    found.setdefault(bn, []).append(torch.var_mean(z, dims, correction=0))

                handles.append(module.register_forward_pre_hook(keep))
        if handles:
            with torch.no_grad():
                self(u, self.parts)
        for handle in handles:
            handle.remove()
        for bn, statistics in found.items():
            bn.forward = frozen(bn, statistics)


def definition(
    model: nn.Module, layers: Sequence[str], x: Tensor, y: Any, eta: Tensor, *, m: int = 2, n: int = 2,
    eps: float | Tensor = EPS, step_size: float | Tensor = SIGMA, bounds: tuple[Any, Any] = (0.0, 1.0),
    norm: str = "linf", gradient: str = "paper", reduction: str = "mean",
    prepare: Callable[[Tensor], Tensor] = lambda u: u, given: Callable[[Tensor], Tensor] = lambda u: u,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy, forward: Forward = call,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """DESIGN section 2, with autograd; accumulates `.grad`, returns (eta_m, losses).

    `layers` are the modules of the first layer in their order, `prepare` is what happens to x + eta before them,
    `given` what the caller does to x + eta before the model.
    """
    lo, hi = bounds
    lower, upper = torch.clamp(lo - x, max=0), torch.clamp(hi - x, min=0)
    scale = 1 / m if reduction == "mean" else 1.0
    losses = []
    for _ in range(m):
        parts = [model.get_submodule(name) for name in layers]
        recorded: dict[str, Any] = {}

        def begin(module: nn.Module, inputs: Any, recorded: dict[str, Any] = recorded, parts: Any = parts) -> None:
            if "chain" not in recorded:
                recorded["chain"] = _Chain(parts, prepare, _random_state())

        def end(module: nn.Module, inputs: Any, output: Tensor, recorded: dict[str, Any] = recorded) -> Tensor | None:
            if "leaf" in recorded:
                return None
            recorded["hidden"], recorded["leaf"] = output, output.detach().requires_grad_()
            return recorded["leaf"] * 1.0

        # Read before the hooks are there: their copies must not hold them.
        state_before = copy.deepcopy(parts)
        first, last = parts[0].register_forward_pre_hook(begin), parts[-1].register_forward_hook(end)
        output = forward(model, given(x + eta))
        first.remove(), last.remove()
        chain: _Chain = recorded["chain"]
        chain.parts = state_before
        loss = loss_fn(output, y)
        (scale * loss).backward()
        p, losses = recorded["leaf"].grad, [*losses, loss.detach()]
        if gradient in ("full", "released") and recorded["hidden"].requires_grad:
            recorded["hidden"].backward(p, retain_graph=True)
        still = copy.deepcopy(chain)
        still.freeze(x + eta)
        for i in range(n):
            inside = torch.clamp(x + eta, lo, hi) if gradient == "released" else x + eta
            u = inside.detach().requires_grad_()
            (g,) = torch.autograd.grad(still(u), u, p)
            if gradient == "released" and i == 0:
                g = torch.where((eta < lower) | (eta > upper), 0.0, g)
            eta = ascend(eta, g, eps, step_size, norm)
            eta = torch.minimum(torch.maximum(eta, lower), upper)
        if gradient in ("paper", "released"):
            copied = copy.deepcopy(chain.parts)
            after = chain(x + eta, copied)
            theirs = [q for q in nn.ModuleList(copied).parameters() if q.requires_grad]
            mine = [q for q in nn.ModuleList(parts).parameters() if q.requires_grad]
            found = torch.autograd.grad(after, theirs, p, allow_unused=True) if theirs else ()
            for parameter, g in zip(mine, found, strict=True):
                if g is not None:
                    parameter.grad = g if parameter.grad is None else parameter.grad + g
    return eta, losses


def ascend(eta: Tensor, g: Tensor, eps: float | Tensor, step_size: float | Tensor, norm: str) -> Tensor:
    """One step, projected on the ball."""
    if norm == "linf":
        radius = torch.as_tensor(eps, dtype=eta.dtype)
        return torch.minimum(torch.maximum(eta + step_size * g.sign(), -radius), radius)
    length = g.flatten(1).norm(dim=1)[:, None, None, None]
    eta = eta + step_size * torch.where(length > 0, g / length, 0.0)
    length = eta.flatten(1).norm(dim=1)[:, None, None, None]
    return eta * torch.clamp(eps / length, max=1.0)


def agrees(
    make: Make, layers: Sequence[str] = (), *, first_layer: Any = "as layers",
    change: Callable[[nn.Module, int], Any] = lambda model, k: None, steps: int = 2, refused_from: int = 0,
    kinds: Sequence[str] | None = None, loss: Callable[[Any], LossFunction] = lambda model: F.cross_entropy,
    images: Callable[[Tensor, int], Tensor] = lambda x, k: x, prepare: Callable[[Tensor], Tensor] = lambda u: u,
    given: Callable[[Tensor], Tensor] = lambda u: u, forward: Forward = call, channels: int = 3,
    rtol: float = 1e-9, atol: float = 1e-11, compare: dict[str, Any] | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model, buffers_on_error: bool = True,
    plain_input: Callable[[Tensor], Tensor] = lambda x: x, plain_backward: Callable[[Tensor], Any] = Tensor.backward,
    distributed: dict[str, Any] | None = None,
    start: Callable[[Tensor, Tensor], Tensor] = lambda x, eta: torch.clamp(x + eta, 0, 1) - x, **options: Any,
) -> Callable[[Setting], None]:  # fmt: skip
    """A row's `run`: `steps` steps on a model and on its twin, compared after each.

    layers: the modules of the first layer, for kinds "released" and "definition"; none: those kinds are left out.
    change: applied to both models before step k. loss: makes the loss function of a model. images: makes x of step k.
    refused_from: the first step in which an error is no fault.
    kinds: "plain" (eps = 0, one pass), "sum" (eps = 0, two passes), "released" (eps = 0, the first layer's gradient
    twice), "full" (eps = 0) and "definition" (two passes of two inner steps at eps > 0).
    In the setting ORACLE the definition at eps = 0 is compared with plain passes.
    options: given to yopo_step. compare: what the definition gets besides.
    """

    def run(setting: Setting) -> None:
        if setting.name == ORACLE:
            itself()
            return
        wanted = kinds or (("plain", "sum", "released", "full", "definition") if layers else ("plain", "sum", "full"))
        if setting.name in (COMPILED, INDUCTOR, TWO_PROCESSES):
            wanted = wanted[:1] if kinds else ["definition" if layers else "sum"]
        elif setting.name == REFERENCE and not kinds:
            wanted = ["released", "definition"] if layers else ["sum"]
        for kind in wanted:
            one(setting, kind)

    def itself() -> None:
        theirs, plain = make(), make()
        for k in range(steps if layers else 0):
            change(theirs, k), change(plain, k)
            x, y, _ = batch(k, channels=channels)
            x = images(x, k)
            theirs.zero_grad(), plain.zero_grad()
            seed(17 + k)
            definition(
                theirs, layers, x, y, 0 * x, m=1, eps=0.0, step_size=0.0, prepare=prepare, given=given,
                loss_fn=loss(theirs), forward=forward,
            )  # fmt: skip
            seed(17 + k)
            plain_passes(plain, given(x), y, loss(plain), 1, forward)
            same_model(Setting(ORACLE), theirs, plain, rtol=rtol, atol=atol)

    def one(setting: Setting, kind: str) -> None:
        ours, theirs = make(), make()
        wrapped = setting.wrap(wrap(ours), **(distributed or {}))
        loss_ours, loss_theirs = loss(ours), loss(theirs)
        named = first_layer
        if isinstance(first_layer, str) and first_layer == "as layers":
            named = None if not layers else layers[0] if len(layers) == 1 else list(layers)
        elif callable(first_layer) and not isinstance(first_layer, nn.Module):
            named = first_layer(ours)
        for k in range(steps):
            change(ours, k), change(theirs, k)
            x, y, eta = batch(k, setting.rank, channels=channels)
            x = images(x, k)
            ours.zero_grad(), theirs.zero_grad()
            how = {"plain": {"outer_steps": 1}, "sum": {"outer_steps": 2, "reduction": "sum"},
                   "released": {"outer_steps": 1, "gradient": "released"},
                   "full": {"outer_steps": 1, "gradient": "full"}, "definition": {"outer_steps": 2}}[kind]  # fmt: skip
            if kind == "definition":
                eta = start(x, eta)
                size = {"eps": EPS, "step_size": SIGMA, "init": eta}
            else:
                size = {"eps": 0.0, "step_size": 0.0, "init": "zero"}
            if forward is not call:
                how["forward"] = forward
            seed(17 + k)
            try:
                with untouched(ours, buffers_on_error and setting.rank == 0):
                    result = yopo_step(
                        wrapped, x, y, first_layer=named, loss_fn=loss_ours, inner_steps=2, **(size | how | options)
                    )
            except Exception as error:
                if k < refused_from:
                    raise AssertionError(f"{kind}, step {k} raised {type(error).__name__}: {error}") from error
                raise
            seed(17 + k)
            here = f"{kind}, step {k}: "
            settings = {
                name: options[name] for name in ("eps", "step_size", "bounds", "norm", "gradient") if name in options
            }
            if kind == "definition":
                eta, losses = definition(
                    theirs, layers, x, y, eta, prepare=prepare, given=given, loss_fn=loss_theirs, forward=forward,
                    **(settings | (compare or {})),
                )  # fmt: skip
            else:
                losses = [
                    plain_passes(
                        theirs, plain_input(given(x)), y, loss_theirs, how["outer_steps"], forward, plain_backward
                    )
                ]
            with setting.together():
                same(f"{here}loss", result.loss, losses[-1].to(result.loss.dtype), rtol, atol)
                if kind == "definition":
                    same(f"{here}losses", result.losses, torch.stack(losses).to(result.losses.dtype), rtol, atol)
                    same(f"{here}perturbation", result.perturbation, eta, 0, 1e-12 if rtol < 1e-6 else atol)
            factors = {}
            if kind == "released":
                mine = {id(p) for name in layers for p in theirs.get_submodule(name).parameters()}
                factors = {name: 2.0 for name, p in theirs.named_parameters() if id(p) in mine}
            try:
                same_model(setting, ours, theirs, factors=factors, rtol=rtol, atol=atol)
            except AssertionError as error:
                raise AssertionError(f"{here}{error}") from None

    run.by_definition = bool(layers) and (kinds is None or "definition" in kinds)  # type: ignore[attr-defined]
    return run


def trades_agrees(
    make: Make, *, first_layer: Any = "first", change: Callable[[nn.Module, int], Any] = lambda model, k: None,
    steps: int = 2, refused_from: int = 0, loss: Callable[[Any], LossFunction] = lambda model: F.cross_entropy,
    images: Callable[[Tensor, int], Tensor] = lambda x, k: x, given: Callable[[Tensor], Tensor] = lambda u: u,
    forward: Forward = call, channels: int = 3, wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    buffers_on_error: bool = True, **options: Any,
) -> Callable[[Setting], None]:  # fmt: skip
    """A row's `run` for trades_yopo_step: at eps = 0 its divergence has no gradient, what is left is a plain pass."""

    def run(setting: Setting) -> None:
        ours, theirs = make(), make()
        wrapped, loss_ours, loss_theirs = setting.wrap(wrap(ours)), loss(ours), loss(theirs)
        named = first_layer(ours) if callable(first_layer) and not isinstance(first_layer, nn.Module) else first_layer
        for k in range(steps):
            change(ours, k), change(theirs, k)
            x, y, eta = batch(k, setting.rank, channels=channels)
            x = images(x, k)
            ours.zero_grad(), theirs.zero_grad()
            how = {} if forward is call else {"forward": forward}
            size = {"eps": 0.0, "step_size": 0.0, "init": eta, "outer_steps": 2, "inner_steps": 2}
            try:
                with untouched(ours, buffers_on_error and setting.rank == 0):
                    result = trades_yopo_step(
                        wrapped, x, y, first_layer=named, loss_fn=loss_ours, **(size | how | options)
                    )
            except Exception as error:
                if k < refused_from:
                    raise AssertionError(f"step {k} raised {type(error).__name__}: {error}") from error
                raise
            value = plain_passes(theirs, given(x), y, loss_theirs, 1, forward)
            with torch.no_grad():
                forward(theirs, given(x))  # the branch of the divergence, at the same images
            with setting.together():
                same(f"step {k}: loss", result.loss, value)
            same_model(setting, ours, theirs)

    return run
