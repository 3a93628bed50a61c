"""Configuration: what goes over what, what is refused with which sentence, and what makes runs share a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.method import load_method, method_settings
from envs.errors import UserError
from orchestrator.config import (
    Config,
    apply_params,
    check_space,
    identity,
    load_config,
    pack_key,
    run_config,
    to_dict,
    to_yaml,
)
from orchestrator.hashing import digest

PENDULUM = "dataset=embedded/pendulum-medium-v0"


def resolved(*overrides: str, files: Any = ()) -> Config:
    return load_config(list(files), ["method=ravl", PENDULUM, *overrides])


# ---- precedence -----------------------------------------------------------------------------------------------------


def test_command_line_goes_over_files_and_files_over_the_methods_settings(tmp_path: Path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "method:\n  name: ravl\n  num_critics: 7\n  eta: 0.5\ndataset: embedded/pendulum-medium-v0\nseed: 3\n"
    )
    config = load_config([file], ["method.eta=2", "evaluation.episodes=4"])
    assert (config.method.eta, config.evaluation.episodes) == (2.0, 4)  # command line
    assert (config.method.num_critics, config.seed) == (7, 3)  # file
    _, settings = method_settings("ravl", "embedded/pendulum-medium-v0", None)
    plain = load_method("ravl").Config()
    assert config.method.rollout_batch == settings["rollout_batch"] != plain.rollout_batch  # the method's settings
    assert "max_alpha" not in settings
    assert config.method.max_alpha == plain.max_alpha  # the class


def test_a_later_file_goes_over_an_earlier_one():
    config = resolved(files=[{"seed": 1, "num_seeds": 2}, {"seed": 5}])
    assert (config.seed, config.num_seeds) == (5, 2)


def test_the_settings_follow_the_dataset_and_the_variant():
    assert load_config([], ["method=ravl", "dataset=hopper-medium-v2"]).method.num_critics == 10
    assert load_config([], ["method=ravl", PENDULUM]).method.num_critics == 5
    edac = load_config([], ["method=ravl", "dataset=hopper-medium-v2", "method.variant=edac-grid"]).method
    assert (edac.num_critics, edac.variant) == (50, "edac-grid")
    year = load_config([], ["method=mobile", "dataset=walker2d-medium-v2", "method.variant=2023"]).method
    assert (year.penalty_coef, year.variant) == (1.0, "2023")


@pytest.mark.parametrize("block", ["ravl", {"name": "ravl"}])
def test_a_file_names_the_method_in_one_word_or_in_a_block(block: Any):
    config = load_config([{"method": block, "dataset": "embedded/pendulum-medium-v0"}], [])
    assert config.method_name == "ravl"


def test_the_command_line_can_change_the_method_of_a_file():
    file = {"method": "ravl", "dataset": "embedded/pendulum-medium-v0"}
    config = load_config([file], ["method=mopo", "method.penalty_coef=0.7"])
    assert (config.method_name, config.method.penalty_coef) == ("mopo", 0.7)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method=rvl", "unknown method 'rvl'; did you mean 'ravl'"),
        ("method=5", "unknown method '5'"),
        ("sed=1", "unknown key sed; did you mean seed?"),
        ("method.num_critic=3", "unknown key method.num_critic; did you mean method.num_critics?"),
        ("method.dynamics.hiden=[3]", "did you mean method.dynamics.hidden?"),
        ("compute.num_evaluator=1", "did you mean compute.num_evaluators?"),
        ("method_name=mopo", "unknown key method_name"),
        ("method.variant=paper", "has no variant 'paper'; choose one of: code, code-patience,"),
        ("seed=abc", "seed: Value 'abc' of type 'str' could not be converted to Integer"),
        ("seed=1.5", "seed: Value '1.5'"),
        ("method.hidden=[a]", "method.hidden[0]: Value 'a'"),
        ("method.num_critics=null", "method.num_critics: Incompatible value 'None'"),
        ("method.eta=${nothing}", "method.eta: Interpolation key 'nothing' not found"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("num_seeds=0", "num_seeds=0 must be at least 1"),
        ("evaluation.episodes=0", "evaluation.episodes=0 must be at least 1"),
        ("compute.num_learners=-1", "compute.num_learners=-1 must be at least 0"),
        ("compute.device=tpu", "must be auto, cpu or cuda"),
        ("method.gamma=1", "method.gamma=1.0 must lie in (0, 1)"),
        ("method.num_updates=10", "must be a multiple of method.updates_per_epoch=1000"),
        ("dataset=null", "no dataset given"),
        ("dataset=[a]", "dataset must be one name"),
        ("seed", "'seed' is not of the form key=value"),
        ("method.hidden=[3", "cannot read the overrides"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(override: str, sentence: str):
    with pytest.raises(UserError) as caught:
        resolved(override)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_of_a_source_that_is_not_used_is_refused():
    plain = ["method=td3_bc", "dataset=embedded/pendulum-medium-v0"]
    with pytest.raises(UserError, match=r"^method\.guidance\.coef has no effect with method\.synthetic\.source=none; "):
        load_config([], [*plain, "method.guidance.coef=1"])
    with pytest.raises(UserError, match=r"^method\.diffusion\.features has no effect with .*source=ensemble; "):
        load_config([], [*plain, "method.synthetic.source=ensemble", "method.diffusion.features=64"])
    used = load_config([], [*plain, "method.synthetic.source=diffusion", "method.guidance.coef=0.5"])
    assert load_config([to_dict(used)], ["method.synthetic.source=none"]).method.guidance.coef == 0.5
    space = {"method.guidance.coef": {"type": "float", "low": 0.1, "high": 1.0}}
    searching = load_config([{"study": {"name": "s", "space": space}}], plain)
    with pytest.raises(UserError, match=r"^method\.guidance\.coef has no effect"):
        check_space(searching)


def test_rollout_workers_and_a_gpu_exclude_each_other():
    with pytest.raises(UserError, match=r"^compute\.num_rollout_workers=2 must be 0 with compute\.device=cuda: "):
        resolved("compute.device=cuda", "compute.num_rollout_workers=2")
    assert resolved("compute.device=auto", "compute.num_rollout_workers=2").compute.num_rollout_workers == 2


@pytest.mark.parametrize("method", [None, [], 5, {"name": None}, {"eta": 1.0}])
def test_a_file_without_a_method_is_refused(method: Any):
    with pytest.raises(UserError, match="method"):
        load_config([{"method": method, "dataset": "embedded/pendulum-medium-v0"}], [])


@pytest.mark.parametrize(
    ("text", "sentence"), [("- a\n", "must hold a mapping"), ("a: [1\n", "is not valid YAML"), (None, "cannot read")]
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | None, sentence: str):
    file = tmp_path / "study.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_config([file], [])


# ---- runs and packs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ravl", "mopo"])
def test_the_stored_configuration_of_a_run_gives_that_run_again(tmp_path: Path, method: str):
    config = load_config([], [f"method={method}", PENDULUM, "num_seeds=3", "study.num_trials=2", "method.tau=0.01"])
    run = run_config(config, {"method.num_critics": 3, "method.dynamics.learning_rate": 2e-3}, seed=2)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(run))
    again = load_config([file], [])
    assert to_dict(again) == to_dict(run)
    assert (again.seeds, again.study.num_trials, again.method.num_critics) == ([2], 1, 3)
    assert (again.method.tau, again.method.dynamics.learning_rate) == (0.01, 2e-3)
    assert digest(identity(again, "hash")) == digest(identity(run, "hash"))


def test_the_identity_of_a_run_is_what_its_result_depends_on():
    def key(*overrides: str, dataset_hash: str = "a") -> str:
        return digest(identity(resolved(*overrides), dataset_hash))

    assert key() == key("compute.num_evaluators=2", "workdir=/elsewhere", "study.num_trials=1")
    others = {
        key("seed=1"), key("method.eta=3"), key("method.dynamics.seed=1"), key("evaluation.episodes=3"),
        key(dataset_hash="b"),
    }  # fmt: skip
    assert len(others | {key()}) == 6


@pytest.mark.parametrize(
    "override",
    ["method.eta=3", "method.actor_lr=1e-3", "method.critic_lr=1e-3", "method.alpha_lr=1e-3", "seed=4", "num_seeds=2",
     "compute.threads=2"],
)  # fmt: skip
def test_runs_that_differ_in_arithmetic_share_a_pack(override: str):
    assert pack_key(resolved(override)) == pack_key(resolved())


@pytest.mark.parametrize(
    "override",
    ["method.num_critics=3", "method.hidden=[8,8]", "method.rollout_length=2", "method.batch_size=8",
     "method.gamma=0.9",
     "method.num_updates=1000", "method.updates_per_epoch=500", "method.dynamics.seed=1", "evaluation.episodes=3",
     "evaluation.every_epochs=2", "dataset=embedded/pendulum-random-v0", "method=mopo", "method.eta=0"],
)  # fmt: skip
def test_runs_that_differ_in_shape_schedule_or_data_do_not_share_a_pack(override: str):
    assert pack_key(resolved(override)) != pack_key(resolved())


def test_the_penalty_is_per_member():
    keys = {pack_key(load_config([], ["method=mopo", PENDULUM, f"method.penalty_coef={c}"])) for c in (0.1, 2.0)}
    assert len(keys) == 1


def test_parameters_of_a_trial_are_applied_and_checked():
    config = apply_params(resolved(), {"method.eta": 0.25, "method.dynamics.hidden": [8, 8]})
    assert (config.method.eta, config.method.dynamics.hidden) == (0.25, [8, 8])
    with pytest.raises(UserError, match="num_critics of at least 2"):
        apply_params(resolved(), {"method.num_critics": 1})


# ---- search spaces --------------------------------------------------------------------------------------------------

ETA = {"method.eta": {"type": "float", "low": 0.1, "high": 1.0}}


def searched(space: Any, **study: Any) -> Config:
    return resolved(files=[{"study": {"name": "s", "num_trials": 4, "space": space, **study}}])


def test_a_sensible_space_passes():
    space = {**ETA, "method.rollout_length": {"type": "categorical", "choices": [1, 5]}}
    spec = check_space(searched(space, enqueue=[{"method.eta": 0.3}]))
    assert (spec.num_trials, spec.total_steps) == (4, 20_000)


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"method.etta": ETA["method.eta"]}, "unknown key method.etta; did you mean method.eta?"),
        ({"seed": {"type": "int", "low": 0, "high": 3}}, "'seed' cannot be searched"),
        ({"method.num_critics": {"type": "int", "low": 0, "high": 3}}, "method.num_critics=0 must be greater than 0"),
        ({"method.num_critics": {"type": "int", "low": 1, "high": 3}}, "method.num_critics of at least 2"),
        ({"method.num_critics": {"type": "float", "low": 2.5, "high": 3.5}}, "could not be converted to Integer"),
        ({"method.initialisation": {"type": "categorical", "choices": ["torch", "xavier"]}}, "'xavier'"),
        ({"method.num_critics": {"type": "categorical", "choices": 5}}, "method.num_critics: choices"),
        ({"method.eta": 5}, "method.eta: expected"),
        ([], "study.space|same key"),
        ({}, "study.space varies nothing"),
    ],
)
def test_a_space_with_keys_or_values_that_the_method_refuses(space: Any, sentence: str):
    with pytest.raises(UserError, match=sentence):
        check_space(searched(space))


@pytest.mark.parametrize("params", [{"method.eta": 5.0}, {"method.tau": 0.5}, {"method.etta": 0.5}])
def test_an_enqueued_trial_outside_the_space_is_refused(params: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(params))):
        check_space(searched(ETA, enqueue=[params]))


def test_yaml_keeps_plain_values_only():
    assert yaml.safe_load(to_yaml(resolved())) == to_dict(resolved())


@pytest.mark.parametrize(
    ("method", "params"),
    [("ravl", {"method.eta": 2, "method.hidden": [32, 32], "method.dynamics.learning_rate": 1}),
     ("mopo", {"method.variant": "official", "method.rollout_length": 3}),
     ("td3_bc", {"method.actor_lr": 0.01})],
)  # fmt: skip
def test_a_trial_is_configured_as_if_everything_were_resolved_anew(method: str, params: dict[str, Any]):
    config = load_config([], [f"method={method}", PENDULUM])
    trial = apply_params(config, params)
    nested: dict[str, Any] = {}
    for key, value in params.items():
        *blocks, name = key.removeprefix("method.").split(".")
        block = nested
        for one in blocks:
            block = block.setdefault(one, {})
        block[name] = value
    assert repr(trial) == repr(load_config([to_dict(config), {"method": nested}], []))
    trial.evaluation.episodes += 1
    assert config.evaluation.episodes == trial.evaluation.episodes - 1  # they share nothing


def test_what_a_trial_may_not_have_is_refused_with_its_full_key():
    with pytest.raises(UserError, match=r"unknown key method\.dynamics\.learning_rat; did you mean"):
        apply_params(resolved(), {"method.dynamics.learning_rat": 1.0})
    with pytest.raises(UserError, match=r"method\.eta: .*many"):
        apply_params(resolved(), {"method.eta": "many"})
