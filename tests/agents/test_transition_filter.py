"""Rollouts through filtered predictions, whose every number is known."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from agents.actors import SquashedGaussianActor
from agents.diagnostics import value_metrics
from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward
from agents.method import RolloutJob, Termination
from agents.networks import StackedMLP
from agents.penalties import max_aleatoric
from agents.replay import Replay
from agents.rollout import CUT_TAG, CUTS, Rollout, RolloutStatistics, draw, tag_cuts, tag_steps
from agents.transition_filter import FilterConfig, FilteredDynamics
from envs.errors import UserError
from tests.agents.filters import linear_reward, random_reward
from tests.agents.test_rollout import (
    ACT,
    OBS,
    D,
    R,
    assert_alike,
    assert_same,
    linear_ensemble,
    never,
    on_gpu,
    pack_job,
    sign_actor,
)

every_cut = pytest.mark.parametrize("cut", CUTS)


def filtered(
    ensemble: Ensemble, weights: list[float] | None = None, *, state: dict[str, Any] | None = None, **settings: Any
) -> FilteredDynamics:
    """The logit of the only discriminator is weights . [s, a, s'] of the raw values, cut to [-1, 1]."""
    state = linear_reward([weights or [0.0] * 5], OBS, ACT) if state is None else state
    config = FilterConfig(**{"selection": "argmax", "threshold": 0.0, **settings})
    return FilteredDynamics(ensemble, DynamicsReward.from_state_dict(state), config)


def r_d(logit: float) -> float:
    return -math.log(1 - 1 / (1 + math.exp(-logit)))


def roll(
    dynamics: FilteredDynamics, starts: list[list[float]], length: int, **kwargs: Any
) -> tuple[Tensor, Tensor, RolloutStatistics]:
    """One member's rows, tags and statistics, by the form for a CPU; that for a GPU must give the same."""
    kwargs = {"actor": sign_actor(), "termination": never, "penalty": None, "cut": dynamics.config.cut, **kwargs}
    rollout = Rollout(dynamics=dynamics, penalty_coef_M=torch.tensor([1.0]), **kwargs)
    starts_BS = torch.tensor(starts)
    draws = draw([0], 0, 0, len(starts), length, ACT, dynamics, starts_BS.device)
    ((rows, tags, statistics),) = rollout(starts_BS.unsqueeze(0), draws)
    ((masked_rows, masked_tags, masked_statistics),) = rollout.masked(starts_BS.unsqueeze(0), draws)
    torch.testing.assert_close(masked_rows, rows)
    assert torch.equal(masked_tags, tags)
    assert_alike(masked_statistics, statistics)
    assert sum(statistics.survivors) == statistics.transitions == len(rows)
    return rows, tags, statistics


# ---- one step -------------------------------------------------------------------------------------------------------


def test_candidates_are_every_elites_draws_and_cut_to_the_clip() -> None:
    ensemble = linear_ensemble([0.0, 10.0, 20.0], [[0.0, 0.0, 0.0], [5.0] * 3, [math.log(2.0)] * 3], elites=[0, 2])
    dynamics = filtered(ensemble, clip=20.5)
    assert (dynamics.num_candidates, dynamics.num_noises, tuple(dynamics.choices)) == (4, 4 * (OBS + 1), (0,))
    assert filtered(ensemble, selection="softmax", draws=3).num_noises == 6 * (OBS + 1) + 1
    state_action = torch.tensor([[0.5, 1.0, 1.0]])
    noise = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 3.0, -0.5, 30.0, -30.0]])
    mean, std = ensemble.predict_elites(state_action)
    candidates = dynamics.candidates(state_action, mean, std, noise)
    # means: s0 + 0.1 a + shift, s1 + 0.5 s0, 2 s1 - a
    expected = [[0.6, 1.25, 1.0], [20.5, 1.25, 1.0], [1.6, 0.25, 4.0], [20.5 - 0.9, 20.5, -20.5]]
    expected[3][0] = 20.6 - 2 * 0.5
    torch.testing.assert_close(candidates[:, 0], torch.tensor(expected))


def test_predictions_of_the_elites_are_those_among_all() -> None:
    ensemble = linear_ensemble([0.0, 10.0, 20.0], [[0.0] * 3, [1.0] * 3, [2.0] * 3], elites=[2, 0])
    state_action = torch.tensor([[0.5, 1.0, 1.0], [-0.5, 2.0, 0.0]])
    for mine, all_of_them in zip(
        ensemble.predict_elites(state_action), ensemble.predict_all(state_action), strict=True
    ):
        assert torch.equal(mine, all_of_them[[2, 0]])
        assert torch.equal(ensemble.of_elites(all_of_them), mine)


