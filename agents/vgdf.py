"""VGDF: value-guided data filtering (Xu, Bai, Ma, Wang, Zhao, Wang, Li and Li, NeurIPS 2023, arXiv 2305.17625).

Source transitions are shared with the target domain where they lead to states that are worth what the states are that
the target's dynamics would lead to:

    refit     an ensemble of the target's dynamics, every so many iterations, on all rows met there
    filter    omega_b = 1 for the share xi of a minibatch's source rows with the greatest fictitious value proximity
              (`agents.value_proximity`), for all rows up to iteration `start_gate`
    critics   sum of mean_{target} sum_k (Q_k - y)^2 and mean_{source} omega sum_k (Q_k - y)^2
    policy    pi, toward min_k Q_k: acts in the target and is evaluated
    source policy  pi^E, toward max_k Q_k: acts in an online source, by which states are visited that may turn out well

(equations 4-8 and algorithm 1; the update is `agents.domain_sac`'s, the loop `agents.cross_domain`'s.) Variant `code`
follows the released code, Kavka1/VGDF 9f65d60, `paper` the paper's equations, and `mix` learns from all source rows:
the paper's ablation, which needs no ensemble. Its others are settings of `filter`: rows are kept by domain classifiers
or by their value (`agents.source_filters`). What the release does by mistake is left out unless it is asked for:
`gate=quantile` filters by densities that may be 0 in float32, `time_limit_terminals=true` makes ends by a time limit
terminals. Its termination rule of Hopper takes the absolute value of a comparison; the environment's is used here.

Shapes: M member, K noise, B batch, S observation, A action, W columns of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agents.checks import check_choice, check_not_negative
from agents.cross_domain import CrossDomain, CrossDomainConfig, Part, joined
from agents.domain_classifiers import ClassifierConfig, DomainClassifiers
from agents.domain_sac import ActorPenalty, DomainBatch, DomainSAC, DomainSACConfig, Targets, make_domain_sac
from agents.method import Termination
from agents.source_filters import GATES, LOSS_WEIGHTS, accept, filtered, value_score
from agents.target_dynamics import TargetDynamics, TargetDynamicsConfig
from agents.value_proximity import FORMS, ValueGate, num_fictitious_noises
from envs.errors import UserError
from envs.termination import termination_rule

FILTERS = ("proximity", "classifiers", "value", "none")
_OF_PROXIMITY = ("proximity", "gate", "dynamics")
_IDLE = {
    "proximity": ("classifiers",),
    "classifiers": _OF_PROXIMITY,
    "value": (*_OF_PROXIMITY, "classifiers"),
    "none": (*_OF_PROXIMITY, "classifiers", "keep_fraction", "start_gate", "loss_weight"),
}
"""Settings that a filter does without."""


@dataclass
class VGDFConfig(CrossDomainConfig, DomainSACConfig):
    """VGDF's hyperparameters; per-dataset values in agents/vgdf.yaml."""

    # proximity | classifiers (of domains) | value: which source rows are learned from; none: all
    filter: str = "proximity"
    proximity: str = "code"  # code | paper: the values compared (see agents.value_proximity)
    gate: str = "topk"  # topk | quantile (as released)
    keep_fraction: float = 0.25  # xi, of a minibatch's source rows
    start_gate: int = 100_000  # the iteration after which rows are filtered
    loss_weight: str = "batch"  # of a source row that passes: batch (1 / B) | accepted (1 / (xi B))
    optimistic: bool = True  # an online source is sampled by a policy of its own, toward the largest critic
    dynamics: TargetDynamicsConfig = field(default_factory=TargetDynamicsConfig)
    classifiers: ClassifierConfig = field(default_factory=ClassifierConfig)  # with filter=classifiers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "filter", FILTERS)
        check_choice(self, "proximity", FORMS)
        check_choice(self, "gate", GATES)
        check_choice(self, "loss_weight", LOSS_WEIGHTS)
        check_not_negative(self, "start_gate")
        if not 0 < self.keep_fraction < 1:
            raise UserError(
                f"method.keep_fraction={self.keep_fraction} must lie between 0 and 1; set method.filter=none to "
                "learn from all source rows"
            )

    @property
    def work_period(self) -> int:
        every = {"proximity": self.dynamics.refit_every, "classifiers": self.classifiers.train_every}
        return math.lcm(super().work_period, every.get(self.filter, 1))

    @property
    def idle_parts(self) -> tuple[str, ...]:
        """Parts that nothing depends on (see `agents.method.effective_settings`)."""
        return _IDLE[self.filter]

    def idle_setting(self, key: str) -> str | None:
        """Why a setting changes nothing, if so."""
        if key.partition(".")[0] not in self.idle_parts:
            return None
        return f"method.{key} has no effect with method.filter={self.filter}"


