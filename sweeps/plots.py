"""How figures look. Everything here takes plain numbers; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EDGE, _WITHIN, _PLAIN, _REFERENCE = "#c1121f", "#2a6f97", "#333333", "#e09f3e"


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of so many inches, on a canvas that needs no window system.

    Args:
        layout: "constrained" makes room for all texts when it is drawn; None keeps the margins as they are set.
    """
    # not pyplot, which would keep the figure and choose a window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class RunCourse:
    """What was measured of a run at its evaluations."""

    name: str
    updates: Sequence[int]  # of the measurements
    metrics: Sequence[Mapping[str, float]]  # reach/*, model/*, synthetic/* of each of them; some may lack some
    values: Sequence[tuple[int, float]]  # (updates, score or mean return)
    expert_value: float | None  # roughly an expert's Q, for comparison
    value_name: str  # score or mean return
    # of the last measurement: dynamics reward and log10 of the one-step error of some candidates, if there is a filter
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)


def diagnostics_figure(course: RunCourse) -> Figure:
    """Panels of what was measured: of reach/* mean Q, Q by step of the last rollouts, share of edge-of-reach targets
    and effective penalty; the score; of model/* its errors; of synthetic/* log-likelihoods, dynamics errors by update
    and by step; and the dynamics reward of a filter.

    Args:
        course: with at least one measurement.
    """
    panels = [_mean_q, _q_by_step, _share, _penalty] if _has(course, "reach/") else []
    panels.append(_value)
    if any(name.startswith("model/rmse_step_") for name in course.metrics[-1]):
        panels.append(_model_error)
    if _has(course, "synthetic/"):
        panels.append(_likelihood)
    if _has(course, "synthetic/dynamics_error"):
        panels += [_synthetic_error, _synthetic_error_by_step]
    if course.samples:
        panels.append(_reward_by_error)
    columns = math.ceil(len(panels) / 2)
    # working the margins out would double the time of drawing
    figure = new_figure(13.0 / 3 * columns, 7.0, layout=None)
    figure.subplots_adjust(
        left=0.18 / columns, right=1 - 0.06 / columns, bottom=0.08, top=0.9, wspace=0.22, hspace=0.32
    )
    figure.suptitle(f"{course.name}: diagnostics")
    places = figure.subplots(2, columns).ravel()
    for draw, axes in zip(panels, places, strict=False):
        draw(axes, course)
    for axes in places[len(panels) :]:
        axes.remove()
    return figure


def load() -> None:
    """Load what the first of these figures would: the library, its fonts and its caches."""
    nothing = RunCourse("", [1], [{"reach/q_mean": 1.0, "model/rmse_step_1": 1.0}], [(1, 0.0)], None, "")
    diagnostics_figure(nothing).savefig(io.BytesIO(), format="png", dpi=100)


def _mean_q(axes: Axes, course: RunCourse) -> None:
    points = [p for p in _series(course, "q_mean") if p[1] > 0]
    axes.plot([u for u, _ in points], [math.log10(q) for _, q in points], marker=".", color=_PLAIN, label="mean Q")
    if course.expert_value is not None:
        label = "value of an expert"
        axes.axhline(math.log10(course.expert_value), linestyle="--", color=_REFERENCE, label=label)
    _describe(axes, "log10 of mean Q, where positive", "updates", "log10 Q")


def _q_by_step(axes: Axes, course: RunCourse) -> None:
    last = course.metrics[-1]
    prefix, within, edge = "reach/q_step_", {}, {}
    for step, value in _by_step(last, prefix):
        name = f"{prefix}{step:02d}"
        if f"{name}_edge" in last:
            edge[step] = last[f"{name}_edge"]
            if f"{name}_within" in last:
                within[step] = last[f"{name}_within"]
        else:
            within[step] = value
    axes.plot(list(within), list(within.values()), marker="o", color=_WITHIN, label="within reach")
    axes.plot(list(edge), list(edge.values()), marker="s", linestyle="none", color=_EDGE, label="edge of reach")
    if course.expert_value is not None:
        axes.axhline(course.expert_value, linestyle="--", color=_REFERENCE, label="value of an expert")
    _describe(axes, f"Q by step of the rollout, at {course.updates[-1]} updates", "step that made the state", "Q")


def _share(axes: Axes, course: RunCourse) -> None:
    _lines(axes, course, {
        "share": ("beyond the threshold, last step", _EDGE), "share_control": ("beyond it, other steps", _WITHIN),
        "edge_share": ("edge of reach, of all targets (exact)", _PLAIN),
    })  # fmt: skip
    axes.set_ylim(bottom=0.0)
    _describe(axes, "share of targets", "updates", "share")


def _penalty(axes: Axes, course: RunCourse) -> None:
    _lines(axes, course, {"penalty_edge": ("edge of reach", _EDGE), "penalty_within": ("within reach", _WITHIN)})
    _describe(axes, "effective penalty: mean less minimum of the critics", "updates", "penalty")


