"""The loop over two domains: who steps when, what updates see, resume, and members that leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.cross_domain import CrossDomain, check_spaces, joined
from agents.interaction import Environments, start_here
from agents.method import TrainingData
from envs.errors import UserError
from tests.agents.domains import BOUND, SOURCE, Both, both, sac, train, weights

MODES = [(1, False), (10, False), (10, True)]  # collect_every, asynchronous


class Logged(Both):
    """Notes what happens when."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log: list[tuple[Any, ...]] = []

        def start(jobs: Any, environments: Environments) -> Any:
            self.log.append(("ask", *((job.domain, len(job.noise_TMA)) for job in jobs)))
            return start_here(jobs, environments)

        self.start_jobs = start

    def refit(self, t: int) -> None:
        self.log.append(("refit", t))

    def update(self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool) -> Any:
        self.log.append(("update", t, self.source.sizes[0], self.target.sizes[0]))
        assert source_MBW.shape == target_MBW.shape == (1, 8, 9)
        assert noise_KMBA.shape == (3, 1, 16, 1)
        return super().update(t, source_MBW, target_MBW, noise_KMBA, with_metrics)


def test_an_iteration_is_a_source_step_every_tenth_time_a_target_step_a_refit_and_an_update():
    method = both(cls=Logged)
    [metrics] = train(method, 1)[0]
    at = method.log.index(("refit", 70))
    # the target holds 8 rows from iteration 70 on
    assert method.log[at - 1 : at + 5] == [
        ("ask", ("source", 1), ("target", 1)), ("refit", 70), ("update", 70, 71, 8),
        ("ask", ("source", 1)), ("refit", 71), ("update", 71, 72, 8),
    ]  # fmt: skip
    assert [entry for entry in method.log[:at] if entry[0] == "update"] == []
    assert (method.updates_done, method.source.sizes, method.target.sizes) == (30, [100], [10])
    assert (metrics["domain/source_steps"], metrics["domain/target_steps"]) == (100.0, 10.0)
    assert "train/critic_loss" in metrics


def test_collecting_ahead_asks_for_a_chunk_before_the_updates_that_precede_it():
    method = both(cls=Logged, collect_every=20, asynchronous=True)
    train(method, 1)
    asked = [i for i, entry in enumerate(method.log) if entry[0] == "ask"]
    assert [method.log[i] for i in asked] == [("ask", ("source", 20), ("target", 2))] * 6
    # chunks 0 and 1 at once, chunk c before update 20 (c - 1)
    assert [method.log[i + 1] for i in asked[1:]] == [("refit", 20 * c) for c in range(5)]
    assert ("update", 99, 100, 10) in method.log


def test_what_a_refit_measures_is_logged_with_its_epoch_alone():
    class Refitted(Both):
        def refit(self, t: int) -> None:
            if t == 70:
                self.extra_metrics[1]["dynamics/epochs"] = 3.0

    first, second = train(both((0, 1), cls=Refitted), 2)
    assert [row.get("dynamics/epochs") for row in (*first, *second)] == [None, 3.0, None, None]


