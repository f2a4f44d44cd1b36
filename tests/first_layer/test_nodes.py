"""The autograd node: as an operator, and under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from policy import assert_as_exact_as_plain
from step_oracle import batch, gradients_along, network, oracle_step
from torch import Tensor, nn

from yopo_ext import adversary_steps, trades_yopo_step, yopo_step
from yopo_ext.first_layer.batch_norm_node import batch_norm_node
from yopo_ext.first_layer.fused_node import FusedNode, Settings, first_layer_node
from yopo_ext.first_layer.normalisation import normalised, sample
from yopo_ext.kernels.constants import ACTIVATIONS
from yopo_ext.threat import ThreatModel

EPS, SIGMA = 0.1, 0.03
BALL = ThreatModel(EPS, SIGMA).around(torch.zeros(2, 4, 6, 5, dtype=torch.float64))
THREAT = BALL.table


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = torch.rand(2, 4, 6, 5, generator=generator, dtype=dtype)
    return {
        "eta": 0.05 * draw(2, 4, 6, 5), "x": x, "weight": draw(6, 2, 3, 3), "bias": draw(6), "scale": draw(6),
        "shift": draw(6),
    }  # fmt: skip


def settings(
    before: bool = False, after: bool = True, dtype: torch.dtype = torch.float64, activation: str = "silu"
) -> Settings:
    geometry = ([0.5], [0.25], [2, 1], [1, 2], [1, 1], 2, ACTIVATIONS[activation], 0.0)
    return Settings(*geometry, 2, 0, False, before, after, False, dtype)


def operator_arguments(given: dict[str, Tensor | None], seen_shift: float = 0.0) -> tuple:
    """eta, check, seen, x, and the parameters."""
    eta, x, *parameters = given.values()
    check = torch.zeros(2, dtype=x.dtype, requires_grad=True)
    seen = normalised(sample(x) + sample(eta.detach()), [0.5], [0.25]) + seen_shift
    return eta, check, seen, x, *parameters


@pytest.mark.parametrize("wanted", ["all", "eta", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_pass_opcheck(wanted: str, dtype: torch.dtype) -> None:
    given = tensors(torch.float64 if dtype == torch.float64 else torch.float32)
    for name, t in given.items():
        t.requires_grad_(name != "x" and (wanted != "eta" or name == "eta"))
    given = {n: None if wanted == "no bias" and n != "weight" and t.dim() == 1 else t for n, t in given.items()}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*operator_arguments(given), THREAT, *settings(True, True, dtype))
    torch.library.opcheck(first_layer_node, arguments, test_utils=checks)
    torch.library.opcheck(batch_norm_node, (*arguments, 1e-5), test_utils=checks)


def test_forward_is_the_layer() -> None:
    given = tensors()
    y = first_layer_node(*operator_arguments(given), THREAT, *settings())
    z = F.conv2d((given["x"] + given["eta"] - 0.5) / 0.25, given["weight"], given["bias"], (2, 1), (1, 2), 1, 2)
    expected = F.silu(z * given["scale"][:, None, None] + given["shift"][:, None, None])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(FusedNode.apply(None, settings(), *given.values()), y, rtol=0, atol=0)


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_another_input_of_the_layer_is_told_by_a_gradient(shift: float) -> None:
    given = {name: t.requires_grad_(name != "x") for name, t in tensors().items()}
    arguments = operator_arguments(given, shift)
    first_layer_node(*arguments, THREAT, *settings()).sum().backward()
    assert arguments[1].grad.tolist() == [1.0, float(shift > 0)]


@pytest.mark.parametrize("seed", range(3))
def test_gradients_come_out_as_ordinary_gradients(seed: int) -> None:
    """At the perturbation the pass ran at, they are those of plain autograd for every parameter."""
    torch.manual_seed(seed)
    given = {name: t.requires_grad_(name != "x") for name, t in tensors().items()}
    plain = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    z = F.conv2d((plain["x"] + plain["eta"] - 0.5) / 0.25, plain["weight"], plain["bias"], (2, 1), (1, 2), 1, 2)
    y = F.silu(z * plain["scale"][:, None, None] + plain["shift"][:, None, None])
    p = torch.randn_like(y)
    y.backward(p)
    first_layer_node(*operator_arguments(given), THREAT, *settings(before=True, after=False)).backward(p)
    for name in ("weight", "bias", "scale", "shift"):
        torch.testing.assert_close(given[name].grad, plain[name].grad)
    parts = {name: given[name].detach() for name in ("bias", "scale", "shift")}
    moved = adversary_steps(
        *(given[name].detach() for name in ("x", "eta")), p, given["weight"].detach(), **parts, mean=0.5, std=0.25,
        stride=(2, 1), padding=(1, 2), groups=2, activation="silu", steps=2, step_size=SIGMA, eps=EPS,
    )  # fmt: skip
    assert torch.equal(given["eta"].grad, moved)


def test_an_expanded_costate_is_taken() -> None:
    given = {name: t.requires_grad_(name != "x") for name, t in tensors().items()}
    first_layer_node(*operator_arguments(given), THREAT, *settings()).mean((2, 3)).sum().backward()
    again = {name: t.detach().clone().requires_grad_(name != "x") for name, t in given.items()}
    y = first_layer_node(*operator_arguments(again), THREAT, *settings())
    y.backward(torch.full_like(y, 1 / y[0, 0].numel()))
    for mine, theirs in zip(given.values(), again.values(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


# --- torch.compile ---

STEMS = {
    "conv": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "conv_bn_relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(model: nn.Module, dtype: torch.dtype = torch.float64, **options):
    x, y, eta = batch(dtype)
    options = {"first_layer": "first", "outer_steps": 3, "eps": EPS, "step_size": SIGMA, "init": eta} | options
    return yopo_step(model, options.pop("x", x), options.pop("y", y), **options)


def assert_same(compiled: nn.Module, eager: nn.Module, results: list) -> None:
    torch.testing.assert_close(results[0].perturbation, results[1].perturbation, rtol=0, atol=1e-12)
    torch.testing.assert_close(results[0].losses, results[1].losses)
    for mine, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gradient", ["paper", "released"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("stem", STEMS)
def test_compiled_model_gives_the_same_step(stem: str, mode: str, gradient: str) -> None:
    eager = network(STEMS[stem]).train(mode == "train")
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(model, eager, [step(m, gradient=gradient) for m in (compiled, eager)])
    assert graphs() == 1


def test_no_recompilation_from_step_to_step() -> None:
    model = network(STEMS["conv_bn_relu"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y, _ = batch()
    for train_on in ("all", "last"):
        step(compiled, train_on=train_on)
    with torch.no_grad():
        compiled(x)
    compiled.eval()
    with torch.no_grad():
        compiled(x)
    compiled.train()
    before = graphs()
    assert before <= 4  # passes that train, passes that do not, evaluation in both modes
    for train_on in ("all", "last"):
        step(compiled, train_on=train_on, init="uniform")
        trades_yopo_step(compiled, x, y, first_layer="first", outer_steps=2)
        with torch.no_grad():
            compiled(x)
    settled = graphs()
    for train_on in ("all", "last"):
        step(compiled, train_on=train_on, init="uniform")
        trades_yopo_step(compiled, x, y, first_layer="first", outer_steps=2)
    assert graphs() == settled


def test_inner_steps_and_gradient_may_change() -> None:
    eager = network(STEMS["conv"])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for options in ({"inner_steps": 1}, {"inner_steps": 4}, {"inner_steps": 2}, {"gradient": "full"}):
        assert_same(model, eager, [step(m, **options) for m in (compiled, eager)])


def test_a_schedule_of_the_threat_model_does_not_recompile() -> None:
    eager = network(STEMS["conv_bn_relu"])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for eps in (0.01, 0.02, 0.04, 0.1):
        options = {"eps": eps, "step_size": eps / 3, "bounds": (-eps, 1 + eps)}
        assert_same(model, eager, [step(m, **options) for m in (compiled, eager)])
    assert graphs() == 1


def test_batches_of_another_size() -> None:
    eager = network(STEMS["conv_bn_relu"])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y, eta = batch()
    for size in (6, 4, 5, 3):
        given = {"x": x[:size], "y": y[:size], "init": eta[:size]}
        assert_same(model, eager, [step(m, **given) for m in (compiled, eager)])
    assert graphs() <= 2


@pytest.mark.filterwarnings("ignore:the first layer runs through autograd")
def test_a_first_layer_that_autograd_runs_cuts_the_graph() -> None:
    eager = network(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh()))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert_same(model, eager, [step(m) for m in (compiled, eager)])


@pytest.mark.parametrize("compiled_model", [False, True])
def test_inside_a_compiled_function(compiled_model: bool) -> None:
    eager = network(STEMS["conv_bn_relu"])
    model = copy.deepcopy(eager)
    runs: list[int] = []

    def backend(graph, inputs):
        return lambda *arguments: runs.append(1) or graph(*arguments)

    compiled = torch.compile(model, fullgraph=True, backend=backend) if compiled_model else model

    @torch.compile(backend="aot_eager")
    def train(model: nn.Module, x: Tensor, y: Tensor, eta: Tensor) -> tuple:
        result = yopo_step(model, x, y, first_layer="first", outer_steps=3, eps=EPS, step_size=SIGMA, init=eta)
        return result, result.loss + 1

    for _ in range(2):
        result, loss = train(compiled, *batch())
        torch.testing.assert_close(loss, result.loss + 1)
        assert_same(model, eager, [result, step(eager)])
    assert len(runs) == (6 if compiled_model else 0)


def test_models_compiled_in_place_and_in_parts() -> None:
    eager = network(STEMS["conv_bn_relu"])
    whole, part = copy.deepcopy(eager), copy.deepcopy(eager)
    whole.compile(fullgraph=True, backend="aot_eager")
    part.rest.compile(backend="aot_eager")
    expected = [step(eager) for _ in range(2)][-1]
    for model in (whole, part):
        result = [step(model) for _ in range(2)][-1]
        assert_same(model, eager, [result, expected])


def test_second_path_is_refused_in_a_compiled_model() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(STEMS["conv"])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + x.mean((1, 2, 3))[:, None]

    compiled = torch.compile(Skipping(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with pytest.raises(ValueError, match="only way from the input"):
            step(compiled, first_layer="net.first")
    assert all(p.grad is None for p in compiled.parameters())


def test_automatic_first_layer_of_a_compiled_model() -> None:
    model = network(STEMS["conv"])
    step(torch.compile(model, fullgraph=True, backend="aot_eager"), first_layer=None)
    assert model.first.weight.grad is not None


def test_autocast_in_a_compiled_model() -> None:
    """The second step, which is the first that runs compiled."""
    plain = network(STEMS["conv_bn_relu"], dtype=torch.float32)
    model, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y, eta = batch(torch.float32)
    options = {"m": 2, "n": 3, "eps": EPS, "step_size": SIGMA, "gradient": "paper", "scale": 0.5}
    for _ in range(2):
        for network_ in (model, plain, exact):
            network_.zero_grad()
        oracle, _ = oracle_step(exact, x.double(), y, eta.double(), **options)
        with torch.autocast("cpu", torch.bfloat16):
            perturbation, _ = oracle_step(plain, x, y, eta, **options)
            result = step(compiled, torch.float32, outer_steps=2)
            halfway = step(copy.deepcopy(model), torch.float32, outer_steps=1).perturbation
            plain_halfway, _ = oracle_step(copy.deepcopy(plain), x, y, eta, **options | {"m": 1})
    assert result.logits.dtype == torch.bfloat16
    assert_as_exact_as_plain("eta", result.perturbation, perturbation, oracle, torch.bfloat16)
    at_mine, at_theirs = (
        gradients_along(exact, x.double(), y, [eta.double(), first.double(), last.double()], scale=0.5)
        for first, last in ((halfway, result.perturbation), (plain_halfway, perturbation))
    )
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        shifted = theirs.grad.double() - at_theirs[name] + at_mine[name]
        assert_as_exact_as_plain(name, mine.grad, shifted, at_mine[name], torch.bfloat16)


def test_inductor() -> None:
    eager = network(STEMS["conv_bn_relu"])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        assert_same(model, eager, [step(m) for m in (compiled, eager)])
    assert graphs() == 1