class VGDF(CrossDomain):
    """A pack of VGDF runs."""

    Config: type[VGDFConfig] = VGDFConfig
    shared: VGDFConfig

    def make_parts(self) -> dict[str, Part]:
        cfg, sizes = self.shared, (self.observation_dim, self.action_dim)
        if cfg.filter == "classifiers":
            own = [c.classifiers for c in self.configs]
            return {"classifiers": DomainClassifiers(own, self.seeds, *sizes, self.device)}
        if cfg.filter == "proximity":
            return {"dynamics": TargetDynamics(cfg.dynamics, self.seeds, *sizes, self.device)}
        return {}

    def bind(self) -> None:
        cfg, data = self.shared, self.data
        moments = (None if x is None else x.to(self.device) for x in (data.observation_mean, data.observation_std))
        self._gate = ValueGate(
            cfg.proximity, cfg.gate, cfg.keep_fraction, cfg.loss_weight, Termination(cfg.target, *moments)
        )

    @staticmethod
    def check_environment(config: CrossDomainConfig, env_id: str) -> None:
        CrossDomain.check_environment(config, env_id)
        if isinstance(config, VGDFConfig) and config.filter == "proximity":
            termination_rule(config.target)

    def make_updater(self) -> DomainSAC:
        optimistic = self.shared.optimistic and self.source_is_online
        sizes = self.observation_dim, self.action_dim
        return make_domain_sac(self.configs, self.seeds, *sizes, self.device, optimistic)

    @property
    def dynamics(self) -> TargetDynamics:
        """The target's, with filter=proximity."""
        part = self.parts["dynamics"]
        assert isinstance(part, TargetDynamics)
        return part

    @property
    def classifiers(self) -> DomainClassifiers:
        """With filter=classifiers."""
        part = self.parts["classifiers"]
        assert isinstance(part, DomainClassifiers)
        return part

    def actor_penalty(self) -> ActorPenalty | None:
        """What else the policy's loss has."""
        return None

    @property
    def _num_gate_noises(self) -> int:
        cfg = self.shared
        if cfg.filter != "proximity":
            return 0
        size = cfg.batch_size
        sizes = self.observation_dim, self.action_dim
        return num_fictitious_noises(cfg.proximity, cfg.dynamics.ensemble_size, size, 2 * size, *sizes)

    @property
    def num_noises(self) -> int:
        penalty = self.actor_penalty()
        of_policies = super().num_noises + (0 if penalty is None else penalty.num_noises)
        return of_policies + self._num_gate_noises

    def refit(self, t: int) -> None:
        if self.shared.filter == "classifiers" and self.classifiers.due(t) and self._ready(t):
            self.classifiers.train(t, self.source, self.target)
        if self.shared.filter != "proximity" or not self.dynamics.due(t, self.source.rows_held):
            return
        rows = [self.target.member_rows(m) for m in range(self.num_members)]
        for kept, measured in zip(self.extra_metrics, self.dynamics.refit(rows, t), strict=True):
            kept.update(measured)

    @torch.inference_mode()
    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        batch, sac = joined(source_MBW, target_MBW), self.updater
        targets, shown = sac.targets(batch.rows_MBW, noise_KMBA[0]), dict[str, Tensor]()
        first_of_gate = len(noise_KMBA) - self._num_gate_noises
        if self.shared.filter != "none" and t > self.shared.start_gate:
            batch, shown = self._filtered(batch, targets, noise_KMBA[first_of_gate:], with_metrics)
        turn = self.updates_done % sac.period
        metrics = sac.update(
            batch, noise_KMBA[:first_of_gate], turn, with_metrics, None, self.actor_penalty(), targets
        )  # fmt: skip
        return None if metrics is None else metrics | shown

    def _filtered(
        self, batch: DomainBatch, targets: Targets, noise_KMBA: Tensor, with_metrics: bool
    ) -> tuple[DomainBatch, dict[str, Tensor]]:
        """The minibatch with its source rows filtered, and metrics `(M,)`."""
        cfg, sac = self.shared, self.updater
        if cfg.filter == "proximity":
            if not self.dynamics.fitted:
                return batch, {}
            return self._gate(sac, self.dynamics.predict, batch, targets, noise_KMBA, with_metrics)
        source, shown = batch.rows_MBW[:, : batch.num_source], dict[str, Tensor]()
        if cfg.filter == "classifiers":
            score, shown = self.classifiers.log_ratio(source), self.classifiers.shown
        else:
            score = value_score(sac, source)
        accepted = accept(score, cfg.keep_fraction)
        shown = {**shown, "gate/score": score.mean(1), "gate/threshold": accepted.threshold_M}
        return filtered(batch, accepted, cfg.loss_weight), shown if with_metrics else {}


METHOD = VGDF
