"""Are the statistics of tables those of rliable? (docs/tables.md, Statistics)

Mean, median, interquartile mean, optimality gap, probability of improvement and performance profile of
`sweeps.table_statistics` beside those of google-research/rliable, of runs that others published and of made-up scores,
and their stratified bootstrap intervals. rliable is no dependency: `--python` names an interpreter that has it.

`--scores` names CSV files with the columns `algorithm,task,run,score`, one row per run; every algorithm needs as many
runs of each of its tasks, but algorithms may have other tasks. Cases are `<file>/<statistic>` and
`made up/<statistic>`: `value` is the largest absolute difference in

    every algorithm's first r runs of its first t tasks, for all r and t, so that numbers of scores leave every
    remainder by 4; of two algorithms (and of one beside itself) the tasks of both, all runs of the one and the first r
    of the other

and `<file>/interval of <statistic>`: bounds are random, so each is the mean over `--seeds` bootstraps, and `value` is
the root mean square of the differences of ours from rliable's, each over its Monte-Carlo standard error. Bootstraps
that draw from the same distribution give about 1.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import print_line, record
from envs.errors import UserError
from sweeps import table_statistics as statistics
from sweeps.table_statistics import score_matrix, stratified_bootstrap

BENCHMARK = "rliable_agreement"
COLUMNS = ("algorithm", "task", "run", "score")
TOLERANCE = 1e-6
TARGETS = (1.0, 50.0, 100.0)  # of the optimality gap: rliable's default, and for D4RL-normalised scores
TARGET = 100.0  # of its interval
THRESHOLDS = np.linspace(-5.0, 150.0, 31).tolist()  # as the published notebooks have them
TIED_THRESHOLDS = 20  # further ones, which are scores
INTERVAL_THRESHOLDS = (25.0, 50.0, 75.0)
AGGREGATES = ("mean", "median", "iqm", "optimality_gap")
PROFILE = "performance_profile"
PAIRWISE = "probability_of_improvement"

Array = NDArray[np.float64]


class Algorithm(NamedTuple):
    """An algorithm's runs: (R, T), and the names of the T tasks."""

    tasks: tuple[str, ...]
    scores: Array


Published = dict[str, Algorithm]


def read_scores(path: Path) -> Published:
    """Algorithms of a CSV file, in the order of their first rows; tasks by name, runs in the order of their rows.

    Raises:
        UserError: no such file, another layout, a run twice, or tasks with different numbers of runs.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"{path.name} needs the columns {', '.join(COLUMNS)}; it lacks {', '.join(missing)}")
            for row in rows:
                runs = found.setdefault(row["algorithm"], {}).setdefault(row["task"], {})
                if row["run"] in runs:
                    raise UserError(f"{path.name}, line {rows.line_num}: run {row['run']} of {row['algorithm']} on "
                                    f"{row['task']} is there twice; give each run its own name")  # fmt: skip
                try:
                    runs[row["run"]] = float(row["score"])
                except (TypeError, ValueError):
                    raise UserError(f"{path.name}, line {rows.line_num}: {row['score']!r} is no score") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not found:
        raise UserError(f"{path.name} has no runs")
    return {
        name: Algorithm(
            tuple(sorted(tasks)), score_matrix([list(tasks[task].values()) for task in sorted(tasks)], name)
        )
        for name, tasks in found.items()
    }


def on_common_tasks(x: Algorithm, y: Algorithm) -> tuple[Array, Array]:
    """Both algorithms' scores (R, T) and (Q, T) on the tasks that both have, in one order; T may be 0."""
    common = sorted(set(x.tasks) & set(y.tasks))
    return x.scores[:, [x.tasks.index(t) for t in common]], y.scores[:, [y.tasks.index(t) for t in common]]


class Points(NamedTuple):
    """What both implementations are asked about a set."""

    samples: dict[str, Array]  # each (R, T), by name
    pairs: dict[str, tuple[Array, Array]]  # each (R, T) and (Q, T), by name
    thresholds: list[float]


