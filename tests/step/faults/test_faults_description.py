"""What a first layer computes is what its modules do, not what their types say."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fault_oracle import Net, Standardise, agrees, conv, net
from fault_rows import AS_EXPECTED, COMPILED, EAGER, EVERYWHERE, INDUCTOR, REFERENCE, Row, cells
from torch import Tensor, nn


def twice(make: Callable[[], nn.Module], before: Callable[[], list[nn.Module]] = lambda: [conv()]) -> nn.Module:
    module = make()
    return nn.Sequential(*before(), module, module)


def patched(sequential: nn.Sequential, index: int, forward: Callable[[Tensor], Tensor]) -> nn.Sequential:
    sequential[index].forward = forward
    return sequential


def without_tracking(sequential: nn.Sequential) -> nn.Sequential:
    for module in sequential:
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    return sequential


def stop_tracking(model: nn.Module, k: int) -> None:
    if k == 1:
        without_tracking(model.first)


class ThreeFirst(Net):
    """A first layer of three channels, then a convolution."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first)
        self.body.insert(0, conv())


ROWS = [
    *(
        Row("the same module twice in a Sequential", name, agrees(net(make, kind), ["first"]), settings=where)
        for name, make, kind, where in (
            ("leaky ReLU", lambda: twice(lambda: nn.LeakyReLU(0.3)), Net, (*EVERYWHERE, INDUCTOR)),
            ("SiLU after BatchNorm", lambda: twice(nn.SiLU, lambda: [conv(), nn.BatchNorm2d(6)]), Net, EVERYWHERE),
            ("BatchNorm", lambda: twice(lambda: nn.BatchNorm2d(6)), Net, EVERYWHERE),
            ("convolution", lambda: twice(lambda: nn.Conv2d(3, 3, 3, padding=1), list), ThreeFirst, EVERYWHERE),
            ("normalisation", lambda: nn.Sequential(*[Standardise()] * 2, conv()), Net, EVERYWHERE),
        )
    ),
    *(
        Row("forward replaced on an instance", name, agrees(net(make), ["first"]), settings=settings)
        for name, make, settings in (
            ("ReLU", lambda: patched(nn.Sequential(conv(), nn.ReLU()), 1, torch.tanh), EVERYWHERE),
            # Its parameters are unused then, which DistributedDataParallel refuses.
            ("BatchNorm", lambda: patched(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()), 1, lambda z: 2 * z - 0.1),
             (EAGER, COMPILED, REFERENCE)),
            ("Identity", lambda: patched(nn.Sequential(conv(), nn.Identity(), nn.ReLU()), 1, torch.sin), EVERYWHERE),
        )
    ),
    *(
        Row("BatchNorm that is alone or first", name, agrees(net(make, ThreeFirst if alone else Net), ["first"]))
        for name, make, alone in (
            ("alone", lambda: nn.BatchNorm2d(3), True),
            ("first in a Sequential", lambda: nn.Sequential(nn.BatchNorm2d(3), conv()), False),
            ("first in a nested Sequential", lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), conv(), nn.ReLU()), False),
            ("alone in a Sequential", lambda: nn.Sequential(nn.BatchNorm2d(3)), True),
            ("alone, not affine", lambda: nn.BatchNorm2d(3, affine=False), True),
        )
    ),
    Row(
        "track_running_stats switched off", "before the first step",
        agrees(net(lambda: without_tracking(nn.Sequential(conv(), nn.BatchNorm2d(6)))), ["first"]),
    ),
    Row(
        "BatchNorm", "cumulative average in fp64",
        agrees(net(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, momentum=None), nn.ReLU())), ["first"], steps=3),
    ),
    Row(
        "track_running_stats switched off", "between steps",
        agrees(net(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())), ["first"], change=stop_tracking),
    ),
    Row(
        "track_running_stats switched off", "cumulative average",
        agrees(net(lambda: without_tracking(nn.Sequential(conv(), nn.BatchNorm2d(6, momentum=None), nn.ReLU()))), ["first"]),
    ),
    Row(
        "track_running_stats switched off", "in evaluation mode",
        agrees(
            net(lambda: without_tracking(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()))), ["first"],
            change=lambda model, k: model.eval(),
        ),
    ),
]  # fmt: skip


@cells(ROWS)
def test_fault(row: Row, setting: str, outcome: Callable[[Row, str], set[str]]) -> None:
    assert outcome(row, setting) == {AS_EXPECTED}
