"""Several processes, several threads, and what stays behind after a step."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from fault_oracle import EPS, SIGMA, Net, agrees, batch, conv, net, plain_passes, same, same_model
from fault_rows import AS_EXPECTED, EAGER, REFERENCE, TWO_PROCESSES, Row, Setting, cells
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from yopo_ext import trades_yopo_step, yopo_step

PAIR, HERE = (TWO_PROCESSES,), (EAGER, REFERENCE)
ZERO = {"first_layer": "first", "eps": 0.0, "step_size": 0.0, "reduction": "sum"}


class OnPurposeError(Exception):
    """A model's own."""


def sharded(model: Any, nested: bool) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    if nested:
        fully_shard(model.body[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(gradient: Any) -> Tensor | None:
    return gradient if gradient is None else gradient.full_tensor()


def compare_sharded(setting: Setting, ours: nn.Module, theirs: nn.Module) -> None:
    expected = setting.average([p.grad for p in theirs.parameters()])
    found = [whole(p.grad) for p in ours.parameters()]
    names = [name for name, _ in theirs.named_parameters()]
    with setting.together():
        for name, mine, other in zip(names, found, expected, strict=True):
            same(f"{name}.grad", mine, other)


def left_out_sharded(
    bad_rank: int, *, nested: bool = False, mode: str = "skip", known: bool = True, trades: bool = False
):
    """One process meets a NaN: both leave the batch out, and go on together."""

    def run(setting: Setting) -> None:
        ours, theirs = sharded(net(conv)(), nested), net(conv)()
        x, y, eta = batch(0, setting.rank)
        options: dict[str, Any] = {"first_layer": "first", "eps": 0.0, "step_size": 0.0, "on_nonfinite": mode}
        options |= {"outer_steps": 2, "init": eta} if trades else {"outer_steps": 2, "reduction": "sum"}
        step = trades_yopo_step if trades else yopo_step
        passes = 1 if trades else 2
        if known:
            step(ours, x, y, **options)
            plain_passes(theirs, x, y, F.cross_entropy, passes)
        before = [whole(p.grad) for p in ours.parameters()]
        before = [None if g is None else g.clone() for g in before]
        buffers = [b.clone() for b in ours.buffers()]
        factor = float("nan") if setting.rank == bad_rank else 1.0
        raised = False
        try:
            step(ours, x, y, loss_fn=lambda output, y: factor * F.cross_entropy(output, y), **options)
        except FloatingPointError:
            raised = True
        after = [whole(p.grad) for p in ours.parameters()]
        with setting.together():
            assert raised == (mode == "raise")
            for i, (mine, other) in enumerate(zip(after, before, strict=True)):
                same(f"gradient {i} after the batch that was left out", mine, other, 0, 0)
            for i, (mine, other) in enumerate(zip(ours.buffers(), buffers, strict=True)):
                same(f"buffer {i} after the batch that was left out", mine, other, 0, 0)
        step(ours, x, y, **options)
        plain_passes(theirs, x, y, F.cross_entropy, passes)
        compare_sharded(setting, ours, theirs)

    return run


def sharded_flag(m: int, nested: bool, **options: Any):
    """The caller accumulates: no gradients are reduced until the caller wants it."""

    def run(setting: Setting) -> None:
        ours, theirs = sharded(net(conv)(), nested), net(conv)()
        for k, wanted in enumerate((False, False, True)):
            x, y, _ = batch(k, setting.rank)
            ours.set_requires_gradient_sync(wanted)
            yopo_step(ours, x, y, outer_steps=m, **(ZERO | options))
            passes = m if options.get("train_on") != "last" else 1
            plain_passes(theirs, x, y, F.cross_entropy, passes)
            if not wanted:
                with setting.together():
                    assert all(p.grad is None for p in ours.parameters()), f"step {k} reduced gradients"
        compare_sharded(setting, ours, theirs)

    return run


def first_fsdp(use_orig_params: bool, m: int, accumulate: bool = False):
    """FullyShardedDataParallel of the first kind: equal, or refused by name."""

    def run(setting: Setting) -> None:
        ours = FullyShardedDataParallel(
            net(conv)(), device_id=torch.device("cpu"), use_orig_params=use_orig_params, sync_module_states=False
        )
        theirs = net(conv)()
        for k in range(2):
            x, y, _ = batch(k, setting.rank)
            with ExitStack() as stack:
                if accumulate and k == 0:
                    stack.enter_context(ours.no_sync())
                yopo_step(ours, x, y, outer_steps=m, **ZERO)
            plain_passes(theirs, x, y, F.cross_entropy, m)
        expected = setting.average([p.grad for p in theirs.parameters()])
        if not use_orig_params:  # this process' piece of one flat gradient
            flat = next(iter(ours.parameters()))
            everything = F.pad(torch.cat([g.flatten() for g in expected if g is not None]), (0, 2))
            with setting.together():
                piece = everything[setting.rank * flat.numel() :][: flat.numel()]
                same("the flat gradient", None if flat.grad is None else flat.grad[: len(piece)], piece)
            return
        with FullyShardedDataParallel.summon_full_params(ours, with_grads=True):
            found = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in ours.named_parameters()}
            found = {name: None if g is None else g.clone() for name, g in found.items()}
        with setting.together():
            for (name, _), other in zip(theirs.named_parameters(), expected, strict=True):
                same(f"{name}.grad", found[name], other)

    return run


def left_out_first_fsdp(use_orig_params: bool):
    """A NaN on one process under FullyShardedDataParallel: equal, or refused by name."""

    def run(setting: Setting) -> None:
        ours = FullyShardedDataParallel(net(conv)(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        x, y, _ = batch(0, setting.rank)
        factor = float("nan") if setting.rank == 1 else 1.0
        yopo_step(
            ours, x, y, outer_steps=2, on_nonfinite="skip", **ZERO,
            loss_fn=lambda output, y: factor * F.cross_entropy(output, y),
        )  # fmt: skip
        with setting.together():
            assert all(p.grad is None for p in ours.parameters()), "a gradient of the batch that was left out is there"

    return run


def changed_on_one(kind: Callable[[nn.Module], nn.Module]):
    """A model that is changed on one process only is an error on all, and no deadlock."""

    def run(setting: Setting) -> None:
        model: Any = net(conv)()
        wrapped = kind(model)
        x, y, _ = batch(0, setting.rank)
        yopo_step(wrapped, x, y, outer_steps=1, **ZERO)
        if setting.rank == 1:
            model.first.register_forward_hook(lambda module, inputs, output: 2 * output)
        yopo_step(wrapped, x, y, outer_steps=1, **ZERO)

    return run


# --- threads ---


class Meeting(Net):
    """Calls `enter` once, in its first forward."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.enter: list[Callable[[], Any]] = []

    def forward(self, u: Tensor) -> Tensor:
        if self.enter:
            self.enter.pop()()
        return super().forward(u)


def compiles() -> bool:
    """Whether torch.compile compiles anything in this process."""
    torch._dynamo.reset()
    graphs = []
    torch.compile(lambda z: z.sin() + 1, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(
        torch.ones(2)
    )
    torch._dynamo.reset()
    return bool(graphs)


def in_threads(step: Callable[..., Any], failing: bool = False):
    """Two first steps that overlap: the one that began first ends first. A lock between them is waited for, briefly."""

    def run(setting: Setting) -> None:
        models: list[Any] = [net(conv, Meeting)() for _ in range(2)]
        began, met, ended = threading.Event(), threading.Event(), threading.Event()

        def early() -> None:
            began.set()
            met.wait(0.5)
            if failing:
                raise OnPurposeError

        def late() -> None:
            met.set()
            ended.wait(0.5)

        models[0].enter.append(early)
        models[1].enter.append(late)
        if step is trades_yopo_step:  # whose first forward is that of the clean images
            for model in models:
                model.enter.append(lambda: None)
        errors: list[BaseException] = []

        def work(i: int) -> None:
            x, y, eta = batch(i)
            if i == 1:
                began.wait(5)
            try:
                options = {"init": eta} if step is trades_yopo_step else {}
                step(models[i], x, y, first_layer="first", outer_steps=1, eps=0.0, step_size=0.0, **options)
            except OnPurposeError:
                pass
            except BaseException as error:  # to be raised in the main thread
                errors.append(error)
            finally:
                if i == 0:
                    ended.set()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            for error in errors:
                raise error
            assert compiles(), "torch.compile is off after the steps"
        finally:
            torch.compiler.set_stance("default")
        for i, model in enumerate(models):
            if failing and i == 0:
                continue
            twin = net(conv, Meeting)()
            x, y, _ = batch(i)
            plain_passes(twin, x, y, F.cross_entropy)
            same_model(setting, model, twin, buffers=step is yopo_step)

    return run


# --- leaks ---


def hook_on_first(model: Any) -> None:
    model.first.register_forward_hook(lambda module, inputs, output: output * float(len(model.body) > 0))


def back_pointer(model: Any) -> None:
    model.first.owners = [model]


def forward_of_model(model: Any) -> None:
    model.first.forward = functools.partial(_forward_with, model)


def _forward_with(model: Any, u: Tensor) -> Tensor:
    return F.conv2d(u, model.first.weight, model.first.bias) * float(model.training)


def hook_on_body(model: Any) -> None:
    model.body[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * float(len(model.body) > 0),))


def collected(tie: Callable[[Any], None], step: Callable[..., Any], first_layer: Any = "first"):
    """A model that its user drops is gone after a step, as it is without one."""

    def run(setting: Setting) -> None:
        gc.collect()
        gc.freeze()  # so that collecting looks at this row's objects only
        try:
            check()
        finally:
            gc.unfreeze()

    def check() -> None:
        for steps in (0, 1, 2):
            model = net(conv)()
            tie(model)
            for k in range(steps):
                x, y, eta = batch(k)
                options = {"init": eta} if step is trades_yopo_step else {}
                step(model, x, y, first_layer=first_layer, outer_steps=2, eps=EPS, step_size=SIGMA, **options)
            gone = weakref.ref(model)
            del model
            gc.collect()
            assert gone() is None, f"the model is kept alive after {steps} steps"

    return run


ROWS = [
    *(
        Row("skip under fully_shard", name, left_out_sharded(bad_rank, **options), settings=PAIR)
        for name, bad_rank, options in (
            ("NaN on process 0", 0, {}), ("NaN on process 1", 1, {}), ("first step", 1, {"known": False}),
            ("sharded layer by layer", 1, {"nested": True}), ("raise", 1, {"mode": "raise"}), ("TRADES", 1, {"trades": True}),
        )
    ),
    *(
        Row("fully_shard's gradient sync is the caller's", name, sharded_flag(m, nested, **options), settings=PAIR)
        for name, m, nested, options in (
            ("one pass", 1, False, {}), ("two passes", 2, False, {}), ("sharded layer by layer", 2, True, {}),
            ("trains on the last pass", 2, False, {"train_on": "last"}),
        )
    ),
    *(
        Row("FullyShardedDataParallel", name, first_fsdp(original, m, accumulate), r"\bmodel\b", or_equal=True, settings=PAIR)
        for name, original, m, accumulate in (
            ("original parameters", True, 2, False), ("flat parameters", False, 2, False), ("one pass", True, 1, False),
            ("accumulation", True, 2, True),
        )
    ),
    *(
        Row("skip under FullyShardedDataParallel", name, left_out_first_fsdp(original), r"\bmodel\b|\bon_nonfinite\b",
            or_equal=True, settings=PAIR)
        for name, original in (("original parameters", True), ("flat parameters", False))
    ),
    Row("a model that is changed on one process", "fully_shard", changed_on_one(lambda model: sharded(model, False)),
        r"\brank\b", settings=PAIR),
    *(
        Row(
            f"DistributedDataParallel({name})", variant,
            agrees(net(first), ["first"], kinds=[kind], distributed=distributed, steps=3, **options),
            rf"\bmodel\b.*\b{name}\b" if name == "static_graph" else None, or_equal=True, settings=PAIR,
        )
        for name, distributed in (
            ("static_graph", {"static_graph": True}),
            ("find_unused_parameters", {"find_unused_parameters": True}),
            ("gradient_as_bucket_view", {"gradient_as_bucket_view": True}),
        )
        for variant, first, kind, options in (
            ("one pass", conv, "plain", {}), ("two passes", conv, "definition", {}),
            ("autograd layer", lambda: nn.Sequential(conv(), nn.Tanh()), "definition", {}),
        )
    ),
    Row("concurrent first steps in threads", "yopo_step", in_threads(yopo_step), settings=HERE),
    Row("concurrent first steps in threads", "trades_yopo_step", in_threads(trades_yopo_step), settings=HERE),
    Row("concurrent first steps in threads", "one of them fails", in_threads(yopo_step, failing=True), settings=HERE),
    *(
        Row("a model is collected after a step", name, collected(tie, step, first_layer), settings=HERE)
        for name, tie, step, first_layer in (
            ("hook on the first layer", hook_on_first, yopo_step, "first"),
            ("hook on the first layer, not named", hook_on_first, yopo_step, None),
            ("hook on the body", hook_on_body, yopo_step, "first"),
            ("attribute of the first layer", back_pointer, yopo_step, "first"),
            ("forward of the first layer", forward_of_model, yopo_step, "first"),
            ("TRADES, hook on the first layer", hook_on_first, trades_yopo_step, "first"),
            ("nothing ties (guard)", lambda model: None, yopo_step, "first"),
        )
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
