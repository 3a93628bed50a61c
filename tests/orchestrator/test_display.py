from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.display import score_label, value_unit
from tests.orchestrator.studies import configured, dataset_of


@pytest.mark.parametrize(
    ("made_in", "evaluated_in", "label"),
    [
        ("Hopper-v4", None, "D4RL reference; Gymnasium Hopper-v4 (D4RL: v2)"),
        (
            "Hopper-v4", "Hopper-v5",
            "D4RL reference; measured in Hopper-v5: not comparable with D4RL's v2 numbers; the data is of Hopper-v4",
        ),
        ("Hopper-v5", None, "D4RL reference; measured in Hopper-v5: not comparable with D4RL's v2 numbers"),
    ],
)  # fmt: skip
def test_scores_say_where_they_were_measured(workdir: Path, made_in: str, evaluated_in: str | None, label: str):
    config = configured(workdir)
    dataset = replace(dataset_of(config), env_id=made_in)
    config.evaluation.env_id = evaluated_in
    assert value_unit(config, dataset) == "score"
    assert score_label(config, dataset) == label


def test_returns_without_a_reference_pair_say_so(workdir: Path):
    config = configured(workdir)
    dataset = replace(dataset_of(config), env_id="MountainCarContinuous-v0")
    assert value_unit(config, dataset) == "return"
    assert score_label(config, dataset) == "mean returns in MountainCarContinuous-v0"
