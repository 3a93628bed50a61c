"""What settings may be: a sentence for the user where one is something else.

`part` is where in a configuration the fields are, such as `method.dynamics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from envs.errors import UserError


def check_positive(config: Any, *names: str, part: str = "method") -> None:
    """Raise a UserError if a field is not greater than 0 and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{part}.{name}={getattr(config, name)} must be greater than 0 and finite")


def check_not_negative(config: Any, *names: str, part: str = "method") -> None:
    """Raise a UserError if a field is not 0 or greater and finite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{part}.{name}={getattr(config, name)} must be 0 or greater, and finite")


def check_share(config: Any, *names: str, interval: str = "(0, 1)", part: str = "method") -> None:
    """Raise a UserError if a field does not lie between 0 and 1.

    Args:
        interval: which of the two it may be: [0, 1], [0, 1), (0, 1] or (0, 1).
    """
    for name in names:
        value = getattr(config, name)
        if not (0 < value < 1 or (value == 0 and interval[0] == "[") or (value == 1 and interval[-1] == "]")):
            raise UserError(f"{part}.{name}={value} must lie in {interval}")


def check_choice(config: Any, name: str, choices: Sequence[str], part: str = "method") -> None:
    """Raise a UserError if a field is none of the choices."""
    if getattr(config, name) not in choices:
        *others, last = choices
        some = f"one of {', '.join(choices)}" if len(choices) > 2 else f"{', '.join(others)} or {last}"
        raise UserError(f"{part}.{name}={getattr(config, name)!r} must be {some}")


def check_widths(config: Any, *names: str, part: str = "method") -> None:
    """Raise a UserError if a field is not a list of one or more layers' widths."""
    for name in names:
        widths = getattr(config, name)
        if not widths or min(widths) < 1:
            raise UserError(f"{part}.{name}={widths} needs one or more widths of at least 1, such as [256,256]")
