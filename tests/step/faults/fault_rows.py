"""What a row of the table of faults is, in which settings it runs, and how its outcome is judged."""

from __future__ import annotations

import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import yopo_ext

AS_EXPECTED = "as expected"
EAGER, COMPILED, TWO_PROCESSES, REFERENCE = "eager", "compiled", "two processes", "reference kernels"
INDUCTOR = "inductor"  # slow
ORACLE = "oracle"  # the definition beside a plain pass, without the package
EVERYWHERE = (EAGER, COMPILED, TWO_PROCESSES, REFERENCE)
ONE_PROCESS = (EAGER, COMPILED, REFERENCE)
PACKAGE = str(Path(yopo_ext.__file__).parent)


@dataclass(frozen=True)
class Setting:
    """Where a row runs: how the model is wrapped, and which part of the data this process has."""

    name: str
    rank: int = 0

    def wrap(self, model: nn.Module, **distributed: Any) -> nn.Module:
        if self.name == COMPILED:
            return torch.compile(model, backend="aot_eager")
        if self.name == INDUCTOR:
            return torch.compile(model)
        if self.name == TWO_PROCESSES:
            return DistributedDataParallel(model, **distributed)
        return model

    def average(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The mean over the processes of what each of them has (None counts as zero where another has a value)."""
        if self.name != TWO_PROCESSES:
            return list(tensors)
        gathered: list[Sequence[Tensor | None]] = [()] * dist.get_world_size()
        dist.all_gather_object(gathered, [None if t is None else t.detach() for t in tensors])
        found: list[Tensor | None] = []
        for parts in zip(*gathered, strict=True):
            given = [part for part in parts if part is not None]
            found.append(sum(given[1:], given[0]) / len(parts) if given else None)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of comparisons without collective calls; where one process fails the others fail with it."""
        text = None
        try:
            yield
        except AssertionError as error:
            text = str(error)
        if self.name == TWO_PROCESSES:
            gathered: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, text)
            text = text or next((other for other in gathered if other is not None), None)
        if text is not None:
            raise AssertionError(text)


@dataclass(frozen=True)
class Row:
    """One variant of one fault.

    run: takes the steps and compares with plain autograd; AssertionError: they differ.
    error: None: no error may be raised. Else a pattern in the text of the error that the package must raise.
    or_equal: an error is allowed, not required.
    """

    fault: str
    variant: str
    run: Callable[[Setting], None] = field(compare=False)
    error: str | None = None
    or_equal: bool = False
    settings: tuple[str, ...] = EVERYWHERE

    @property
    def oracle(self) -> bool:
        """Whether the row compares with the definition."""
        return getattr(self.run, "by_definition", False)

    @property
    def name(self) -> str:
        return f"{self.fault}: {self.variant}"

    def outcome(self, setting: Setting) -> str:
        """AS_EXPECTED, or what happened instead."""
        seed()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run(setting)
        except AssertionError as error:
            return f"differs: {_short(error)}"
        except Exception as error:  # every other outcome is a row's failure, not the harness's
            if self.error is not None and _own(error) and setting.name != ORACLE and re.search(self.error, str(error)):
                return AS_EXPECTED
            return f"raised {type(error).__name__}: {_short(error)}"
        finally:
            if setting.name in (COMPILED, INDUCTOR):
                torch._dynamo.reset()
        if self.error is None or self.or_equal or setting.name == ORACLE:
            return AS_EXPECTED
        return f"raised nothing, expected {self.error!r}"


def _own(error: Exception) -> bool:
    """Whether the package raised the error itself (and torch did not)."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError | TypeError | RuntimeError) and frames[-1].filename.startswith(PACKAGE)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def seed(value: int = 3) -> None:
    """Every source of random numbers that a layer may draw from."""
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def cells(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """The parametrisation of a table: each row in each of its settings, all but the first of them in `make test-long`."""
    assert len({row.name for row in rows}) == len(rows)
    return pytest.mark.parametrize(
        ("row", "setting"),
        [
            pytest.param(
                row, setting, id=f"{row.name} [{setting}]", marks=[pytest.mark.slow] if setting != EAGER else []
            )
            for row in rows
            for setting in row.settings
        ],
    )
