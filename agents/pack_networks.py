"""Networks of a pack and their optimisers: what is made, dropped and kept for all members at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch

from agents.networks import StackedMLP, initialise
from agents.randomness import generator


class PackNetworks:
    """Networks of a pack and their optimisers, of which members can be dropped and whose state can be kept.

    Attributes:
        stacks: names of the networks, each with a leading member axis.
        optimisers: names of the optimisers, `<network>_optim`.
        per_member: names of the sequences that have one entry per member.
    """

    stacks: tuple[str, ...]
    optimisers: tuple[str, ...]
    per_member: tuple[str, ...]

    @property
    def num_members(self) -> int:
        return len(getattr(self, self.per_member[0]))

    def network(
        self, name: str, seeds: Sequence[int], sizes: Sequence[int], device: torch.device | str, *,
        each: int | None = None, scheme: str = "torch", last_bound: float = 0.0, kind: type[StackedMLP] = StackedMLP,
    ) -> StackedMLP:  # fmt: skip
        """Networks of every member with weights drawn for this name from its seed (see `agents.networks.initialise`).

        Args:
            sizes: input width, hidden widths, output width.
            each: networks of a member, `(M, each)`; None: one, `(M,)`.
        """
        lead = (self.num_members,) if each is None else (self.num_members, each)
        made = kind(lead, sizes, device)
        initialise(made, [generator(seed, f"init {name}") for seed in seeds], scheme=scheme, last_bound=last_bound)
        return made

    def bind(self) -> None:
        """Make the constants of the update that follow from settings, and views of the networks."""

    def select(self, members: Sequence[int]) -> Self:
        """The same with some of its members only."""
        other = copy.copy(self)
        for name in self.per_member:
            of_all = getattr(self, name)
            setattr(other, name, type(of_all)(of_all[m] for m in members))
        for name in self.stacks:
            setattr(other, name, getattr(self, name).select(members))
        for name in self.optimisers:
            network = getattr(other, name.removesuffix("_optim"))
            setattr(other, name, getattr(self, name).select(network, members))
        other.bind()
        return other

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while learning."""
        stacks = {name: getattr(self, name).flat for name in self.stacks}
        return {**stacks, **{name: getattr(self, name).state_dict() for name in self.optimisers}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load in place."""
        for name in self.stacks:
            getattr(self, name).flat.copy_(state[name])
        for name in self.optimisers:
            getattr(self, name).load_state_dict(state[name])