def test_the_softmax_takes_each_candidate_as_often_as_it_should() -> None:
    dynamics = filtered(linear_ensemble([0.0]), selection="softmax", temperature=0.25)
    scores = torch.tensor([[0.4, 0.9, 0.5, 1.2]])
    odds = [math.exp(x / 0.25) for x in (0.4, 0.9, 0.5, 1.2)]
    # standard normal draws at equal distances of their distribution function
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    taken = dynamics.choose(scores.expand(10_000, -1), torch.special.ndtri(uniform))
    shares = torch.bincount(taken, minlength=4) / 10_000
    assert shares.tolist() == pytest.approx([x / sum(odds) for x in odds], abs=2e-4)
    assert torch.equal(taken, taken.sort().values)  # by the inverse of the cumulated probabilities
    ends = dynamics.choose(scores.expand(2, -1), torch.tensor([-40.0, 40.0]))
    assert ends.tolist() == [0, 3]


@pytest.mark.parametrize("selection", ["softmax", "argmax"])
def test_a_candidate_that_is_not_a_number_is_not_taken(selection: str) -> None:
    dynamics = filtered(linear_ensemble([0.0]), selection=selection, temperature=1e-3)
    scores = torch.tensor([[math.nan, 0.5, math.nan], [math.nan] * 3, [0.2, math.nan, 0.5]])
    for normal in (-40.0, 0.0, 40.0):
        taken = dynamics.choose(scores, torch.full((3,), normal)).tolist()
        assert (taken[0], taken[2]) == (1, 2)
        assert 0 <= taken[1] < 3


# ---- rollouts -------------------------------------------------------------------------------------------------------


def test_the_most_real_candidate_supplies_state_and_reward() -> None:
    """Elites add 0 and 0.5 to s0, discriminators like it small."""
    ensemble = linear_ensemble([0.5, 0.0])
    ensemble.tensors["b0"][1, 0, OBS] = 100.0  # and is paid more for it, were it not for the clip
    rows, _, statistics = roll(filtered(ensemble, [0.0, 0.0, 0.0, -1.0, 0.0]), [[0.1, 0.5]], 3)
    # by hand: s0 grows by 0.1, s1 by s0 / 2, the reward is 2 s1 - 1 + 100, at most 25
    assert rows[:, -2].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert rows[:, -1].tolist() == pytest.approx([0.55, 0.65, 0.8])
    assert rows[:, R].tolist() == [25.0] * 3
    assert statistics.dynamics_reward_sum == pytest.approx(r_d(-0.2) + r_d(-0.3) + r_d(-0.4), abs=1e-5)
    other, _, _ = roll(filtered(ensemble, [0.0, 0.0, 0.0, 1.0, 0.0]), [[0.1, 0.5]], 1)
    assert other[0, -2:].tolist() == pytest.approx([0.7, 0.55])
    assert float(other[0, R]) == pytest.approx(2 * 0.5 - 1)


