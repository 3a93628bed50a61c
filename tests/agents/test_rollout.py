"""Rollouts in ensembles whose every prediction is known."""

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
from agents.dynamics import Ensemble
from agents.method import RolloutJob, RolloutResult, Termination
from agents.networks import StackedMLP
from agents.penalties import max_aleatoric
from agents.replay import Replay
from agents.rollout import SHARD_ROWS, Penalty, Predictions, Rollout, RolloutStatistics, draw, shard_size

OBS, ACT = 2, 1
R, D = OBS + ACT, OBS + ACT + 1  # columns of reward and done in a row [s, a, r, d, s']


def linear_ensemble(
    shifts: list[float], log_std: list[list[float]] | None = None, elites: list[int] | None = None
) -> Ensemble:
    """One layer, inputs not rescaled. Member e adds [0.1 * a + shifts[e], 0.5 * s0] to s and rewards 2 * s1 - a;
    without `log_std` (E, S + 1) the predictions have no noise."""
    size, outputs = len(shifts), OBS + 1
    weight, bias = torch.zeros(size, OBS + ACT, 2 * outputs), torch.zeros(size, 1, 2 * outputs)
    weight[:, 2, 0], weight[:, 0, 1] = 0.1, 0.5
    weight[:, 1, 2], weight[:, 2, 2] = 2.0, -1.0
    bias[:, 0, 0] = torch.tensor(shifts)
    bias[:, 0, outputs:] = -300.0 if log_std is None else 2 * torch.tensor(log_std)
    tensors = {
        "W0": weight, "b0": bias, "max_logvar": torch.full((outputs,), 60.0),
        "min_logvar": torch.full((outputs,), -200.0), "mean": torch.zeros(OBS + ACT), "std": torch.ones(OBS + ACT),
    }  # fmt: skip
    return Ensemble(tensors, list(range(size)) if elites is None else elites, OBS)


def sign_actor() -> SquashedGaussianActor:
    """a = sign(s0), so saturated that its noise does not show."""
    actor = StackedMLP((1,), (OBS, 2, 2 * ACT))
    actor.weights[0][0] = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    actor.weights[1][0] = torch.tensor([[1e6, 0.0], [-1e6, 0.0]])
    actor.biases[1][0, 0, 1] = -5.0
    return SquashedGaussianActor(actor)


def random_actor() -> SquashedGaussianActor:
    """Actions spread over (-1, 1), whatever the state."""
    return SquashedGaussianActor(StackedMLP((1,), (OBS, 2, 2 * ACT)))


def never(next_obs: Tensor) -> Tensor:
    return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


def assert_alike(mine: RolloutStatistics, other: RolloutStatistics, rel: float | None = None) -> None:
    assert mine.survivors == other.survivors
    first, second = (dataclasses.asdict(dataclasses.replace(x, survivors=())) for x in (mine, other))
    assert (first.pop("survivors"), second.pop("survivors")) == ((), ())
    assert first == pytest.approx(second, rel=rel)


def roll(
    ensemble: Ensemble, starts: Tensor, length: int, penalty_coef: float = 0.0, **kwargs: Any
) -> tuple[Tensor, RolloutStatistics]:
    """One member's rows and statistics, by the form for a CPU; that for a GPU must give the same."""
    kwargs = {"actor": sign_actor(), "termination": never, "penalty": None, **kwargs}
    rollout = Rollout(dynamics=ensemble, penalty_coef_M=torch.tensor([penalty_coef]), **kwargs)
    draws = draw([0], 0, 0, len(starts), length, ACT, ensemble, starts.device)
    ((rows, tags, statistics),) = rollout(starts.unsqueeze(0), draws)
    ((masked_rows, masked_tags, masked_statistics),) = rollout.masked(starts.unsqueeze(0), draws)
    torch.testing.assert_close(masked_rows, rows)
    assert torch.equal(masked_tags, tags)
    assert_alike(masked_statistics, statistics)
    return rows, statistics


def by_hand(start: list[float], length: int, shift: float = 0.0) -> list[list[float]]:
    """The rows of one trajectory, done flags left at 0."""
    s0, s1 = start
    rows = []
    for _ in range(length):
        a = math.copysign(1.0, s0)
        after = [s0 + 0.1 * a + shift, s1 + 0.5 * s0]
        rows.append([s0, s1, a, 2 * s1 - a, 0.0, *after])
        s0, s1 = after
    return rows


STARTS = [[0.5, 1.0], [-0.25, 0.0], [1.0, -2.0]]


