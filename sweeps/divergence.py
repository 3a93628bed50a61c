"""When a run counts as diverged besides losses or parameters that are not finite."""

from __future__ import annotations

from dataclasses import dataclass

from sweeps.errors import StudyError


@dataclass
class DivergenceSpec:
    """What stops a run before its losses are not finite any more."""

    # A run diverges if its mean Q over an epoch is above so many times max |r| / (1 - gamma), which no policy's value
    # can exceed with rewards like the data's. None: never. There is no bound below: a large penalty makes values as
    # negative as that, and nothing is wrong with them
    q_bound: float | None = 3.0
    always: bool = False  # also in trainings and listed trials, which otherwise go on to their end

    def validate(self) -> None:
        """Raises:
        StudyError: a number that makes no sense.
        """
        if self.q_bound is not None and not self.q_bound >= 1:
            raise StudyError(
                f"study.divergence.q_bound must be at least 1, or null for no bound, not {self.q_bound!r}."
            )
