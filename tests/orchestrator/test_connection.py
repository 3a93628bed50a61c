from typing import Any

import pytest

from envs.errors import UserError
from orchestrator.connection import capacity, check_answers, connected


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_one_sentence(address: str):
    with pytest.raises(UserError, match=f"no Ray cluster answers at {address}: .*; start it, or"):
        check_answers(address)


def test_a_ray_that_does_not_come_up_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def slow(**options: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", slow)
    sentence = r"Ray did not start on this machine \(The current node timed out"
    with pytest.raises(UserError, match=sentence), connected(None, 1):
        pass


def test_a_cluster_counts_with_what_its_autoscaler_may_start(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert capacity()["CPU"] == 2
    monkeypatch.setenv("OFFSWEEP_MAX_CPUS", "64")
    monkeypatch.setenv("OFFSWEEP_MAX_GPUS", "8")
    assert (capacity()["CPU"], capacity()["GPU"]) == (64, 8)
    monkeypatch.setenv("OFFSWEEP_MAX_GPUS", "many")
    with pytest.raises(UserError, match="OFFSWEEP_MAX_GPUS='many' must be a whole number"):
        capacity()
