"""Which GPUs the CUDA kernels run on; the others get the reference kernels, and one warning each."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import make_arguments

from yopo_ext.kernels import dispatch, native, ops

RUNS = [
    ((9, 0), "90"), ((9, 0), "80"), ((8, 9), "86-real"), ((8, 6), "80;86;89;90;100;120"), ((12, 0), "90;100"),
    ((9, 0), "90a"), ((10, 3), "100f"), ((9, 0), "80-virtual"), ((7, 5), "native"), ((8, 0), "90-real;80-real"),
]  # fmt: skip
RUNS_NOT = [
    ((7, 5), "80;86;89;90;100;120"), ((8, 0), "90"), ((9, 0), "80-real"), ((8, 0), "86-real"), ((10, 0), "90a"),
    ((12, 0), "100f"), ((8, 0), "90-virtual"), ((8, 9), "90a;100f"),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "architectures"), RUNS, ids=str)
def test_runs(capability, architectures):
    assert native.why_not_capability(capability, architectures) is None


@pytest.mark.parametrize(("capability", "architectures"), RUNS_NOT, ids=str)
def test_does_not_run(capability, architectures):
    why = native.why_not_capability(capability, architectures)
    assert f"{capability[0]}.{capability[1]}" in why
    assert architectures.split(";")[0] in why


@pytest.fixture
def a_t4(monkeypatch):
    """A machine with a loaded CUDA library, whose second GPU is too old for it."""
    build = {"cuda_architectures": "80;90"}
    monkeypatch.setattr(ops, "native_status", ops.native_status._replace(cuda=True, why_not_cuda=None))
    monkeypatch.setattr(native, "status", lambda: ops.native_status._replace(build=build))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (7, 5)][i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["an H200", "a T4"][i])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for cache in (native.why_not_device.cache_clear, dispatch._choices.clear):
        cache()
    yield
    for cache in (native.why_not_device.cache_clear, dispatch._choices.clear):
        cache()


def on(device: str) -> tuple:
    """A CIFAR stem's arguments as if x were on the device."""
    x, *rest = make_arguments(kernels=64, size=(32, 32))
    return (
        SimpleNamespace(device=torch.device(device), shape=x.shape, dtype=x.dtype, element_size=x.element_size),
        *rest,
    )


def test_an_old_gpu_gets_the_reference_and_one_warning(a_t4):
    with pytest.warns(RuntimeWarning, match=r"cuda:1 \(a T4\): its compute capability is 7\.5") as seen:
        choices = [dispatch.choose(*on("cuda:1")) for _ in range(3)]
    assert len(seen) == 1
    assert {choice.backend for choice in choices} == {"reference"}
    assert "7.5" in str(choices[0])


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_other_gpu_keeps_its_kernels(a_t4, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(*on(device)).backend == "native cuda"


SETTINGS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


@pytest.fixture(params=["ieee", "tf32"])
def before(request):
    """The caller's settings."""
    kept = [owner.fp32_precision for owner in SETTINGS]
    for owner in SETTINGS:
        owner.fp32_precision = request.param
    yield request.param
    for owner, value in zip(SETTINGS, kept, strict=True):
        owner.fp32_precision = value


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("backend", ["native cuda", "library"])
def test_library_products_on_a_gpu_round_as_allow_tf32_says(monkeypatch, backend, before, allow_tf32):
    """Patch embeddings and library products; afterwards the caller's settings are back, also behind an error."""
    seen = []

    def operator(*arguments):
        seen.append([owner.fp32_precision for owner in SETTINGS])
        raise RuntimeError("on purpose")

    for name in ("first_layer_update", "first_layer_update_library"):
        monkeypatch.setattr(ops, name, operator)
    with pytest.raises(RuntimeError, match="on purpose"):
        dispatch.Choice(backend, "").run(*on("cuda:0")[:-1], allow_tf32)
    assert seen == [["tf32" if allow_tf32 else "ieee"] * 2]
    assert [owner.fp32_precision for owner in SETTINGS] == [before] * 2