def test_a_noiseless_ensemble_gives_the_exact_trajectories() -> None:
    rows, statistics = roll(linear_ensemble([0.0, 0.0]), torch.tensor(STARTS), 4)
    expected = torch.tensor([by_hand(s, 4) for s in STARTS]).transpose(0, 1).reshape(12, -1)  # step after step
    torch.testing.assert_close(rows, expected)
    assert (statistics.transitions, statistics.terminals, statistics.dropped) == (12, 0, 0)
    assert statistics.reward_sum == pytest.approx(float(expected[:, R].sum()))
    assert statistics.penalty_sum == 0.0


def test_terminal_rows_are_kept_and_their_rollouts_end() -> None:
    rows, statistics = roll(linear_ensemble([0.0]), torch.tensor(STARTS), 3, termination=lambda s: s[..., 0] > 0.65)
    expected = []
    for t in range(3):
        for start, last in zip(STARTS, [1, 2, 0], strict=True):  # 0.5 -> 0.6 -> 0.7; never; 1.0 -> 1.1
            row = by_hand(start, 3)[t]
            row[D] = float(row[-2] > 0.65)
            expected += [row] if t <= last else []
    torch.testing.assert_close(rows, torch.tensor(expected))
    assert rows[:, D].sum() == 2
    assert (statistics.transitions, statistics.terminals) == (6, 2)


def test_a_rollout_ends_when_nothing_is_left() -> None:
    rows, statistics = roll(linear_ensemble([0.0]), torch.tensor(STARTS), 50, termination=lambda s: s[..., 0] > -99)
    assert len(rows) == statistics.transitions == statistics.terminals == 3


def test_predictions_that_are_not_finite_are_dropped_and_counted() -> None:
    ensemble = linear_ensemble([0.0])
    ensemble.tensors["W0"][0, 1, 2] = 1e38  # the reward overflows from s1 = 3.41 on
    starts = torch.tensor([[1.0, 0.0], [1.0, 5.0], [1.0, 3.0]])
    rows, statistics = roll(ensemble, starts, 3)
    assert torch.isfinite(rows).all()
    # second row: at once; third: s1 = 3, then 3.5
    assert (statistics.transitions, statistics.dropped) == (3 + 1, 1 + 1)
    assert math.isfinite(statistics.reward_sum)
    assert rows[:, 1].tolist() == pytest.approx([0.0, 3.0, 0.5, 1.05])


def test_one_elite_is_drawn_for_every_row_and_step() -> None:
    ensemble = linear_ensemble([0.0, 10.0, 20.0, 30.0], elites=[0, 2, 3])
    rows, _ = roll(ensemble, torch.ones(3000, OBS), 2)
    step = (rows[:, -2] - rows[:, 0]).view(2, 3000)  # 0.1 * a + shift, a = 1
    drawn = ((step - 0.1) / 10).round()
    assert drawn.unique().tolist() == [0.0, 2.0, 3.0]
    for elite in (0, 2, 3):
        share = (drawn == elite).float().mean(1)
        torch.testing.assert_close(share, torch.full((2,), 1 / 3), atol=0.04, rtol=0.0)
    both = ((drawn[0] == 0) & (drawn[1] == 0)).float().mean()
    assert float(both) == pytest.approx(1 / 9, abs=0.03)  # drawn anew at every step


@pytest.mark.parametrize("penalised", [False, True])
def test_state_change_and_reward_are_sampled(penalised: bool) -> None:
    std = [0.3, 0.05, 2.0]
    ensemble = linear_ensemble([0.0, 0.0], [[math.log(x) for x in std]] * 2)
    penalty = max_aleatoric if penalised else None
    rows, _ = roll(ensemble, torch.tensor([[0.5, 1.0]]).repeat(4000, 1), 1, penalty=penalty)
    noise = torch.cat((rows[:, -2:], rows[:, R : R + 1]), 1) - torch.tensor([0.6, 1.25, 1.0])
    torch.testing.assert_close(noise.std(0), torch.tensor(std), rtol=0.05, atol=0.0)
    assert (noise.mean(0).abs() < 4 * torch.tensor(std) / math.sqrt(4000)).all()
    correlation = torch.corrcoef(noise.T) - torch.eye(3)
    assert correlation.abs().max() < 0.06


