from dataclasses import replace

import numpy as np
import pytest

from envs import environments, recipes
from envs.errors import UserError
from envs.recipes import CONTROLLER, EMBEDDED, RECIPES, UNIFORM, recipe


@pytest.fixture
def actors(monkeypatch):
    """Sets the names of the installed actors."""

    def install(*names: str) -> None:
        monkeypatch.setattr(recipes, "embedded_actors", lambda: sorted(names))

    return install


@pytest.mark.parametrize("robot", ["hopper", "halfcheetah", "walker2d", "pendulum"])
def test_d4rl_s_recipes(robot):
    def actors_of(kind: str) -> list[str]:
        shares = recipe(f"{robot}-{kind}").actors
        assert {weight for _, weight in shares} == {1.0}
        return [actor for actor, _ in shares]

    assert actors_of("random") == [UNIFORM]
    assert actors_of("medium") == [f"{robot}-medium"]
    assert actors_of("expert") == [f"{robot}-expert"]
    assert actors_of("medium-expert") == [f"{robot}-medium", f"{robot}-expert"]
    assert actors_of("medium-snapshots")[-1] == f"{robot}-medium"
    rows = {kind: recipe(f"{robot}-{kind}").rows for kind in ("random", "medium", "expert", "medium-expert")}
    assert rows == {"random": 10**6, "medium": 10**6, "expert": 10**6, "medium-expert": 2 * 10**6}


def test_snapshots_are_found_by_name_and_follow_the_training(actors):
    actors("hopper-medium", *(f"hopper-snapshot-{i}" for i in range(11)), "hopper-expert", "walker2d-snapshot-0")
    found = recipe("hopper-medium-snapshots")
    assert [actor for actor, _ in found.actors] == [*(f"hopper-snapshot-{i}" for i in range(11)), "hopper-medium"]
    assert found.available()


def test_a_missing_actor_is_named(actors):
    actors("hopper-medium")
    assert recipe("hopper-medium").available()
    assert recipe("hopper-random").available()
    for name, missing in [("hopper-medium-expert", "hopper-expert"), ("walker2d-medium-snapshots", "walker2d-snap")]:
        assert not recipe(name).available()
        with pytest.raises(UserError, match=f"'{name}' needs the embedded actor '{missing}"):
            recipe(name).policies()


def test_the_environment_s_version_can_be_chosen():
    assert recipe("walker2d-random").env_id == "Walker2d-v5"
    assert recipe("walker2d-random", "Walker2d-v4").env_id == "Walker2d-v4"
    with pytest.raises(UserError, match="for Walker2d-v5 and its other versions, not for 'Hopper-v5'"):
        recipe("walker2d-random", "Hopper-v5")


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no recipe 'hoper-medium'; nearest: hopper-medium"):
        recipe("hoper-medium")
    with pytest.raises(UserError, match=r"no recipe 'hopper-medium-replay'; nearest:.* hopper-medium-snapshots"):
        recipe("hopper-medium-replay")


def test_a_recipe_collects_its_shares_and_says_what_it_is(tmp_path):
    short = replace(recipe("pendulum-medium-snapshots"), rows=1200, seed=3)
    data = short.collect(name="small", path=tmp_path / "small.hdf5")
    assert (tmp_path / "small.hdf5").is_file()
    assert (data.name, data.env_id, data.num_transitions) == ("small", "Pendulum-v1", 1200)
    shares = data.provenance["policies"]
    assert [share.get("name", share["kind"]) for share in shares] == ["uniform", "pendulum-random", "pendulum-medium"]
    assert [share["rows"] for share in shares] == [[0, 400], [400, 800], [800, 1200]]
    assert data.provenance["recipe_name"] == "pendulum-medium-snapshots"
    assert "in place of D4RL's medium-replay, and not the same" in data.provenance["recipe_text"]
    assert data.provenance["seed"] == 3


def test_the_toys_have_recipes():
    environments.register()
    for name, action_range in [
        ("edge-of-reach-random", (-1, 1)), ("refrigerator-behaviour", (0, 10)), ("refrigerator-shut", (0, 10)),
    ]:  # fmt: skip
        data = replace(recipe(name), rows=300).collect()
        assert data.actions.min() >= action_range[0]
        assert data.actions.max() <= action_range[1]
        assert len(np.unique(data.actions)) > 100
    assert recipe("refrigerator-behaviour").actors == ((CONTROLLER, 1.0),)


def test_embedded_sets_are_recipes_with_fewer_rows():
    assert {spec.name for spec in EMBEDDED.values()} <= set(RECIPES)
    for spec in EMBEDDED.values():
        assert spec.rows <= 100_000
        assert spec.env_id == recipe(spec.name).env_id
    assert len({spec.seed for spec in EMBEDDED.values()}) == len(EMBEDDED)
