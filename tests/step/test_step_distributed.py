"""`yopo_step` over several processes and inside Lightning Fabric."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from policy import assert_as_exact_as_plain
from processes import run_ranks
from step_oracle import Network, batch, network, oracle_step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from yopo_ext import trades_yopo_step, yopo_step
from yopo_ext.training.torchvision_import import import_torchvision

EPS, SIGMA = 0.1, 0.03
STEMS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(3, 6, 3),
    "opaque": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh()),
}


class Count:
    """How often gradients were reduced."""

    reductions = 0


def counted(count: Count, bucket):
    """A communication hook that averages as DistributedDataParallel does, and counts."""
    count.reductions += bucket.is_last()
    buffer = bucket.buffer() / dist.get_world_size()
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])


def without_batch_norm(stem: str) -> Network:
    model = network(STEMS[stem])
    model.rest[0] = nn.Identity()  # whose statistics would differ between half batches and the whole
    return model


def half(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t[3 * rank : 3 * rank + 3] for t in batch())  # type: ignore[return-value]


def step(model: nn.Module, rank: int, **options):
    x, y, eta = half(rank)
    return yopo_step(
        model, x, y, **{"first_layer": "first", "outer_steps": 3, "eps": EPS, "step_size": SIGMA, "init": eta} | options
    )


def check_plain(rank: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for stem in STEMS:
        model = without_batch_norm(stem)
        parallel, count = DistributedDataParallel(model), Count()
        parallel.register_comm_hook(count, counted)
        result = step(parallel, rank)
        found[stem] = [p.grad for p in model.parameters()], result.perturbation
        found[f"{stem} reductions"] = count.reductions
        parallel.zero_grad()
        step(parallel, rank, train_on="last")
        found[f"{stem} reductions, last"] = count.reductions - 1
        seen: list[int] = []
        step(parallel, rank, after_pass=lambda j, seen=seen, count=count: seen.append(count.reductions - 2))
        found[f"{stem} reductions, after_pass"] = seen
    return found


def check_batch_norm(rank: int) -> dict[str, object]:
    parallel = DistributedDataParallel(network(STEMS["conv"]))
    step(parallel, rank)
    x, y, eta = half(rank)
    for _ in range(2):
        trades_yopo_step(parallel, x, y, first_layer="first", outer_steps=2, init=eta)
    return {
        "grads": [p.grad for p in parallel.parameters()],
        "passes": int(parallel.module.rest[0].num_batches_tracked),
    }


def check_compiled(rank: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for order in ("compiled inside", "compiled outside"):
        model, count = without_batch_norm("conv"), Count()
        if order == "compiled inside":
            parallel = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
            parallel.register_comm_hook(count, counted)
            wrapped: nn.Module = parallel
        else:
            parallel = DistributedDataParallel(model)
            parallel.register_comm_hook(count, counted)
            wrapped = torch.compile(parallel, backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            result = step(wrapped, rank)
        found[order] = [p.grad for p in model.parameters()], result.perturbation, count.reductions
    return found


def check_sharded(rank: int) -> dict[str, object]:
    found: dict[str, object] = {}
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    reduce, reductions = getattr(dist, name), []
    setattr(dist, name, lambda *args, **kwargs: reductions.append(1) or reduce(*args, **kwargs))
    for train_on in ("all", "last"):
        model = without_batch_norm("conv")
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        reductions.clear()
        for _ in range(2):
            model.zero_grad()
            result = step(model, rank, train_on=train_on)
        found[train_on] = [p.grad.full_tensor() for p in model.parameters()], result.perturbation, len(reductions)
    setattr(dist, name, reduce)
    return found


def check_nonfinite(rank: int) -> dict[str, object]:
    """One process meets a NaN; both must leave the batch out."""
    model = without_batch_norm("conv")
    parallel = DistributedDataParallel(model)
    factor = float("nan") if rank == 1 else 1.0
    result = step(parallel, rank, loss_fn=lambda out, y: factor * out.square().mean(), on_nonfinite="skip")
    left_out = all(p.grad is None for p in model.parameters())
    step(parallel, rank, on_nonfinite="skip")
    return {
        "left out": left_out,
        "finite": bool(result.loss.isfinite()),
        "next": all(p.grad is not None for p in model.parameters()),
    }


def check_fabric(rank: int) -> dict[str, object]:
    import_torchvision(required=False)  # which Fabric imports
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    except ModuleNotFoundError:
        return {}
    found: dict[str, object] = {}
    for precision in ("64-true", "bf16-mixed"):
        strategy = DDPStrategy(process_group_backend="gloo")
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
        fabric.launch()
        model = without_batch_norm("conv")
        if precision != "64-true":
            model.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        count = Count()
        wrapped._forward_module.register_comm_hook(count, counted)
        x, y, eta = (t if t.dtype == torch.int64 or precision == "64-true" else t.float() for t in half(rank))
        result = yopo_step(
            wrapped,
            x,
            y,
            first_layer="first",
            outer_steps=3,
            eps=EPS,
            step_size=SIGMA,
            init=eta,
            backward=fabric.backward,
        )
        found[precision] = [p.grad for p in model.parameters()], result.perturbation, count.reductions
    return found


CHECKS = (check_plain, check_compiled, check_sharded, check_batch_norm, check_nonfinite, check_fabric)


def worker(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save({check.__name__: check(rank) for check in CHECKS}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What two processes found in every check."""
    folder = tmp_path_factory.mktemp("processes")
    log = folder / "log"
    assert run_ranks(worker, str(folder), log=log) == [0, 0], log.read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def whole(stem: str, **options) -> tuple[Network, Tensor]:
    model = without_batch_norm(stem)
    x, y, eta = batch()
    result = yopo_step(model, x, y, first_layer="first", outer_steps=3, eps=EPS, step_size=SIGMA, init=eta, **options)
    return model, result.perturbation


