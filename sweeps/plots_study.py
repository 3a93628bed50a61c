"""The figures of a study: its history, its parameters, its learning curves, and what a confirmation left of its best.

Everything is drawn from the study's records alone, so it works on a study that is running, resumed or made up. A value
of a pruned trial is a report from mid-training and that of a diverged one a stand-in: both look different everywhere,
and neither is called best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sweeps.confirm import Confirmation
from sweeps.plots import new_figure
from sweeps.space import Parameter, SearchSpace
from sweeps.study import TrialRecord
from sweeps.summary import Spread, finishing_order, history, results, short_names, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_COLORS = {
    "complete": "#2a6f97", "pruned": "#b0b0b0", "diverged": "#c1121f", "best": "#e09f3e", "confirmed": "#2e7d32",
    "running": "#8d6bb1", "failed": "#333333",
}  # fmt: skip
_MAP = "viridis"
_FAINT = (0.72, 0.72, 0.72, 0.45)
_FOLDS = 10
MIN_EXPLAINED = 0.25  # share of the variance that a surface must predict of trials it has not seen; a choice of ours
MIN_SURFACE = 20  # trials


def study_figures(
    records: Sequence[TrialRecord],
    space: SearchSpace,
    direction: str,
    value_name: str,
    total_steps: int,
    importances: Mapping[str, Spread] | None,
    confirmed: Sequence[Confirmation],
) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws it, of all the figures that a study has something for.

    Args:
        records: of the study; may hold no finished trial.
        space: of the study; without parameters there are only the figures that need none.
        direction: maximize or minimize.
        value_name: score or return.
        total_steps: updates of a whole training.
        importances: of the parameters, if there are enough trials.
        confirmed: trials that were trained again with fresh seeds.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    if space.parameters:
        figures["history.png"] = lambda: history_figure(records, direction, value_name)
        figures["slices.png"] = lambda: slice_figure(records, space, value_name)
    if any(record.intermediate for record in records):
        figures["curves.png"] = lambda: curves_figure(records, direction, value_name, total_steps)
    done = results(records)
    if len(space.parameters) > 1 and done:
        numbers = {one.number for one in confirmed}
        figures["parallel.png"] = lambda: parallel_figure(records, space, direction, value_name, numbers)
    if importances:
        figures["importances.png"] = lambda: importance_figure(importances)
        if len(importances) > 1:
            first, second, *_ = importances
            figures["pair.png"] = lambda: pair_figure(records, space, direction, (first, second), value_name)
    if confirmed:
        figures["confirmed.png"] = lambda: confirmed_figure(confirmed, value_name)
    return figures


def history_figure(records: Sequence[TrialRecord], direction: str, value_name: str = "score") -> Figure:
    """Every trial's value and the best so far, over the order in which trials finished.

    Args:
        records: of the study; may hold no finished trial.
        direction: maximize or minimize.
        value_name: of the vertical axis.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    finished = sorted((r for r in records if r.value is not None and r.finished), key=finishing_order)
    place = {record.number: index for index, record in enumerate(finished, start=1)}
    _scatter(axes, finished, [place[record.number] for record in finished])
    course = history(finished, direction)
    if len(course.numbers):
        places = [place[int(number)] for number in course.numbers]
        axes.step(
            [*places, len(finished)],
            [*course.best, course.best[-1]],
            where="post",
            color=_COLORS["best"],
            label="best so far",
        )
    axes.set_xlabel("finished trials")
    axes.set_ylabel(value_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def slice_figure(
    records: Sequence[TrialRecord], space: SearchSpace, value_name: str = "score", columns: int = 3
) -> Figure:
    """Every parameter against the value, one panel each; a trial appears only where the parameter applied.

    Args:
        records: of the study; may hold no finished trial.
        space: of the study.
        value_name: of the vertical axes.
        columns: panels side by side, >= 1.
    """
    keys, names = list(space.parameters), short_names(space.parameters)
    columns = max(1, min(columns, len(keys)))
    rows = max(1, math.ceil(len(keys) / columns))
    figure = new_figure(3.4 * columns, 2.8 * rows)
    finished = [record for record in records if record.value is not None and record.finished]
    first: Axes | None = None
    for index, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first)
        first = first or axes
        parameter = space.parameters[key]
        shown = [record for record in finished if key in record.active]
        if parameter.type == "categorical":
            positions = [
                place + 0.3 * shift for place, shift in zip(_places(parameter, shown), _jitter(shown), strict=True)
            ]
            _scatter(axes, shown, positions)
            _name_choices(axes, parameter, "x")
        else:
            _scatter(axes, shown, [record.active[key] for record in shown])
            _scale_axis(axes, parameter, "x")
        axes.set_xlabel(names[key])
        if index % columns == 0:
            axes.set_ylabel(value_name)
    return figure


