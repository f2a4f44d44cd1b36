"""The table's own ruler: on every model of the table, the definition at eps = 0 is a plain training pass."""

from __future__ import annotations

import pytest
from fault_rows import AS_EXPECTED, ORACLE, Setting
from fault_worker import table


@pytest.mark.parametrize("name", [name for name, row in table().items() if row.oracle])
def test_definition_without_an_adversary_is_a_plain_pass(name: str) -> None:
    assert table()[name].outcome(Setting(ORACLE)) == AS_EXPECTED
