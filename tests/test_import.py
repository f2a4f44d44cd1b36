"""What `import yopo_ext` draws in, and that the decorators which avoid torch._dynamo work as PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from yopo_ext.compilation import constant_when_compiled, not_traced


@pytest.mark.parametrize("module", ["yopo_ext", "yopo_ext.training.cli"])
def test_an_import_leaves_torch_dynamo_alone(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def graphs_of(function) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile makes of two calls with different arguments."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    for value in (1.0, 2.0):
        torch.testing.assert_close(compiled(torch.full((2,), value)), function(torch.full((2,), value)))
    return graphs


@pytest.mark.parametrize("decorator", [torch.compiler.disable, not_traced], ids=["torch", "ours"])
def test_not_traced_is_a_graph_break_that_compiles_nothing_inside(decorator) -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @decorator
    def step(x: torch.Tensor, traced: list[bool]) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return inner(x)

    traced: list[bool] = []
    graphs = graphs_of(lambda x: step(x + 1, traced) * 2)
    assert traced == [False] * 4
    assert len(graphs) >= 2  # before the call and after it
    assert not any("sin" in graph.code for graph in graphs)


@pytest.mark.parametrize(
    "decorator", [torch.compiler.assume_constant_result, constant_when_compiled], ids=["torch", "ours"]
)
def test_constant_when_compiled_is_read_once(decorator) -> None:
    calls: list[int] = []

    @decorator
    def setting() -> bool:
        calls.append(1)
        return True

    graphs = graphs_of(lambda x: x + 1 if setting() else x - 1)
    assert len(graphs) == 1
    assert len(calls) == 3  # one for the compiler, two of the function that is not compiled
