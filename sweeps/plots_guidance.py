"""The figure of the guidance benchmark (benchmarks/pgd_guidance.py): its lines in, a figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"early": "#e09f3e", "medium": "#2a6f97", "expert": "#c1121f"}
_STYLES = {"code": ("-", "o"), "score": ("--", "s")}
_LINEAR = 0.1  # lambda below which the axis is linear
_SHOWN_POLICY = "medium"
_ERROR = "squared error, variances"

Line = Mapping[str, Any]


def draw_guidance(lines: Sequence[Line]) -> Figure:
    """A row of panels for every task: log-likelihood and dynamics error over lambda, the latter beside the ensemble's,
    dynamics error by step, and dynamics error over the sampler's steps. Bars and bands are intervals of 95 %, the wider
    one of those over trajectories and over seeds."""
    tasks = list(dict.fromkeys(line["case"].partition("/")[0] for line in lines))
    figure = new_figure(19.0, 4.4 * len(tasks))
    places = np.atleast_2d(figure.subplots(len(tasks), 4))
    for task, (likelihood, error, by_step, by_steps) in zip(tasks, places, strict=True):
        mine = [line for line in lines if line["case"].startswith(f"{task}/")]
        _over_lambda(likelihood, mine, "log_likelihood")
        _describe(likelihood, f"{task}: log-likelihood of the actions", "lambda", "mean log pi(a|s)")
        _over_lambda(error, mine, "dynamics_error")
        error.set_yscale("log")
        _describe(error, f"{task}: dynamics error (shaded: ensemble)", "lambda", _ERROR)
        _by_step(by_step, mine)
        _describe(
            by_step,
            f"{task}: median error by step (thin: open loop), {_SHOWN_POLICY}",
            "step of the trajectory",
            _ERROR,
        )
        _by_sampler_steps(by_steps, mine)
        _describe(by_steps, f"{task}: median error by steps of the sampler", "steps", _ERROR)
    return figure


def _of(lines: Sequence[Line], *words: str) -> list[Line]:
    """Lines whose case goes on behind the task with these words."""
    return [line for line in lines if line["case"].split("/")[1 : 1 + len(words)] == list(words)]


def _bounds(line: Line, name: str) -> tuple[float, float]:
    """The wider of a mean's intervals."""
    both = [line[f"{name}_interval"], line.get(f"{name}_interval_seeds") or line[f"{name}_interval"]]
    low, high = max(both, key=lambda interval: interval[1] - interval[0])
    return low, high


def _over_lambda(axes: Axes, lines: Sequence[Line], name: str) -> None:
    for policy, color in _COLORS.items():
        for line in _of(lines, "ensemble", policy):
            if name == "dynamics_error":
                low, high = _bounds(line, name)
                axes.axhspan(max(low, line[name] / 10), high, color=color, alpha=0.12)
                axes.axhline(line[name], color=color, linestyle=":")
            else:
                axes.axhline(line["log_likelihood_dataset"], color=color, linestyle=":")
        unguided = [line for line in _of(lines, "guided", policy) if line["lambda"] == 0]
        for rule, (style, marker) in _STYLES.items():
            curve = [*unguided, *(x for x in _of(lines, "guided", policy, rule) if x["lambda"] != 0)]
            if len(curve) == len(unguided):
                continue
            values, bounds = [x[name] for x in curve], [_bounds(x, name) for x in curve]
            tiny = 1e-12
            lower = [max(value - low, 0.0) for value, (low, _) in zip(values, bounds, strict=True)]
            if name == "dynamics_error":  # Student's may reach below 0, which has no logarithm
                lower = [min(one, value * 0.9 + tiny) for one, value in zip(lower, values, strict=True)]
            upper = [max(high - value, 0.0) for value, (_, high) in zip(values, bounds, strict=True)]
            axes.errorbar(
                [x["lambda"] for x in curve], values, yerr=[lower, upper], color=color, linestyle=style, marker=marker,
                markersize=4, capsize=2, label=f"{policy}, rule {rule}",
            )  # fmt: skip
    axes.set_xscale("symlog", linthresh=_LINEAR)


def _by_step(axes: Axes, lines: Sequence[Line]) -> None:
    shown = {"ensemble": (_of(lines, "ensemble", _SHOWN_POLICY), "#333333")}
    for line in _of(lines, "guided", _SHOWN_POLICY, "code"):
        if line["lambda"] in (0, 1, 4):
            color = {0: "#9ecae1", 1: "#2a6f97", 4: "#9467bd"}[line["lambda"]]
            shown[f"diffusion, lambda {line['lambda']:g}"] = ([line], color)
    for label, (found, color) in shown.items():
        for line in found:
            for name, width in (("error_median_by_step", 1.8), ("open_loop_median_by_step", 0.8)):
                points = [(t, x) for t, x in enumerate(line[name], 1) if x]
                shown_as = label if name == "error_median_by_step" else None
                axes.plot(*zip(*points, strict=True), linewidth=width, color=color, label=shown_as)
    axes.set_yscale("log")


def _by_sampler_steps(axes: Axes, lines: Sequence[Line]) -> None:
    for coef, color in (("0", "#9ecae1"), ("1", "#2a6f97")):
        found = _of(lines, "steps", coef)
        if found:
            values = [x["dynamics_error_median"] for x in found]
            ends = [x["dynamics_error_median_interval"] for x in found]
            bars = [[v - low for v, (low, _) in zip(values, ends, strict=True)],
                    [high - v for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
            axes.errorbar([x["steps"] for x in found], values, yerr=bars, color=color, marker="o", markersize=4,
                          capsize=2, label=f"lambda {coef}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def _describe(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
