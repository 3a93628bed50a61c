"""Warm starts: points that are known to be good come before those of the sampler.

Only points are taken from elsewhere, never values: scores of another dataset are not comparable with this one's, and
what remains of them after any rescaling (their order, say) would tell the sampler of a surface that it does not search.
A point costs one trial and says what it is worth here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sweeps.confirm import Candidate, Confirmation, candidates
from sweeps.errors import StudyError

if TYPE_CHECKING:
    from sweeps.study import TrialRecord


@dataclass
class WarmStartSpec:
    """Trials that come first, part of num_trials."""

    settings: bool = False  # the method's own settings for the dataset
    variants: list[str] = field(default_factory=list)  # those of other variants of the method
    studies: list[str] = field(default_factory=list)  # earlier studies of the same work folder
    top: int = 3  # settings of each of these, best first

    def validate(self) -> None:
        """Raises:
        StudyError: a number that makes no sense.
        """
        if isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 1:
            raise StudyError(f"study.warm_start.top must be a whole number of at least 1, not {self.top!r}.")


def best_of(
    records: Sequence[TrialRecord], direction: str, top: int, confirmed: Sequence[Confirmation] = ()
) -> list[Candidate]:
    """The best settings of an earlier study, no two alike: confirmed ones in the order of what was confirmed, then the
    others by what the search found.

    Args:
        records: of the study.
        direction: maximize or minimize.
        top: how many, at most.
        confirmed: best first.
    """
    from sweeps.selection import best_trials  # which knows what a study is, of which this is a part

    first = [one.number for one in confirmed if not one.diverged]
    others = [number for number in best_trials(records, len(records), direction) if number not in first]
    return candidates(records, [*first, *others], top)
