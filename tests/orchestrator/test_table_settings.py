"""The tables of `sweeps/tables/` as `offsweep train` takes them."""

from __future__ import annotations

from typing import Any

import pytest

from agents.penalties import PENALTIES
from agents.refrigerator import CONTROLLERS, DRAW, FILTERED, MEAN, NEAREST
from orchestrator import labs
from orchestrator.config import load_config, to_dict
from sweeps.tables import COUNTED_IN_UPDATES, known_tables, load_table, scaled


def value_of(config: dict[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


def has_effect(config: dict[str, Any], key: str) -> bool:
    if key == "method.source_updates":
        return bool(value_of(config, "method.learn_from") == "source-then-target")
    if key.startswith(("method.synthetic.", "method.diffusion.")):
        return bool(value_of(config, "method.synthetic.source") == "diffusion")
    of_filter = key == "method.start_gate" or key.startswith("method.dynamics.")
    return not of_filter or value_of(config, "method.filter") != "none"


@pytest.mark.parametrize("name", known_tables())
def test_every_cell_is_a_training_and_a_reduced_one_has_fewer_of_all_that_is_counted_in_updates(name):
    whole, small = scaled(load_table(name), 1), scaled(load_table(name), 0.05)
    for column in whole.columns:
        cell = whole.cell(whole.rows[-1].name, column.name)  # what differs by dataset are values, not kinds of settings
        reduced = small.cell(cell.row.name, column.name)
        if not cell.trained:
            continue
        full, less = (to_dict(load_config([], words)) for words in (cell.words, reduced.words))
        assert value_of(full, "method.num_updates") == cell.updates
        assert value_of(less, "method.num_updates") == reduced.updates
        for key in ("method.num_updates", *COUNTED_IN_UPDATES):
            count = value_of(full, key)
            if count and has_effect(full, key):
                few = value_of(less, key)
                assert few < count, (column.name, key)
                assert few == pytest.approx(0.05 * count, abs=1000), (column.name, key)  # an epoch is the least


def test_what_tables_take_of_labs_exists():
    assert {row.lab for name in known_tables() for row in load_table(name).rows if row.lab} <= set(labs.LABS)
    refrigerator = load_table("refrigerator")
    assert [row.reads for row in refrigerator.rows] == [controller.name for controller in CONTROLLERS]
    assert {column.reads for column in refrigerator.columns} == {DRAW, MEAN, FILTERED, NEAREST}
    assert {column.reads for column in load_table("revisiting-penalties").columns} == set(PENALTIES)
