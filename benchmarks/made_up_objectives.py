"""Objectives whose best value is known, for the benchmarks of samplers; no benchmark itself.

Every objective is made from a seed, which moves its optimum: what was tuned on some seeds can be measured on others.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.errors import UserError

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """Larger is better."""

    space: dict[str, Any]  # as `study.space`
    true: Callable[[Params], float]  # without noise
    noise: Callable[[float], float]  # true value -> standard deviation of what a trial tells
    best: float  # largest true value

    def told(self, params: Params, rng: np.random.Generator) -> float:
        """What a trial with these parameters tells."""
        value = self.true(params)
        return value + self.noise(value) * float(rng.standard_normal())


def mbrl(seed: int) -> Objective:
    """A score from 0 to 101 of a model-based method: the penalty's weight has an optimum that moves with the kind of
    penalty and the rollouts' length (a narrow ridge); below it runs collapse, above it they get no better than a
    plateau. One of the seven parameters counts for one kind of penalty only. Noise has a standard deviation of 3 plus
    5 % of the score."""
    rng = np.random.default_rng([seed, 0])
    kinds = ["a", "b", "c", "d", "e", "f"]
    offset = dict(zip(kinds, rng.uniform(-1.0, 1.0, 6).tolist(), strict=True))  # of the optimum, in decades
    quality = dict(zip(kinds, rng.permutation([1.0, 0.95, 0.9, 0.8, 0.7, 0.6]).tolist(), strict=True))
    slope, best_length = rng.uniform(0.5, 0.9), int(rng.integers(5, 21))
    best_models, best_rate, best_share = int(rng.integers(5, 14)), rng.uniform(-4.3, -3.2), rng.uniform(0.05, 0.5)
    best_target = rng.uniform(0.2, 0.8)

    def true(params: Params) -> float:
        kind, length = params["penalty"], math.log10(params["length"] / best_length)
        ridge = math.log10(params["weight"]) - offset[kind] - slope * length
        height = math.exp(-((ridge / 0.15) ** 2)) if ridge < 0 else 0.5 + 0.5 * math.exp(-((ridge / 0.4) ** 2))
        value = 101 * quality[kind] * height * math.exp(-((length / 0.7) ** 2))
        value *= 1 - 0.3 * min(abs(params["models"] - best_models) / 8, 1.0)
        value *= math.exp(-(((math.log10(params["rate"]) - best_rate) / 0.8) ** 2))
        value *= 1 - 0.3 * abs(params["share"] - best_share)
        if kind == "f":
            value *= 1 - 0.3 * abs(params["target"] - best_target)
        return value

    space = {
        "penalty": {"type": "categorical", "choices": kinds},
        "length": {"type": "int", "low": 1, "high": 50, "log": True},
        "models": {"type": "int", "low": 1, "high": 15},
        "weight": {"type": "float", "low": 0.01, "high": 100.0, "log": True},
        "rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True},
        "share": {"type": "float", "low": 0.0, "high": 0.5},
        "target": {"type": "float", "low": 0.0, "high": 1.0, "when": {"penalty": "f"}},
    }
    return Objective(space, true, lambda value: 3 + 0.05 * value, 101.0)


def ackley13(seed: int) -> Objective:
    """Minus Ackley's function of 10 binary and 3 continuous coordinates, with the optimum moved. Noise of 0.1."""
    rng = np.random.default_rng([seed, 1])
    centre = np.concatenate([rng.integers(0, 2, 10).astype(float), rng.uniform(-0.6, 0.6, 3)])
    names = [f"b{i}" for i in range(10)] + [f"x{i}" for i in range(3)]

    def true(params: Params) -> float:
        z = np.array([float(params[name]) for name in names]) - centre
        shape = 20 * math.exp(-0.2 * math.sqrt(float((z**2).mean())))
        return shape + math.exp(float(np.cos(2 * math.pi * z).mean())) - 20 - math.e

    space: dict[str, Any] = {name: {"type": "categorical", "choices": [0, 1]} for name in names[:10]}
    space |= {name: {"type": "float", "low": -1.0, "high": 1.0} for name in names[10:]}
    return Objective(space, true, lambda value: 0.1, 0.0)