def test_the_penalty_is_of_all_members_and_of_no_candidate() -> None:
    """Member 1 is no elite and the least sure."""
    log_std = [[math.log(x)] * 3 for x in (0.3, 3.0, 0.2)]
    ensemble = linear_ensemble([0.0, 0.0, 0.0], log_std, elites=[0, 2])
    weights = [0.0, 0.0, 0.0, -1.0, 0.0]
    free, _, _ = roll(filtered(ensemble, weights), [[0.1, 0.5], [0.2, 0.1]], 2)
    rows, _, statistics = roll(filtered(ensemble, weights), [[0.1, 0.5], [0.2, 0.1]], 2, penalty=max_aleatoric)
    torch.testing.assert_close(rows[:, R], free[:, R] - 3.0 * math.sqrt(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[:, -2:], free[:, -2:])
    assert statistics.penalty_sum == pytest.approx(4 * 3.0 * math.sqrt(3), rel=1e-4)


# s0 grows by 0.1 a step (or falls, where it is negative); the logit is 1 - s0'
STARTS = [[0.5, 0.0], [0.85, 0.0], [-0.9, 0.0], [0.62, 0.0], [1.2, 0.0]]
# a logit of at least 0.15: cut at s0' > 0.85, so in the 4th step, in the 1st, never, in the 3rd, at once
THRESHOLD = r_d(0.15)


def falling() -> Ensemble:
    return linear_ensemble([0.0])


def by_logit(cut: str) -> FilteredDynamics:
    """The logit is 1 - s0', by a bias of its own."""
    state = linear_reward([[0.0, 0.0, 0.0, -1.0, 0.0]], OBS, ACT)
    state["tensors"]["b1"] += 1.0
    return filtered(falling(), state=state, threshold=THRESHOLD, cut=cut)


@every_cut
def test_rollouts_are_cut_below_the_threshold(cut: str) -> None:
    """The start at 1.2 is a terminal of the environment's own, and so no cut."""

    def outside(next_obs: Tensor) -> Tensor:
        return next_obs[..., 0] > 1.25

    rows, tags, statistics = roll(by_logit(cut), STARTS, 5, termination=outside)
    lasting = {"drop": [3, 0, 5, 2, 1]}.get(cut, [4, 1, 5, 3, 1])
    cut_at = {0: 4, 1: 1, 3: 3}
    expected, marks = [], []
    for t in range(1, 6):
        for b, (start, _) in enumerate(STARTS):
            if t > lasting[b]:
                continue
            sign = 1 if start > 0 else -1
            done = b == 4 or (cut == "terminal" and cut_at.get(b) == t)
            expected.append([start + sign * 0.1 * (t - 1), float(done), start + sign * 0.1 * t])
            # nothing goes on from the next state: of the row before, where the cut one is dropped
            is_end = cut_at.get(b) == t if cut == "truncate" else cut == "drop" and cut_at.get(b) == t + 1
            marks.append((1 if b % 2 == 0 else -1) * (t + CUT_TAG * is_end))
    torch.testing.assert_close(rows[:, [0, D, -2]], torch.tensor(expected))
    assert tags.tolist() == marks
    assert tag_steps(tags).tolist() == [abs(x) % CUT_TAG for x in marks]
    assert int(tag_cuts(tags).sum()) == {"terminal": 0, "truncate": 3, "drop": 2}[cut]
    assert (statistics.cut, statistics.terminals, statistics.dropped) == (3, 1, 0)
    assert statistics.survivors == tuple(sum(n >= t for n in lasting) for t in range(1, 6))
    # of every step that was made, the dropped ones too
    logits = [1 - (abs(s) + 0.1 * t) * (1 if s > 0 else -1)
              for (s, _), n in zip(STARTS, [4, 1, 5, 3, 1], strict=True) for t in range(1, n + 1)]  # fmt: skip
    total = sum(r_d(max(-1.0, min(1.0, x))) for x in logits)
    assert statistics.dynamics_reward_sum == pytest.approx(total, abs=1e-4)


@every_cut
def test_predictions_that_are_not_finite_are_dropped_and_not_cut(cut: str) -> None:
    dynamics = by_logit(cut)
    dynamics.ensemble.tensors["W0"][0, 1, 2] = math.nan
    dynamics.ensemble.tensors["W0"][0, 1, 0] = math.nan
    rows, _, statistics = roll(dynamics, STARTS, 3)
    assert len(rows) == 0
    assert (statistics.dropped, statistics.cut, statistics.terminals) == (5, 0, 0)
    assert statistics.dynamics_reward_sum == 0.0


def test_nothing_is_cut_without_a_threshold() -> None:
    dynamics = by_logit("terminal")
    dynamics = FilteredDynamics(dynamics.ensemble, dynamics.reward, dataclasses.replace(dynamics.config, threshold=0.0))
    rows, _, statistics = roll(dynamics, STARTS, 4)
    assert (len(rows), statistics.cut, statistics.terminals) == (20, 0, 0)


# ---- diagnostics ----------------------------------------------------------------------------------------------------


def test_states_that_a_cut_leaves_bootstrapped_are_edge_of_reach() -> None:
    """Steps of a rollout of 4: a row that goes on, a last one, a truncated one; all beyond the threshold, values 1 to
    3."""
    values = torch.tensor([[1.0, 2.0, 3.0]]).repeat(2, 1)
    tags = torch.tensor([2, -4, 2 + CUT_TAG], dtype=torch.int16)
    no, yes = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    metrics = value_metrics(values, tags, no, yes, None, 4)
    assert float(metrics["reach/q_edge"]) == 2.5
    assert float(metrics["reach/q_within"]) == 1.0
    assert float(metrics["reach/q_step_02"]) == 2.0
    metrics = value_metrics(values, tags, no, torch.tensor([False, False, True]), None, 4)
    assert (float(metrics["reach/share"]), float(metrics["reach/share_control"])) == (0.5, 0.0)


# ---- jobs -----------------------------------------------------------------------------------------------------------


def noisy_filter(cut: str) -> FilteredDynamics:
    ensemble = linear_ensemble([0.0, 0.01, 0.02], [[-3.0, -3.0, 0.0]] * 3, elites=[0, 2])
    state = random_reward(4, OBS, ACT)
    return filtered(ensemble, state=state, selection="softmax", threshold=0.95, cut=cut)


@every_cut
def test_both_forms_give_the_same_rows(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = dataclasses.replace(pack_job(max_aleatoric), cut=cut)
    compacted = pack.run(noisy_filter(cut))
    on_gpu(monkeypatch)
    assert_same(compacted, pack.run(noisy_filter(cut)))
    for statistics in compacted.statistics:
        assert 300 < statistics.transitions < 5 * 400
        assert min(statistics.terminals, statistics.cut) > 10
    # infinite starts make candidates that the clip makes finite again, as the release has it, but for the policy's
    assert compacted.statistics[1].dropped > 0


@every_cut
@pytest.mark.parametrize("gpu", [False, True])
def test_a_member_of_a_job_gathers_what_it_gathers_alone(cut: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        on_gpu(monkeypatch)
    pack = dataclasses.replace(pack_job(None), cut=cut)
    together = pack.run(noisy_filter(cut))
    for m in range(3):
        alone = dataclasses.replace(
            pack, members=pack.members[m : m + 1], seeds=pack.seeds[m : m + 1], actor=pack.actor.select([m]),
            starts=pack.starts[m : m + 1], penalty_coef=pack.penalty_coef[m : m + 1],
        )  # fmt: skip
        mine = together.renumbered({together.members[m]: pack.members[m]})
        assert_same(alone.run(noisy_filter(cut)), mine)
    assert len({s.transitions for s in together.statistics}) == 3


@every_cut
def test_dynamics_can_be_sent_to_another_process(cut: str) -> None:
    dynamics = noisy_filter(cut)
    pack = dataclasses.replace(pack_job(None), cut=cut)
    here = pack.run(dynamics)
    sent = pickle.dumps(dynamics)  # with the elites' weights at hand, which need not be sent
    there = pickle.loads(pickle.dumps(pack)).run(pickle.loads(sent))
    assert all(map(torch.equal, here.rows, there.rows))
    assert here.statistics == there.statistics
    assert len(sent) == len(pickle.dumps(noisy_filter(cut)))


@every_cut
def test_on_a_gpu_only_the_totals_are_read(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_rollout.py does it, on fake tensors of device "meta", which refuse whatever needs a value."""
    monkeypatch.setattr("agents.rollout.generator", lambda *_, device: None)  # there is none for this device
    reads: list[Tensor] = []

    def read(totals: Tensor) -> list[list[float]]:
        reads.append(totals)
        return [[4.0, 0.0, 0.0, 1.0, 2.0, 1.0, 2.0] + [0.0] * 5, [0.0] * 12, [9.0, 1.0] + [0.0] * 10]

    monkeypatch.setattr("agents.rollout._read", read)
    there = noisy_filter(cut)
    state = there.reward.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        ensemble = Ensemble(
            {k: torch.empty(v.shape) for k, v in there.ensemble.tensors.items()}, there.ensemble.elites, OBS
        )
        ensemble._elite_weights = (  # made once and with values, on the device itself
            [(torch.empty(2, 3, 6), torch.empty(2, 1, 6))], torch.empty(3, dtype=torch.int64),
        )  # fmt: skip
        tensors = {name: torch.empty(value.shape) for name, value in state["tensors"].items()}
        reward = DynamicsReward({**state, "tensors": tensors})
        job = RolloutJob(
            (4, 0, 2), (7, 8, 9), 3, 2, Termination("Hopper-v4", torch.empty(OBS), torch.empty(OBS)),
            SquashedGaussianActor(StackedMLP((3,), (OBS, 16, 2 * ACT), "meta")), torch.empty(3, 400, OBS), 5, None,
            torch.empty(3), cut=cut,
        )  # fmt: skip
        result = job.run(FilteredDynamics(ensemble, reward, there.config))
        replay = Replay(torch.empty((10, 2 * OBS + ACT + 2)), 3, 6, "meta")
        replay.add(0, result.rows[0], result.tags[0])
        with pytest.raises(DataDependentOutputException):
            reads[0].tolist()
    assert [tuple(r.shape) for r in reads] == [(3, 12)]
    assert [len(rows) for rows in result.rows] == [4, 0, 9]


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, r"^method\.filter\.draws=0 must be greater than 0 and finite$"),
        ({"temperature": 0.0}, r"^method\.filter\.temperature=0\.0 must be greater than 0"),
        ({"clip": math.inf}, r"^method\.filter\.clip=inf must be"),
        ({"num_discriminators": 0}, r"^method\.filter\.num_discriminators=0 must be"),
        ({"threshold": -0.1}, r"^method\.filter\.threshold=-0\.1 must be 0 \(nothing is cut\) or greater$"),
        ({"threshold": math.nan}, r"^method\.filter\.threshold=nan must be"),
        ({"selection": "best"}, r"^method\.filter\.selection='best' must be softmax or argmax$"),
        ({"cut": "stop"}, r"^method\.filter\.cut='stop' must be one of terminal, truncate, drop$"),
        ({"scorer": "all"}, r"^method\.filter\.scorer='all' must be discriminators or distilled$"),
        ({"precision": "half"}, r"^method\.filter\.precision='half' must be float32 or bfloat16$"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FilterConfig(**settings)
