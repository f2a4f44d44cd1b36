"""Models and arguments that are legitimate: they work, or are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fault_oracle import (
    Make,
    Net,
    Normalised,
    Standardise,
    agrees,
    batch,
    conv,
    net,
    plain_passes,
    same_model,
    trades_agrees,
)  # fmt: skip
from fault_rows import (
    AS_EXPECTED,
    EAGER,
    INDUCTOR,
    ONE_PROCESS,
    REFERENCE,
    TWO_PROCESSES,
    Row,
    Setting,
    cells,
)
from torch import Tensor, nn

from yopo_ext import trades_yopo_step, yopo_step

FIRST, MODEL = r"\bfirst_layer\b", r"\bmodel\b"
HERE = (EAGER, REFERENCE)
NOT_COMPILED = (EAGER, TWO_PROCESSES, REFERENCE)
MEAN = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)[:, None, None]
STD = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)[:, None, None]


# --- DataParallel ---


def parallel(ids: list[int]) -> Callable[[nn.Module], nn.Module]:
    """nn.DataParallel as it is on a machine with these devices."""

    def wrap(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = nn.DataParallel(model)
        wrapped.device_ids = ids
        if len(ids) == 1:  # what one device does, without the device
            wrapped.forward = lambda *inputs, **named: wrapped.module(*inputs, **named)
        return wrapped

    return wrap


# --- constants ---


def normalised(u: Tensor) -> Tensor:
    return (u - MEAN) / STD


def per(shape: str, low: float, high: float) -> Tensor:
    """A positive tensor that broadcasts to x [4, 3, 8, 7]."""
    sizes = {"[C]": (3,), "[C,1,1]": (3, 1, 1), "[1,C,1,1]": (1, 3, 1, 1), "[B,1,1,1]": (4, 1, 1, 1), "x": (4, 3, 8, 7)}
    generator = torch.Generator().manual_seed(6)
    return low + (high - low) * torch.rand(sizes[shape], generator=generator, dtype=torch.float64)


def constants(**options: Any):
    theirs = {name: v[:, None, None] for name, v in options.items() if isinstance(v, Tensor) and v.dim() == 1}
    return agrees(net(conv), ["first"], kinds=["definition"], compare=theirs, **options)


# --- normalisations that clamp ---


class Clamped(Normalised):
    """Clamps to the bounds before it normalises."""

    form = "method"

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.limit = nn.Hardtanh(0.0, 1.0)

    def forward(self, u: Tensor) -> Tensor:
        forms = {
            "method": lambda: self.norm(u.clamp(0, 1)),
            "min and max": lambda: self.norm(torch.clamp(torch.clamp(u, min=0), max=1)),
            "Hardtanh": lambda: self.norm(self.limit(u)),
            "clamp alone": lambda: u.clamp(0.0, 1.0),
        }
        return Net.forward(self, forms[self.form]())


class NormalisedAndFlattened(Normalised):
    def forward(self, u: Tensor) -> Tensor:
        return self.body(self.first(self.norm(u).flatten(1)).reshape(-1, 6, 8, 7))


class ClampedStandardise(Standardise):
    """Clamps to [0, 1] before it normalises."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u.clamp(0, 1))


def clamped(form: str) -> Make:
    return net(conv, type("Clamped", (Clamped,), {"form": form}))


def standardise(u: Tensor) -> Tensor:
    return Standardise().double()(u)


# --- fronts ---


