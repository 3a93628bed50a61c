"""The figure of what episodes in the environment buy: `online_budget.png` of a study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.plots import new_figure
from sweeps.selection import SelectionReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def online_budget_figure(report: SelectionReport, unit: str = "score") -> Figure:
    """Expected best of n policies, and beside it, where there are two or more, the policy that a bandit believes best
    after so many episodes.

    Args:
        report: with at least one policy.
        unit: of the policies' values.
    """
    figure = new_figure(9.0 if report.bandit else 5.0, 3.6)
    panels = figure.subplots(1, 2 if report.bandit else 1, squeeze=False)[0]
    budgets, values = zip(*report.eop, strict=True)
    axes = panels[0]
    axes.plot(budgets, values, marker="o", color="#2a6f97")
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(n) for n in budgets])
    axes.set_xlabel("policies tried in the environment")
    axes.set_ylabel(f"expected best {unit}")
    axes.set_title(f"best of n of {report.num_policies} policies")
    if report.bandit is not None:
        axes, curve = panels[1], report.bandit
        axes.plot(curve.pulls, curve.mean, color="#c1121f")
        axes.fill_between(curve.pulls, curve.low, curve.high, color="#c1121f", alpha=0.25, linewidth=0)
        axes.set_xlabel("episodes")
        axes.set_ylabel(f"{unit} of the policy believed best")
        axes.set_title(f"UCB bandit among {curve.num_arms} of {curve.num_policies} policies")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure
