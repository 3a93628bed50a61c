from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from envs.errors import UserError
from sweeps.samplers import check_sampler
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec

SPACE = {"x": {"type": "float", "low": 1e-5, "high": 1.0, "log": True}}


def test_a_spec_survives_its_file(tmp_path):
    spec = StudySpec(
        "hopper", SPACE, SamplerSpec("gp", 7), PrunerSpec("none", 0.25, 2), 30, 4, "minimize", total_steps=500
    )
    spec.save(tmp_path / "study.yaml")
    assert StudySpec.load(tmp_path / "study.yaml") == spec
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_it_is_a_block_of_a_structured_configuration():
    config = OmegaConf.merge(
        OmegaConf.structured(StudySpec("hopper", SPACE)),
        OmegaConf.from_dotlist(["num_trials=9", "sampler.name=qmc", "space.x.high=0.5"]),
    )
    spec = OmegaConf.to_object(config)
    assert isinstance(spec, StudySpec)
    assert (spec.num_trials, spec.sampler) == (9, SamplerSpec("qmc", 0))
    assert spec.validate().parameters["x"].high == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, ["study.name"]),
        ({"num_trials": 0}, ["num_trials", "at least 1"]),
        ({"seeds_per_trial": 0}, ["seeds_per_trial"]),
        ({"total_steps": 1.5}, ["total_steps", "1.5"]),
        ({"direction": "maximise"}, ["'maximise'", "did you mean 'maximize'"]),
        ({"sampler": SamplerSpec("tpee")}, ["'tpee'", "did you mean 'tpe'"]),
        ({"sampler": SamplerSpec("tpe", -1)}, ["sampler.seed", "-1"]),
        ({"pruner": PrunerSpec("meidan")}, ["'meidan'", "did you mean 'median'"]),
        ({"pruner": PrunerSpec("median", 33)}, ["warmup_fraction", "33"]),
        ({"space": {}, "num_trials": 2}, ["study.space", "the same"]),
        ({"space": {"x": {"type": "float"}}}, ["x", "'low' is missing"]),
    ],
)
def test_a_senseless_study_is_refused_by_a_sentence(changes, words):
    spec = StudySpec("hopper", SPACE, num_trials=3)
    spec.validate()
    with pytest.raises(UserError) as caught:
        replace(spec, **changes).validate()
    assert [word for word in words if word not in str(caught.value)] == []


def test_an_unknown_setting_in_the_file_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text("name: hopper\npruner: {warmup: 0.5}\n")
    with pytest.raises(UserError, match=r"study\.pruner\.warmup; did you mean 'warmup_fraction'"):
        StudySpec.load(tmp_path / "study.yaml")


def test_an_unknown_sampler_is_named_with_its_neighbour():
    with pytest.raises(UserError, match="did you mean 'random'"):
        check_sampler("randm")
