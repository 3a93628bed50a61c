"""Warm starts: which points a study begins with, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.method import load_method, method_settings
from envs.errors import UserError
from orchestrator.artifacts import write_text
from orchestrator.config import Config, to_yaml
from orchestrator.plan import outlook
from orchestrator.warm_start import load, points, save, with_points
from sweeps.confirm import FINAL_VALUES, FOLDER, Candidate, save_candidates
from sweeps.spec import StudySpec
from sweeps.study import Study
from tests.orchestrator.studies import configured

SPACE: dict[str, Any] = {
    "method.eta": {"type": "float", "low": 0.001, "high": 100.0, "log": True},
    "method.num_critics": {"type": "int", "low": 2, "high": 60},
}


def searching(workdir: Path, *overrides: str, space: dict[str, Any] = SPACE, **warm_start: Any) -> Config:
    config = configured(workdir, *overrides, name="warm", num_trials=9, warm_start=warm_start)
    config.study.space = space
    return config


def earlier(workdir: Path, name: str, values: list[tuple[float, int, float]], *overrides: str) -> Path:
    """A finished study of (eta, num_critics, value)."""
    config = configured(workdir, *overrides, name=name, num_trials=len(values))
    config.study.space = SPACE
    folder = workdir / "studies" / name
    with Study.create(folder, config.study_spec()) as study:
        for eta, critics, _ in values:
            study.enqueue({"method.eta": eta, "method.num_critics": critics})
        for *_, value in values:
            ticket = study.ask()
            assert ticket is not None
            study.tell(ticket.number, value)
    write_text(folder / "config.yaml", to_yaml(config))
    return folder


def test_the_method_s_own_settings_come_first_then_those_of_variants(tmp_path: Path):
    # what the file overrides is not the method's own
    config = searching(tmp_path, "method.eta=0.5", settings=True, variants=["edac-grid", "code"])
    found = points(config)
    own = {v: method_settings("ravl", "tiny", v)[1] for v in (config.method.variant, "edac-grid", "code")}
    default = load_method("ravl").Config()
    wanted = [
        {f"method.{key}": block.get(key, getattr(default, key)) for key in ("eta", "num_critics")}
        for block in own.values()
    ]
    assert found == [point for i, point in enumerate(wanted) if point not in wanted[:i]]
    save(tmp_path, found)
    assert load(tmp_path) == found
    config.study.enqueue = [{"method.eta": 7.0}, found[0]]
    warm = with_points(config, found)
    assert warm.study.enqueue == [*found, {"method.eta": 7.0}]
    assert len(config.study.enqueue) == 2
    # a plan counts their shapes
    critics = [ahead.method.num_critics for ahead in outlook(warm, warm.study_spec()).configs.values()]
    assert found[0]["method.num_critics"] in critics


def test_the_best_of_earlier_studies_confirmed_ones_first(tmp_path: Path):
    folder = earlier(tmp_path, "other", [(0.1, 2, 5.0), (0.2, 3, 7.0), (0.3, 4, 9.0), (0.4, 5, 1.0)])
    config = searching(tmp_path, studies=["other"], top=3)
    etas = [point["method.eta"] for point in points(config)]
    assert etas == [0.3, 0.2, 0.1]
    save_candidates(folder / FOLDER, [Candidate(2, 9.0, {}), Candidate(1, 7.0, {})])
    listed: list[dict[str, Any]] = [{"method.eta": 0.3}, {"method.eta": 0.2}]
    with Study.create(folder / FOLDER, StudySpec("other", trials=listed, num_trials=2)) as study:
        for value in (2.0, 6.0):
            ticket = study.ask()
            assert ticket is not None
            study.set_attr(ticket.number, FINAL_VALUES, {"c": value})
            study.tell(ticket.number, value)
    assert [point["method.eta"] for point in points(config)] == [0.2, 0.3, 0.1]


def test_what_does_not_fit_is_refused_and_not_moved(tmp_path: Path):
    earlier(tmp_path, "other", [(0.1, 2, 5.0), (0.2, 3, 7.0)])
    narrow = {**SPACE, "method.eta": {"type": "float", "low": 0.15, "high": 1.0}}
    with pytest.raises(UserError, match=r"studies: other trial 0: method\.eta = 0\.1 is outside the search space"):
        points(searching(tmp_path, space=narrow, studies=["other"]))
    only_eta = {"method.eta": SPACE["method.eta"]}
    with pytest.raises(UserError, match=r"trial 1 has method\.num_critics=3, which is 2 here and not searched"):
        points(searching(tmp_path, space=only_eta, studies=["other"]))
    # of what the other study has not varied its fixed value counts
    wide = {**SPACE, "method.rollout_length": {"type": "int", "low": 1, "high": 5}}
    found = points(searching(tmp_path, "method.rollout_length=1", space=wide, studies=["other"]))
    assert [point["method.rollout_length"] for point in found] == [2, 2]
    with pytest.raises(UserError, match=r"studies: none is not in .*; it holds: other"):
        points(searching(tmp_path, studies=["none"]))
    with pytest.raises(UserError, match="no variant 'nonesuch'"):
        points(searching(tmp_path, variants=["nonesuch"]))
