"""The objective of a study: what is refused, and that studies of before there was one open as they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sweeps.errors import StudyError
from sweeps.objectives import ObjectiveSpec
from sweeps.spec import StudySpec


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kind": "offlin"}, "did you mean 'offline'"),
        ({"kind": "offline"}, "metric=score is not there to be seen"),
        ({"kind": "offline", "metric": "fqee"}, "did you mean 'fqe'"),
        ({"metric": "fqe"}, "needs no episodes"),
        ({"kind": "hybrid", "metric": "fqe"}, "at least 8, not 0"),
        ({"kind": "offline", "metric": "fqe", "pulls": 5}, "that kind=offline does not have"),
        ({"kind": "offline", "metric": "fqe", "fqe_updates": 0}, "fqe_updates must be a whole number"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(StudyError, match=word):
        StudySpec("s", objective=ObjectiveSpec(**settings)).validate()  # type: ignore[arg-type]


def test_the_objective_is_kept_with_the_study_and_may_be_missing(tmp_path: Path) -> None:
    spec = StudySpec("s", objective=ObjectiveSpec("hybrid", "fqe", pulls=20))
    spec.save(tmp_path / "study.yaml")
    assert StudySpec.load(tmp_path / "study.yaml") == spec
    content = yaml.safe_load((tmp_path / "study.yaml").read_text())
    del content["objective"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    assert StudySpec.load(tmp_path / "study.yaml").objective == ObjectiveSpec()
