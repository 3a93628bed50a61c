"""The errors of this package: sentences that say what is wrong and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

from envs.errors import UserError


class SpaceError(UserError):
    """A search space, or a point in one, that makes no sense."""


class StudyError(UserError):
    """A study that cannot be created, opened, written or told what it was told."""


class StudyBusyError(StudyError):
    """A study that another driver works at."""


class StudyExistsError(StudyError):
    """A study that somebody has begun already."""


class TableError(UserError):
    """A paper table, or its references, that make no sense."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """The tail of a "no such name" sentence: the nearest known name if one is near, and the list of all."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
