"""What the soft actor-critics of a pack have in common, whatever their minibatches are made of: a policy, N critics,
their targets and a temperature for every member, and the optimisers of these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from agents.networks import StackedMLP, StackedScalar
from agents.optim import Adam
from agents.pack_networks import PackNetworks
from agents.squashed import PolicyScalars


@dataclass(frozen=True)
class LearningRates:
    """Of one member."""

    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 3e-4


class Settings(Protocol):
    """Those that this module looks at."""

    @property
    def target_entropy(self) -> float | None: ...

    @property
    def auto_alpha(self) -> bool: ...


SettingsT = TypeVar("SettingsT", bound=Settings)
RatesT = TypeVar("RatesT", bound=LearningRates)


class SoftActorCritic(PackNetworks, Generic[RatesT, SettingsT]):
    """Policies, critics, targets and temperatures of a pack.

    Args:
        seeds: one per member; M is their number.
        hyperparameters: one per member.
        settings: common to the pack.
        observation_dim, action_dim: S and A; actions lie in [-1, 1].
        device: where everything lives.

    Attributes:
        alpha_M1: the temperatures as they are used.
    """

    stacks: tuple[str, ...] = ("actor", "critic", "target", "log_alpha")
    optimisers: tuple[str, ...] = ("actor_optim", "critic_optim", "log_alpha_optim")
    per_member = ("seeds", "hyperparameters")
    actor: StackedMLP
    critic: StackedMLP

    def __init__(
        self, seeds: Sequence[int], hyperparameters: Sequence[RatesT], settings: SettingsT, observation_dim: int,
        action_dim: int, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.seeds, self.hyperparameters, self.settings = tuple(seeds), tuple(hyperparameters), settings
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.device = torch.device(device)
        self.build()
        self.target = self.critic.clone()
        self.log_alpha = StackedScalar(self.num_members, 0.0, device)
        self.log_alpha.flat.copy_(self.initial_alpha().log())
        self.actor_optim = Adam(self.actor, [h.actor_lr for h in hyperparameters])
        self.critic_optim = Adam(self.critic, [h.critic_lr for h in hyperparameters])
        self.log_alpha_optim = Adam(self.log_alpha, [h.alpha_lr for h in hyperparameters])
        self.bind()

    @abstractmethod
    def build(self) -> None:
        """Make `actor` and `critic`, with the initial weights of the members' seeds."""

    @abstractmethod
    def initial_alpha(self) -> Tensor:
        """Initial or fixed temperatures `(M,)`."""

    def bind(self) -> None:
        # as tensors: torch converts a Python number anew in every call
        self._scalars = PolicyScalars.make(self.action_dim, self.device)
        goal = self.settings.target_entropy
        self._entropy_goal = torch.tensor(-float(self.action_dim) if goal is None else goal, device=self.device)
        self._alpha = torch.empty_like(self.log_alpha.flat)
        self.alpha_M1 = self._alpha.unsqueeze(1)
        self.read_alpha()

    def read_alpha(self) -> None:
        """Bring `alpha_M1` to what `log_alpha` says."""
        torch.exp(self.log_alpha.flat, out=self._alpha)

    def step_alpha(self, log_prob_MB: Tensor) -> None:
        """Step of the temperatures along the gradient of -log_alpha mean_b (log pi(a~|s) + target entropy)."""
        torch.mean(log_prob_MB, dim=1, out=self.log_alpha.grad).add_(self._entropy_goal).neg_()
        self.log_alpha_optim.step()
        self.read_alpha()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load in place; a fixed temperature stays the configuration's."""
        fixed = {} if self.settings.auto_alpha else {"log_alpha": self.log_alpha.flat}
        super().load_state_dict({**state, **fixed})
        self.read_alpha()
