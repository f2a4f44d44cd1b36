"""Whole training steps on the CPU: `yopo_step` against the released step, a hand-collapsed one, PGD, FGSM-RS and plain passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import baseline_steps as baseline
import measure
import torch
from torch import Tensor, nn

import yopo_ext
from yopo_ext.training.models import build_model


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    shape: tuple[int, int, int]
    batch: int
    outer: int
    inner: int
    pgd: int  # steps of the PGD baseline
    eps: float
    step: float
    targets: dict[str, float] = field(default_factory=dict)  # ratio of a baseline's time to yopo_step's


CASES = [
    Case("SmallCNN on MNIST shapes, YOPO-5-10", "smallcnn", (1, 28, 28), 128, 5, 10, 40, 0.3, 0.01,
         {"released": 2.8, "pgd": 5.0}),
    Case("PreActResNet-18 on CIFAR shapes, YOPO-5-3", "preactresnet18", (3, 32, 32), 16, 5, 3, 10, 8 / 255, 2 / 255),
]  # fmt: skip


def check_same(
    case: Case, model: nn.Module, ours: Callable[[], Tensor], theirs: dict[str, Callable[[], Tensor]]
) -> None:
    """The baselines must leave the gradients of `yopo_step(gradient="released")`, sign flips at g = 0 and rounding apart."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()  # no dropout: the same function every time
    expected = baseline.gradients(model, ours)
    for name, step in theirs.items():
        for e, a in zip(expected, baseline.gradients(model, step), strict=True):
            if (e - a).norm() > 0.02 * e.norm():
                raise AssertionError(f"{case.name}: {name} computes another gradient ({(e - a).norm() / e.norm():.2%})")
    for module, mode in modes:
        module.training = mode


def run(case: Case, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model, first_name = build_model(case.model, case.shape, 10)
    model.train()
    first = model.get_submodule(first_name) if first_name else None
    assert first is not None
    x, y = torch.rand(case.batch, *case.shape), torch.randint(0, 10, (case.batch,))
    eta = (torch.rand_like(x) * 2 - 1) * case.eps
    yopo = {
        "outer_steps": case.outer,
        "inner_steps": case.inner,
        "eps": case.eps,
        "step_size": case.step,
        "first_layer": first,
    }
    arguments = {"m": case.outer, "n": case.inner, "eps": case.eps, "step": case.step}

    def ours(**options: Any) -> Tensor:
        return yopo_ext.yopo_step(model, x, y, **yopo, **options).perturbation  # type: ignore[arg-type]

    steps: dict[str, Callable[[], Tensor]] = {
        "yopo_step": lambda: ours(),
        "released": lambda: baseline.released_step(model, first, x, y, eta, **arguments),
        "collapsed": lambda: baseline.collapsed_step(model, first, x, y, eta, **arguments),
        "pgd": lambda: baseline.pgd_step(model, x, y, steps=case.pgd, eps=case.eps, step=case.step),
        "fgsm-rs": lambda: baseline.fgsm_rs_step(model, x, y, eps=case.eps, step=1.25 * case.eps),
        "plain passes": lambda: baseline.plain_passes(model, x, y, m=case.outer),
    }
    check_same(
        case, model, lambda: ours(gradient="released", init=eta), {k: steps[k] for k in ("released", "collapsed")}
    )
    times = measure.interleaved(steps, seconds, minimum=5)
    others = [name for name in steps if name != "yopo_step"]
    return {
        "case": case.name, "batch": case.batch, "pgd_steps": case.pgd, "targets": case.targets,
        "variants": {name: measure.summary(times[name]) for name in steps},
        "ratios": {name: measure.ratio(times[name], times["yopo_step"]) for name in others},
    }  # fmt: skip


def overhead(modules: int, seconds: float) -> dict[str, Any]:
    """What a step adds to plain passes where the network costs nothing: once per step, and once per pass."""
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(1, 4, 3, padding=1),
        *[nn.Identity() for _ in range(modules - 3)],
        nn.Flatten(),
        nn.Linear(256, 10),
    ]
    model, x, y = nn.Sequential(*parts), torch.rand(1, 1, 8, 8), torch.tensor([3])

    def plain(m: int) -> None:
        for _ in range(m):
            torch.nn.functional.cross_entropy(model(x), y).backward()

    steps: dict[str, Callable[[], Any]] = {}
    for m in (1, 5):
        steps[f"yopo_step, m = {m}"] = lambda m=m: yopo_ext.yopo_step(model, x, y, outer_steps=m)  # type: ignore[misc]
        steps[f"plain passes, m = {m}"] = lambda m=m: plain(m)  # type: ignore[misc]
    times = measure.interleaved(steps, seconds, minimum=50)
    summaries = {name: measure.summary(times[name]) for name in steps}
    above = {m: summaries[f"yopo_step, m = {m}"]["ms"] - summaries[f"plain passes, m = {m}"]["ms"] for m in (1, 5)}
    per_pass = (above[5] - above[1]) / 4
    return {
        "case": f"overhead, {modules} modules, 8x8 pixels", "batch": 1, "variants": summaries,
        "microseconds": {"per step": 1e3 * (above[1] - per_pass), "per pass": 1e3 * per_pass},
    }  # fmt: skip


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0], seconds=60.0)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    for case in CASES:
        if options.only in case.name:
            result = run(case, options.seconds)
            results.append(result)
            ours = result["variants"]["yopo_step"]["ms"]
            ratios = ", ".join(f"{name} {r['ratio']:.2f}x" for name, r in result["ratios"].items())
            print(f"{case.name} (B={case.batch}): {ours:.0f} ms; {ratios}", flush=True)
    for modules in (3, 200):
        if options.only in "overhead":
            result = overhead(modules, options.seconds / 4)
            results.append(result)
            cost = ", ".join(f"{value:.0f} us {what}" for what, value in result["microseconds"].items())
            print(f"{result['case']}: {cost} above plain passes", flush=True)
    measure.save("training_step_cpu", {"environment": measure.environment(), "cases": results}, options.out)


if __name__ == "__main__":
    main()
