"""The shipped search over penalties: its points can be run, and it trains one ensemble."""

from __future__ import annotations

from agents.method import load_method, settings_file
from agents.penalties import PENALTIES
from orchestrator.artifacts import stage_key
from orchestrator.config import apply_params, check_space, corner_configs, load_config
from orchestrator.labs import STUDIES

STUDY = STUDIES / "revisiting.yaml"


def test_every_trial_uses_the_same_ensemble() -> None:
    config = load_config([STUDY], ["study.name=revisiting"])
    check_space(config)
    assert tuple(config.study.space["method.penalty"]["choices"]) == PENALTIES
    keys = {stage_key(load_method("mopo").stages(one.method)["dynamics"], "data") for one in corner_configs(config)}
    assert len(keys) == 1
    smallest = {"method.dynamics.use_members": 2, "method.penalty": "loo_kl", "method.rollout_length": 50}
    assert apply_params(config, smallest).method.dynamics.elites_used == 2


def test_the_first_trial_is_what_was_tuned_by_hand() -> None:
    """As agents/mopo.yaml has it for the dataset."""
    config = load_config([STUDY], ["study.name=revisiting"])
    (first,) = config.study.enqueue
    by_hand = settings_file("mopo")["variants"]["offlinerlkit"]
    block = by_hand["*"] | by_hand[config.dataset]
    assert first == {
        "method.penalty": "max_aleatoric", "method.penalty_coef": block["penalty_coef"],
        "method.dynamics.use_members": block["dynamics"]["ensemble_size"],
        "method.rollout_length": block["rollout_length"],
    }  # fmt: skip
    trial = apply_params(config, first).method
    assert (trial.penalty_scale, trial.dynamics.elites_used) == ("max_aleatoric", block["dynamics"]["num_elites"])
