"""Sub-trajectories: windows of a dataset, what a diffusion model sees of them, and the transitions in them.

A sub-trajectory has H rows (s, a, r, d), and what follows a row is the state of the next one: H rows are H - 1
transitions. Policy-guided diffusion (Jackson et al., RLC 2024, arXiv 2404.06356; code EmptyJackson/policy-guided-
diffusion, commit 9da606c) cuts a dataset into windows such that d = 1 stands in the last row of a window only, which is
no transition: what its model generates never holds a terminal. The windows here are of three kinds:

    padded   as `whole`, and behind an episode that a terminal has ended its last state stays, with the mean action and
             reward and d = 1, for so many rows that a window may begin with any of its transitions. So a terminal may
             stand in any row, the share of transitions that are terminal is the data's, and episodes shorter than a
             window are learned from, too
    whole    every episode is one row longer: behind its last transition comes the state in which that one ended, with
             the mean action and reward and d = 0. So d = 1 also stands in the last row but one, where a window ends
             with its episode, and the transition that ends an episode is there to be learned.
    release  as the released code makes them (environments/dataset.py): no such row, and no window ends in the last
             row of an episode that a time limit has ended.

All take every `stride`-th of the starts that keep a window inside the rows of its episode, and beside these every
window an episode begins with; the last two also every one that a terminal ends. A time limit is no terminal.

Shapes: R rows of all episodes, W windows, H row of a window, C = S + A + 2 channels, S observation, A action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agents.method import TrainingData
from agents.replay import transition_rows

RULES = ("padded", "whole", "release")
TERMINAL_SCALES = ("standardised", "raw", "bounded")
MAX_ACTION = 0.999  # of what artanh is taken (released code: environments/dataset.py)


class Trajectories(NamedTuple):
    """Rows of sub-trajectories in the units of `TrainingData`: observations and rewards as the dataset has them, and
    actions in [-1, 1]."""

    observations: Tensor  # (..., H, S)
    actions: Tensor  # (..., H, A)
    rewards: Tensor  # (..., H)
    terminals: Tensor  # (..., H) 0 or 1: true terminals only, never a time limit


def transitions(trajectories: Trajectories) -> tuple[Tensor, Tensor]:
    """The transitions in sub-trajectories.

    Returns:
        Rows `(..., H - 1, 2S + A + 2)` as `agents.replay` has them, and a mask `(..., H - 1)`, true up to the first
        terminal of each sub-trajectory: what comes behind it does not follow from it.
    """
    obs, action, reward, done = trajectories
    rows = transition_rows(obs[..., :-1, :], action[..., :-1, :], reward[..., :-1], done[..., :-1], obs[..., 1:, :])
    ended_before = done.cumsum(-1) - done
    return rows, ended_before[..., :-1] < 0.5


@dataclass(frozen=True)
class TrajectoryScaling:
    """How sub-trajectories become the diffusion model's input: every channel less its mean, over its deviation.

    The action's channels are artanh(a), a cut to +-0.999, so that every sample is an action within its bounds.
    """

    observation_mean: Tensor  # (S,)
    observation_std: Tensor  # (S,)
    action_mean: Tensor  # (A,) of artanh(a)
    action_std: Tensor  # (A,)
    reward_mean: Tensor  # ()
    reward_std: Tensor  # ()
    terminal_mean: Tensor  # ()
    terminal_std: Tensor  # ()

    @classmethod
    def fit(cls, windows: Windows, terminal_scale: str = "standardised") -> TrajectoryScaling:
        """The statistics of windows; a deviation of 0 becomes 1.

        The action and reward of rows that hold a state only are left out.

        Args:
            terminal_scale: what becomes of d. "standardised": like every other channel, as the released code does; of
                terminals with rate p those are then sqrt((1 - p) / p). "raw": 0 or 1, as SynthER has them. "bounded":
                -1 or 1.
        """
        rows, weight_R = windows.episodes.rows, windows.row_counts().double()
        with_action_R = weight_R * ~windows.episodes.state_only
        terminal_mean, terminal_std = _moments(rows.terminals, weight_R)
        if terminal_scale != "standardised":
            mean, std = {"raw": (0.0, 1.0), "bounded": (0.5, 0.5)}[terminal_scale]
            terminal_mean, terminal_std = (torch.full_like(terminal_mean, value) for value in (mean, std))
        return cls(
            *_moments(rows.observations, weight_R), *_moments(_before_tanh(rows.actions), with_action_R),
            *_moments(rows.rewards, with_action_R), terminal_mean, terminal_std,
        )  # fmt: skip

    @property
    def observation_dim(self) -> int:
        return self.observation_mean.shape[0]

    @property
    def action_dim(self) -> int:
        return self.action_mean.shape[0]

    @property
    def num_channels(self) -> int:
        return self.observation_dim + self.action_dim + 2

    def encode(self, trajectories: Trajectories) -> Tensor:
        """The model's input, `(..., H, C)`, columns [s | a | r | d]."""
        obs, action, reward, done = trajectories
        return torch.cat((
            (obs - self.observation_mean) / self.observation_std,
            (_before_tanh(action) - self.action_mean) / self.action_std,
            ((reward - self.reward_mean) / self.reward_std).unsqueeze(-1),
            ((done - self.terminal_mean) / self.terminal_std).unsqueeze(-1),
        ), -1)  # fmt: skip

    def decode(self, x: Tensor) -> Trajectories:
        """What inputs `(..., H, C)` say: actions by tanh, terminals where d is above one half."""
        return Trajectories(
            self.observations(x),
            self.pre_tanh_actions(x).tanh(),
            x[..., -2] * self.reward_std + self.reward_mean,
            (x[..., -1] * self.terminal_std + self.terminal_mean > 0.5).to(x.dtype),
        )

    def observations(self, x: Tensor) -> Tensor:
        """The observations `(..., H, S)` in inputs `(..., H, C)`."""
        return x[..., : self.observation_dim] * self.observation_std + self.observation_mean

    def pre_tanh_actions(self, x: Tensor) -> Tensor:
        """What tanh makes actions of, `(..., H, A)`, in inputs `(..., H, C)`."""
        return x[..., self.observation_dim : -2] * self.action_std + self.action_mean

    def to(self, device: torch.device | str) -> TrajectoryScaling:
        return TrajectoryScaling(**{name: value.to(device) for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> TrajectoryScaling:
        return cls(**state)


@dataclass(frozen=True)
class EpisodeRows:
    """A dataset's episodes one after the other, each with one row more for the state in which it ended, or with several
    if a terminal ended it."""

    rows: Trajectories  # (R, S), (R, A), (R,), (R,)
    state_only: Tensor  # (R,) bool: the rows behind each episode's transitions; action and reward are the data's mean
    starts: Tensor  # (E,) first rows of the episodes; on the CPU, as what follows
    lengths: Tensor  # (E,) transitions
    terminated: Tensor  # (E,) bool: by a terminal

    @classmethod
    def from_data(cls, data: TrainingData, padding: int = 0) -> EpisodeRows:
        """The rows of all episodes.

        Args:
            padding: rows with d = 1 in place of the one with d = 0 behind an episode that a terminal has ended, H - 1
                for `padded` windows of H rows; 0: none.
        """
        if data.episode_starts is None:
            raise ValueError("windows need data with episode_starts")
        device, num_rows = data.observations.device, len(data.observations)
        starts = data.episode_starts.cpu()
        lengths = torch.diff(starts, append=torch.tensor([num_rows]))
        ends = starts + lengths
        last = (ends - 1).to(device)
        terminated = data.terminals[last].cpu() > 0.5
        added_E = torch.where(terminated, max(padding, 1), 1)
        extended = starts + added_E.cumsum(0) - added_E
        of_transition = (torch.arange(num_rows) + torch.repeat_interleave(extended - starts, lengths)).to(device)
        total = num_rows + int(added_E.sum())
        state_only = torch.ones(total, dtype=torch.bool, device=device)
        state_only[of_transition] = False
        episode_of_state = torch.repeat_interleave(torch.arange(len(starts)), added_E).to(device)

        def joined(column: Tensor, behind: Tensor) -> Tensor:
            out = column.new_empty((total, *column.shape[1:]))
            out[of_transition], out[state_only] = column, behind
            return out

        mean_action = _before_tanh(data.actions).mean(0).tanh()
        stays_done = data.terminals[last] * (padding > 0)
        rows = Trajectories(
            joined(data.observations, data.next_observations[last][episode_of_state]),
            joined(data.actions, mean_action), joined(data.rewards, data.rewards.mean()),
            joined(data.terminals, stays_done[episode_of_state]),
        )  # fmt: skip
        return cls(rows, state_only, extended, lengths, terminated)

    def __len__(self) -> int:
        return len(self.starts)

    def windows(self, length: int, rule: str = "whole", stride: int = 8, episodes: Tensor | None = None) -> Windows:
        """The windows of some episodes.

        Args:
            length: H.
            rule: one of `RULES`; `padded` with so much `padding` only.
            stride: of the starts inside episodes, counted on over all of them.
            episodes: numbers `(n,)` on the CPU; None: all.
        """
        episodes = torch.arange(len(self)) if episodes is None else episodes
        usable_E = self.lengths[episodes] + (rule != "release")  # rows
        if rule == "padded":
            usable_E += self.terminated[episodes] * (length - 2)
        longer = usable_E >= length
        starts_E, num_E = self.starts[episodes][longer], usable_E[longer] - length + 1
        terminated_E, last_E = self.terminated[episodes][longer], starts_E + num_E - 1
        before_E = num_E.cumsum(0) - num_E
        inside = torch.repeat_interleave(starts_E - before_E, num_E) + torch.arange(int(num_E.sum()))
        strided = inside[::stride]
        if rule == "release":
            at_limit = last_E[~terminated_E]
            strided, starts_E = (x[~torch.isin(x, at_limit)] for x in (strided, starts_E))
        first = starts_E[~torch.isin(starts_E, strided)]
        end = last_E[terminated_E] if rule != "padded" else last_E[:0]
        end = end[~torch.isin(end, torch.cat((strided, first)))]
        counts = {"strided": len(strided), "start": len(first), "terminal_end": len(end)}
        num_transitions = int(self.lengths[episodes].sum())
        return Windows(self, torch.cat((strided, first, end)), length, counts, num_transitions)


@dataclass(frozen=True)
class Windows:
    """Sub-trajectories of a dataset: start rows, and the rows themselves once, whatever the number of windows."""

    episodes: EpisodeRows
    starts: Tensor  # (W,) rows of `episodes`, on the CPU
    length: int  # H
    counts: Mapping[str, int]  # windows by kind: strided; further ones at a start; further ones that a terminal ends
    num_transitions: int  # of the episodes that the windows are of

    def __len__(self) -> int:
        return len(self.starts)

    def row_numbers(self, numbers: Tensor) -> Tensor:
        """The rows `(..., H)` of the windows with numbers `(...)`; both on the CPU."""
        return self.starts[numbers].unsqueeze(-1) + torch.arange(self.length)

    def gather(self, numbers: Tensor) -> Trajectories:
        """The windows with numbers `(...)`, on the data's device."""
        index = self.row_numbers(numbers).to(self.episodes.state_only.device)
        return Trajectories(*(column[index] for column in self.episodes.rows))

    def row_counts(self) -> Tensor:
        """In how many windows each row is, `(R,)` int64 on the data's device."""
        steps = torch.zeros(len(self.episodes.state_only) + 1, dtype=torch.int64)
        one = torch.ones_like(self.starts)
        steps.index_add_(0, self.starts, one).index_add_(0, self.starts + self.length, -one)
        return steps.cumsum(0)[:-1].to(self.episodes.state_only.device)

    @property
    def coverage(self) -> float:
        """Share of the episodes' transitions that some window holds."""
        held = (self.row_counts() > 0) & ~self.episodes.state_only
        return float(held.sum()) / max(self.num_transitions, 1)


def _before_tanh(action: Tensor) -> Tensor:
    return action.clamp(-MAX_ACTION, MAX_ACTION).atanh()


def _moments(column: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `(R, ...)` with weights; a deviation of 0 becomes 1."""
    weight = (weight_R / weight_R.sum()).view(-1, *[1] * (column.dim() - 1))
    column = column.double()
    mean = (weight * column).sum(0)
    # a constant channel must give 0, and not what rounding leaves of it
    std = (weight * (column - mean).square()).sum(0).sqrt()
    std = torch.where(std > 1e-7 * mean.abs().clamp_min(1e-5), std, torch.ones_like(std))
    return mean.float(), std.float()