def test_the_policy_is_sampled() -> None:
    rows, _ = roll(linear_ensemble([0.0]), torch.zeros(4000, OBS), 1, actor=random_actor())
    z = torch.atanh(rows[:, OBS])  # mean 0, log std 0
    assert abs(float(z.mean())) < 0.07
    assert float(z.std()) == pytest.approx(1.0, abs=0.05)


def test_penalty_is_the_largest_norm_over_all_members() -> None:
    """Member 1 has the largest norm through its reward alone and is no elite."""
    log_std = [[math.log(x) for x in row] for row in ([0.3, 0.4, 0.1], [0.1, 0.1, 3.0], [0.2, 0.2, 0.2])]
    ensemble = linear_ensemble([0.0, 0.0, 0.0], log_std, elites=[0, 2])
    starts = torch.tensor(STARTS)
    free, without = roll(ensemble, starts, 4)
    rows, statistics = roll(ensemble, starts, 4, penalty=max_aleatoric, penalty_coef=0.7)
    norm = math.sqrt(0.1**2 + 0.1**2 + 3.0**2)
    other_columns = [c for c in range(rows.shape[1]) if c != R]
    torch.testing.assert_close(rows[:, other_columns], free[:, other_columns])
    torch.testing.assert_close(rows[:, R], free[:, R] - 0.7 * norm, rtol=1e-4, atol=1e-4)
    assert statistics.penalty_sum == pytest.approx(12 * norm, rel=1e-4)
    assert statistics.reward_sum == pytest.approx(without.reward_sum - 12 * 0.7 * norm, rel=1e-4)


def test_max_aleatoric_by_hand() -> None:
    std = torch.tensor([[[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 4.9], [2.0, 2.0, 1.0]]])  # (E, B, D)
    assert max_aleatoric(Predictions(torch.zeros_like(std), std, torch.zeros(2), std[0])).tolist() == [5.0, 3.0]


def test_a_penalty_that_is_not_finite_drops_its_row() -> None:
    """One member that is no elite is infinitely unsure: neither a reward of -inf nor an infinite mean penalty."""
    log_std = [[math.log(0.1)] * 3] * 2
    ensemble = linear_ensemble([0.0, 0.0], log_std, elites=[0])
    ensemble.tensors["max_logvar"] = torch.full((3,), 1000.0)
    ensemble.tensors["W0"][1, 0, OBS + 1 :] = torch.tensor([0.0, 0.0, 100.0])  # exp(250) at s0 = 5
    starts = torch.tensor([[-1.0, 0.0], [5.0, 0.0], [-2.0, 0.0]])
    rows, statistics = roll(ensemble, starts, 1, penalty=max_aleatoric, penalty_coef=1.0)
    assert torch.isfinite(rows).all()
    assert rows[:, 0].tolist() == [-1.0, -2.0]
    assert (statistics.transitions, statistics.dropped) == (2, 1)
    assert math.isfinite(statistics.reward_sum)
    assert statistics.penalty_sum == pytest.approx(2 * math.sqrt(3) * 0.1, rel=1e-3)


def test_statistics_add_up() -> None:
    total = RolloutStatistics(1, 2, 3, 4.0, 5.0) + RolloutStatistics(10, 20, 30, 40.0, 50.0)
    assert total == RolloutStatistics(11, 22, 33, 44.0, 55.0)


# ---- jobs -----------------------------------------------------------------------------------------------------------


def job(**changes: Any) -> RolloutJob:
    """Of one member."""
    starts, coef = torch.tensor([STARTS]) + 1.0, torch.zeros(1)
    first = RolloutJob((0,), (7,), 3, 2, Termination("Hopper-v4"), random_actor(), starts, 5, None, coef)
    return dataclasses.replace(first, **changes)


def rows_of(job: RolloutJob) -> Tensor:
    (rows,) = job.run(noisy()).rows
    return rows


def noisy() -> Ensemble:
    return linear_ensemble([0.0, 0.01], [[-3.0, -3.0, 0.0]] * 2)


def test_a_job_gives_the_same_rows_whatever_the_others() -> None:
    jobs = [job(shard=s, members=(s % 2,), seeds=(7 + s % 2,)) for s in range(4)]
    alone = [rows_of(jobs[s]) for s in range(4)]
    torch.manual_seed(5)
    together = {s: jobs[s].run(noisy()) for s in (3, 1, 0, 2)}
    for s in range(4):
        assert torch.equal(together[s].rows[0], alone[s])
        assert together[s].members == (s % 2,)