def curves_figure(records: Sequence[TrialRecord], direction: str, value_name: str, total_steps: int) -> Figure:
    """What every trial reported while it was trained, mean over its seeds; pruned ones end where they were stopped.

    Args:
        records: of the study.
        direction: maximize or minimize.
        value_name: of the vertical axis.
        total_steps: right end of the horizontal axis.
    """
    from matplotlib.collections import LineCollection

    figure = new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    reporting = [record for record in records if record.intermediate]
    done = results(records)
    best = _best(done, direction)
    width, alpha = (1.2, 0.8) if len(reporting) <= 40 else (0.7, max(0.12, 30 / len(reporting)))
    kinds = ["diverged" if record.diverged else str(record.state) for record in reporting]
    for kind, marker in (("pruned", "v"), ("diverged", "x"), ("failed", "+"), ("complete", ""), ("running", ".")):
        lines = [list(r.intermediate.items()) for r, found in zip(reporting, kinds, strict=True) if found == kind]
        if not lines:
            continue
        color, style = _COLORS[kind], "--" if kind == "running" else "-"
        axes.add_collection(LineCollection(lines, colors=color, linewidths=width, alpha=alpha, linestyles=style))
        ends = [line[-1] for line in lines]
        if marker:
            axes.scatter(
                [x for x, _ in ends], [y for _, y in ends], marker=marker, s=18, color=color, alpha=min(1.0, 2 * alpha)
            )
        axes.plot([], [], style, color=color, marker=marker, markersize=4, label=kind)
    if best is not None and best.intermediate:
        axes.plot(
            list(best.intermediate), list(best.intermediate.values()), color=_COLORS["best"], linewidth=2.4,
            marker=".", label=f"best, trial {best.number}",
        )  # fmt: skip
    axes.set_xlim(0, total_steps * 1.02)
    axes.set_xlabel("updates")
    axes.set_ylabel(value_name)
    if reporting:
        axes.autoscale_view(scalex=False)
        axes.legend(fontsize="small").set_zorder(10)
    return figure