def points_of(published: Published) -> Points:
    """Every algorithm's first r runs of its first t tasks, and every algorithm beside the first r runs of each, itself
    included. What holds all runs is named by the algorithms alone."""
    samples, pairs = {}, {}
    for name, (tasks, scores) in published.items():
        runs = len(scores)
        for r in range(1, runs + 1):
            for t in range(1, len(tasks) + 1):
                samples[name if (r, t) == scores.shape else f"{name} {r} {t}"] = scores[:r, :t]
        for other, algorithm in published.items():
            x, y = on_common_tasks(published[name], algorithm)
            if x.shape[1]:
                for r in range(1, len(y) + 1):
                    pairs[f"{name} over {other}" + (f" {r}" if r < len(y) else "")] = x, y[:r]
    scores_of_all = sorted({float(s) for x in published.values() for s in x.scores.flat})
    ties = scores_of_all[:: max(1, len(scores_of_all) // TIED_THRESHOLDS)]
    return Points(samples, pairs, THRESHOLDS + ties)


def made_up_points(seed: int = 0) -> Points:
    """Multiples of 25, so that many are equal to each other, to thresholds and to targets, in all small shapes; pairs
    with different numbers of runs, and of arrays that are equal, constant or apart."""
    draw = np.random.default_rng(seed)

    def scores(runs: int, tasks: int) -> Array:
        return np.asarray(25.0 * draw.integers(-1, 7, (runs, tasks)), np.float64)

    samples = {f"{r} {t}": scores(r, t) for r in range(1, 10) for t in range(1, 8)}
    pairs = {f"{r} {q}": (scores(r, 3), scores(q, 3)) for r in range(1, 7) for q in range(1, 7)}
    constant, same = np.full((4, 3), 50.0), scores(5, 3)
    pairs["constant"], pairs["constant, fewer"] = (constant, constant), (constant, constant[:2])
    pairs["equal"], pairs["in another order"], pairs["apart"] = (same, same), (same, same[::-1]), (same, same - 500)
    return Points(samples, pairs, [*THRESHOLDS, -25.0, 0.0, 25.0, 50.0])


def our_points(points: Points) -> dict[str, list[Any]]:
    """Each statistic of each sample, or pair; optimality gaps for all `TARGETS`."""
    samples = points.samples.values()
    return {
        "mean": [statistics.mean(s) for s in samples],
        "median": [statistics.median(s) for s in samples],
        "iqm": [statistics.iqm(s) for s in samples],
        "optimality_gap": [[statistics.optimality_gap(s, t) for t in TARGETS] for s in samples],
        PROFILE: [statistics.performance_profile(s, points.thresholds) for s in samples],
        PAIRWISE: [statistics.probability_of_improvement(x, y) for x, y in points.pairs.values()],
    }


def aggregates_of(scores: Array) -> Array:
    """What intervals are drawn of; scores (..., R, T) give (..., 7)."""
    values = [statistics.mean(scores), statistics.median(scores), statistics.iqm(scores)]
    values.append(statistics.optimality_gap(scores, TARGET))
    shares = statistics.performance_profile(scores, INTERVAL_THRESHOLDS)
    return np.asarray(np.concatenate([np.stack(values, -1), shares], -1), np.float64)


class Options(NamedTuple):
    """Of the intervals."""

    seeds: int
    resamples: int
    pair_resamples: int


def our_intervals(asked: Mapping[str, Mapping[str, Any]], options: Options) -> dict[str, list[Any]]:
    """Bounds for every seed: samples (N, seeds, 2, 7), pairs (N, seeds, 2)."""

    def bounds(statistic: Any, samples: Sequence[Array], resamples: int, seed: int) -> list[Array]:
        found = stratified_bootstrap(statistic, *samples, resamples=resamples, seed=seed)
        return [found.low, found.high]

    seeds = range(options.seeds)
    return {
        "samples": [[bounds(aggregates_of, [s], options.resamples, seed) for seed in seeds]
                    for s in asked["samples"].values()],
        "pairs": [[bounds(statistics.probability_of_improvement, pair, options.pair_resamples, seed) for seed in seeds]
                  for pair in asked["pairs"].values()],
    }  # fmt: skip


# ---- the other side: this source runs in the interpreter that has rliable -------------------------------------------


def answer_of_rliable(question: dict[str, Any]) -> dict[str, Any]:
    """The same of rliable, for questions that are made of lists; imports numpy and rliable alone."""
    import platform
    import warnings
    from importlib.metadata import version

    import numpy as np
    from rliable import library, metrics  # type: ignore[import-not-found,import-untyped,unused-ignore]

    warnings.simplefilter("ignore")

    def points(asked: dict[str, Any]) -> dict[str, list[Any]]:
        samples = [np.array(s) for s in asked["samples"]]
        return {
            "mean": [float(metrics.aggregate_mean(s)) for s in samples],
            "median": [float(metrics.aggregate_median(s)) for s in samples],
            "iqm": [float(metrics.aggregate_iqm(s)) for s in samples],
            "optimality_gap": [
                [float(metrics.aggregate_optimality_gap(s, gamma=t)) for t in asked["targets"]] for s in samples
            ],
            "performance_profile": [
                library.score_distributions(s, np.array(asked["thresholds"])).tolist() for s in samples
            ],
            "probability_of_improvement": [
                float(metrics.probability_of_improvement(np.array(x), np.array(y))) for x, y in asked["pairs"]
            ],
        }

    def aggregates(scores: Any) -> Any:
        profile = library.score_distributions(scores, np.array(question["interval_thresholds"]))
        gap = metrics.aggregate_optimality_gap(scores, gamma=question["target"])
        few = [metrics.aggregate_mean(scores), metrics.aggregate_median(scores), metrics.aggregate_iqm(scores), gap]
        return np.concatenate([few, profile])

    def bounds(scores: Any, func: Any, resamples: int, seed: int) -> Any:
        np.random.seed(seed)  # rliable draws from numpy's global generator whatever `random_state` it is given
        found = library.get_interval_estimates({"x": scores}, func, reps=resamples)[1]["x"]
        return np.squeeze(found).tolist()

    def intervals(asked: dict[str, Any]) -> dict[str, list[Any]]:
        seeds, improvement = range(question["seeds"]), metrics.probability_of_improvement
        return {
            "samples": [[bounds(np.array(s), aggregates, question["resamples"], seed) for seed in seeds]
                        for s in asked["samples"]],
            "pairs": [[bounds(tuple(np.array(a) for a in pair), improvement, question["pair_resamples"], seed)
                       for seed in seeds] for pair in asked["pairs"]],
        }  # fmt: skip

    return {
        "points": {name: points(asked) for name, asked in question["points"].items()},
        "intervals": {name: intervals(asked) for name, asked in question["intervals"].items()},
        "versions": {name: version(name) for name in ("rliable", "arch", "numpy", "scipy", "pandas")}
        | {"python": platform.python_version()},
    }


def ask_rliable(python: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of an interpreter that has rliable.

    Raises:
        UserError: there is no such interpreter, or it has no rliable that loads.
    """
    script = "\n".join([
        "from __future__ import annotations", "import json, sys", "from typing import Any",
        inspect.getsource(answer_of_rliable), "json.dump(answer_of_rliable(json.load(sys.stdin)), sys.stdout)",
    ])  # fmt: skip
    try:
        done = subprocess.run([python, "-c", script], input=json.dumps(question, default=np.ndarray.tolist), text=True,
                              capture_output=True, check=False)  # fmt: skip
    except OSError as error:
        raise UserError(f"{python} cannot be started ({error.strerror}): give an interpreter with --python") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"{python} gave no answer of rliable: {last}. It needs the package rliable, in versions that "
                        "load together")  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


# ---- what is printed ------------------------------------------------------------------------------------------------


def largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Largest absolute difference of numbers, or of arrays of numbers, in pairs; infinite where one is no number.

    Raises:
        ValueError: shapes that are not equal.
    """
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if x.shape != y.shape:
            raise ValueError(f"shapes {x.shape} and {y.shape}")
        difference = np.abs(x - y)
        largest = max(largest, float(np.where(np.isfinite(difference), difference, np.inf).max()))
    return largest


class Ends(NamedTuple):
    """Bounds of intervals, means over seeds, each (N, 2)."""

    ours: Array
    theirs: Array
    error: Array  # Monte-Carlo standard error of ours - theirs

    @classmethod
    def of_seeds(cls, ours: Any, theirs: Any) -> Ends:
        """Of bounds of shape (N, seeds, 2), at least 2 seeds."""
        x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        error = np.sqrt((x.var(1, ddof=1) + y.var(1, ddof=1)) / x.shape[1])
        return cls(x.mean(1), y.mean(1), error)

    @property
    def in_errors(self) -> Array:
        """Differences over their errors; what is below 1e-9 is a matter of floating-point sums."""
        return (self.ours - self.theirs) / np.maximum(self.error, 1e-9)

    @property
    def widths(self) -> tuple[Array, Array]:
        return self.ours[:, 1] - self.ours[:, 0], self.theirs[:, 1] - self.theirs[:, 0]


def interval_fields(ends: Ends, names: Sequence[str]) -> dict[str, Any]:
    """What a line says of intervals beside its value."""
    ours, theirs = ends.widths
    wide = theirs > 1e-9  # of constant scores they have no width
    shares = (np.abs(ends.ours - ends.theirs)[wide] / theirs[wide, None]).max(initial=0.0)
    errors = (ends.error[wide] / theirs[wide, None]).mean() if wide.any() else 0.0
    return {
        "largest_in_errors": float(np.abs(ends.in_errors).max()),
        "bounds_compared": ends.ours.size,
        "largest_in_widths": float(shares),
        "error_in_widths": float(errors),
        "mean_width_ratio": float((ours[wide] / theirs[wide]).mean()) if wide.any() else None,
        "bounds": {
            name: {"ours": ends.ours[i].tolist(), "rliable": ends.theirs[i].tolist(), "error": ends.error[i].tolist()}
            for i, name in enumerate(names)
        },
    }


def compare(sets: Mapping[str, tuple[str, Published]], options: Options, python: str) -> list[dict[str, Any]]:
    """The lines of published runs, given by name with their source, and of made-up scores."""
    points = {name: points_of(published) for name, (_, published) in sets.items()} | {"made up": made_up_points()}
    asked = {name: interval_question(published) for name, (_, published) in sets.items()}
    print(f"{BENCHMARK}: asking rliable, intervals included", file=sys.stderr, flush=True)
    theirs = ask_rliable(python, {
        "points": {name: {"samples": list(p.samples.values()), "pairs": list(p.pairs.values()),
                          "thresholds": p.thresholds, "targets": TARGETS} for name, p in points.items()},
        "intervals": {name: {key: list(found.values()) for key, found in q.items()} for name, q in asked.items()},
        **options._asdict(), "target": TARGET, "interval_thresholds": INTERVAL_THRESHOLDS,
    })  # fmt: skip
    versions = {"rliable_with": theirs["versions"], "ours_with": {n: version(n) for n in ("numpy", "scipy")}}
    words = "".join(f" --{key.replace('_', '-')} {value}" for key, value in options._asdict().items())
    command = f"python -m benchmarks.{BENCHMARK} --python PYTHON{words}"
    if sets:
        command += f" --scores {' '.join(f'{name}.csv' for name in sets)} --source ..."
    lines = []
    for name, p in points.items():
        about: dict[str, Any] = {"source": "made up by this benchmark"}
        whole: set[str] = set()  # names of what holds all runs
        if name in sets:
            source, published = sets[name]
            whole = {*published, *(f"{x} over {y}" for x in published for y in published)}
            about = {"source": source, "runs": sum(x.scores.size for x in published.values()),
                     "runs_and_tasks": {a: list(x.scores.shape) for a, x in published.items()}}  # fmt: skip
        ours, rliables = our_points(p), theirs["points"][name]
        for statistic in (*AGGREGATES, PROFILE, PAIRWISE):
            keys = list(p.pairs if statistic == PAIRWISE else p.samples)
            found = dict(zip(keys, zip(ours[statistic], rliables[statistic], strict=True), strict=True))
            beside = {
                key: {"ours": np.asarray(found[key][0]).tolist(), "rliable": found[key][1]}
                for key in keys if key in whole and statistic != PROFILE
            }  # fmt: skip
            lines.append(record(
                BENCHMARK, f"{name}/{statistic}", largest_difference(ours[statistic], rliables[statistic]),
                "largest absolute difference", TOLERANCE, 1, command, reference_is="what it may be at most",
                compared=sum(np.size(value) for value in ours[statistic]), **about,
                **({"targets": list(TARGETS)} if statistic == "optimality_gap" else {}), values=beside, **versions,
            ))  # fmt: skip
        if name not in sets:
            continue
        print(f"{BENCHMARK}: our intervals of {name}", file=sys.stderr, flush=True)
        own, rliables = our_intervals(asked[name], options), theirs["intervals"][name]
        shares = [f"share_above_{tau:g}" for tau in INTERVAL_THRESHOLDS]
        x_seeds, y_seeds = np.asarray(own["samples"]), np.asarray(rliables["samples"])
        compared = {
            statistic: (list(asked[name]["samples"]), x_seeds[..., i], y_seeds[..., i])
            for i, statistic in enumerate((*AGGREGATES, *shares))
        }
        if asked[name]["pairs"]:
            compared[PAIRWISE] = (list(asked[name]["pairs"]), np.asarray(own["pairs"]), np.asarray(rliables["pairs"]))
        for statistic, (keys, x, y) in compared.items():
            ends = Ends.of_seeds(x, y)
            lines.append(record(
                BENCHMARK, f"{name}/interval of {statistic}", float(np.sqrt((ends.in_errors**2).mean())),
                "Monte-Carlo standard errors", 1.0, 1, command, reference_is="about what chance gives", **about,
                **interval_fields(ends, keys), **versions,
            ))  # fmt: skip
    return lines


def interval_question(published: Published) -> dict[str, dict[str, Any]]:
    """What intervals are drawn of: every algorithm's scores, and the first algorithm beside each of the others."""
    first, *others = published
    pairs = {f"{first} over {other}": on_common_tasks(published[first], published[other]) for other in others}
    return {
        "samples": {name: algorithm.scores for name, algorithm in published.items()},
        "pairs": {name: pair for name, pair in pairs.items() if pair[0].shape[1]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--python", required=True, help="interpreter that has rliable")
    parser.add_argument("--scores", nargs="*", type=Path, default=[], metavar="CSV", help="published runs")
    parser.add_argument("--source", nargs="*", default=[], help="of each file: repository, commit and path")
    parser.add_argument("--seeds", type=int, default=10, help="bootstraps of each interval (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of an interval (default: %(default)s)")
    parser.add_argument("--pair-resamples", type=int, default=200,
                        help="of an interval of the probability of improvement (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if len(args.source) != len(args.scores):
        parser.error("each file of --scores needs its --source")
    if args.seeds < 2 or min(args.resamples, args.pair_resamples) < 1:
        parser.error("there must be at least 2 seeds and 1 resample")
    try:
        if len({path.stem for path in args.scores}) < len(args.scores):
            raise UserError("two files of --scores have the same name: rename one, since results go by it")
        sets = {path.stem: (source, read_scores(path)) for path, source in zip(args.scores, args.source, strict=True)}
        lines = compare(sets, Options(args.seeds, args.resamples, args.pair_resamples), args.python)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    for line in lines:
        print_line(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