def test_a_member_learns_the_same_alone_and_in_a_pack():
    pack, alone = both((0, 5)), both((5,))
    train(pack, 2)
    train(alone, 2)
    torch.testing.assert_close(weights(pack, 1), weights(alone), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(pack.target.member_rows(1), alone.target.member_rows(0), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(pack.source.member_rows(0), pack.source.member_rows(1))


@pytest.mark.parametrize(("every", "ahead"), MODES)
def test_a_resumed_pack_goes_on_as_the_undisturbed_one(every: int, ahead: bool):
    settings: dict[str, Any] = {"collect_every": every, "asynchronous": ahead, "random_steps": 30}
    undisturbed, killed = (both((0, 1), **settings) for _ in range(2))
    metrics = train(undisturbed, 4)
    train(killed, 3)  # in the middle of the second episode
    resumed = both((0, 1), **settings)
    resumed.load_state_dict(killed.state_dict())
    repeated = train(resumed, 1, first=3)
    assert torch.equal(weights(resumed, 0), weights(undisturbed, 0))
    assert torch.equal(weights(resumed, 1), weights(undisturbed, 1))
    for m in range(2):
        assert torch.equal(resumed.source.member_rows(m), undisturbed.source.member_rows(m))
        same = [{k: v for k, v in one.items() if not k.startswith("time/")} for one in (metrics[3][m], repeated[0][m])]
        assert same[0] == same[1]
        assert "domain/source_return" in same[0]


@pytest.mark.parametrize(("every", "ahead"), MODES)
def test_the_others_go_on_as_before_when_a_member_leaves(every: int, ahead: bool):
    whole, part = (both((0, 1, 2), collect_every=every, asynchronous=ahead) for _ in range(2))
    train(whole, 3)
    train(part, 2)
    left = part.select([2, 0])
    train(left, 1, first=2)
    for now, before in ((0, 2), (1, 0)):
        torch.testing.assert_close(weights(left, now), weights(whole, before), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(left.source.member_rows(now), whole.source.member_rows(before), rtol=1e-3, atol=1e-3)
    again = both((0, 1, 2), collect_every=every, asynchronous=ahead).select([2, 0])
    again.load_state_dict(part.select([2, 0]).state_dict())
    train(again, 1, first=2)
    assert torch.equal(weights(again), weights(left))


def recorded(rows: int = 50) -> TrainingData:
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = (torch.randn((rows, 3), generator=draw) for _ in range(2))
    action, reward = torch.rand((rows, 1), generator=draw), torch.randn(rows, generator=draw)
    low, high = torch.from_numpy(-BOUND), torch.from_numpy(BOUND)
    return TrainingData(
        SOURCE, obs, action, reward, next_obs, torch.zeros(rows), torch.full((3,), 0.5), torch.full((3,), 2.0),
        reward_scale=0.1, reward_shift=1.0, action_low=low, action_high=high,
    )  # fmt: skip


def test_a_recorded_source_is_sampled_and_never_stepped():
    method = both(data=recorded(), cls=Logged, updates_per_target_step=5)
    seen: list[Tensor] = []
    plain = CrossDomain._batch
    method._batch = lambda t: seen.append((batch := plain(method, t))[0]) or batch  # type: ignore[method-assign]
    train(method, 1)
    asked = [entry for entry in method.log if entry[0] == "ask"]
    assert asked == [("ask", ("target", 1))] * 20
    first = next(entry for entry in method.log if entry[0] == "update")
    assert first == ("update", 35, 0, 8)
    rows = torch.cat([batch[0] for batch in seen])
    real = method.source.gather(torch.arange(50))
    which = (rows.unsqueeze(1) == real).all(-1)
    assert which.any(1).all()
    assert which.any(0).sum() > 40  # of the 50 rows, 520 draws
    # the target's rows are in the units of the dataset: 2 x + 0.5 is a point on the circle, rewards are 1 at most
    target = method.target.member_rows(0)
    np.testing.assert_allclose((target[:, :2] * 2 + 0.5).square().sum(1), 1.0, rtol=1e-4)
    assert (target[:, 4] <= 1.0).all()
    assert (target[:, 4] > -1.0).all()


def test_no_target_steps():
    method = sac(updates_per_target_step=0)
    train(method, 1)
    assert (method.target.capacity, method.source.sizes, method.updates_done) == (0, [100], 93)


@pytest.mark.parametrize("as_terminals", [False, True])
def test_ends_by_a_time_limit_are_terminals_where_that_is_wanted(as_terminals: bool):
    method = sac(num_updates=300, time_limit_terminals=as_terminals)
    train(method, 3)
    done = method.source.member_rows(0)[:, 5]
    assert done.nonzero().flatten().tolist() == ([199] if as_terminals else [])


def test_fine_tuning_learns_from_the_source_first_and_then_from_the_target_alone():
    method = sac(learn_from="source-then-target", source_updates=200, updates_per_target_step=2)
    train(method, 4)
    assert (method.source.sizes, method.target.sizes) == ([200], [100])
    assert method.updates_done == 193 + 200 - 14  # pauses until the target's rows are a batch: 8 steps, every second
    sources = method._batch(210)[0].shape[1], method._batch(210)[1].shape[1]
    assert sources == (0, 8)


def test_fine_tuning_may_keep_the_rows_of_the_source():
    method = sac(
        (0, 1), learn_from="source-then-target", source_updates=200, keep_source_rows=True, updates_per_target_step=1
    )
    train(method, 4)
    assert (method.source.sizes, method.source.capacity, method.target.capacity) == ([400, 400], 400, 0)
    assert method.updates_done == 393
    assert [x.shape[1] for x in method._batch(399)[:2]] == [8, 0]
    oracle = sac(learn_from="target", updates_per_target_step=1)
    train(oracle, 1)
    assert (oracle.source.capacity, oracle.target.sizes) == (0, [100])


def test_the_weights_of_a_batch_are_means_over_either_domain():
    batch = joined(torch.zeros((2, 4, 9)), torch.ones((2, 8, 9)))
    assert (batch.num_source, batch.weight_MB[0].tolist()) == (4, [0.25] * 4 + [0.125] * 8)
    assert joined(torch.zeros((2, 0, 9)), torch.ones((2, 8, 9))).weight_MB[1].tolist() == [0.125] * 8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"collect_every": 30}, "must divide method.updates_per_epoch=100"),
        ({"replay_rows": 4}, "at least method.batch_size=8"),
        ({"updates_per_target_step": 0}, "must be greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        both(**settings)


def test_domains_of_other_spaces_or_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="choose a target of the same robot"):
        check_spaces(SOURCE, "offsweep/EdgeOfReach-v0")
    with pytest.raises(UserError, match=r"there is no .*'Pendulum-v7'; nearest: Pendulum-v1"):
        check_spaces(SOURCE, "Pendulum-v7")
