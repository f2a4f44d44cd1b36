"""Whether the first-layer operation ever loses to what a PyTorch user can write, over many geometries.

    yopo_ext    the operation, by the route that its costs choose (`yopo_ext.explain`)
    collapsed   the best composition in PyTorch, in its faster layout;  eager: the iterated definition

`ratio` is the faster composition's time over the operation's, round by round: its median and quartiles. A row fails if
even its upper quartile is below 0.95. `--drawn N` adds N geometries drawn with a fixed seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import first_layer
import measure
import torch
from first_layer import Case, Inputs

import yopo_ext
from yopo_ext.kernels import dispatch, ops

LEAST, SEED = 0.95, 2019
BF16, LAST = torch.bfloat16, torch.channels_last
CIFAR = {"batch": 64, "channels": 3, "size": 32, "kernels": 64}
MNIST = {"batch": 64, "channels": 1, "size": 28, "kernels": 32, "padding": 0}
LARGE = {"batch": 2, "channels": 3, "size": 224}


def named(changes: dict[str, Any], **base: Any) -> Case:
    """A case whose name is what it changes."""
    words = ", ".join(f"{k} {str(v).removeprefix('torch.')}" for k, v in changes.items())
    return Case(name=words or "as it is", **{**base, **changes})


def cases() -> list[Case]:
    """Kernels from 1 to the image's size, strides, groups, dilation, norms, channels, sizes, batches, dtypes, layouts."""
    kernels = [{"kernel": k, "padding": k // 2} for k in (1, 2, 5, 7, 9, 11, 15)]
    wide = [{"kernel": k, "padding": 0} for k in (16, 24, 31, 32)]
    strides = [
        {"stride": 2},
        {"stride": 3},
        {"kernel": 4, "stride": 4, "padding": 0},
        {"kernel": 1, "stride": 2, "padding": 0},
    ]
    patches = [{"kernel": k, "stride": k, "padding": 0} for k in (2, 8, 16, 32)]
    shapes: list[dict[str, Any]] = [
        {"kernels": 10}, {"kernels": 16}, {"kernels": 1}, {"kernels": 512, "batch": 8}, {"channels": 1},
        {"channels": 16}, {"channels": 64, "batch": 8}, {"groups": 3, "kernels": 63},
        {"channels": 32, "groups": 32, "kernels": 32}, {"dilation": 2, "padding": 2}, {"dilation": 3, "padding": 0},
    ]  # fmt: skip
    others: list[dict[str, Any]] = [
        {"norm": "l2"}, {"norm": "l2", "activation": "relu"}, {"activation": "relu"}, {"activation": "silu"},
        {"steps": 10}, {"steps": 1, "full": False}, {"batch": 1}, {"batch": 512}, {"dtype": BF16},
        {"dtype": BF16, "layout": LAST}, {"layout": LAST}, {"activation": "relu", "dtype": BF16, "layout": LAST},
    ]  # fmt: skip
    rows = [named(c, **CIFAR) for c in ({}, *kernels, *wide, *strides, *patches, *shapes, *others)]
    mnist: list[dict[str, Any]] = [
        {},
        {"kernel": 5},
        {"kernel": 28},
        {"kernel": 28, "activation": "relu"},
        {"kernel": 14, "stride": 7},
    ]
    digits: list[dict[str, Any]] = [
        {},
        {"kernel": 8, "padding": 0},
        {"kernel": 8, "padding": 0, "activation": "relu"},
        {"batch": 4},
    ]
    large: list[dict[str, Any]] = [
        {"kernels": 64, "kernel": 7, "stride": 2, "padding": 3}, {"kernels": 768, "kernel": 16, "stride": 16, "padding": 0},
        {"kernels": 96, "kernel": 4, "stride": 4, "padding": 0}, {"kernels": 32, "stride": 2, "activation": "silu"},
        {"kernels": 64}, {"kernels": 128, "kernel": 32, "stride": 32, "padding": 0},
    ]  # fmt: skip
    rows += [named(c, **MNIST) for c in mnist]
    rows += [named(c, batch=64, channels=1, size=8, kernels=16) for c in digits]
    return rows + [named(c, **LARGE) for c in large]


def drawn(count: int, seed: int = SEED) -> list[Case]:
    """Geometries that nobody chose."""
    random_ = random.Random(seed)
    rows: list[Case] = []
    while len(rows) < count:
        size = random_.choice([8, 12, 16, 20, 28, 32, 48, 64, 96])
        kernel = random_.randint(1, min(size, 12)) if random_.random() < 0.8 else random_.randint(1, size)
        groups = random_.choice([1, 1, 1, 1, 3])
        case = Case(
            name=f"drawn {len(rows)}", batch=random_.choice([1, 2, 8, 32, 128]), channels=groups * random_.randint(1, 6),
            kernels=groups * random_.randint(1, 48), size=size, kernel=kernel, stride=random_.randint(1, 4),
            padding=random_.randint(0, kernel // 2), dilation=random_.choice([1, 1, 1, 2]), groups=groups,
            steps=random_.randint(1, 10), activation=random_.choice(["identity", "identity", "relu", "silu"]),
            norm=random_.choice(["linf", "linf", "l2"]), full=random_.random() < 0.8, dtype=random_.choice([torch.float32, BF16]),
            layout=random_.choice([torch.contiguous_format, LAST]),
        )  # fmt: skip
        if case.output > 0 and case.flops() < 4e9:
            rows.append(case)
    return rows


def forced(operator: Callable[..., Any], function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` with the operator of every choice replaced."""

    def run() -> Any:
        before = dispatch.Choice.operator
        try:
            dispatch.Choice.operator = property(lambda self: operator)  # type: ignore[assignment, method-assign]
            return function()
        finally:
            dispatch.Choice.operator = before  # type: ignore[method-assign]

    return run


def run(case: Case, seconds: float, routes: bool = False) -> dict[str, Any]:
    inputs = Inputs.of(case, case.layout)
    other = LAST if case.layout == torch.contiguous_format else torch.contiguous_format
    swapped = Inputs.of(case, other)
    variants: dict[str, Callable[[], Any]] = {
        "yopo_ext": lambda: first_layer.ours(case, inputs),
        "eager": lambda: first_layer.eager(case, inputs),
        "collapsed": lambda: first_layer.collapsed(case, inputs),
        "collapsed, other layout": lambda: first_layer.collapsed(case, swapped),
    }
    if routes:
        for name, operator in (("kernel", ops.first_layer_update), ("library", ops.first_layer_update_library)):
            variants[name] = forced(operator, variants["yopo_ext"])
    expected = variants["yopo_ext"]()
    for name, function in variants.items():
        first_layer.verify(case, expected, function(), name)
    times = measure.interleaved(variants, seconds)
    compositions = ("eager", "collapsed", "collapsed, other layout")
    best = min(compositions, key=lambda n: sorted(times[n])[len(times[n]) // 2])
    eps, step_size = case.threat
    route = yopo_ext.explain(
        inputs.x, inputs.eta, inputs.costate, inputs.weight, inputs.bias, stride=case.stride, padding=case.padding,
        dilation=case.dilation, groups=case.groups, activation=case.activation, steps=case.steps, step_size=step_size,
        eps=eps, norm=case.norm, need_output=case.full, need_weight_grad=case.full,
    )  # fmt: skip
    shape = {k: str(v).removeprefix("torch.") for k, v in asdict(case).items() if k not in ("name", "targets")}
    return {
        "case": case.name, **shape, "route": route.splitlines()[0], "best": best,
        "ms": {name: measure.summary(t)["ms"] for name, t in times.items()},
        "ratio": measure.ratio(times[best], times["yopo_ext"]),
    }  # fmt: skip


def main() -> int:
    parser = measure.parser(__doc__.splitlines()[0], seconds=2.0)
    parser.add_argument("--drawn", type=int, default=20, help="geometries to draw (default: 20)")
    parser.add_argument(
        "--routes", action="store_true", help="also time the kernels and the library, whatever is chosen"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads or 1)
    rows = [c for c in (*cases(), *drawn(options.drawn)) if options.only in c.name]
    results, failed = [], 0
    for number, case in enumerate(rows, 1):
        r = run(case, options.seconds, options.routes)
        results.append(r)
        ratio = r["ratio"]
        below = ratio["ratio_q3"] < LEAST
        failed += below
        print(
            f"{number:3d}/{len(rows)} C{case.channels} K{case.kernels} {case.size}: {case.name:40s} {r['ms']['yopo_ext']:9.3f} ms "
            f"{ratio['ratio']:6.2f}x ({ratio['ratio_q1']:.2f} .. {ratio['ratio_q3']:.2f}) of {r['best']}, "
            f"{r['route'].split(',')[0]}"
            + "".join(f", {name} {r['ms'][name]:.3f}" for name in ("kernel", "library") if name in r["ms"])
            + (" BELOW" if below else ""),
            flush=True,
        )  # fmt: skip
    worst = min(results, key=lambda r: r["ratio"]["ratio"])
    print(f"{failed} of {len(results)} rows below {LEAST}x; worst {worst['ratio']['ratio']:.2f}x: {worst['case']}")
    measure.save("geometries_cpu", {"environment": measure.environment(), "seed": SEED, "cases": results}, options.out)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
