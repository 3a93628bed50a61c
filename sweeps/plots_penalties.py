"""The figure of the penalties laboratory. Plain numbers in, a figure out.

Shapes: P penalty, N size of the ensemble, R repetition, T step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sweeps.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#555555", "#e09f3e", "#c1121f", "#8c564b", "#2a6f97", "#9467bd")
_HEADINGS = {
    "spearman": "Spearman's correlation with the true error", "pearson": "Pearson's correlation with the true error",
    "auroc": "AUROC of the largest 10 % of errors", "ause": "AUSE (0 is best)",
}  # fmt: skip


@dataclass(frozen=True)
class PenaltyFigure:
    """Everything that the figure shows; values may be not a number."""

    title: str
    penalties: Sequence[str]  # (P,)
    members: Sequence[int]  # (N,)
    by_size: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # statistic -> penalty -> (R, N)
    steps: Sequence[int]  # (T,)
    by_step: Mapping[str, Sequence[float]]  # penalty -> Spearman's correlation (T,)
    shown: int  # size of the ensemble of by_step and by_scenario
    inside: Mapping[tuple[str, int], Sequence[float]]  # (penalty, deviations) -> share of columns (N,)
    nominal: Sequence[float]  # within 1 and 2 deviations
    by_scenario: Mapping[str, Sequence[float]]  # policy or dataset -> Spearman's correlation (P,)


def draw_penalties(content: PenaltyFigure) -> Figure:
    """Above: statistics by the size of the ensemble. Below: by step, intervals, by scenario."""
    figure = new_figure(18.0, 9.5)
    figure.suptitle(content.title)
    places = figure.subplot_mosaic([[*content.by_size], ["step", "inside", "scenario", "scenario"]])
    for statistic, values in content.by_size.items():
        _by_size(places[statistic], content, values, _HEADINGS[statistic])
    next(iter(places.values())).legend(fontsize=8)
    for penalty, color in zip(content.penalties, _COLORS, strict=True):
        places["step"].plot(content.steps, content.by_step[penalty], ".-", color=color)
    places["step"].set(title=f"Spearman's correlation by step, N = {content.shown}", xlabel="step of the rollouts")
    _inside(places["inside"], content)
    _by_scenario(places["scenario"], content)
    return figure


def _by_size(axes: Axes, content: PenaltyFigure, values: Mapping[str, Sequence[Sequence[float]]], title: str) -> None:
    for penalty, color in zip(content.penalties, _COLORS, strict=True):
        of_seeds = np.asarray(values[penalty])
        axes.plot(content.members, of_seeds.mean(0), ".-", color=color, label=penalty)
        axes.fill_between(content.members, of_seeds.min(0), of_seeds.max(0), color=color, alpha=0.15, lw=0)
    axes.set(title=title, xlabel="members N (mean and range of the repetitions)", xticks=list(content.members))


def _inside(axes: Axes, content: PenaltyFigure) -> None:
    for (penalty, deviations), shares in content.inside.items():
        color = _COLORS[list(content.penalties).index(penalty)]
        style = "-" if deviations == 1 else "--"
        axes.plot(content.members, shares, style, marker=".", color=color, label=f"{penalty}, {deviations} σ")
    for share in content.nominal:
        axes.axhline(share, color="black", linestyle=":", lw=1)
    axes.set(title="true columns inside (dotted: of Gaussians)", xlabel="members N", ylim=(0, 1.02))
    axes.legend(fontsize=7)


def _by_scenario(axes: Axes, content: PenaltyFigure) -> None:
    for place, values in enumerate(content.by_scenario.values()):
        for p, (value, color) in enumerate(zip(values, _COLORS, strict=True)):
            axes.plot(value, place + 0.1 * (p - 2.5), "o", color=color, ms=5)
    axes.set_yticks(range(len(content.by_scenario)), list(content.by_scenario), fontsize=8)
    axes.axvline(0.0, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.set(title=f"Spearman's correlation by policy and dataset, N = {content.shown}")
