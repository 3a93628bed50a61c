"""Model rollouts: short imagined trajectories from states of the dataset.

Whatever is random in a shard is drawn first, for all its rows and steps, by one generator per member. So shards may run
anywhere, in any order and with any other members, with the same result, and the steps themselves come in two forms
with the same numbers:

- on a CPU *compacting*, one member after the other: rows whose rollout has ended leave the batch;
- on a GPU *masked*, all members at once: shapes stay fixed, and what is worth keeping is picked at the end, so that no
  step waits for the device.

What they step through is anything with the interface of `Dynamics`: an ensemble (`agents.dynamics`), the environment's
simulator (`agents.true_dynamics`), or something between two of these (`agents.model_quality`).

Dynamics may cut a rollout where they do not trust it (`agents.transition_filter`); `CUTS` is what becomes of the
transition it is cut at. A row that the environment's own rule ends there is a terminal as any other.

Every row has a tag of two bytes: its step 1..K, negative where its rollout started at an odd place of its shard. So two
rows whose signs differ are certainly of two rollouts. `CUT_TAG` is added to the size of the tag of a row whose next
state is bootstrapped although a cut has ended the rollout there: see `tag_steps` and `tag_cuts`.

Shapes: M member, K step, B start, S observation, A action, E ensemble, D = S + 1 outputs of an ensemble, X simulator
state, Z standard normal draws of a step, W = 2S + A + 2 columns of a row (see `agents.replay`), R row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from agents.actors import Actor
from agents.randomness import generator

SHARD_ROWS = 2_500  # starts of a shard on a CPU: its activations stay in a core's cache
DEVICE_SHARD_ROWS = 25_000  # starts of a shard on a GPU, of each member
DEVICE_JOB_BYTES = 4 << 30  # of GPU memory that one job may take, unless a single member takes more
MAX_LENGTH = 127  # steps: what a tag can count
CUT_TAG = 128
# a transition at which dynamics cut a rollout: kept with d = 1, kept with d = 0, or not kept
CUTS = ("terminal", "truncate", "drop")


class Predictions(NamedTuple):
    """What an ensemble says of B steps, which a penalty is computed from; outputs are in raw units."""

    mean_EBD: Tensor  # of every member
    std_EBD: Tensor
    member_B: Tensor  # number of the member that is drawn for each row
    sample_BD: Tensor  # the outputs with which the rollout goes on


Penalty = Callable[[Predictions], Tensor]  # -> (B,)


class Step(NamedTuple):
    """What a step of M x B rollouts leaves beside the next observations."""

    reward_MB: Tensor  # without penalty
    penalty_MB: Tensor | None  # None without a penalty function
    carried_MBX: Tensor | None
    dynamics_reward_MB: Tensor | None = None  # of the transition, where the dynamics have one
    cut_MB: Tensor | None = None  # which rollouts the dynamics want to end here, if they ever do


class Dynamics(Protocol):
    """What rollouts step through, in observations and rewards as the dataset has them and actions in [-1, 1].

    A rollout may carry a state of its own from step to step, which belongs to the dynamics: for a simulator its exact
    state, of which observations show a rounded, perhaps clipped part.
    """

    @property
    def observation_dim(self) -> int: ...

    @property
    def num_noises(self) -> int:
        """Z, the standard normal draws that a step of a row takes."""

    @property
    def choices(self) -> Sequence[int]:
        """Numbers of which a step of a row takes one, drawn uniformly: an ensemble's elites."""

    @property
    def floats_per_row(self) -> int:
        """About how many floats of the learner's device a step needs at once for a row."""

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> Tensor | None:
        """What is carried into the first step, `(M, B, X)`, if anything is.

        Args:
            obs_MBS: the first observations.
            states_MBX: the simulator's states that belong to them, float64, where they are known.
        """

    def step(
        self, carried_MBX: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor,
        penalty: Penalty | None, next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        """One step; the next observations are written to `next_obs_MBS`.

        Args:
            state_action_MBY: columns `[s, a]`, Y = S + A.
            penalty: of what an ensemble predicts, wherever there is one.
        """


@dataclass(frozen=True)
class RolloutStatistics:
    """Sums over a shard of one member, so that shards add up."""

    transitions: int
    terminals: int  # by the environment's own rule
    dropped: int  # predictions or penalised rewards that were not finite
    reward_sum: float
    penalty_sum: float
    cut: int = 0  # rollouts that the dynamics have ended
    dynamics_reward_sum: float = 0.0  # of all transitions with finite numbers, those that a cut drops included
    survivors: tuple[int, ...] = ()  # transitions of each step, (K,)

    def __add__(self, other: RolloutStatistics) -> RolloutStatistics:
        mine, theirs = vars(self), vars(other)
        sums = {k: mine[k] + theirs[k] for k in mine if k != "survivors"}
        survivors = tuple(map(operator.add, self.survivors, other.survivors))
        return RolloutStatistics(**sums, survivors=survivors)


class Gathered(NamedTuple):
    """What a member gathers in a shard."""

    rows: Tensor  # (n, W)
    tags: Tensor  # (n,) int16
    statistics: RolloutStatistics


class _Stepped(NamedTuple):
    """A step of M x B rollouts whose transitions are written."""

    next_obs_MBS: Tensor
    ended_MB: Tensor  # terminal or cut
    cut_MB: Tensor | None
    penalty_MB: Tensor | None
    dynamics_reward_MB: Tensor | None
    carried_MBX: Tensor | None


def tag_steps(tags: Tensor) -> Tensor:
    """The step 1..K of every row, 0 of one that no rollout has made."""
    return tags.abs() % CUT_TAG


def tag_cuts(tags: Tensor) -> Tensor:
    """Which rows a cut has left without a next one, though they are no terminals."""
    return tags.abs() >= CUT_TAG


def shard_size(device: torch.device, actor: Actor, dynamics: Dynamics, length: int) -> tuple[int, int]:
    """How a device's work is divided: members of a job, and starts that it has of each.

    The number of starts decides what is drawn, so it does not depend on the pack.

    Args:
        length: K, steps.
    """
    if device.type == "cpu":
        return 1, SHARD_ROWS
    s, a = dynamics.observation_dim, actor.action_dim
    # of one start: a layer's input and output with something to spare; the rows twice, as made and as picked; the draws
    per_step = 2 * (2 * s + a + 2) + a + dynamics.num_noises + 2
    floats = dynamics.floats_per_row + 3 * actor.widest_layer + length * per_step
    return max(1, DEVICE_JOB_BYTES // (4 * floats * DEVICE_SHARD_ROWS)), DEVICE_SHARD_ROWS


class Draws(NamedTuple):
    """All that is random in a shard of M members; V = A + Z."""

    noise_MKBV: Tensor  # standard normal: A columns for the policy, Z for the dynamics
    choice_MKB: Tensor  # of the dynamics: the ensemble member that predicts


def draw(
    seeds: Sequence[int], epoch: int, shard: int, num_starts: int, length: int, action_dim: int, dynamics: Dynamics,
    device: torch.device,
) -> Draws:  # fmt: skip
    """Draw a shard's noise and choices on its device, by one generator per member.

    Args:
        num_starts: B, starts of each member.
        length: K, steps.
    """
    noise = torch.empty((len(seeds), length, num_starts, action_dim + dynamics.num_noises), device=device)
    which = torch.empty((len(seeds), length, num_starts), dtype=torch.int64, device=device)
    for m, seed in enumerate(seeds):
        source = generator(seed, "rollout", epoch, shard, device=device)
        noise[m].normal_(generator=source)
        which[m].random_(len(dynamics.choices), generator=source)
    return Draws(noise, torch.tensor(dynamics.choices, device=device)[which])


@dataclass(frozen=True)
class Rollout:
    """The rollouts of M members, started by calling it.

    At every step the policy and the dynamics are sampled for every row. A terminal transition is kept with d = 1 and
    its row ends; a transition with a value that is not finite is dropped and ends its row too, and so does one that the
    dynamics cut.

    Args:
        actor: the policies of M members.
        termination: next observations (..., S) -> bool (...).
        penalty: a function of what all ensemble members predict, or None.
        penalty_coef_M: subtracted from the reward, times the penalty.
        cut: one of `CUTS`.
    """

    actor: Actor
    dynamics: Dynamics
    termination: Callable[[Tensor], Tensor]
    penalty: Penalty | None
    penalty_coef_M: Tensor
    cut: str = "terminal"

    @torch.inference_mode()
    def __call__(self, starts_MBS: Tensor, draws: Draws, states_MBX: Tensor | None = None) -> list[Gathered]:
        """What every member gathers, step after step; as many steps as `draws` has.

        Args:
            states_MBX: the simulator's states of the starts, where they are known.
        """
        if starts_MBS.device.type != "cpu":
            return self.masked(starts_MBS, draws, states_MBX)
        parts = [starts_MBS, *draws] + ([] if states_MBX is None else [states_MBX])
        return [self._of_member(m).compacting(*(x[m] for x in parts)) for m in range(len(starts_MBS))]

    def compacting(
        self, obs_BS: Tensor, noise_KBV: Tensor, choice_KB: Tensor, states_BX: Tensor | None = None
    ) -> Gathered:
        """One member's rollouts; rows that have ended leave the batch."""
        length, num_starts = choice_KB.shape
        carried = self.dynamics.begin(obs_BS.unsqueeze(0), None if states_BX is None else states_BX.unsqueeze(0))
        rows = obs_BS.new_empty((length * num_starts, self._width))
        tags = torch.empty(length * num_starts, dtype=torch.int16, device=obs_BS.device)
        filled, dropped, cuts, penalty_sum, dynamics_reward_sum = 0, 0, 0, 0.0, 0.0
        place = torch.arange(num_starts, device=obs_BS.device)  # of the rows still alive among the starts
        half_B = half_of(place)
        survivors = [0] * length
        before = place  # where the last row of each of them is, from the second step on
        for step, (noise, choice) in enumerate(zip(noise_KBV, choice_KB, strict=True)):
            if len(place) < num_starts:
                noise, choice = noise.index_select(0, place), choice.index_select(0, place)
            new = rows[filled : filled + len(place)]
            stepped = self._step(carried, *(x.unsqueeze(0) for x in (obs_BS, noise, choice, new)))
            if not bool(new.sum().isfinite()):  # the sum is cheap; where it is finite, all are
                finite = torch.isfinite(new).all(-1)
                dropped += int((~finite).sum())
                stepped, place, before = _only(finite, stepped, place, before)
                new = _moved_up(new, finite)
            if stepped.dynamics_reward_MB is not None:
                dynamics_reward_sum += float(stepped.dynamics_reward_MB.sum(dtype=torch.float64))
            if stepped.cut_MB is not None:
                cut = stepped.cut_MB.squeeze(0)
                cuts += int(cut.sum())
                if self.cut == "drop" and bool(cut.any()):
                    if step:
                        _mark_cut(tags, before[cut])
                    stepped, place, before = _only(~cut, stepped, place, before)
                    new = _moved_up(new, ~cut)
            if stepped.penalty_MB is not None:
                penalty_sum += float(stepped.penalty_MB.sum(dtype=torch.float64))
            half = half_B if len(place) == num_starts else half_B.index_select(0, place)
            torch.mul(half, step + 1, out=tags[filled : filled + len(place)])
            before = torch.arange(filled, filled + len(place), device=place.device)
            if self.cut == "truncate" and stepped.cut_MB is not None:
                _mark_cut(tags, before[stepped.cut_MB.squeeze(0)])
            filled += len(place)
            survivors[step] = len(place)
            if bool(stepped.ended_MB.any()):
                stepped, place, before = _only(~stepped.ended_MB.squeeze(0), stepped, place, before)
            obs_BS, carried = stepped.next_obs_MBS.squeeze(0), stepped.carried_MBX
            if not len(place):
                break
        rows = rows[:filled]
        reward_sum, terminals = rows[:, self._reward : self._reward + 2].sum(0, dtype=torch.float64).tolist()
        if self.cut == "terminal":
            terminals -= cuts
        statistics = RolloutStatistics(
            filled, int(terminals), dropped, reward_sum, penalty_sum, cuts, dynamics_reward_sum, tuple(survivors)
        )
        return Gathered(rows, tags[:filled], statistics)

    def masked(self, obs_MBS: Tensor, draws: Draws, states_MBX: Tensor | None = None) -> list[Gathered]:
        """All members' rollouts; rows that have ended go on, unheeded."""
        members, length, num_starts = draws.choice_MKB.shape
        carried = self.dynamics.begin(obs_MBS, states_MBX)
        rows = obs_MBS.new_empty((members, length, num_starts, self._width))
        kept = torch.empty_like(draws.choice_MKB, dtype=torch.bool)
        cut_MKB = None if self.cut == "terminal" else torch.zeros_like(kept)
        alive = torch.ones_like(kept[:, 0])
        dropped = torch.zeros_like(self.penalty_coef_M, dtype=torch.float64)
        penalty_sum, cuts, dynamics_reward_sum = (torch.zeros_like(dropped) for _ in range(3))
        for t in range(length):
            stepped = self._step(carried, obs_MBS, draws.noise_MKBV[:, t], draws.choice_MKB[:, t], rows[:, t])
            obs_MBS, carried = stepped.next_obs_MBS, stepped.carried_MBX
            finite = torch.isfinite(rows[:, t]).all(-1)
            dropped += (alive & ~finite).sum(1)
            alive = torch.logical_and(alive, finite, out=kept[:, t])
            if stepped.dynamics_reward_MB is not None:
                dynamics_reward_sum += stepped.dynamics_reward_MB.where(alive, 0.0).sum(1, dtype=torch.float64)
            if stepped.cut_MB is not None:
                cut = alive & stepped.cut_MB
                cuts += cut.sum(1)
                if cut_MKB is not None and self.cut == "truncate":
                    cut_MKB[:, t] = cut
                elif cut_MKB is not None:
                    alive = torch.logical_and(alive, ~cut, out=kept[:, t])
                    if t:
                        cut_MKB[:, t - 1] = cut
            if stepped.penalty_MB is not None:
                penalty_sum += stepped.penalty_MB.where(alive, 0.0).sum(1, dtype=torch.float64)
            alive = alive & ~stepped.ended_MB
        reward_done = rows[..., self._reward : self._reward + 2].where(kept.unsqueeze(-1), 0.0)
        reward_sum, terminals = reward_done.sum((1, 2), dtype=torch.float64).unbind(1)
        if self.cut == "terminal":
            terminals = terminals - cuts
        survivors_MK = kept.sum(2)
        sums = (survivors_MK.sum(1), terminals, dropped, reward_sum, penalty_sum, cuts, dynamics_reward_sum)
        totals = torch.cat((torch.stack(sums, 1), survivors_MK), 1)
        statistics = [_statistics(row) for row in _read(totals)]
        counts = [s.transitions for s in statistics]
        places = kept_places(kept.view(-1), sum(counts))
        picked = rows.view(-1, self._width).index_select(0, places)
        sizes = 1 + places.div(num_starts, rounding_mode="floor") % length
        if cut_MKB is not None:
            sizes += CUT_TAG * cut_MKB.view(-1).index_select(0, places)
        tags = sizes.to(torch.int16) * half_of(places % num_starts)
        return [Gathered(*one) for one in zip(picked.split(counts), tags.split(counts), statistics, strict=True)]

    def _step(
        self, carried_MBX: Tensor | None, obs_MBS: Tensor, noise_MBV: Tensor, choice_MB: Tensor, rows_MBW: Tensor
    ) -> _Stepped:
        """Write a transition of every row."""
        s = obs_MBS.shape[-1]
        a = self._reward - s
        rows_MBW[..., :s] = obs_MBS
        rows_MBW[..., s : s + a] = self.actor.sample(obs_MBS, noise_MBV[..., :a])
        next_obs = rows_MBW[..., s + a + 2 :]
        step = self.dynamics.step(
            carried_MBX, rows_MBW[..., : s + a], noise_MBV[..., a:], choice_MB, self.penalty, next_obs
        )
        reward = step.reward_MB
        if step.penalty_MB is not None:
            reward = torch.addcmul(reward, self.penalty_coef_M.unsqueeze(1), step.penalty_MB, value=-1.0)
        done = ended = self.termination(next_obs)
        cut = None if step.cut_MB is None else step.cut_MB & ~done
        if cut is not None:
            ended = done | cut
            done = ended if self.cut == "terminal" else done
        rows_MBW[..., s + a], rows_MBW[..., s + a + 1] = reward, done
        return _Stepped(next_obs, ended, cut, step.penalty_MB, step.dynamics_reward_MB, step.carried_MBX)

    def _of_member(self, member: int) -> Rollout:
        if self.actor.num_members == 1:
            return self
        coef = self.penalty_coef_M[member : member + 1]
        return replace(self, actor=self.actor.select([member]), penalty_coef_M=coef)

    @property
    def _reward(self) -> int:
        """The column of the reward; the done flag's is the next."""
        return self.dynamics.observation_dim + self.actor.action_dim

    @property
    def _width(self) -> int:
        return self._reward + 2 + self.dynamics.observation_dim


def _read(totals_MX: Tensor) -> list[list[float]]:
    """The only point at which rollouts on a device wait for it."""
    rows: list[list[float]] = totals_MX.tolist()
    return rows


def _statistics(totals: Sequence[float]) -> RolloutStatistics:
    made, ended, lost, reward, penalty, cut, dynamics_reward, *survivors = totals
    return RolloutStatistics(
        int(made), int(ended), int(lost), reward, penalty, int(cut), dynamics_reward, tuple(map(int, survivors))
    )


def _only(chosen_B: Tensor, stepped: _Stepped, *others: Tensor) -> tuple[Any, ...]:
    """Some rows of a member's step `(1, B, ...)`, and of what belongs to them, `(B,)`; copies."""
    parts: dict[str, Any] = {k: None if x is None else x[:, chosen_B] for k, x in stepped._asdict().items()}
    return _Stepped(**parts), *(x[chosen_B] for x in others)


def _moved_up(rows_BW: Tensor, kept_B: Tensor) -> Tensor:
    """The kept rows, moved to the first places of the same memory."""
    kept = rows_BW[kept_B]
    rows_BW[: len(kept)] = kept
    return rows_BW[: len(kept)]


def _mark_cut(tags: Tensor, at: Tensor) -> None:
    tags[at] += CUT_TAG * tags[at].sign()


def kept_places(kept_R: Tensor, count: int) -> Tensor:
    """Where the kept rows are, `(count,)`, ascending; `count` is their number, so that nothing has to be asked."""
    # each kept row's place among the kept; the others all write behind the last
    place = torch.where(kept_R, kept_R.cumsum(0) - 1, count)
    source = torch.empty(count + 1, dtype=torch.int64, device=kept_R.device)
    source.scatter_(0, place, torch.arange(len(place), device=kept_R.device))
    return source[:count]


def half_of(starts: Tensor) -> Tensor:
    """1 for the rollouts of starts at even places of a shard, -1 for those at odd ones, int16."""
    return (1 - 2 * (starts % 2)).to(torch.int16)
