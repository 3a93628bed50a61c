"""Synthetic transitions from a trajectory diffusion model, towards whatever policies guide it.

A job makes a shard of the pools of one or several members: a pure function of its fields and the model, so that it may
run anywhere and again. Every member draws its own noise (`agents.edm_sampler.MemberNoise`), and the number of
trajectories in a shard does not depend on the pack, so a member's rows are the same alone as in any pack. Rows are as
rollouts leave them (`agents.rollout`): in the units of the data, with the step 1..H-1 as their tag, negative where the
trajectory has an odd place in its shard. Shapes are fixed and nothing waits for the device before the end.

Shapes: M member, B trajectory, H row, K = H - 1 transition, S observation, A action, C channel, W columns of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.actors import Actor
from agents.chunk import matrix_precision
from agents.edm import Denoise
from agents.edm_sampler import MemberNoise, SamplerConfig, Steering, sample
from agents.guidance import GuidanceConfig, PolicyScore, ScoreGuidedDenoiser, StepGuidance, step_coefficients
from agents.method import RolloutResult, Termination
from agents.rollout import RolloutStatistics, half_of, kept_places
from agents.trajectories import Trajectories, transitions
from agents.trajectory_diffusion import TrajectoryModel


@dataclass(frozen=True)
class TrajectoryJob:
    """One shard of the pools of M members.

    Args:
        members, seeds, epoch, shard: as in `agents.method.RolloutJob`.
        num_trajectories: B, of each member.
        actor: the members' policies; None: unguided.
        coef: lambda, (M,), on the CPU.
        termination: of the environment, for `sampler.terminals="rule"`.
        device: where the model is and the job runs.
    """

    members: tuple[int, ...]
    seeds: tuple[int, ...]
    epoch: int
    shard: int
    num_trajectories: int
    actor: Actor | None
    coef: Tensor
    sampler: SamplerConfig
    guidance: GuidanceConfig
    termination: Termination
    device: torch.device

    @property
    def num_starts(self) -> int:
        """Trajectories of all members."""
        return len(self.members) * self.num_trajectories

    def run(self, model: TrajectoryModel) -> RolloutResult:
        """The transitions of every member's trajectories; nothing behind a trajectory's first terminal."""
        rows, tags, statistics = zip(*_gather(self.trajectories(model)), strict=True)
        return RolloutResult(self.members, rows, tags, statistics)

    @torch.inference_mode()
    def trajectories(self, model: TrajectoryModel) -> Trajectories:
        """The trajectories of every member, `(M, B, H, ...)`, with the terminals that `sampler.terminals` asks for.

        Raises:
            ValueError: the policies are not of the model's observations and actions, or not as many as the members.
        """
        shape = (self.num_trajectories, model.length, model.observation_dim + model.action_dim + 2)
        denoise, steering = self._guided(model)
        noise = MemberNoise(self.seeds, (self.epoch, self.shard), shape, self.device)
        with matrix_precision(self.sampler.precision):  # which the model's network follows
            x = sample(denoise, noise, self.sampler, steering)
        trajectories = model.scaling.decode(x.view(len(self.seeds), *shape))
        return trajectories._replace(terminals=self._terminals(trajectories))

    def _guided(self, model: TrajectoryModel) -> tuple[Denoise, Steering | None]:
        """The denoiser and what steers its samples, as `guidance` has it."""
        if self.actor is None or not bool(self.coef.any()):
            return model.denoiser, None
        theirs = (self.actor.num_members, self.actor.observation_dim, self.actor.action_dim)
        mine = (len(self.seeds), model.observation_dim, model.action_dim)
        if theirs != mine:
            raise ValueError(f"policies of (members, observation, action) {theirs} cannot guide a model of {mine}")
        score = PolicyScore(self.actor, model.scaling)
        coef_N = self.coef.to(self.device).repeat_interleave(self.num_trajectories)
        actions = slice(model.observation_dim, model.observation_dim + model.action_dim)
        if self.guidance.rule == "score":
            return ScoreGuidedDenoiser(model.denoiser, score, coef_N, actions, self.guidance), None
        coefficients = step_coefficients(self.guidance, self.sampler)
        return model.denoiser, StepGuidance(score, coef_N, actions, self.guidance, coefficients)

    def _terminals(self, trajectories: Trajectories) -> Tensor:
        if self.sampler.terminals == "generated":
            return trajectories.terminals
        terminals = torch.zeros_like(trajectories.terminals)
        if self.sampler.terminals == "rule":
            terminals[..., :-1] = self.termination(trajectories.observations[..., 1:, :])
        return terminals


def _gather(trajectories: Trajectories) -> list[tuple[Tensor, Tensor, RolloutStatistics]]:
    """Rows (n, W), tags (n,) and statistics of every member."""
    rows_MBKW, kept_MBK = transitions(trajectories)
    _, num_trajectories, length, width = rows_MBKW.shape
    finite_MBK = rows_MBKW.isfinite().all(-1)
    dropped_M = (kept_MBK & ~finite_MBK).sum((1, 2))
    kept_MBK = kept_MBK & finite_MBK
    reward = trajectories.observations.shape[-1] + trajectories.actions.shape[-1]
    reward_done = rows_MBKW[..., reward : reward + 2].where(kept_MBK.unsqueeze(-1), 0.0)
    reward_M, terminals_M = reward_done.sum((1, 2), dtype=torch.float64).unbind(1)
    survivors_MK = kept_MBK.sum(1)
    totals = torch.cat((torch.stack((terminals_M, dropped_M, reward_M), 1), survivors_MK), 1)
    statistics = [_statistics(line) for line in _read(totals)]
    counts = [s.transitions for s in statistics]
    places = kept_places(kept_MBK.flatten(), sum(counts))
    rows = rows_MBKW.reshape(-1, width).index_select(0, places)
    step, trajectory = places % length + 1, places.div(length, rounding_mode="floor") % num_trajectories
    tags = step.to(torch.int16) * half_of(trajectory)
    return list(zip(rows.split(counts), tags.split(counts), statistics, strict=True))


def _read(totals_MX: Tensor) -> list[list[float]]:
    """The only point at which a job waits for its device."""
    lines: list[list[float]] = totals_MX.tolist()
    return lines


def _statistics(totals: Sequence[float]) -> RolloutStatistics:
    terminals, dropped, reward_sum, *survivors = totals
    by_step = tuple(map(int, survivors))
    return RolloutStatistics(sum(by_step), int(terminals), int(dropped), reward_sum, 0.0, survivors=by_step)
