"""The figure of a population. Plain numbers in, a figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.plots import new_figure
from sweeps.space import SearchSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEST, _OTHERS = "#c1121f", "#b0b0b0"


def schedule_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], best: str, space: SearchSpace, total_updates: int
) -> Figure:
    """What the best run's state has been trained with, and those of the other runs, one panel for each hyperparameter.

    Args:
        histories: of every run, at least one: [{updates, run, settings}, ...], the runs whose states its own comes
            from, each from so many updates on, and their settings, a value for every parameter of the space.
        best: one of them.
        space: what the study varies.
        total_updates: of a run.
    """
    keys = list(space.parameters)
    figure = new_figure(6.4, 2.2 * len(keys) + 0.4)
    first = None
    for row, key in enumerate(keys):
        axes = first = figure.add_subplot(len(keys), 1, row + 1, sharex=first)
        parameter = space.parameters[key]
        chosen = parameter.type == "categorical"
        for run in (*(r for r in histories if r != best), best):
            steps = histories[run]
            updates = [*(step["updates"] for step in steps), total_updates]
            values = [step["settings"][key] for step in steps]
            if chosen:
                values = [parameter.choices.index(value) for value in values]
            color, width, on_top = (_BEST, 2.0, 3) if run == best else (_OTHERS, 1.0, 2)
            label = "best run's ancestry" if run == best else "the others'"
            axes.step(
                updates, [*values, values[-1]], where="post", color=color, linewidth=width, zorder=on_top, label=label
            )
        if chosen:
            axes.set_yticks(range(len(parameter.choices)), [str(choice) for choice in parameter.choices])
        elif parameter.log:
            axes.set_yscale("log")
        axes.set_ylabel(key.removeprefix("method."))
        if row == 0:
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(*zip(*dict(zip(labels, zip(handles, labels, strict=True), strict=True)).values(), strict=True))
        if row + 1 == len(keys):
            axes.set_xlabel("updates")
        else:
            axes.tick_params(labelbottom=False)
    return figure
