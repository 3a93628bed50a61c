"""Draws of what learns beside actor and critics, a block of steps at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.randomness import generator

_BLOCK_NUMBERS = 1 << 18  # of a member that are drawn by one generator


class Draws:
    """What further draws the steps of a training take, a block of steps at a time: a function of seed, purpose and the
    step's number only.

    Args:
        seeds: one per member, M of them.
        purpose: what is drawn.
        shape: of a member's numbers of a step; how many steps a block has follows from it.
        uniform: numbers in [0, 1) as float64, whose product with a count can be rounded down to a row's number, in
            place of standard normal ones as float32.
        device: where they are drawn.
    """

    def __init__(
        self, seeds: Sequence[int], purpose: str, shape: Sequence[int], device: torch.device | str = "cpu",
        uniform: bool = False,
    ) -> None:  # fmt: skip
        self.seeds, self.purpose, self.shape = list(seeds), purpose, tuple(shape)
        self.device, self.uniform = torch.device(device), uniform
        self._num_steps = max(1, _BLOCK_NUMBERS // max(1, math.prod(self.shape)))
        self._number, self._block = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The numbers `(M, *shape)` of a step."""
        number, place = divmod(step, self._num_steps)
        if number != self._number:
            shape = (self._num_steps, *self.shape)
            made = []
            for seed in self.seeds:
                source = generator(seed, self.purpose, number, device=self.device)
                if self.uniform:
                    made.append(torch.rand(shape, generator=source, device=self.device, dtype=torch.float64))
                else:
                    made.append(torch.randn(shape, generator=source, device=self.device))
            self._number, self._block = number, torch.stack(made, 1)
        return self._block[place]

    def select(self, members: Sequence[int]) -> Draws:
        """The draws of some members only."""
        seeds = [self.seeds[m] for m in members]
        return Draws(seeds, self.purpose, self.shape, self.device, self.uniform)
