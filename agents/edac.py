"""EDAC: ensemble-diversified actor-critic (An, Moon, Kim and Song, NeurIPS 2021, arXiv 2110.01548).

SAC-N (`agents.sac_n`) needs many critics since their gradients with respect to the action align. EDAC keeps them apart
and gets along with fewer:

    J(Q) = sum_i mean_b (Q_i - y)^2 + eta * ES
    ES   = mean_b 1/(N-1) sum_{i != j} <g_i, g_j>,    g_i = grad_a Q_i(s, a) / (||grad_a Q_i(s, a)|| + 1e-10)

The update is that of `agents.sac`, and the whole of RAVL (`agents.ravl`) is this on model rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.method import per_member
from agents.sac_n import SACN, SACNConfig


@dataclass
class EDACConfig(SACNConfig):
    """EDAC's hyperparameters; per-dataset values in agents/edac.yaml."""

    eta: float = per_member(1.0, off_at_zero=True)


class EDAC(SACN):
    """A pack of EDAC runs."""

    Config = EDACConfig


METHOD = EDAC