def _value(axes: Axes, course: RunCourse) -> None:
    axes.plot([u for u, _ in course.values], [v for _, v in course.values], marker=".", color=_PLAIN)
    _describe(axes, course.value_name, "updates", course.value_name)


def _model_error(axes: Axes, course: RunCourse) -> None:
    shown = {
        "rmse": ("rollout, unfiltered", _EDGE, "-"), "rmse_filtered": ("filtered, nothing cut", _WITHIN, "-"),
        "rmse_survivors": ("filtered, survivors", _WITHIN, "--"),
        "rmse_survivors_unfiltered": ("unfiltered, survivors' starts", _EDGE, "--"),
        "one_step_error": ("one step, unfiltered", _EDGE, ":"),
        "one_step_error_filtered": ("one step, filtered", _WITHIN, ":"),
    }  # fmt: skip
    for name, (label, color, style) in shown.items():
        _log_line(axes, _by_step(course.metrics[-1], f"model/{name}_step_"), label, color, style)
    title = f"error of the model, at {course.updates[-1]} updates"
    _describe(axes, title, "step of the rollout", "log10 of the error, in std")


def _likelihood(axes: Axes, course: RunCourse) -> None:
    _lines(axes, course, {
        "log_likelihood": ("synthetic actions", _WITHIN), "log_likelihood_dataset": ("the dataset's actions", _PLAIN),
        "log_likelihood_policy": ("the policy's own, same states", _REFERENCE),
    }, "synthetic/")  # fmt: skip
    _describe(axes, "log-likelihood under the current policy", "updates", "mean log pi(a|s)")


_ERROR_KINDS = {"": ("mean", _EDGE, "-"), "_median": ("median", _WITHIN, "-")}


def _synthetic_error(axes: Axes, course: RunCourse) -> None:
    for kind, (label, color, _) in _ERROR_KINDS.items():
        name = f"dynamics_error{kind}"
        for shown, of, style in ((name, "", "-"), (f"{name}_dataset", ", dataset", ":")):
            _log_line(axes, _series(course, shown, "synthetic/"), f"{label}{of}", color, style)
    _describe(axes, "squared dynamics error of synthetic data", "updates", "log10 of the error, in variances")


def _synthetic_error_by_step(axes: Axes, course: RunCourse) -> None:
    for kind, (label, color, style) in _ERROR_KINDS.items():
        points = _by_step(course.metrics[-1], f"synthetic/dynamics_error{kind}_step_")
        _log_line(axes, points, label, color, style)
    title = f"by step of the trajectory, at {course.updates[-1]} updates"
    _describe(axes, title, "step of the trajectory", "log10 of the error, in variances")


def _reward_by_error(axes: Axes, course: RunCourse) -> None:
    rewards, errors = (course.samples[f"model/sample_{name}"] for name in ("dynamics_reward", "log10_error"))
    axes.plot(errors, rewards, linestyle="none", marker=".", markersize=3, color=_PLAIN)
    title = f"candidates, at {course.updates[-1]} updates"
    correlation = course.metrics[-1].get("model/reward_error_correlation")
    if correlation is not None:
        title = f"{title}: rank correlation {correlation:.2f}"
    _describe(axes, title, "log10 of the one-step error", "dynamics reward")


def _by_step(metrics: Mapping[str, float], prefix: str) -> list[tuple[int, float]]:
    """What is known of each step, in their order; metrics of a group of its rows have more behind the number."""
    known = ((name.removeprefix(prefix), x) for name, x in metrics.items() if name.startswith(prefix))
    return sorted((int(step), x) for step, x in known if step.isdigit())


def _has(course: RunCourse, prefix: str) -> bool:
    return any(name.startswith(prefix) for metrics in course.metrics for name in metrics)


def _log_line(axes: Axes, points: Sequence[tuple[int, float]], label: str, color: str, style: str) -> None:
    """The logarithms of what is positive; nothing where nothing is."""
    points = [p for p in points if p[1] > 0]
    if points:
        values = [math.log10(y) for _, y in points]
        axes.plot([x for x, _ in points], values, style, marker=".", color=color, label=label)


def _lines(
    axes: Axes, course: RunCourse, shown: Mapping[str, tuple[str, str]], prefix: str = "reach/"
) -> None:  # fmt: skip
    for name, (label, color) in shown.items():
        points = _series(course, name, prefix)
        if points:
            axes.plot([u for u, _ in points], [x for _, x in points], marker=".", color=color, label=label)


def _series(course: RunCourse, name: str, prefix: str = "reach/") -> list[tuple[int, float]]:
    key = f"{prefix}{name}"
    return [(u, m[key]) for u, m in zip(course.updates, course.metrics, strict=True) if key in m]


def _describe(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.locator_params(axis="x", nbins=6, integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
