"""The penalties laboratory on HalfCheetah: see `orchestrator.labs.penalties`."""

from __future__ import annotations

from orchestrator.labs.penalties import options, show, table_values

__all__ = ["ABOUT", "options", "show", "table_values"]

ABOUT = "the same on HalfCheetah, where no rule ends an episode"
