"""The figure of the refrigerator laboratory. Plain numbers in, a figure out.

Shapes: X, Y temperatures and powers of the map, R seed, T step, C next temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#c1121f", "#e09f3e", "#2a6f97", "#2e7d32", "#9467bd")
_SUPPORT = "white"


@dataclass(frozen=True)
class Plane:
    """What is shown over temperatures `(X,)` and powers `(Y,)`; every map is `(X, Y)`, mean over the seeds."""

    temperatures: Sequence[float]  # °C
    powers: Sequence[float]
    rows: Any  # of the dataset, by nearest point
    errors: Mapping[str, Any]  # mean |one-step error| in °C by way of stepping
    reward_of_truth: Any
    reward_of_model: Any


@dataclass(frozen=True)
class ControllerCourse:
    """Rollouts under one controller."""

    name: str
    visited: tuple[Sequence[float], Sequence[float]]  # temperatures and powers of the simulator, (T,) each
    rmse: Mapping[str, Any]  # (R, T) in °C by way of stepping; may hold what is not a number
    totals: Mapping[str, Sequence[float]]  # (R,) likewise, over all steps
    share: Any  # (R, T) of the rollouts not cut


@dataclass(frozen=True)
class Curve:
    """The dynamics reward of next temperatures around the true one."""

    name: str
    offsets: Sequence[float]  # °C
    rewards: Any  # (R, C)


@dataclass(frozen=True)
class RefrigeratorFigure:
    """Everything that the figure shows."""

    title: str
    compared: tuple[str, str]  # ways of stepping: without the filter and with it
    plane: Plane
    courses: Sequence[ControllerCourse]  # three
    curves: Sequence[Curve]
    threshold: float  # of the dynamics reward, below which rollouts are cut


def draw_refrigerator(content: RefrigeratorFigure) -> Figure:
    """Above: data and errors over the plane. Middle: rewards over the plane, curves of the reward, the share of
    rollouts that is not cut. Below: error by step of each controller, and the whole of it."""
    figure = new_figure(17.0, 12.0)
    figure.suptitle(content.title)
    places = figure.subplots(3, 4).ravel()
    plane, (reference_way, filtered_way) = content.plane, content.compared
    _support(places[0], content)
    reference, filtered = plane.errors[reference_way], plane.errors[filtered_way]
    highest = float(max(np.max(reference), np.max(filtered)))
    _map(places[1], plane, reference, f"|one-step error| in °C: {reference_way}", vmin=0.0, vmax=highest)
    _map(places[2], plane, filtered, f"|one-step error| in °C: {filtered_way}", vmin=0.0, vmax=highest)
    gain = np.log2(np.maximum(filtered, 1e-6) / np.maximum(reference, 1e-6))
    most = float(max(np.abs(gain).max(), 0.1))
    _map(places[3], plane, gain, f"log2 of error, {filtered_way} / {reference_way}", "RdBu_r", vmin=-most, vmax=most)
    rewards = (plane.reward_of_truth, plane.reward_of_model)
    low, high = (float(f([f(r) for r in rewards])) for f in (np.min, np.max))
    for axes, values, whose in zip(places[4:6], rewards, ("the true step", "the model's draws"), strict=True):
        _map(axes, plane, values, f"dynamics reward of {whose}", "viridis", vmin=low, vmax=high)
    _curves(places[6], content)
    _shares(places[7], content)
    for axes, course in zip(places[8:11], content.courses, strict=True):
        _errors(axes, course)
    places[8].legend(fontsize=8)
    places[8].set_ylabel("RMSE of temperature, °C")
    _totals(places[11], content.courses)
    return figure


def _support(axes: Axes, content: RefrigeratorFigure) -> None:
    plane = content.plane
    rows = np.where(plane.rows > 0, plane.rows, np.nan)
    image = axes.pcolormesh(plane.temperatures, plane.powers, np.log10(rows).T, cmap="Greys", vmin=-1.0)
    axes.figure.colorbar(image, ax=axes)
    for course, color in zip(content.courses, _COLORS, strict=False):
        axes.plot(*course.visited, ".-", color=color, lw=0.8, markersize=4, label=course.name)
    axes.legend(fontsize=8, title="the simulator under", title_fontsize=8)
    axes.set(title="log10 of the dataset's rows", xlabel="temperature, °C", ylabel="power")


def _map(axes: Axes, plane: Plane, values: Any, title: str, cmap: str = "magma", **limits: float) -> None:
    image = axes.pcolormesh(plane.temperatures, plane.powers, np.asarray(values).T, cmap=cmap, **limits)  # type: ignore[arg-type]
    axes.figure.colorbar(image, ax=axes)
    color = _SUPPORT if cmap != "RdBu_r" else "black"
    axes.contour(plane.temperatures, plane.powers, (plane.rows > 0).T, levels=[0.5], colors=color, linewidths=1.0)
    axes.set(title=title, xlabel="temperature, °C (outlined: where the data is)")


def _curves(axes: Axes, content: RefrigeratorFigure) -> None:
    for curve, color in zip(content.curves, _COLORS, strict=False):
        axes.plot(curve.offsets, np.mean(curve.rewards, 0), color=color, label=curve.name)
    axes.axvline(0.0, color="black", lw=0.8)
    axes.axhline(content.threshold, color="black", ls=":", lw=0.8)
    axes.set(title="dynamics reward of T', mean of the seeds", xlabel="T' less the true one, °C")
    axes.legend(fontsize=8)


def _shares(axes: Axes, content: RefrigeratorFigure) -> None:
    for course, color in zip(content.courses, _COLORS, strict=False):
        mean = np.mean(course.share, 0)
        axes.plot(range(1, len(mean) + 1), mean, color=color, label=course.name)
    axes.set(title=f"share of rollouts not cut (below {content.threshold:g})", xlabel="step", ylim=(-0.02, 1.02))
    axes.legend(fontsize=8)


def _errors(axes: Axes, course: ControllerCourse) -> None:
    for (way, rmse), color in zip(course.rmse.items(), _COLORS, strict=False):
        steps = np.arange(1, rmse.shape[1] + 1)
        known = np.isfinite(rmse).all(0)
        axes.plot(steps[known], np.median(rmse[:, known], 0), color=color, label=way)
        axes.fill_between(
            steps[known], rmse[:, known].min(0), rmse[:, known].max(0), color=color, alpha=0.15, lw=0
        )  # fmt: skip
    axes.set(title=f"RMSE by step: {course.name}", xlabel="step (median and range of the seeds)", yscale="log")


def _totals(axes: Axes, courses: Sequence[ControllerCourse]) -> None:
    ways = list(courses[0].rmse)
    for w, (way, color) in enumerate(zip(ways, _COLORS, strict=False)):
        for c, course in enumerate(courses):
            values = [value for value in course.totals[way] if np.isfinite(value)]
            axes.plot([c + 0.15 * (w - len(ways) / 2)] * len(values), values, "o", color=color, ms=4, alpha=0.7)
    axes.set_xticks(range(len(courses)), [course.name for course in courses], fontsize=8)
    axes.set(title="RMSE over all steps, every seed", yscale="log")
