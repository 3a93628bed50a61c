"""What cross-domain methods with domain classifiers share: their training beside actor and critics.

Shapes: M member, B row of a batch, W columns of a row (see `agents.replay`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from agents.cross_domain import CrossDomain, CrossDomainConfig, Part
from agents.domain_classifiers import ClassifierConfig, DomainClassifiers
from agents.domain_sac import DomainSACConfig


@dataclass
class ClassifiedConfig(CrossDomainConfig, DomainSACConfig):
    """Soft actor-critic from two domains beside classifiers."""

    classifiers: ClassifierConfig = field(default_factory=ClassifierConfig)

    @property
    def work_period(self) -> int:
        return math.lcm(super().work_period, self.classifiers.train_every)


class Classified(CrossDomain):
    """A pack whose classifiers are trained as soon as both domains hold a batch."""

    configs: list[Any]

    def make_parts(self) -> dict[str, Part]:
        own = [c.classifiers for c in self.configs]
        sizes = self.observation_dim, self.action_dim
        return {**super().make_parts(), "classifiers": DomainClassifiers(own, self.seeds, *sizes, self.device)}

    @property
    def classifiers(self) -> DomainClassifiers:
        return cast(DomainClassifiers, self.parts["classifiers"])

    def refit(self, t: int) -> None:
        if self.classifiers.due(t) and self._ready(t):
            self.classifiers.train(t, self.source, self.target)

    def with_classifiers(self, metrics: dict[str, Tensor] | None, **further: Tensor) -> dict[str, Tensor] | None:
        """Metrics with those of the classifiers and further ones `(M,)`; None if none are wanted."""
        return None if metrics is None else {**metrics, **self.classifiers.shown, **further}