def test_seed_epoch_and_shard_each_give_other_noise_and_the_member_none() -> None:
    rows = rows_of(job())
    for changes in ({"seeds": (8,)}, {"epoch": 4}, {"shard": 3}):
        assert not torch.equal(rows_of(job(**changes))[:3], rows[:3])
    assert torch.equal(rows_of(job(members=(9,))), rows)


def test_a_job_ends_its_rollouts_by_the_rule_of_its_environment() -> None:
    """Hopper falls when |s'[1]| >= 0.2; HalfCheetah never does."""
    starts = torch.tensor([[[1.5, 0.0]]])
    hopper = job(starts=starts).run(linear_ensemble([0.0]))
    cheetah = job(starts=starts, termination=Termination("HalfCheetah-v4")).run(linear_ensemble([0.0]))
    assert hopper.rows[0][:, D].tolist() == [1.0]
    assert cheetah.rows[0][:, D].tolist() == [0.0] * 5
    assert hopper.statistics[0].terminals == 1


def test_standardised_observations_end_a_rollout_where_the_environments_would() -> None:
    raw = torch.tensor([[0.9, 0.1, 3.0], [0.6, 0.1, 3.0], [0.9, 0.3, 3.0]])
    mean, std = torch.tensor([1.2, -0.1, 5.0]), torch.tensor([0.2, 0.05, 4.0])
    done = Termination("Hopper-v4")(raw)
    assert done.tolist() == [False, True, True]
    assert torch.equal(Termination("Hopper-v4", mean, std)((raw - mean) / std), done)


def test_a_job_can_be_sent_to_another_process() -> None:
    original = job(penalty=max_aleatoric, penalty_coef=torch.tensor([0.5]), actor=sign_actor())
    sent = pickle.loads(pickle.dumps(original))
    assert torch.equal(rows_of(sent), rows_of(original))


# ---- several members, on a CPU and on a GPU --------------------------------------------------------------------------


def pack_job(penalty: Penalty | None) -> RolloutJob:
    """Three members whose policies, seeds and penalties differ; some of their rows fall, some are not finite."""
    actor = StackedMLP((3,), (OBS, 16, 2 * ACT))
    actor.flat.copy_(torch.randn(actor.flat.shape, generator=torch.Generator().manual_seed(0)))
    starts = torch.rand((3, 400, OBS), generator=torch.Generator().manual_seed(1)) * 0.3
    starts[..., 0] += 0.65  # Hopper falls at 0.7, and at |s1| >= 0.2
    starts[..., 1] -= 0.5
    starts[1, ::7] = math.inf
    return job(
        members=(4, 0, 2), seeds=(7, 8, 9), actor=SquashedGaussianActor(actor), starts=starts, penalty=penalty,
        penalty_coef=torch.tensor([0.0, 0.5, 2.0]),
    )  # fmt: skip