def parallel_figure(
    records: Sequence[TrialRecord],
    space: SearchSpace,
    direction: str,
    value_name: str,
    confirmed: set[int] | frozenset[int] = frozenset(),
) -> Figure:
    """A vertical axis for every parameter and one for the value; a line for every trial, of the colour of its value.

    Lines run only between neighbouring parameters that both applied. Trials without a result of their own are grey and
    have no value.

    Args:
        records: of the study, at least one complete.
        space: of the study.
        direction: maximize or minimize.
        value_name: of the last axis.
        confirmed: numbers of the trials that were trained again.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection

    keys, names = list(space.parameters), short_names(space.parameters)
    figure = new_figure(max(6.4, 1.5 * (len(keys) + 1) + 1.2), 4.8)
    axes = figure.add_subplot()
    done = results(records)
    best = _best(done, direction)
    scale = _scale([value_of(record) for record in done], direction)
    low, high = _range([value_of(record) for record in done])
    others = [r for r in records if r.state in ("pruned", "complete") and (r.state == "pruned" or r.diverged)]
    ordered = sorted(done, key=lambda r: value_of(r) if direction == "maximize" else -value_of(r))
    alpha = max(0.25, min(0.9, 60 / max(len(done), 1)))

    def places(record: TrialRecord) -> list[float | None]:
        (shift,) = _jitter([record])
        found = [_place(space.parameters[key], record.active.get(key, _NONE), shift) for key in keys]
        value = (value_of(record) - low) / (high - low) if record in done else None
        return [*found, value]

    def pieces(record: TrialRecord) -> tuple[list[Any], list[tuple[int, float]]]:
        """Line segments, and the points that no segment touches."""
        heights = places(record)
        segments = [
            ((i, a), (i + 1, b)) for i, (a, b) in enumerate(pairwise(heights)) if a is not None and b is not None
        ]
        touched = {x for segment in segments for x, _ in segment}
        return segments, [(i, h) for i, h in enumerate(heights) if h is not None and i not in touched]

    lines: list[Any] = []
    line_colors: list[Any] = []
    dots: list[tuple[int, float]] = []
    dot_colors: list[Any] = []
    colors = [(*color[:3], alpha) for color in scale.to_rgba([value_of(record) for record in ordered])]
    for record, color in [*((r, _FAINT) for r in others), *zip(ordered, colors, strict=True)]:
        segments, points = pieces(record)
        lines += segments
        line_colors += [color] * len(segments)
        dots += points
        dot_colors += [color] * len(points)
    axes.add_collection(LineCollection(lines, colors=line_colors, linewidths=1.1, zorder=2))
    if dots:
        axes.scatter([x for x, _ in dots], [y for _, y in dots], s=14, color=dot_colors, zorder=2)
    if best is not None:
        segments, points = pieces(best)
        for edge, width in (("black", 4.0), (_COLORS["best"], 2.6)):
            axes.add_collection(LineCollection(segments, colors=edge, linewidths=width, zorder=3))
        if points:
            across, up = [x for x, _ in points], [y for _, y in points]
            axes.scatter(across, up, s=46, color=_COLORS["best"], edgecolor="black", zorder=3)
    stars = [record for record in done if record.number in confirmed]
    if stars:
        heights = [(value_of(record) - low) / (high - low) for record in stars]
        axes.scatter(
            [len(keys)] * len(stars), heights, marker="*", s=130, color=_COLORS["confirmed"], edgecolor="white",
            linewidth=0.6, zorder=6, label="confirmed", clip_on=False,
        )  # fmt: skip
    if best is not None:
        axes.plot([], [], color=_COLORS["best"], linewidth=2.6, label=f"best, trial {best.number}")
    if others:
        axes.plot([], [], color=_FAINT, label="pruned or diverged")
    axes.set_xlim(-0.35, len(keys) + 0.3)
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([])
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    ticks = [_ticks(space.parameters[key]) for key in keys] + [[(x, t) for x, t in _number_ticks(low, high)]]
    for i, marks_of in enumerate(ticks):
        axes.plot([i, i], [0, 1], color="black", linewidth=1, zorder=4)
        for height, text in marks_of:
            axes.plot([i - 0.03, i], [height, height], color="black", linewidth=1, zorder=4)
            box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
            axes.text(i - 0.05, height, text, ha="right", va="center", fontsize=8, bbox=box, zorder=5)
    axes.set_xticks(range(len(keys) + 1), [*(_wrapped(names[key]) for key in keys), value_name], fontsize=9)
    axes.tick_params(axis="x", length=0)
    figure.colorbar(
        ScalarMappable(norm=scale.norm, cmap=scale.cmap), ax=axes, label=value_name, fraction=0.03, pad=0.02
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    return figure


def importance_figure(importances: Mapping[str, Spread]) -> Figure:
    """A bar for every parameter, most important on top, with the spread of the bootstrap.

    Args:
        importances: key -> importance and its spread.
    """
    names = short_names(importances)
    figure = new_figure(6.4, 1.2 + 0.36 * len(importances))
    axes = figure.add_subplot()
    rows = list(importances.items())[::-1]
    axes.barh([names[key] for key, _ in rows], [spread.value for _, spread in rows], color=_COLORS["complete"])
    resampled = [(row, spread) for row, (_, spread) in enumerate(rows) if spread.low == spread.low]
    if resampled:  # an interval may lie beside its value
        middles, halves = ([(s.high + sign * s.low) / 2 for _, s in resampled] for sign in (1, -1))
        axes.errorbar(
            middles, [row for row, _ in resampled], xerr=halves, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=3
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("importance (PED-ANOVA)" + ("\nwhiskers: 5 to 95 % of bootstrap resamples" if resampled else ""))
    return figure


def pair_figure(
    records: Sequence[TrialRecord], space: SearchSpace, direction: str, keys: tuple[str, str], value_name: str
) -> Figure:
    """Two parameters and the value as colour, of the trials in which both applied.

    Behind the trials stands a smooth surface where both are numbers and it predicts held-out trials: at least a share
    `MIN_EXPLAINED` of their variance in 10-fold cross-validation. Elsewhere contours would show a pattern that the
    trials do not have.

    Args:
        records: of the study.
        space: of the study.
        direction: maximize or minimize.
        keys: horizontal, vertical.
        value_name: of the colour.
    """
    names = short_names(space.parameters)
    figure = new_figure(6.4, 4.8)
    axes = figure.add_subplot()
    shown = [r for r in results(records) if all(key in r.active for key in keys)]
    values = np.array([value_of(record) for record in shown])
    parameters = [space.parameters[key] for key in keys]
    if shown:
        scale = _scale(list(values), direction)
        numeric = all(parameter.type != "categorical" for parameter in parameters)
        if numeric and len(shown) >= MIN_SURFACE:
            points = np.array([[_unit(p, r.active[p.key]) for p in parameters] for r in shown])
            explained, surface = _surface(points, values)
            if surface is None:
                axes.set_title(
                    f"no surface: these two explain {max(0.0, explained):.0%} of held-out trials' variance", fontsize=9
                )
            else:
                grid = np.linspace(0, 1, 60)
                across, up = np.meshgrid(grid, grid)
                heights = surface(np.column_stack([across.ravel(), up.ravel()])).reshape(across.shape)
                axes.contourf(
                    _from_unit(parameters[0], across), _from_unit(parameters[1], up), heights, levels=12,
                    cmap=scale.cmap, norm=scale.norm, alpha=0.55, extend="both",
                )  # fmt: skip
                axes.set_title(f"surface: explains {explained:.0%} of held-out trials' variance", fontsize=9)
        places = [
            [_places(p, [r])[0] + 0.3 * _jitter([r])[0] if p.type == "categorical" else r.active[p.key] for r in shown]
            for p in parameters
        ]
        axes.scatter(
            places[0],
            places[1],
            c=values,
            cmap=scale.cmap,
            norm=scale.norm,
            s=34,
            edgecolor="white",
            linewidth=0.6,
            zorder=3,
        )
        best = _best(shown, direction)
        if best is not None:
            index = shown.index(best)
            axes.scatter(
                [places[0][index]], [places[1][index]], s=120, facecolor="none", edgecolor=_COLORS["best"],
                linewidth=2.2, zorder=4, label=f"best, trial {best.number}",
            )  # fmt: skip
            axes.legend(fontsize="small")
        figure.colorbar(scale, ax=axes, label=value_name)
    sides: tuple[Literal["x", "y"], ...] = ("x", "y")
    for parameter, which in zip(parameters, sides, strict=True):
        if parameter.type == "categorical":
            _name_choices(axes, parameter, which)
        else:
            _scale_axis(axes, parameter, which)
        axes.set(**{f"{which}label": names[parameter.key]})
    return figure


def confirmed_figure(confirmed: Sequence[Confirmation], value_name: str) -> Figure:
    """Of every confirmed trial its value in the search beside those of its fresh seeds, their mean and its interval.

    Args:
        confirmed: best mean first.
        value_name: of the vertical axis.
    """
    figure = new_figure(max(6.0, 1.6 + 0.9 * len(confirmed)), 4.0)
    axes = figure.add_subplot()
    for i, one in enumerate(confirmed):
        first = i == 0
        axes.plot([i - 0.18, i + 0.1], [one.searched, one.mean], color="#999999", linewidth=1, zorder=1)
        axes.scatter(
            [i - 0.18], [one.searched], s=46, facecolor="white", edgecolor=_COLORS["best"], linewidth=2,
            label="in the search" if first else None, zorder=3,
        )  # fmt: skip
        low, high = one.interval
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([i + 0.1] * 2, [low, high], color=_COLORS["confirmed"], linewidth=2.4, alpha=0.5, zorder=2)
        axes.scatter(
            [i + 0.1], [one.mean], s=46, color=_COLORS["confirmed"], zorder=3,
            label="fresh seeds: mean, 95 % interval" if first else None,
        )  # fmt: skip
        axes.scatter(
            [i + 0.26] * len(one.values), one.values, s=16, color="#555555", zorder=3,
            label="fresh seeds, each" if first else None,
        )  # fmt: skip
    axes.set_xticks(range(len(confirmed)), [f"trial {one.number}" for one in confirmed])
    axes.set_xlim(-0.6, len(confirmed) - 0.4)
    axes.set_ylabel(value_name)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


# ---- shared ---------------------------------------------------------------------------------------------------------

_NONE = object()  # a parameter that did not apply; None is a value


def _scatter(axes: Axes, records: Sequence[TrialRecord], positions: Sequence[float]) -> None:
    kinds = ["diverged" if record.diverged else str(record.state) for record in records]
    for kind, marker in (("complete", "o"), ("pruned", "v"), ("diverged", "x")):
        chosen = [index for index, found in enumerate(kinds) if found == kind]
        if chosen:
            axes.scatter(
                [positions[index] for index in chosen],
                [value_of(records[index]) for index in chosen],
                s=18,
                marker=marker,
                color=_COLORS[kind],
                label=kind,
            )


def _best(done: Sequence[TrialRecord], direction: str) -> TrialRecord | None:
    sign = 1.0 if direction == "maximize" else -1.0
    return max(done, key=lambda record: (sign * value_of(record), -record.number), default=None)


def _jitter(records: Sequence[TrialRecord]) -> list[float]:
    """A number from -1/2 to 1/2 for every trial, so that equal choices do not hide each other; evenly spread over
    successive trials."""
    return [(record.number * 0.6180339887) % 1.0 - 0.5 for record in records]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _scale(values: Sequence[float], direction: str) -> Any:
    """Colours of values, brightest at the best. The worst tenth has one colour: a few very bad trials would else leave
    one colour for all others."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = _range(values)
    if len(values) >= MIN_SURFACE:
        if direction == "maximize":
            low = min(float(np.quantile(values, 0.1)), high - 1e-9)
        else:
            high = max(float(np.quantile(values, 0.9)), low + 1e-9)
    norm: Normalize = Normalize(low, high, clip=True)
    return ScalarMappable(norm=norm, cmap=_MAP if direction == "maximize" else f"{_MAP}_r")


