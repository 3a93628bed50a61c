"""The error types that reach a user as a sentence, and how a sentence names what was perhaps meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do.

    The command line prints it and exits with 2.
    """


class UnknownDatasetError(UserError):
    """There is no dataset of this name, or its rows are not on this machine."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`; nearest: a, b` for the end of an error sentence, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(by_lower[item] for item in found)}" if found else ""