class Front(nn.Module):
    """Rearranges the input."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, u: Tensor) -> Tensor:
        return self.what(u)


class Fronted(Net):
    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.front = type(self).made()

    @staticmethod
    def made() -> nn.Module:
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(self.front(u))


def fronted(front: Callable[[], nn.Module], first: Callable[[], nn.Module] = conv) -> Make:
    return net(first, type("Fronted", (Fronted,), {"made": staticmethod(front)}))


FRONTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "zero padding": (lambda: nn.ZeroPad2d(1), 3),
    "reflecting padding": (lambda: nn.ReflectionPad2d(2), 3),
    "permuted channels": (lambda: Front(lambda u: u[:, [2, 1, 0]]), 3),
    "repeated channel": (lambda: Front(lambda u: u.repeat(1, 3, 1, 1)), 1),
    "expanded channel": (lambda: Front(lambda u: u.expand(-1, 3, -1, -1)), 1),
    "resized": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 3),
    "normalisation": (Standardise, 3),
}
GIVEN: dict[str, Any] = {
    "names": lambda model: ["front", "first"],
    "modules": lambda model: (model.front, model.first),
    "a module and a name": lambda model: [model.front, "first"],
}


# --- whole models in half precision ---


def half(dtype: torch.dtype, first: Callable[[], nn.Module], call: Callable[..., Any]):
    """x stays fp32; the model, and the gradients, are in half precision."""

    def run(setting: Setting) -> None:
        ours, theirs = net(first)().to(dtype), net(first)().to(dtype)
        wrapped = setting.wrap(ours)
        for k in range(2):
            x, y, eta = (t.float() if t.is_floating_point() else t for t in batch(k))
            ours.zero_grad(), theirs.zero_grad()
            trades = call is trades_yopo_step
            result = call(
                wrapped,
                x,
                y,
                first_layer="first",
                outer_steps=2,
                eps=0.0,
                step_size=0.0,
                init=eta if trades else "zero",
            )
            assert result.perturbation.dtype == torch.float32
            plain_passes(theirs, x.to(dtype), y, F.cross_entropy)
            with torch.no_grad():
                theirs(x.to(dtype))  # the second pass, and the divergence's branch
            same_model(setting, ours, theirs, rtol=5e-2, atol=1e-2)
            result = call(
                wrapped, x, y, first_layer="first", outer_steps=1, eps=8 / 255, step_size=2 / 255, init=eta / 100
            )
            moved = (result.perturbation - eta / 100).abs()
            assert ((moved < 1e-6) | (moved - 2 / 255 < 3 * 2 / 255)).all()
            assert moved.max() > 0.9 * 2 / 255
            theirs.load_state_dict(ours.state_dict())

    return run


# --- fine-tuned and quantised first layers ---


class Adapted(nn.Module):
    """A frozen convolution with a trained one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = conv(), nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 6, 1, bias=False)
        self.base.requires_grad_(False)

    def forward(self, u: Tensor) -> Tensor:
        return self.base(u) + 0.5 * self.up(self.down(u))