def _unit(parameter: Parameter, value: Any) -> float:
    """A number's place from 0 (low) to 1 (high)."""
    assert parameter.low is not None
    assert parameter.high is not None
    low, high = parameter.low, parameter.high
    if parameter.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _from_unit(parameter: Parameter, place: np.ndarray) -> np.ndarray:
    assert parameter.low is not None
    assert parameter.high is not None
    low, high = parameter.low, parameter.high
    if parameter.log:
        return np.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    return low + place * (high - low)


def _choice(parameter: Parameter, value: Any) -> int:
    """Its index; True is not 1."""
    return next(
        i for i, c in enumerate(parameter.choices) if c == value and isinstance(c, bool) == isinstance(value, bool)
    )


def _places(parameter: Parameter, records: Sequence[TrialRecord]) -> list[float]:
    return [float(_choice(parameter, record.active[parameter.key])) for record in records]


def _place(parameter: Parameter, value: Any, shift: float) -> float | None:
    """Height of a value on its axis; None where the parameter did not apply."""
    if value is _NONE:
        return None
    if parameter.type == "categorical":
        count = len(parameter.choices)
        return (_choice(parameter, value) + 0.5 + 0.3 * shift) / count
    return _unit(parameter, value)


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    """Height and text of an axis' labels."""
    if parameter.type == "categorical":
        count = len(parameter.choices)
        return [((i + 0.5) / count, _wrapped(str(choice), 14)) for i, choice in enumerate(parameter.choices)]
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.log:
        inner = [
            10.0**e for e in range(math.floor(math.log10(parameter.low)), math.ceil(math.log10(parameter.high)) + 1)
        ]
        inner = [value for value in inner if parameter.low < value < parameter.high]
        shown = [parameter.low, *inner[:: max(1, math.ceil(len(inner) / 4))], parameter.high]
    elif parameter.type == "int" and parameter.high - parameter.low <= 8:
        shown = list(np.arange(parameter.low, parameter.high + 1, parameter.step or 1))
    else:
        return _number_ticks(parameter.low, parameter.high)
    places = [(_unit(parameter, value), f"{value:g}") for value in shown]
    # the ends stay; what is too near to them goes
    return [p for i, p in enumerate(places) if i in (0, len(places) - 1) or 0.12 < p[0] < 0.88]


