from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from sweeps.errors import TableError
from sweeps.table_references import Reference, dump_references, load_references
from sweeps.tables import known_tables, load_table, scaled, with_references

SHIPPED = Path(__file__).parents[2] / "sweeps"
HEADER = "table,dataset,method,mean,spread,spread_kind,seeds,source,note\n"
OWN = """
title: Two methods
paper: nobody's
metric: score
unit: score
reference: own
protocol: {seeds: 2, updates: 20000, evaluations: 20}
rows:
  - {name: medium, dataset: embedded/pendulum-medium-v0, values: {target: offsweep/Pendulum-gravity-0.5-v1}}
  - {name: random, dataset: embedded/pendulum-random-v0, values: {target: offsweep/Pendulum-gravity-2-v1}}
columns:
  - {name: RAVL, settings: {method: ravl, method.num_critics: 5}}
  - {name: VGDF, settings: {method: vgdf, method.target: "{target}", method.start_gate: 3000}, updates: 40000}
  - {name: other, reference_only: no such method here}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(OWN, encoding="utf-8")
    (tmp_path / "own.csv").write_text(HEADER + "own,medium,RAVL,80,5,std,4,somewhere,\n", encoding="utf-8")
    return tmp_path / "own.yaml"


def changed(own: Path, **changes: object) -> Path:
    content = yaml.safe_load(OWN)
    for key, value in changes.items():
        block = content
        *path, last = key.split("__")
        for part in path:
            block = block[int(part)] if part.isdigit() else block[part]
        block[last] = value
    own.write_text(yaml.safe_dump(content), encoding="utf-8")
    return own


def test_a_cell_is_words_for_train_with_its_reference(own):
    table = load_table(own)
    assert [(cell.row.name, cell.column.name) for cell in table.cells()][:2] == [("medium", "RAVL"), ("medium", "VGDF")]
    cell = table.cell("medium", "RAVL")
    assert cell.words == [
        "dataset=embedded/pendulum-medium-v0", "method=ravl", "method.num_critics=5", "method.num_updates=20000",
        "method.updates_per_epoch=1000", "seed=0", "num_seeds=2", "evaluation.episodes=10", "evaluation.every_epochs=1",
    ]  # fmt: skip
    assert cell.reference == Reference(80.0, 5.0, "std", 4, "somewhere")
    assert (cell.reference.std, cell.not_comparable, table.watermark) == (5.0, "", "")
    vgdf = table.cell("random", "VGDF")
    assert "method.target=offsweep/Pendulum-gravity-2-v1" in vgdf.words
    assert "evaluation.every_epochs=2" in vgdf.words
    assert vgdf.reference.mean is None
    assert not table.cell("medium", "other").trained
    with pytest.raises(TableError, match="no column 'RAVE'; did you mean 'RAVL'"):
        table.cell("medium", "RAVE")


def test_a_reduced_table_shrinks_all_that_is_counted_in_updates_and_says_so(own):
    table = scaled(load_table(own), 0.1)
    vgdf = table.cell("medium", "VGDF")
    assert vgdf.updates == 4000
    assert {"method.num_updates=4000", "method.start_gate=1000", "evaluation.every_epochs=1"} <= set(vgdf.words)
    assert table.cell("medium", "RAVL").updates == 2000
    assert "0.1 of the updates" in table.watermark
    assert table.cell("medium", "RAVL").not_comparable == table.watermark
    assert scaled(table, 0.001).cell("medium", "RAVL").updates == 1000  # an epoch is the least
    assert scaled(table, 1).watermark == ""
    for wrong in (0, 1.5, True, "0.1"):
        with pytest.raises(TableError, match="scale of a table"):
            scaled(table, wrong)


def test_a_scale_must_leave_as_many_evaluations_as_are_averaged(own):
    table = load_table(changed(own, protocol__selection="average"))
    assert scaled(table, 0.5).cell("medium", "RAVL").updates == 10000
    with pytest.raises(TableError, match="RAVL has only 8 epochs"):
        scaled(table, 0.4)


def test_single_cells_may_differ(own):
    cells = [
        {"row": "random", "column": "RAVL", "settings": {"method.num_critics": 10}, "not_comparable": "ten critics"}
    ]
    table = load_table(changed(own, cells=cells))
    assert "method.num_critics=10" in table.cell("random", "RAVL").words
    assert table.cell("random", "RAVL").not_comparable == "ten critics"
    assert "method.num_critics=5" in table.cell("medium", "RAVL").words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colums": []}, "unknown key 'colums'; did you mean 'columns'"),
        ({"protocol__seed": 1}, "protocol: unknown key 'seed'; did you mean 'seeds'"),
        ({"protocol__seeds": "five"}, "protocol.seeds must be a whole number"),
        ({"protocol__seeds": True}, "protocol.seeds must be a whole number"),
        ({"protocol__episodes": 0}, "protocol.episodes must be at least 1"),
        ({"protocol__selection": "lst"}, "unknown protocol.selection 'lst'; did you mean 'last'"),
        ({"protocol": {"seeds": 2}}, "protocol has no updates"),
        ({"protocol__updates": 1500}, "must be a multiple of its 1000"),
        ({"rows": []}, "rows must be a list"),
        ({"rows__1__name": "medium"}, "'medium' is listed twice"),
        ({"rows__0__dataset": ""}, "has no dataset"),
        ({"rows__0__values": {}}, "needs values.target of row 'medium'"),
        ({"columns__0__settings": {}}, "'RAVL' has no method"),
        ({"columns__0__settings__num_seeds": 3}, "settings.num_seeds is the protocol's"),
        ({"columns__0__settings__method": {"name": "ravl"}}, "write its keys with dots"),
        ({"columns__1__settings__method.start_gate": 0.5}, "whole number of updates"),
        ({"columns__2__settings": {"method": "bc"}}, "settings and reference_only"),
        ({"columns__0__study": "revisitng"}, "unknown study 'revisitng'; did you mean 'revisiting'"),
        ({"cells": [{"row": "medium", "column": "MOPO"}]}, "no column 'MOPO'"),
        ({"reference": "ownn"}, "no references 'ownn'"),
        ({"columns__0__name": "RAVE"}, "has no column 'RAVL'; did you mean 'RAVE'"),
        ({"scale": 2}, "scale of a table must be above 0"),
        ({"title": 5}, "title must be words"),
    ],
)  # fmt: skip
def test_a_bad_table_is_one_sentence(own, changes, says):
    with pytest.raises(TableError) as error:
        load_table(changed(own, **changes))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_missing_and_broken_files(own, tmp_path):
    with pytest.raises(TableError, match="Unknown table 'ravl-table-3'; did you mean 'ravl-table-2'"):
        load_table("ravl-table-3")
    with pytest.raises(TableError, match=r"Cannot read the table in .*none.yaml: No such file"):
        load_table(tmp_path / "none.yaml")
    for text, says in (("rows: [", "Cannot read"), ("- 1", "must be a block"), ("title: a\ntitle: b", "stands twice")):
        own.write_text(text, encoding="utf-8")
        with pytest.raises(TableError, match=says) as error:
            load_table(own)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "has no column table"),
        (HEADER.replace("spread,", "std,", 1), "unknown column 'std'"),
        (HEADER.replace(",note", ""), "has no column note"),
        (HEADER + "own,medium,RAVL,1,2,std\n", "line 2: it must have 9 fields"),
        (HEADER + "own,medium,RAVL,1,2,std,4,here,,\n", "line 2: it must have 9 fields"),
        (HEADER + "own,medium,RAVL,much,2,std,4,here,\n", "line 2: mean must be a finite number, or empty, not 'much'"),
        (HEADER + "own,medium,RAVL,nan,2,std,4,here,\n", "mean must be a finite number"),
        (HEADER + "own,medium,RAVL,1,-2,std,4,here,\n", "spread must be 0 or greater"),
        (HEADER + "own,medium,RAVL,1,2,sd,4,here,\n", "unknown spread_kind 'sd'; did you mean 'std'"),
        (HEADER + "own,medium,RAVL,1,,std,4,here,\n", "spread_kind is 'std' but spread is empty"),
        (HEADER + "own,medium,RAVL,1,2,std,0,here,\n", "seeds must be a whole number"),
        (HEADER + "own,medium,RAVL,1,2,std,4,,\n", "source is empty"),
        (HEADER + "own,medium,RAVL,,2,std,4,,lost\n", "a spread but no mean"),
        (HEADER + "own,medium,RAVL,,,,,,\n", "mean and note are empty"),
        (HEADER + "own,,RAVL,1,2,std,4,here,\n", "dataset is empty"),
        (HEADER + 2 * "own,medium,RAVL,1,2,std,4,here,\n", "line 3: RAVL on medium has a line above"),
        (HEADER + 'own,medium,"RAVL\n', "this is no CSV"),
        (HEADER + "other,medium,RAVL,1,2,std,4,here,\n", "must be of the table 'own', not other"),
        (HEADER + "own,mediun,RAVL,1,2,std,4,here,\n", "has no row 'mediun'; did you mean 'medium'"),
    ],
)
def test_bad_references_are_one_sentence(own, lines, says):
    own.with_suffix(".csv").write_text(lines, encoding="utf-8")
    with pytest.raises(TableError) as error:
        load_table(own)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_references_are_read_as_spreadsheets_save_them_and_written_back(own, tmp_path):
    path = tmp_path / "refs.csv"
    path.write_text(
        "\ufeff" + HEADER.replace("\n", "\r\n") + 'own,random,RAVL,7.5,2,population-std,4,"a, b",\r\n', encoding="utf-8"
    )
    found = load_references(path)
    assert found["own"]["random", "RAVL"].source == "a, b"
    assert found["own"]["random", "RAVL"].std == pytest.approx(2 * (4 / 3) ** 0.5)
    path.write_text(dump_references(found), encoding="utf-8")
    assert load_references(path) == found
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match="no UTF-8"):
        load_references(path)

    table = with_references(load_table(own), found["own"])
    assert table.cell("random", "RAVL").reference.mean == 7.5
    assert table.cell("medium", "RAVL").reference.mean == 80.0
    with pytest.raises(TableError, match="has no row 'expert'"):
        with_references(table, {("expert", "RAVL"): Reference(1.0, source="here")})


def test_shipped_references_say_of_every_cell_what_was_read_or_why_not():
    assert len(known_tables()) == 13
    read = 0
    for name in known_tables():
        table = load_table(name)
        for cell in table.cells():
            assert (cell.row.name, cell.column.name) in table.references, (name, cell.row.name, cell.column.name)
            read += cell.reference.mean is not None
    assert read == 345
    cell = load_table("vgdf-table-1").cell("hopper - short feet", "VGDF+BC")
    assert (cell.reference.mean, cell.reference.std, cell.reference.seeds) == (3060.0, 60.0, 5)
    assert "Table 1" in cell.reference.source
    assert "matches no environment" in cell.not_comparable
    assert load_table("vgdf-reduced").watermark.startswith("REDUCED: 0.1")


def test_a_shipped_table_can_be_copied_and_changed(tmp_path):
    shutil.copy(SHIPPED / "tables" / "edge-of-reach.yaml", tmp_path / "mine.yaml")
    assert len(list(load_table(tmp_path / "mine.yaml").cells())) == 3  # with the shipped references


def test_tables_are_values():
    table = load_table("edge-of-reach")
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.scale = 0.5  # type: ignore[misc]
