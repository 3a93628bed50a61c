"""What a study's trials are judged by: episodes in the environment, or a metric that needs none.

Choosing settings by their scores in the environment is itself learning from it: an offline method tuned so has used
online episodes, and the report of a study says how many. A study may instead search by an offline metric, and spend
episodes only on the choice among its best trials.
"""

from __future__ import annotations

from dataclasses import dataclass

from sweeps.errors import StudyError, suggestion

KINDS = ("online", "offline", "hybrid")
SCORE = "score"
OFFLINE_METRICS = ("fqe", "model_return", "initial_value")


@dataclass
class ObjectiveSpec:
    """By what trials are judged."""

    # online: by episodes in the environment | offline: by a metric of the data alone | hybrid: likewise, and then the
    # best `top` trials play a bandit of `pulls` episodes for who is chosen
    kind: str = "online"
    # score (or mean return where no reference is known) | fqe | model_return | initial_value
    metric: str = SCORE
    fqe_updates: int = 5_000  # of fitted Q evaluation, at every evaluation
    horizon: int = 200  # steps of model_return
    top: int = 8  # trials in the bandit of kind=hybrid
    pulls: int = 0  # episodes of the bandit

    @property
    def offline(self) -> bool:
        """Whether the search sees no episodes."""
        return self.kind != "online"

    def validate(self) -> None:
        """Check every field.

        Raises:
            StudyError: a value that makes no sense, or values that do not go together.
        """
        if self.kind not in KINDS:
            raise StudyError(f"Unknown study.objective.kind '{self.kind}'; {suggestion(self.kind, KINDS)}.")
        metrics = (SCORE, *OFFLINE_METRICS)
        if self.metric not in metrics:
            raise StudyError(f"Unknown study.objective.metric '{self.metric}'; {suggestion(self.metric, metrics)}.")
        for name, least in (("fqe_updates", 1), ("horizon", 1), ("top", 2), ("pulls", 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise StudyError(f"study.objective.{name} must be a whole number of at least {least}, not {number!r}.")
        if self.offline and self.metric == SCORE:
            raise StudyError(
                f"study.objective.kind={self.kind} searches without episodes, so metric=score is not there to be "
                f"seen; set study.objective.metric to one of {', '.join(OFFLINE_METRICS)}."
            )
        if not self.offline and self.metric != SCORE:
            raise StudyError(
                f"study.objective.metric={self.metric} needs no episodes; set study.objective.kind to offline or "
                "hybrid, or leave out the metric."
            )
        if self.kind == "hybrid" and self.pulls < self.top:
            raise StudyError(
                f"study.objective.kind=hybrid plays every one of its top={self.top} trials at least once; set "
                f"study.objective.pulls, the episodes it may spend, to at least {self.top}, not {self.pulls}."
            )
        if self.kind != "hybrid" and self.pulls:
            raise StudyError(
                f"study.objective.pulls={self.pulls} are episodes of a bandit that kind={self.kind} does not have; "
                "set study.objective.kind=hybrid, or leave them out."
            )