def _number_ticks(low: float, high: float) -> list[tuple[float, str]]:
    from matplotlib.ticker import MaxNLocator

    values = [v for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]
    return [((v - low) / (high - low), f"{v:g}") for v in values]


def _name_choices(axes: Axes, parameter: Parameter, which: Literal["x", "y"]) -> None:
    """A tick for every choice on an axis of their indices."""
    labels = [str(choice) for choice in parameter.choices]
    style: dict[str, Any] = {}
    if which == "x" and sum(map(len, labels)) > 26:
        style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(range(len(labels)), labels, **style)
    axes.set(**{f"{which}lim": (-0.5, len(labels) - 0.5)})


def _scale_axis(axes: Axes, parameter: Parameter, which: Literal["x", "y"]) -> None:
    """The whole range of a number, however few trials there are, with ticks that do not touch."""
    axes.set(**{f"{which}lim": tuple(_from_unit(parameter, np.array([-0.04, 1.04])))})
    axis = axes.xaxis if which == "x" else axes.yaxis
    if parameter.log:
        axes.set(**{f"{which}scale": "log"})
        ticks = _ticks(parameter)
        axis.set_ticks([float(_from_unit(parameter, np.array(place))) for place, _ in ticks], [t for _, t in ticks])
        axis.set_ticks([], minor=True)
    elif parameter.type == "int":
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(integer=True))