class WeightOnly(nn.Module):
    """int8 weights that are dequantised in every forward."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(6, 3, 3, 3)
        self.register_buffer("quantised", (weight * 40).round().clamp(-128, 127).to(torch.int8))
        self.register_buffer("scale", torch.tensor(1 / 40))

    def forward(self, u: Tensor) -> Tensor:
        return F.conv2d(u, self.quantised.to(u.dtype) * self.scale)


def single(
    run_step: Callable[[nn.Module, Tensor, Tensor, Any], Any], make: Callable[[], nn.Module], rtol: float = 1e-4
):
    """A plain pass at eps = 0 in fp32, for what has no fp64."""

    def run(setting: Setting) -> None:
        ours, theirs = make(), make()
        wrapped = setting.wrap(ours)
        for k in range(2):
            x, y, _ = batch(k)
            x = x.float()
            ours.zero_grad(), theirs.zero_grad()
            run_step(wrapped, x, y, ours)
            plain_passes(theirs, x, y, F.cross_entropy)
            same_model(setting, ours, theirs, rtol=rtol, atol=1e-6)

    return run


def named(model: nn.Module, x: Tensor, y: Tensor, inner: Any) -> Any:
    return yopo_step(model, x, y, first_layer="first", outer_steps=1, eps=0.0, step_size=0.0, init="zero")


def dynamic() -> nn.Module:
    torch.manual_seed(11)
    model = Net(nn.Linear(168, 6), flat=True)
    return torch.ao.quantization.quantize_dynamic(model, {"first"}, dtype=torch.qint8)


def aware() -> nn.Module:
    """Quantisation-aware: fake quantisation of the weights, and of the output by an observer with state."""
    torch.manual_seed(11)
    model = Net(conv())
    model.first.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model.first = torch.ao.nn.qat.Conv2d.from_float(model.first)
    return model.train()


def scripted() -> nn.Module:
    torch.manual_seed(11)
    return torch.jit.script(Net(conv()).train())


def traced() -> nn.Module:
    torch.manual_seed(11)
    return torch.jit.trace(Net(conv()).train(), torch.rand(4, 3, 8, 7), check_trace=False)


def scripted_first() -> nn.Module:
    torch.manual_seed(11)
    return Net(torch.jit.script(nn.Sequential(conv(), nn.ReLU()))).train()


# --- other signatures and outputs ---


class Dictionary(Net):
    def forward(self, u: Tensor) -> Any:
        return {"logits": super().forward(u), "features": u.mean()}


class Tuple(Net):
    def forward(self, u: Tensor) -> Any:
        return super().forward(u), None


class TwoInputs(Net):
    def forward(self, pixel_values: Tensor, shift: Tensor) -> Tensor:
        return super().forward(pixel_values) + shift


SHIFT = torch.linspace(0, 1, 5, dtype=torch.float64)
FORWARDS: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]] = {
    "dict": (Dictionary, lambda model, u: model(u)["logits"]),
    "tuple": (Tuple, lambda model, u: model(u)[0]),
    "two inputs by name": (TwoInputs, lambda model, u: model(pixel_values=u, shift=SHIFT)),
}

ROWS = [
    Row("DataParallel", "no device", agrees(net(conv), ["first"], wrap=parallel([])), settings=ONE_PROCESS),
    Row("DataParallel", "one device", agrees(net(conv), ["first"], wrap=parallel([0])), settings=HERE),
    Row("DataParallel", "no device, first layer not named",
        agrees(net(conv), ["first"], first_layer=None, wrap=parallel([])), settings=HERE),
    Row("DataParallel", "first layer by its name in the wrapper",
        agrees(net(conv), ["first"], first_layer="module.first", wrap=parallel([])), settings=HERE),
    Row("DataParallel", "of a compiled model",
        agrees(net(conv), ["first"], kinds=["definition"],
               wrap=lambda model: parallel([])(torch.compile(model, backend="eager"))), settings=HERE),
    Row("DataParallel", "several devices", agrees(net(conv), ["first"], wrap=parallel([0, 1])), r"model\.module",
        settings=HERE),
    Row("DataParallel", "TRADES, no device", trades_agrees(net(conv), wrap=parallel([])), settings=ONE_PROCESS),
    Row("DataParallel", "TRADES, several devices", trades_agrees(net(conv), wrap=parallel([0, 1])), r"model\.module",
        settings=HERE),
    *(
        Row("constants that broadcast", f"mean and std {name}",
            agrees(net(conv), ["first"], prepare=normalised, given=normalised, mean=mean, std=std), settings=where)
        for name, mean, std, where in (
            ("[C,1,1]", MEAN, STD, (*ONE_PROCESS, TWO_PROCESSES, INDUCTOR)),
            ("[1,C,1,1]", MEAN[None], STD[None], (*ONE_PROCESS, TWO_PROCESSES)),
        )
    ),
    *(
        Row("constants that broadcast", f"{what} {shape}", constants(**{what: per(shape, low, high)}), settings=where)
        for what, low, high in (("eps", 0.02, 0.2), ("step_size", 0.01, 0.05))
        for shape, where in (
            ("[C]", HERE), ("[C,1,1]", ONE_PROCESS), ("[1,C,1,1]", HERE), ("[B,1,1,1]", ONE_PROCESS), ("x", HERE),
        )
    ),
    *(
        Row("constants that broadcast", f"bounds {shape}",
            constants(bounds=(-per(shape, 0, 0.1), 1 + per(shape, 0, 0.1))), settings=ONE_PROCESS)
        for shape in ("[C,1,1]", "[1,C,1,1]", "x")
    ),
    Row("constants that broadcast", "eps [B,1,1,1], autograd layer",
        agrees(net(lambda: nn.Sequential(conv(), nn.Tanh())), ["first"], kinds=["definition"],
               eps=per("[B,1,1,1]", 0.02, 0.2)), settings=HERE),
    Row("constants that broadcast", "eps of another shape (guard)", constants(eps=torch.full((2, 1, 1), 0.1)), r"\beps\b",
        settings=HERE),
    Row("constants that broadcast", "eps [B,1,1,1], L2 (guard)", constants(eps=per("[B,1,1,1]", 0.1, 0.2), norm="l2"),
        r"\beps\b", settings=HERE),
    Row("constants that broadcast", "TRADES, mean and std [C,1,1]",
        trades_agrees(net(conv), given=normalised, mean=MEAN, std=STD), settings=(*ONE_PROCESS, TWO_PROCESSES)),
    *(
        Row("a normalisation that clamps first", f"{form}{', layer not named' if name is None else ''}",
            agrees(clamped(form), ["first"], first_layer=name, prepare=(lambda u: u) if "alone" in form else standardise))
        for form in ("method", "min and max", "Hardtanh", "clamp alone")
        for name in ("first", None)
        if name or form == "method"
    ),
    *(
        Row("a normalisation before a flattening", f"first_layer={name!r}",
            agrees(net(lambda: nn.Linear(168, 336), NormalisedAndFlattened), ["first"], first_layer=name,
                   kinds=["plain", "sum", "released", "full"]), settings=HERE)
        for name in ("first", None)
    ),
    Row("a normalisation that clamps first", "in the first layer, after another one",
        agrees(net(lambda: nn.Sequential(ClampedStandardise(), conv()), Normalised), ["norm", "first"],
               first_layer="first")),
    Row("a normalisation that clamps first", "in the first layer, from a start outside the bounds",
        agrees(net(lambda: nn.Sequential(ClampedStandardise(), conv())), ["first"], start=lambda x, eta: eta + 0.04)),
    Row("a normalisation that clamps first", "TRADES", trades_agrees(clamped("method"))),
    *(
        Row("a front before the first layer", f"{name}, as {given}",
            agrees(fronted(front), ["front", "first"], first_layer=GIVEN[given], channels=channels))
        for name, (front, channels) in FRONTS.items()
        for given in GIVEN
        if given == "names" or name == "zero padding"
    ),
    Row("a front before the first layer", "padding, convolution and ReLU",
        agrees(fronted(lambda: nn.ZeroPad2d(1), lambda: nn.Sequential(conv(), nn.ReLU())), ["front", "first"])),
    Row("a front before the first layer", "padding, convolution, BatchNorm",
        agrees(fronted(lambda: nn.ZeroPad2d(1), lambda: nn.Sequential(conv(), nn.BatchNorm2d(6))), ["front", "first"])),
    Row("a front before the first layer", "TRADES",
        trades_agrees(fronted(lambda: nn.ZeroPad2d(1)), first_layer=GIVEN["names"])),
    Row("a front before the first layer", "permuted channels, only the convolution named (guard)",
        agrees(fronted(lambda: Front(lambda u: u[:, [2, 1, 0]])), ["front", "first"], first_layer="first"), FIRST, settings=HERE),
    *(
        Row("a front before the first layer", f"sequence {name}",
            agrees(fronted(lambda: nn.ZeroPad2d(1)), ["front", "first"], first_layer=sequence), FIRST, settings=HERE)
        for name, sequence in (
            ("in the wrong order", lambda model: ["first", "front"]),
            ("with a gap", lambda model: ["front", "body.2"]),
            ("that is empty", lambda model: []),
            ("with a module that is not the model's", lambda model: [nn.ZeroPad2d(1), "first"]),
        )
    ),
    *(
        Row("a model wholly in half precision", f"{str(dtype)[6:]}, {name}", half(dtype, first, call), settings=where)
        for dtype in (torch.bfloat16, torch.float16)
        for name, first, call, where in (
            ("convolution", conv, yopo_step, ONE_PROCESS),
            ("convolution, BatchNorm, ReLU", lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), yopo_step, HERE),
            ("autograd layer", lambda: nn.Sequential(conv(), nn.Tanh()), yopo_step, HERE),
            ("autograd layer with BatchNorm", lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Tanh()), yopo_step, HERE),
            ("TRADES", conv, trades_yopo_step, HERE),
        )
    ),
    Row("a fine-tuned or quantised first layer", "low rank, named", agrees(net(Adapted), ["first"])),
    Row("a fine-tuned or quantised first layer", "low rank, not named",
        agrees(net(Adapted), ["first"], first_layer=None), FIRST, or_equal=True),
    Row("a fine-tuned or quantised first layer", "int8 weights only", agrees(net(WeightOnly), ["first"])),
    Row("a fine-tuned or quantised first layer", "dynamic", single(named, dynamic), FIRST, or_equal=True,
        settings=NOT_COMPILED),
    Row("a fine-tuned or quantised first layer", "quantisation-aware", single(named, aware), FIRST, or_equal=True,
        settings=HERE),
    *(
        Row("a ScriptModule", name, single(named, make), error, or_equal=True, settings=HERE)
        for name, make, error in (
            ("scripted", scripted, MODEL), ("traced", traced, MODEL), ("as first layer", scripted_first, f"{MODEL}|{FIRST}"),
        )
    ),
    *(
        Row("forward=", name, agrees(net(conv, kind), ["first"], forward=forward))
        for name, (kind, forward) in FORWARDS.items()
    ),
    *(
        Row("forward=", f"TRADES, {name}", trades_agrees(net(conv, kind), forward=forward))
        for name, (kind, forward) in FORWARDS.items()
    ),
    Row("forward=", "not callable", agrees(net(conv), kinds=["plain"], forward="logits"), r"\bforward\b", settings=HERE),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