def func3c(seed: int) -> Objective:
    """Minus a sum of Rosenbrock's, the six-hump camel and Beale's function of two coordinates, in which three
    categories choose the parts: which, which second one, and what of a third; heavy-tailed, noise of 0.3."""
    rng = np.random.default_rng([seed, 2])
    orders = [rng.permutation(n) for n in (3, 5, 4)]
    shift = rng.uniform(-0.3, 0.3, 2)

    def parts(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[list[NDArray[np.float64]]]:
        u, v = 2 * (x - shift[0]), 2 * (y - shift[1])
        rosenbrock = 100 * (v - u**2) ** 2 + (1 - u) ** 2
        camel = (4 - 2.1 * u**2 + u**4 / 3) * u**2 + u * v + (4 * v**2 - 4) * v**2
        beale = (1.5 - u + u * v) ** 2 + (2.25 - u + u * v**2) ** 2 + (2.625 - u + u * v**3) ** 2
        nothing = np.zeros_like(u)
        return [
            [rosenbrock, camel, beale],
            [rosenbrock, camel, beale, nothing, nothing + 5],
            [5 * camel, 2 * rosenbrock, 2 * beale, nothing],
        ]

    def value(categories: tuple[int, ...], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = parts(x, y)
        total: NDArray[np.float64] = sum(
            (terms[i][orders[i][c]] for i, c in enumerate(categories)), np.zeros_like(x)
        )  # fmt: skip
        return -total

    def true(params: Params) -> float:
        categories = (params["c0"], params["c1"], params["c2"])
        return float(value(categories, np.array([params["x"]]), np.array([params["y"]]))[0])

    def best_of(categories: tuple[int, ...]) -> float:
        low, high = np.full(2, -1.0), np.full(2, 1.0)
        for _ in range(5):  # finer and finer around the best point of a grid
            xs, ys = np.linspace(low[0], high[0], 101), np.linspace(low[1], high[1], 101)
            grid = value(categories, *np.meshgrid(xs, ys, indexing="ij"))
            i, j = np.unravel_index(int(grid.argmax()), grid.shape)
            centre, width = np.array([xs[i], ys[j]]), (high - low) / 20
            low, high = np.maximum(centre - width, -1), np.minimum(centre + width, 1)
        return float(grid.max())

    best = max(best_of(categories) for categories in itertools.product(range(3), range(5), range(4)))
    space: dict[str, Any] = {
        f"c{i}": {"type": "categorical", "choices": list(range(n))} for i, n in enumerate((3, 5, 4))
    }
    space |= {name: {"type": "float", "low": -1.0, "high": 1.0} for name in "xy"}
    return Objective(space, true, lambda value: 0.3, best)


MADE_UP: dict[str, Callable[[int], Objective]] = {"mbrl": mbrl, "ackley13": ackley13, "func3c": func3c}


def tabular(path: Path) -> Objective:
    """Complete trials of a study, from its `trials.csv`: a point has the value of the trial nearest to it.

    Ordered parameters count by their distance as a share of their range, on a log scale where the range spans a factor
    of more than 20, categorical ones, and whether a parameter applies at all, as 1. Beside the table's own there is no
    noise.

    Raises:
        UserError: the file cannot be read, or has fewer than 2 complete trials or no parameter that differs.
    """
    try:
        with path.open(newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["state"] == "complete"]
        unit = next(name for name in ("score", "return") if not lines or name in lines[0])
        values = np.array([float(line[unit]) for line in lines])
        points = [dict(word.split("=", 1) for word in line["hyperparameters"].split()) for line in lines]
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise UserError(f"{path} is not the trials.csv of a finished study ({error!r})") from None
    space: dict[str, Any] = {}
    columns: dict[str, tuple[Callable[[Any], float], NDArray[np.float64]]] = {}  # of ordered parameters
    for key in sorted({key for point in points for key in point}):
        texts = [point[key] for point in points if key in point]
        try:
            numbers = [float(text) for text in texts]
        except ValueError:
            numbers = []
        low, high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)
        if numbers and low < high:
            log, whole = low > 0 and high / low > 20, all(number == int(number) for number in numbers)
            curve = math.log if log else float
            scaled = [(curve(float(point[key])) - curve(low)) / (curve(high) - curve(low)) if key in point else math.nan
                      for point in points]  # fmt: skip
            space[key] = {"type": "int" if whole else "float", "low": int(low) if whole else low,
                          "high": int(high) if whole else high, "log": log}  # fmt: skip
            columns[key] = _unit_scale(curve, low, high), np.array(scaled)
        elif not numbers and len(set(texts)) > 1:
            space[key] = {"type": "categorical", "choices": sorted(set(texts))}
    if len(lines) < 2 or not space:
        raise UserError(f"{path} needs at least 2 complete trials that differ in some parameter")

    def true(params: Params) -> float:
        distance = np.zeros(len(points))
        for key, value in params.items():
            if key in columns:
                scale, column = columns[key]
                distance += np.nan_to_num((column - scale(value)) ** 2, nan=1.0)
            else:
                distance += np.array([point.get(key) != value for point in points], dtype=float)
        return float(values[int(distance.argmin())])

    return Objective(space, true, lambda value: 0.0, float(values.max()))


def _unit_scale(curve: Callable[[Any], float], low: float, high: float) -> Callable[[Any], float]:
    return lambda value: (curve(value) - curve(low)) / (curve(high) - curve(low))
