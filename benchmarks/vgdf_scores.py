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
one ended.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import print_line, record
from benchmarks.studies import metric_courses, pack_parser, pack_words, run_summary, study_main, train_all
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
        if case.method == "finetune":
            phase = [point for point in curve if point[1] == 0]
            yield Run(case.target, "zero-shot", seed, phase, summary)
        yield Run(case.target, case.method, seed, curve, summary, statistics.fmean(late) if late else None)


def line_of(run: Run, config: Config, args: argparse.Namespace, command: str) -> dict[str, Any]:
    source_steps, target_steps, _ = run.curve[-1] if run.curve else (0, 0, 0.0)
    wall = {} if run.method == "zero-shot" else {"wall_s": run.summary["wall_s"]}
    return record(
        BENCHMARK, f"{run.target}/{run.method}/s{run.seed}", run.value, "return in the target", None,
        config.compute.threads, command, target=run.target, method=run.method, seed=run.seed,
        source_steps=source_steps, target_steps=target_steps, target_return=run.value, outcome=run.summary["outcome"],
        **wall, seeds_in_pack=config.num_seeds, episodes=config.evaluation.episodes, hidden=config.method.hidden,
        log_density=run.log_density,
        precision=precision_of(run.method, args), **scale_fields(args),
    )  # fmt: skip


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


def curve_text(runs: Sequence[Run]) -> str:
    """One row per evaluation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        for source_steps, target_steps, value in run.curve:
            writer.writerow((run.target, run.method, run.seed, source_steps, target_steps, f"{value:.6g}"))
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
    parser.add_argument("--curves", type=Path, help="CSV file of all evaluations")
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
    chosen = {case: overrides(case, args) for case in cases_of(args)}
    configs = {case: load_config([], given) for case, given in chosen.items()}
    runs: list[Run] = []
    scores: Scores = {}
    densities: dict[str, list[float]] = {}
    cases = list(chosen)
    for i, (case, folder) in enumerate(train_all(BENCHMARK, chosen, configs, args)):
        for run in runs_of(case, folder, configs[case]):
            if run.method not in args.methods:
                continue
            runs.append(run)
            print_line(line_of(run, configs[case], args, command))
            if run.log_density is not None:
                densities.setdefault(run.target, []).append(run.log_density)
            if run.value is not None:
                scores.setdefault((run.target, run.method), []).append(run.value)
        if i + 1 == len(cases) or cases[i + 1].target != case.target:
            for key in [key for key, values in scores.items() if len(values) < args.seeds]:
                del scores[key]  # a seed has diverged: its line says so, and there is no mean
            for line in mean_lines(scores, case.target, args, command):
                print_line(line)
        if args.curves is not None:
            write_text(args.curves, curve_text(runs))
    for line in claim_lines(scores, densities, args.robots, args.version, args, command):
        print_line(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
