import pytest
import yaml

from envs.errors import UserError
from sweeps.space import SearchSpace

CONFIG = yaml.safe_load(
    """
    method.eta: {type: float, low: 0.1, high: 10.0, log: true}
    method.num_critics: {type: int, low: 2, high: 10, step: 4}
    method.penalty: {type: categorical, choices: [none, max_aleatoric, std]}
    method.penalty_coef: {type: float, low: 0.01, high: 10, when: {method.penalty: [max_aleatoric, std]}}
    method.penalty_clip: {type: float, low: 1, high: 5, when: {method.penalty_coef_kind: clipped}}
    method.penalty_coef_kind: {type: categorical, choices: [plain, clipped], when: {method.penalty: std}}
    """
)


def point(**changes):
    values = {
        "method.eta": 1.0,
        "method.num_critics": 6,
        "method.penalty": "none",
        "method.penalty_coef": 1.0,
        "method.penalty_clip": 2.0,
        "method.penalty_coef_kind": "clipped",
    }
    return {**values, **{f"method.{key}": value for key, value in changes.items()}}


def test_every_parameter_has_a_distribution_conditional_or_not():
    distributions = SearchSpace.from_config(CONFIG).distributions()
    assert list(distributions) == list(CONFIG)
    assert vars(distributions["method.eta"]) == {"low": 0.1, "high": 10.0, "log": True, "step": None}
    assert vars(distributions["method.num_critics"]) == {"low": 2, "high": 10, "log": False, "step": 4}
    assert distributions["method.penalty"].choices == ("none", "max_aleatoric", "std")


@pytest.mark.parametrize(
    ("penalty", "kind", "inactive"),
    [
        ("none", "clipped", {"penalty_coef", "penalty_clip", "penalty_coef_kind"}),
        ("max_aleatoric", "clipped", {"penalty_clip", "penalty_coef_kind"}),
        ("std", "plain", {"penalty_clip"}),
        ("std", "clipped", set()),
    ],
)
def test_a_parameter_is_active_where_all_it_hangs_on_is(penalty, kind, inactive):
    params = point(penalty=penalty, penalty_coef_kind=kind)
    active = SearchSpace.from_config(CONFIG).active(params)
    assert params.keys() - active.keys() == {f"method.{key}" for key in inactive}
    assert all(active[key] == params[key] for key in active)


def test_a_number_and_a_truth_value_are_not_the_same_condition():
    config = {
        "n": {"type": "int", "low": 0, "high": 3},
        "x": {"type": "float", "low": 0, "high": 1, "when": {"n": True}},
    }
    with pytest.raises(UserError, match="n = true"):
        SearchSpace.from_config(config)


def entry(**fields):
    return {"a.b": fields, "a.kind": {"type": "categorical", "choices": ["x", "y"]}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (entry(type="flaot", low=0, high=1), ["a.b", "'flaot'", "did you mean 'float'"]),
        (entry(low=0, high=1), ["a.b", "'type' is missing"]),
        (entry(type="float", low=0), ["a.b", "'high' is missing"]),
        (entry(type="float", high=0), ["a.b", "'low' is missing"]),
        (entry(type="float", low=1, high=1), ["a.b", "low (1.0) must be below high (1.0)"]),
        (entry(type="float", low=2, high=1), ["a.b", "must be below"]),
        (entry(type="float", low=0, high=1, log=True), ["a.b", "log", "low > 0"]),
        (entry(type="float", low=0, high=float("nan")), ["a.b", "high", "finite"]),
        (entry(type="float", low="1e-4", high=1), ["a.b", "low", "'1e-4'", "decimal point"]),
        (entry(type="int", low=0.5, high=3), ["a.b", "whole number", "0.5"]),
        (entry(type="float", low=0, high=1, log="yes"), ["a.b", "log must be true or false"]),
        (entry(type="float", low=0, high=1, step=0.3), ["a.b", "step (0.3)", "divide"]),
        (entry(type="int", low=1, high=8, step=1, log=True), ["a.b", "step and log"]),
        (entry(type="categorical"), ["a.b", "'choices' is missing"]),
        (entry(type="categorical", choices=[]), ["a.b", "choices is empty"]),
        (entry(type="categorical", choices="xy"), ["a.b", "must be a list"]),
        (entry(type="categorical", choices=[[256, 256]]), ["a.b", "[256, 256]"]),
        (entry(type="categorical", choices=[1, True]), ["a.b", "true is listed twice"]),
        (entry(type="float", low=0, hihg=1), ["a.b", "'hihg'", "did you mean 'high'"]),
        (entry(type="categorical", choices=[1, 2], low=0), ["a.b", "'low'", "choices"]),
        (
            entry(type="float", low=0, high=1, when={"a.knd": ["x"]}),
            ["a.b", "'a.knd'", "did you mean 'a.kind'"],
        ),
        (entry(type="float", low=0, high=1, when={"a.kind": ["z"]}), ["a.b", "a.kind = 'z'", "'x', 'y'"]),
        (entry(type="float", low=0, high=1, when={"a.kind": []}), ["a.b", "lists no value"]),
        (entry(type="float", low=0, high=1, when={"a.b": [0.5]}), ["a.b", "a float"]),
        (entry(type="float", low=0, high=1, when="a.kind"), ["a.b", "when must map"]),
        ({"a.b": 3}, ["a.b", "expected", "3"]),
    ],
)
def test_a_senseless_entry_is_refused_by_a_sentence_that_names_it(config, words):
    with pytest.raises(UserError) as caught:
        SearchSpace.from_config(config)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_conditions_in_a_circle_are_refused():
    config = {
        "a": {"type": "int", "low": 0, "high": 1, "when": {"b": 1}},
        "b": {"type": "int", "low": 0, "high": 1, "when": {"c": 1}},
        "c": {"type": "int", "low": 0, "high": 1, "when": {"a": 1}},
    }
    with pytest.raises(UserError, match="a -> b -> c -> a"):
        SearchSpace.from_config(config)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"method.etta": 1.0}, ["'method.etta'", "did you mean 'method.eta'"]),
        ({"method.eta": 10.5}, ["method.eta = 10.5", "0.1 to 10.0"]),
        ({"method.num_critics": 4}, ["method.num_critics = 4", "steps of 4"]),
        ({"method.num_critics": 2.5}, ["method.num_critics = 2.5"]),
        ({"method.penalty": "max"}, ["'max'", "'max_aleatoric'"]),
        ({"method.eta": float("nan")}, ["method.eta = nan"]),
    ],
)
def test_a_point_outside_is_refused(params, words):
    space = SearchSpace.from_config(CONFIG)
    space.check(point())
    with pytest.raises(UserError) as caught:
        space.check(params)
    assert [word for word in words if word not in str(caught.value)] == []