def _wrapped(name: str, width: int = 16) -> str:
    """On several lines, broken behind dots and underscores."""
    lines, line = [], ""
    for part in name.replace(".", ".\0").replace("_", "_\0").split("\0"):
        if line and len(line) + len(part) > width:
            lines.append(line)
            line = ""
        line += part
    return "\n".join([*lines, line])


def _surface(points: np.ndarray, values: np.ndarray) -> tuple[float, Callable[[np.ndarray], np.ndarray] | None]:
    """The smooth function of two numbers that best predicts held-out values, and the share of their variance that it
    explains; no function where that is too little.

    Args:
        points: (n, 2) in [0, 1].
        values: (n,).
    """
    from scipy.interpolate import RBFInterpolator

    spread = float(values.var())
    # trials at the same place are held out together: they would give each other's value away
    unique, place = np.unique(points, axis=0, return_inverse=True)
    if spread == 0 or len(unique) < _FOLDS:
        return 0.0, None
    folds = (np.random.default_rng(0).permutation(len(unique)) % _FOLDS)[place]
    # a spline needs points apart; far below what can be seen
    points = points + 1e-6 * np.random.default_rng(0).standard_normal(points.shape)
    best: tuple[float, float] = (-math.inf, 0.0)
    for smoothing in (0.01, 0.1, 1.0, 10.0):
        predicted = np.empty_like(values)
        for fold in range(_FOLDS):
            held = folds == fold
            model = RBFInterpolator(points[~held], values[~held], smoothing=smoothing, degree=1)
            predicted[held] = model(points[held])
        best = max(best, (1.0 - float(((predicted - values) ** 2).mean()) / spread, smoothing))
    explained, smoothing = best
    if explained < MIN_EXPLAINED:
        return explained, None
    return explained, RBFInterpolator(points, values, smoothing=smoothing, degree=1)
