"""VGDF and its baselines on shifted robots, trained by `offsweep train`: returns in the target domain.

    zero-shot    soft actor-critic in the source; its policy in the target
    target-only  soft actor-critic on the few target steps alone
    finetune     the source's steps, then the target's
    mix          VGDF without filter and ensemble: all source rows count
    vgdf         VGDF

`--scale 0.1` means 100,000 source and 10,000 target steps instead of the paper's 1,000,000 and 100,000, with every
constant of the schedule that is counted in steps scaled alike (the filter's beginning, patience's decay, evaluations);
what is drawn in batches, networks and the refits' distance stay. Such runs show the direction of an effect, not the
paper's levels, and every line says so.

Zero-shot is the first phase of finetune, update by update, so it is read from finetune's runs up to the end of that
phase and costs nothing. That phase is trained once per target, of which evaluations are part: with two targets of a
robot that is one training in the source more than there need be.

Lines: one per run (its last return in the target, and the source and target steps behind it), one per method and target
(mean and standard deviation of the seeds), VGDF beside each other method by pairs of seeds, and what of the paper's
counted claims can be counted here. `--curves PATH` also writes every evaluation: a CSV file with the columns target,
method, seed, source_steps, target_steps, target_return. A second call with the same `--name` goes on where the first
one ended. `--earlier PATH` takes runs from the lines of an earlier call, and their curves from `--curves`, instead of
training them: the study takes many hours, and can so be trained target by target, on whatever machines there are.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import parse_line, print_line, record
from benchmarks.studies import metric_courses, pack_parser, pack_words, run_summary, study_main, train_all
from envs.errors import UserError
from orchestrator.artifacts import write_text
from orchestrator.config import Config, load_config
from sweeps.statistics import paired_difference

BENCHMARK = "vgdf_scores"
METHODS = ("zero-shot", "target-only", "finetune", "mix", "vgdf")
COLUMNS = ("target", "method", "seed", "source_steps", "target_steps", "target_return")
ROBOTS, SHIFTS = ("HalfCheetah", "Hopper"), ("kinematic", "morphology")
SOURCE_STEPS, GAMMA = 1_000_000, 10  # the paper's
UNFILTERED, PATIENCE_DECAY, EVALUATIONS = 100_000, 150_000, 50  # of source steps, and of a run
Scores = dict[tuple[str, str], list[float]]  # by target and method, in the order of the seeds
Line = dict[str, Any]
Rows = dict[tuple[str, str], list[Sequence[str]]]  # of `--curves`, by target and method


@dataclass(frozen=True)
class Case:
    """A pack of seeds that is trained."""

    robot: str
    shift: str
    method: str
    version: str

    @property
    def source(self) -> str:
        return f"offsweep/{self.robot}-{self.version}"

    @property
    def target(self) -> str:
        return f"offsweep/{self.robot}-{self.shift}-{self.version}"

    @property
    def name(self) -> str:
        return f"{self.robot.lower()}-{self.shift}/{self.method}"

    @property
    def methods(self) -> tuple[str, ...]:
        """What is read from its runs."""
        return ("zero-shot", self.method) if self.method == "finetune" else (self.method,)


@dataclass(frozen=True)
class Run:
    """What is reported of one seed of a method."""

    target: str
    method: str
    seed: int
    curve: list[tuple[int, int, float]]  # source steps, target steps, return in the target
    summary: dict[str, Any]
    log_density: float | None = None  # of the fictitious values, mean over the second half

    @property
    def value(self) -> float | None:
        """The last return of a run that ended well."""
        return self.curve[-1][2] if self.curve and self.summary["outcome"] == "finished" else None


def scaled(steps: int, scale: float) -> int:
    return max(1, round(steps * scale))


def overrides(case: Case, args: argparse.Namespace) -> list[str]:
    """The words behind `offsweep train` for a case; what is not named keeps the method's settings."""
    source = scaled(SOURCE_STEPS, args.scale)
    target, every = source // GAMMA, max(1, source // EVALUATIONS)
    settings: dict[str, Any] = {"target": case.target, "precision": precision_of(case.method, args)}
    if case.method in ("vgdf", "mix"):
        updates, words = source, ["method=vgdf"]
        settings["updates_per_target_step"] = GAMMA
        if case.method == "mix":
            words.append("method.variant=mix")
        else:
            settings |= {
                "start_gate": scaled(UNFILTERED, args.scale), "dynamics.precision": args.precision,
                "dynamics.patience_decay": scaled(PATIENCE_DECAY, args.scale),
            }  # fmt: skip
    else:
        words = ["method=online_sac", f"method.variant={'finetune' if case.method == 'finetune' else 'oracle'}"]
        updates = target if case.method == "target-only" else source + target
        every = max(1, target // GAMMA) if case.method == "target-only" else every
        if case.method == "finetune":
            settings["source_updates"] = source
    return [
        *words, f"dataset=online/{case.source}", *pack_words(args, updates, every),
        *(f"method.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def precision_of(method: str, args: argparse.Namespace) -> str:
    """Of a method's updates: the products of the others are too small to gain by another one."""
    return str(args.precision) if method in ("vgdf", "mix") else "float32"


def runs_of(case: Case, folder: Path, config: Config) -> Iterator[Run]:
    """Each seed of a trained study, and with finetune's also zero-shot's."""
    m = config.method
    for seed in config.seeds:
        spool = folder / "spool" / f"t0000-s{seed}.jsonl"
        summary = run_summary(spool)
        courses = metric_courses(spool, "eval/return_mean", "train/gate/log_density")
        returns = courses.get("eval/return_mean", {})
        curve = [(m.source_steps(t), m.target_steps(t), returns[t]) for t in sorted(returns)]
        densities = courses.get("train/gate/log_density", {})
        late = [value for t, value in densities.items() if t > m.num_updates / 2]
        if "zero-shot" in case.methods:
            phase = [point for point in curve if point[1] == 0]
            yield Run(case.target, "zero-shot", seed, phase, summary)
        yield Run(case.target, case.method, seed, curve, summary, statistics.fmean(late) if late else None)


def line_of(run: Run, args: argparse.Namespace, command: str) -> Line:
    source_steps, target_steps, _ = run.curve[-1] if run.curve else (0, 0, 0.0)
    wall = {} if run.method == "zero-shot" else {"wall_s": run.summary["wall_s"]}
    return record(
        BENCHMARK, f"{run.target}/{run.method}/s{run.seed}", run.value, "return in the target", None, args.threads,
        command, target=run.target, method=run.method, seed=run.seed, source_steps=source_steps,
        target_steps=target_steps, target_return=run.value, outcome=run.summary["outcome"], **wall,
        log_density=run.log_density, **settings_of(run.method, args),
    )  # fmt: skip


def settings_of(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a run's line says of how it was trained: with others it would be another run."""
    return {
        "seeds_in_pack": args.seeds, "episodes": args.episodes, "hidden": args.hidden,
        "precision": precision_of(method, args), **scale_fields(args),
    }  # fmt: skip


def scale_fields(args: argparse.Namespace) -> dict[str, Any]:
    return {"scale": args.scale, "papers_source_steps": SOURCE_STEPS}


def mean_lines(scores: Scores, target: str, args: argparse.Namespace, command: str) -> Iterator[dict[str, Any]]:
    """Every method's mean on a target beside zero-shot's, then VGDF beside every other method."""
    of_target = {method: scores[target, method] for method in METHODS if (target, method) in scores}
    zero = of_target.get("zero-shot")
    for method, values in of_target.items():
        yield record(
            BENCHMARK, f"{target}/{method}/mean", statistics.fmean(values), "return in the target",
            statistics.fmean(zero) if zero else None, args.threads, command, reference_is="zero-shot's mean",
            target=target, method=method, std=statistics.stdev(values) if len(values) > 1 else None, returns=values,
            **scale_fields(args),
        )  # fmt: skip
    for method, values in of_target.items():
        if method == "vgdf" or "vgdf" not in of_target:
            continue
        found = paired_difference(of_target["vgdf"], values)
        yield record(
            BENCHMARK, f"{target}/vgdf - {method}", found.mean, "return in the target", None, args.threads, command,
            target=target, method=method, student=found.student, bootstrap=found.bootstrap, pairs=len(values),
            **scale_fields(args),
        )  # fmt: skip


def claim_lines(
    scores: Scores, densities: dict[str, list[float]], robots: Sequence[str], version: str, args: argparse.Namespace,
    command: str,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """How often what the paper counts, or says, holds here.

    Args:
        densities: mean log density of the fictitious values by target.
    """
    means = {key: statistics.fmean(values) for key, values in scores.items()}
    targets = {shift: [f"offsweep/{robot}-{shift}-{version}" for robot in robots] for shift in SHIFTS}
    every = [target for of_shift in targets.values() for target in of_shift]

    def above(one: str, other: str, of: Sequence[str]) -> list[bool]:
        return [means[t, one] > means[t, other] for t in of if (t, one) in means and (t, other) in means]

    def worst(method: str) -> list[bool]:
        found = []
        for target in every:
            of_target = [means[target, m] for m in METHODS if (target, m) in means]
            if (target, method) in means and len(of_target) > 1:
                found.append(means[target, method] == min(of_target))
        return found

    less_alike = [
        statistics.fmean(densities[kinematic]) < statistics.fmean(densities[morphology])
        for kinematic, morphology in zip(targets["kinematic"], targets["morphology"], strict=True)
        if kinematic in densities and morphology in densities
    ]
    claims: list[tuple[str, list[bool], tuple[int, int] | None, str]] = [
        ("Finetune above VGDF", above("finetune", "vgdf", every), (2, 8), "Figure 4: targets"),
        ("fictitious values closer to the source's on morphology than on kinematic targets", less_alike, (4, 4),
         "Figure 11: robots"),
        ("VGDF above Mix on morphology targets", above("vgdf", "mix", targets["morphology"]), None, "Figure 6, text"),
        ("VGDF above Mix on kinematic targets", above("vgdf", "mix", targets["kinematic"]), None,
         "Figure 6, text: Mix is strong there"),
        ("VGDF above Zero-shot", above("vgdf", "zero-shot", every), None, "text: Zero-shot barely works"),
        ("VGDF above learning on the target's steps alone", above("vgdf", "target-only", every), None,
         "no claim of the paper"),
        ("Zero-shot is the worst", worst("zero-shot"), None, "text: Zero-shot barely works"),
    ]  # fmt: skip
    for claim, found, paper, source in claims:
        if found:
            yield record(
                BENCHMARK, f"claim/{claim}", sum(found) / len(found), "share of cases",
                paper[0] / paper[1] if paper else None, args.threads, command,
                reference_is=f"{source}, at the paper's steps", holds=sum(found), cases=len(found),
                paper_holds=paper[0] if paper else None, paper_cases=paper[1] if paper else None, **scale_fields(args),
            )  # fmt: skip


def earlier_lines(args: argparse.Namespace) -> dict[Case, list[Line]]:
    """The lines of the runs of those cases that were trained in an earlier call with the same settings.

    Raises:
        UserError: there is no such file, or something else is in it.
    """
    if args.earlier is None:
        return {}
    try:
        lines = [parse_line(text, BENCHMARK) for text in args.earlier.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {args.earlier}: {error.strerror}") from None
    by_run: dict[tuple[str, str, int], Line] = {}
    for line in lines:
        if "seed" in line and all(line.get(k) == v for k, v in settings_of(line["method"], args).items()):
            by_run[line["target"], line["method"], line["seed"]] = line
    seeds = range(args.seed, args.seed + args.seeds)
    wanted = {case: [(case.target, m, seed) for m in case.methods for seed in seeds] for case in cases_of(args)}
    return {case: [by_run[key] for key in keys] for case, keys in wanted.items() if all(k in by_run for k in keys)}


def earlier_rows(path: Path | None) -> Rows:
    """The evaluations of earlier calls; none where there is no such file."""
    rows: Rows = defaultdict(list)
    if path is not None and path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for target, method, *rest in list(csv.reader(file))[1:]:
                rows[target, method].append((target, method, *rest))
    return rows


def curve_rows(run: Run) -> list[Sequence[str]]:
    """One row per evaluation."""
    return [
        (run.target, run.method, str(run.seed), str(source_steps), str(target_steps), f"{value:.6g}")
        for source_steps, target_steps, value in run.curve
    ]


def curve_text(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for key in sorted(rows):
        writer.writerows(rows[key])
    return text.getvalue()


def build_parser() -> argparse.ArgumentParser:
    parser = pack_parser(BENCHMARK, __doc__)
    parser.add_argument("--scale", type=float, default=0.1, help="of the paper's steps (default: %(default)s)")
    parser.add_argument("--robots", nargs="+", default=list(ROBOTS))
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--version", choices=("v4", "v5"), default="v5", help="of the robots (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("float32", "mixed"),
        default="float32",
        help="of VGDF's and Mix's updates and refits; the other methods' are float32",
    )
    parser.add_argument("--curves", type=Path, help="CSV file of all evaluations; those of other runs in it stay")
    parser.add_argument("--earlier", type=Path, help="lines of an earlier call; its runs are not trained again")
    return parser


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What is trained; zero-shot is the beginning of finetune."""
    trained = [m for m in METHODS if m in args.methods and m != "zero-shot"]
    if "zero-shot" in args.methods and "finetune" not in trained:
        trained = ["finetune", *trained]
    return [
        Case(robot, shift, method, args.version)
        for robot in args.robots for shift in args.shifts for method in trained
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return study_main(BENCHMARK, build_parser(), run_all, argv)


def run_all(args: argparse.Namespace, command: str) -> int:
    known = earlier_lines(args)
    cases = cases_of(args)
    chosen = {case: overrides(case, args) for case in cases if case not in known}
    configs = {case: load_config([], given) for case, given in chosen.items()}
    rows = earlier_rows(args.curves)
    lines: list[Line] = []
    scores: Scores = {}
    training = train_all(BENCHMARK, chosen, configs, args)
    for i, case in enumerate(cases):
        if case in known:
            of_case = known[case]
        else:
            _, folder = next(training)
            runs = list(runs_of(case, folder, configs[case]))
            of_case = [line_of(run, args, command) for run in runs]
            for method in case.methods:
                rows[case.target, method] = [row for run in runs if run.method == method for row in curve_rows(run)]
            if args.curves is not None:
                write_text(args.curves, curve_text(rows))
        for line in of_case:
            if line["method"] in args.methods:
                print_line(line)
                lines.append(line)
        if i + 1 == len(cases) or cases[i + 1].target != case.target:
            scores |= scores_of(lines, case.target, args.seeds)
            for line in mean_lines(scores, case.target, args, command):
                print_line(line)
    for line in claim_lines(scores, densities_of(lines), args.robots, args.version, args, command):
        print_line(line)
    return 0


def scores_of(lines: Sequence[Line], target: str, seeds: int) -> Scores:
    """The last returns on a target by method; not of one of which a seed has diverged: its line says so, and there is
    no mean."""
    found: Scores = defaultdict(list)
    for line in lines:
        if line["target"] == target and line["target_return"] is not None:
            found[target, line["method"]].append(line["target_return"])
    return {key: values for key, values in found.items() if len(values) == seeds}


def densities_of(lines: Sequence[Line]) -> dict[str, list[float]]:
    """Mean log densities of the fictitious values by target."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["log_density"] is not None:
            found[line["target"]].append(line["log_density"])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
