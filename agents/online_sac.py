"""Soft actor-critic in one domain at a time: the baselines that a cross-domain method is held against.

    learn_from           variant      steps and updates
    source               zero-shot    in the source; never in the target, where the policies are evaluated
    target               oracle       in the target from scratch
    source-then-target   finetune     `source_updates` iterations of the first kind, then those of the second

(Xu et al. 2023, arXiv 2305.17625, section 6: Zero-shot, Oracle, Finetune.) The update is that of `agents.domain_sac`:

    J(Q) = mean_b sum_k (Q_k(s, a) - y)^2

With `keep_source_rows` the rows met in the target join those of the source, and minibatches are drawn from all of them;
without, updates pause until the target's hold a batch and are of these alone, as in ODRL's fine-tuning
(OffDynamicsRL/off-dynamics-rl 34bba73, train_tune.py). The paper does not say which it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.checks import check_choice
from agents.cross_domain import CrossDomain, CrossDomainConfig
from agents.domain_sac import DomainSAC, DomainSACConfig, make_domain_sac
from agents.replay import Replay
from envs.errors import UserError

PHASES = ("source", "target", "source-then-target")


@dataclass
class OnlineSACConfig(CrossDomainConfig, DomainSACConfig):
    """Settings in agents/online_sac.yaml. `updates_per_target_step` counts where the target is learned from."""

    learn_from: str = "source"  # source | target | source-then-target
    source_updates: int = 1_000_000  # of num_updates with source-then-target, those before the target
    keep_source_rows: bool = False  # with source-then-target

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "learn_from", PHASES)
        if self.learn_from == "source-then-target" and not (
            0 < self.source_updates < self.num_updates and self.source_updates % self.collect_every == 0
        ):
            raise UserError(
                f"method.source_updates={self.source_updates} must be greater than 0, less than "
                f"method.num_updates={self.num_updates} and a multiple of method.collect_every={self.collect_every}"
            )

    @property
    def steps_in_target(self) -> bool:
        return self.uses_target

    @property
    def uses_source(self) -> bool:
        return self.learn_from != "target"

    @property
    def uses_target(self) -> bool:
        return self.learn_from != "source"

    @property
    def batch_rows(self) -> int:
        return self.batch_size

    def source_steps(self, t: int) -> int:
        return {"source": t, "target": 0, "source-then-target": min(t, self.source_updates)}[self.learn_from]

    def target_steps(self, t: int) -> int:
        return super().target_steps(t - self.source_steps(t)) if self.uses_target else 0

    def learns_from(self, t: int) -> tuple[bool, bool]:
        of_source = self.learn_from == "source" or (
            self.learn_from == "source-then-target" and (t < self.source_updates or self.keep_source_rows)
        )
        return of_source, not of_source

    def idle_setting(self, key: str) -> str | None:
        """Why a setting changes nothing, if so."""
        needs: dict[str, tuple[str, ...]] = {"updates_per_target_step": ("target", "source-then-target")}
        needs |= dict.fromkeys(("source_updates", "keep_source_rows"), ("source-then-target",))
        if key not in needs or self.learn_from in needs[key]:
            return None
        return f"method.{key} has no effect with method.learn_from={self.learn_from}"


class OnlineSAC(CrossDomain):
    """A pack of runs."""

    Config = OnlineSACConfig
    shared: OnlineSACConfig

    def make_updater(self) -> DomainSAC:
        return make_domain_sac(self.configs, self.seeds, self.observation_dim, self.action_dim, self.device)

    @property
    def _joins_rows(self) -> bool:
        return self.shared.learn_from == "source-then-target" and self.shared.keep_source_rows

    def replay_of(self, domain: str) -> Replay:
        return self.source if self._joins_rows else super().replay_of(domain)

    def capacity_of(self, domain: str) -> int:
        if not self._joins_rows:
            return super().capacity_of(domain)
        both = super().capacity_of("source") + super().capacity_of("target")
        return min(self.shared.replay_rows, both) if domain == "source" else 0


METHOD = OnlineSAC