@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
def test_two_processes_equal_one_and_reduce_once(processes: list[dict]) -> None:
    found = [process["check_plain"] for process in processes]
    for stem in STEMS:
        model, perturbation = whole(stem)
        for process in found:
            assert process[f"{stem} reductions"] == 1
            assert process[f"{stem} reductions, last"] == 1
            assert process[f"{stem} reductions, after_pass"] == [1, 2, 3]
            for mine, expected in zip(process[stem][0], model.parameters(), strict=True):
                torch.testing.assert_close(mine, expected.grad)
        torch.testing.assert_close(torch.cat([process[stem][1] for process in found]), perturbation)


@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
def test_compiled_model_over_two_processes(processes: list[dict], order: str) -> None:
    found = [process["check_compiled"][order] for process in processes]
    model, perturbation = whole("conv")
    for gradients, _, reductions in found:
        assert reductions == 2  # of two steps
        for mine, expected in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(mine, expected.grad)
    torch.testing.assert_close(torch.cat([process[1] for process in found]), perturbation)


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_sharded_model_over_two_processes(processes: list[dict], train_on: str) -> None:
    found = [process["check_sharded"][train_on] for process in processes]
    model, perturbation = whole("conv", train_on=train_on)
    for gradients, _, reductions in found:
        assert reductions == 2  # of two steps
        for mine, expected in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(mine, expected.grad)
    torch.testing.assert_close(torch.cat([process[1] for process in found]), perturbation)


def test_batch_norm_buffers_and_two_forwards_before_one_backward(processes: list[dict]) -> None:
    found = [process["check_batch_norm"] for process in processes]
    for a, b in zip(*(process["grads"] for process in found), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [process["passes"] for process in found] == [3 + 4, 3 + 4]


def test_processes_leave_a_batch_out_together(processes: list[dict]) -> None:
    found = [process["check_nonfinite"] for process in processes]
    assert [process["finite"] for process in found] == [True, False]
    assert all(process["left out"] and process["next"] for process in found)


def test_fabric_reduces_once(processes: list[dict]) -> None:
    if not processes[0]["check_fabric"]:
        pytest.skip("lightning-fabric is not installed")
    found = [process["check_fabric"] for process in processes]
    model, perturbation = whole("conv")
    plain = without_batch_norm("conv").float()
    exact = copy.deepcopy(plain).double()
    x, y, eta = (t.float() if t.is_floating_point() else t for t in batch())
    options = {"m": 3, "n": 3, "eps": EPS, "step_size": SIGMA, "gradient": "paper", "scale": 1 / 3}
    oracle_step(exact, x.double(), y, eta.double(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        oracle_step(plain, x, y, eta, **options)
    for process in found:
        gradients, _, reductions = process["64-true"]
        assert reductions == 1
        for mine, expected in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(mine, expected.grad)
        gradients, _, reductions = process["bf16-mixed"]
        assert reductions == 1
        for mine, theirs, true in zip(gradients, plain.parameters(), exact.parameters(), strict=True):
            assert_as_exact_as_plain("gradient", mine, theirs.grad, true.grad, torch.bfloat16)
    torch.testing.assert_close(torch.cat([process["64-true"][1] for process in found]), perturbation)


def test_fabric_on_one_process() -> None:
    import_torchvision(required=False)
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    plain = network(STEMS["conv"], dtype=torch.float32)
    model = copy.deepcopy(plain)
    wrapped = fabric.setup(model)
    x, y, eta = batch(torch.float32)
    options = {"outer_steps": 2, "eps": EPS, "step_size": SIGMA, "init": eta}
    result = yopo_step(wrapped, x, y, **options, backward=fabric.backward)
    with torch.autocast("cpu", torch.bfloat16):
        expected = yopo_step(plain, x, y, **options)
    torch.testing.assert_close(result.perturbation, expected.perturbation, rtol=0, atol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