def assert_same(one: RolloutResult, other: RolloutResult) -> None:
    assert one.members == other.members
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(map(torch.equal, one.tags, other.tags))
    for ours, others in zip(one.statistics, other.statistics, strict=True):
        assert_alike(ours, others, 1e-5)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs take the form for a GPU."""
    monkeypatch.setattr(Rollout, "__call__", torch.inference_mode()(Rollout.masked))


penalties = pytest.mark.parametrize("penalty", [None, max_aleatoric], ids=["free", "penalised"])


@penalties
def test_both_forms_give_the_same_rows(penalty: Penalty | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compacted = pack_job(penalty).run(noisy())
    on_gpu(monkeypatch)
    assert_same(compacted, pack_job(penalty).run(noisy()))
    for rows, statistics in zip(compacted.rows, compacted.statistics, strict=True):
        assert 400 < statistics.transitions == len(rows) < 5 * 400
        assert statistics.terminals > 20
    assert [s.dropped for s in compacted.statistics] == [0, 58, 0]


@pytest.mark.parametrize("gpu", [False, True])
@penalties
def test_a_member_of_a_job_gathers_what_it_gathers_alone(
    penalty: Penalty | None, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu:
        on_gpu(monkeypatch)
    pack = pack_job(penalty)
    together = pack.run(noisy())
    for m in range(3):
        alone = dataclasses.replace(
            pack, members=pack.members[m : m + 1], seeds=pack.seeds[m : m + 1], actor=pack.actor.select([m]),
            starts=pack.starts[m : m + 1], penalty_coef=pack.penalty_coef[m : m + 1],
        )  # fmt: skip
        names = ("members", "rows", "tags", "statistics")
        mine = RolloutResult(**{name: getattr(together, name)[m : m + 1] for name in names})
        assert_same(alone.run(noisy()), mine)
    assert len({s.transitions for s in together.statistics}) == 3


@pytest.mark.parametrize("gpu", [False, True])
def test_a_tag_is_the_step_and_the_half_of_the_starts(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        on_gpu(monkeypatch)
    # ends at its 2nd step (0.5, 0.6, 0.7), is dropped, never ends, ends at its 1st, ends at its 1st, never ends
    s0 = [0.5, math.nan, -0.25, 1.0, 1.0, -1.0]
    starts = torch.tensor([[[x, 0.0] for x in s0]]).repeat(2, 1, 1)
    actor = sign_actor().select([0, 0])
    result = job(
        members=(0, 1), seeds=(7, 8), starts=starts, actor=actor, length=4, penalty_coef=torch.zeros(2),
        termination=lambda s: s[..., 0] > 0.65,
    ).run(linear_ensemble([0.0]))  # fmt: skip
    for rows, tags in zip(result.rows, result.tags, strict=True):
        assert tags.dtype == torch.int16
        assert tags.tolist() == [1, 1, -1, 1, -1, 2, 2, -2, 3, -3, 4, -4]
        assert rows[:, 0].tolist() == pytest.approx(
            [0.5, -0.25, 1.0, 1.0, -1.0, 0.6, -0.35, -1.1, -0.45, -1.2, -0.55, -1.3]
        )


@penalties
def test_on_a_gpu_only_the_totals_are_read(penalty: Penalty | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws, steps, picking the rows and storing them in the rings, on fake tensors, which refuse whatever needs a
    value or mixes devices. Theirs is "meta": without a GPU torch does not index what lies on "cuda"."""
    width = 2 * OBS + ACT + 2
    monkeypatch.setattr("agents.rollout.generator", lambda *_, device: None)  # there is none for this device
    monkeypatch.setattr(Ensemble, "predict_drawn", dense)
    reads: list[Tensor] = []

    def read(totals: Tensor) -> list[list[float]]:
        reads.append(totals)
        return [[4.0, 0.0, 0.0, 1.0, 2.0, *[0.0] * 7], [0.0] * 12, [9.0, 1.0, 0.0, 1.0, 2.0, *[0.0] * 7]]

    monkeypatch.setattr("agents.rollout._read", read)
    there = noisy()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        ensemble = Ensemble({k: torch.empty(v.shape) for k, v in there.tensors.items()}, there.elites, OBS)
        job = RolloutJob(
            (4, 0, 2), (7, 8, 9), 3, 2, Termination("Hopper-v4", torch.empty(OBS), torch.empty(OBS)),
            SquashedGaussianActor(StackedMLP((3,), (OBS, 16, 2 * ACT), "meta")), torch.empty(3, 400, OBS), 5, penalty,
            torch.empty(3),
        )  # fmt: skip
        result = job.run(ensemble)
        replay = Replay(torch.empty((10, width)), 3, 6, "meta")
        for m in (0, 1):
            replay.add(m, result.rows[m], result.tags[m])
        with pytest.raises(DataDependentOutputException):
            reads[0].tolist()
    assert [tuple(r.shape) for r in reads] == [(3, 12)]  # 7 sums and the survivors of 5 steps
    assert [tuple(rows.shape) for rows in result.rows] == [(n, width) for n in (4, 0, 9)]
    assert {x.device.type for x in (*result.rows, *result.tags)} == {"meta"}
    assert replay.sizes == [4, 0, 0]


def dense(ensemble: Ensemble, state_action: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """What a GPU has to use in place of sorting the rows by member, which waits for their numbers."""
    mean, std = ensemble.predict_all(state_action)
    row = torch.arange(len(member), device=member.device)
    return mean[member, row], std[member, row]


def test_a_gpu_takes_as_many_members_as_its_memory_bound_allows() -> None:
    actor, ensemble = SquashedGaussianActor(StackedMLP((40,), (OBS, 256, 256, 2 * ACT))), noisy()
    assert shard_size(torch.device("cpu"), actor, ensemble, 5) == (1, SHARD_ROWS)
    members, rows = shard_size(torch.device("cuda"), actor, ensemble, 5)
    assert members > 1
    longer, same_rows = shard_size(torch.device("cuda"), actor, ensemble, 500)
    assert (1 <= longer < members, same_rows) == (True, rows)
    assert shard_size(torch.device("cuda"), actor, ensemble, 10**9) == (1, rows)
