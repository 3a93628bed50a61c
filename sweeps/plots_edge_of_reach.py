"""The figure of the edge-of-reach laboratory. Plain numbers in, a figure out.

Shapes: R run, T step of an episode, X, Y points along the plane's axes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGE, WITHIN = "#c1121f", "#2a6f97"
_COLORS = ("#2a6f97", "#c1121f", "#2e7d32", "#9467bd", "#e09f3e", "#8c564b", "#555555")


@dataclass(frozen=True)
class Course:
    """What was measured of the runs of one setting, at their evaluations."""

    name: str
    updates: Sequence[int]
    returns: Sequence[Sequence[float]]  # of every run
    mean_q: Sequence[Sequence[float]]
    edge_share: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Map:
    """The plane: reward `(X, Y)` at the points of `axis`, and half-widths of the squares that matter."""

    axis: Sequence[float]
    reward: Any
    start: float  # episodes start in this square
    within: float  # rollouts pass through this square
    reach: float  # and end in this one


@dataclass(frozen=True)
class LabFigure:
    """Everything that the figure shows."""

    title: str
    plane: Map
    walks: Mapping[str, Any]  # method -> episodes of its first run (episodes, T, 2)
    courses: Sequence[Course]
    best_return: float  # of any policy
    largest_q: float  # that any policy can have
    penalty_within: Sequence[float]  # of RAVL's first run
    penalty_edge: Sequence[float]
    auroc: Sequence[float]  # of RAVL's runs
    lengths: Mapping[int, Course]  # rollout length -> Base


def draw_lab(content: LabFigure) -> Figure:
    """Panels in the order of the paper's figures: reward, policies, return, Q; then share, penalty, rollout length."""
    figure = new_figure(16.0, 11.5)
    figure.suptitle(content.title)
    places = figure.subplots(3, 4).ravel()
    _plane(places[0], content.plane, None, "reward")
    for axes, (name, walks) in zip(places[1:4], content.walks.items(), strict=False):
        _plane(axes, content.plane, walks, f"policy of {name}")
    _courses(places[4], content.courses, "returns", "return of 30 steps", content.best_return, "best possible")
    _courses(places[5], content.courses, "mean_q", "mean Q of the targets", content.largest_q, "largest possible")
    places[5].set_yscale("symlog", linthresh=10.0)
    _courses(places[6], content.courses, "edge_share", "share of edge-of-reach targets", None, "")
    places[4].legend(fontsize=7)
    _penalty(places[7], places[8], content)
    _lengths(places[9], content.lengths, "returns", "Base: return", content.best_return)
    _lengths(places[10], content.lengths, "mean_q", "Base: mean Q", content.largest_q)
    places[10].set_yscale("symlog", linthresh=10.0)
    _lengths(places[11], content.lengths, "edge_share", "Base: share of edge-of-reach targets", None)
    return figure


def _plane(axes: Axes, plane: Map, walks: Any | None, title: str) -> None:
    axes.contourf(plane.axis, plane.axis, plane.reward.T, levels=12, cmap="Greens")
    for half, style, color in ((plane.start, "-", "black"), (plane.within, "--", EDGE), (plane.reach, "-", EDGE)):
        axes.plot([-half, half, half, -half, -half], [-half, -half, half, half, -half], style, color=color, lw=1)
    for walk in [] if walks is None else walks:
        axes.plot(walk[:, 0], walk[:, 1], color="black", lw=0.7, alpha=0.6)
        axes.plot(walk[-1, 0], walk[-1, 1], ".", color="black")
    limit = float(plane.axis[-1])
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)


def _courses(axes: Axes, courses: Sequence[Course], what: str, title: str, reference: float | None, label: str) -> None:
    for course, color in zip(courses, _COLORS, strict=False):
        values = getattr(course, what)
        middle = [statistics.median(v) for v in zip(*values, strict=True)]
        axes.plot(course.updates, middle, color=color, label=course.name)
        cut = len(values) // 4  # one run that goes its own way would hide the others
        low, high = ([sorted(v)[at] for v in zip(*values, strict=True)] for at in (cut, -1 - cut))
        axes.fill_between(course.updates, low, high, color=color, alpha=0.15, lw=0)
    if reference is not None:
        axes.axhline(reference, color="black", linestyle=":", lw=1, label=label)
    axes.set(title=title, xlabel="updates (median of the seeds, middle half)")


def _penalty(box: Axes, histogram: Axes, content: LabFigure) -> None:
    groups = [content.penalty_within, content.penalty_edge]
    auroc = statistics.mean(content.auroc)
    box.boxplot(groups, showfliers=False)
    box.set_xticks([1, 2], ["within reach", "edge of reach"])
    box.set(title=f"RAVL's penalty: AUROC {auroc:.2f}", yscale="log")
    for values, color, label in zip(groups, (WITHIN, EDGE), ("within reach", "edge of reach"), strict=True):
        logs = [v for v in values if v > 0]
        low, high = min(min(g) for g in groups if len(g)), max(max(g) for g in groups if len(g))
        bins = [max(low, 1e-12) * (high / max(low, 1e-12)) ** (i / 40) for i in range(41)]
        histogram.hist(logs, bins=bins, color=color, alpha=0.6, label=label)
    histogram.set(title="RAVL's penalty", xscale="log", xlabel="variance of the critics", ylabel="states")
    histogram.legend()


def _lengths(axes: Axes, lengths: Mapping[int, Course], what: str, title: str, reference: float | None) -> None:
    ks = sorted(lengths)
    values = [[run[-1] for run in getattr(lengths[k], what)] for k in ks]
    for place, (_, group) in enumerate(zip(ks, values, strict=True)):
        axes.plot([place] * len(group), group, "o", color=EDGE, alpha=0.5, markersize=4)
    axes.plot(range(len(ks)), [statistics.median(group) for group in values], color="black", lw=1)
    if reference is not None:
        axes.axhline(reference, color="black", linestyle=":", lw=1)
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set(title=title, xlabel="rollout length k (every dot is a run)")
