"""MOPO and MOBILE, each plain and as MOREC's base method, trained by `offsweep train`: scores and errors of the model.

    mopo, mobile               plain, with the rollout length and the starts of their own settings
    mopo-long, mobile-long     the same with the rollouts of the next, unfiltered (not trained by default)
    morec-mopo, morec-mobile   variant morec: filtered rollouts of `--length` steps from `--morec-rollout-batch` starts

The weight of the penalty is the same in all three: OfflineRL-Kit's for the D4RL set <robot>-medium-replay-v2, whose
place the datasets take. MOREC's own weights were tuned with its filter; with them more than the filter would differ.

Each method is trained on a pack of seeds. All of a dataset share one dynamics ensemble, and both with a filter one
dynamics reward: seeds do not cover these. What is not named by an option keeps the method's settings for the dataset.
Networks, number of updates and datasets are far from the paper's and stand in every line: these are no results to put
beside the paper's tables.

The model's errors (`agents.model_error`) are those of the last evaluation; plain methods have them up to their rollout
length only, so that what filtering gains over many steps is read off the lines with a filter, which hold both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import print_line, record
from benchmarks.studies import (
    keys_of,
    metric_courses,
    of_seeds,
    pack_words,
    run_summary,
    short_name,
    stage_minutes,
    study_main,
    study_parser,
    train_all,
)
from envs.dataset import Dataset
from envs.errors import UserError
from envs.registry import load_dataset
from orchestrator.config import Config, load_config
from orchestrator.learner import flatten

BENCHMARK = "morec_scores"
PLAIN = ("mopo", "mobile")
METHODS = tuple(name for plain in PLAIN for name in (plain, f"{plain}-long", f"morec-{plain}"))
DEFAULT_METHODS = tuple(name for name in METHODS if not name.endswith("-long"))
COEFFICIENTS = {  # of the penalties, by robot and plain method
    ("hopper", "mopo"): 2.5, ("halfcheetah", "mopo"): 0.5, ("hopper", "mobile"): 0.1, ("halfcheetah", "mobile"): 0.1,
}  # fmt: skip
DATASETS = tuple(f"embedded/{robot}-medium-snapshots-v0,subsample=100000,seed=0" for robot in ("hopper", "halfcheetah"))


@dataclass(frozen=True)
class Case:
    """A pack of seeds."""

    dataset: str
    method: str

    @property
    def name(self) -> str:
        return f"{short_name(self.dataset)}/{self.method}"

    @property
    def plain(self) -> str:
        """The method without filter and with rollouts of its own length."""
        return next(name for name in PLAIN if name in self.method)

    @property
    def filtered(self) -> bool:
        return self.method.startswith("morec-")


def overrides(case: Case, args: argparse.Namespace) -> list[str]:
    """The words behind `offsweep train` for a case."""
    updates = args.mobile_updates if case.plain == "mobile" and args.mobile_updates else args.updates
    long = case.method != case.plain
    rollouts = {
        "rollout_length": args.length if long else None,
        "rollout_batch": args.morec_rollout_batch if long else args.rollout_batch,
    }  # fmt: skip
    robot = short_name(case.dataset).partition("-")[0]
    rates = {f"{name}_lr": args.learning_rate for name in ("actor", "critic", "alpha")}
    settings = rollouts | rates | {"penalty_coef": COEFFICIENTS.get((robot, case.plain))}
    return [
        f"method={case.plain}", *(["method.variant=morec"] if case.filtered else []), f"dataset={case.dataset}",
        *pack_words(args, updates),
        *(f"method.{key}={value}" for key, value in settings.items() if value is not None),
        *(filter_overrides(args) if case.filtered else []),
        *dynamics_overrides(case.dataset, args),
    ]  # fmt: skip


def filter_overrides(args: argparse.Namespace) -> list[str]:
    given = {
        "filter.selection": args.selection, "filter.scorer": args.scorer, "filter.precision": args.precision,
        "filter.num_discriminators": args.discriminators, "filter.cut": args.cut,
        "dynamics_reward.max_epochs": args.reward_epochs,
    }  # fmt: skip
    return [f"method.{key}={value}" for key, value in given.items() if value is not None]


def dynamics_overrides(dataset: str, args: argparse.Namespace) -> list[str]:
    """MOPO's settings of the dynamics ensemble, spelled out, so that all methods share one."""
    config = load_config([], ["method=mopo", f"dataset={dataset}"]).method.dynamics
    if args.dynamics_epochs is not None:
        config.max_epochs = args.dynamics_epochs
    settings = {key: value for key, value in asdict(config).items() if key not in ("filter", "use_members")}
    return [f"method.dynamics.{key}={value}" for key, value in flatten(settings).items()]


def last_values(spool: Path) -> dict[str, Any]:
    """Of a run's last evaluation and rollouts.

    Returns:
        rmse_by_step: every error of the model that is told by step, {metric: {step: value}}; model: its other metrics;
        rollout: lengths and cuts of the last epoch with rollouts.
    """
    by_step: dict[str, dict[str, float]] = {}
    model, rollout = {}, {}
    for name, course in metric_courses(spool, "model/", "rollout/").items():
        value = course[max(course)]
        metric, _, step = name.removeprefix("model/").rpartition("_step_")
        if name.startswith("rollout/"):
            rollout[name.removeprefix("rollout/")] = value
        elif step.isdigit():
            by_step.setdefault(metric, {})[step] = value
        else:
            model[name.removeprefix("model/")] = value
    ordered = {name: dict(sorted(steps.items(), key=lambda item: int(item[0]))) for name, steps in by_step.items()}
    return {"rmse_by_step": ordered, "model": model, "rollout": rollout}


def lines_of(
    case: Case, folder: Path, config: Config, dataset: Dataset, workdir: Path, command: str
) -> Iterator[dict[str, Any]]:
    """One line per seed of a trained study."""
    m = config.method
    for seed in config.seeds:
        spool = folder / "spool" / f"t0000-s{seed}.jsonl"
        run = run_summary(spool)
        yield record(
            BENCHMARK, f"{case.name}/s{seed}", run["normalized_score"],
            f"D4RL-normalised score in {run['environment']}", dataset.summary().get("score"), config.compute.threads,
            command, reference_is="mean score of the dataset's episodes", dataset=dataset.name, method=case.method,
            seed=seed, **run, **last_values(spool), stage_minutes=stage_minutes(config, dataset, workdir),
            updates_planned=m.num_updates, seeds_in_pack=config.num_seeds, episodes=config.evaluation.episodes,
            penalty_coef=m.penalty_coef, actor_lr=m.actor_lr, critic_lr=m.critic_lr, hidden=m.hidden,
            batch=m.batch_size, real_ratio=m.real_ratio, rollout_length=m.rollout_length, rollout_batch=m.rollout_batch,
            filter=asdict(m.filter) if case.filtered else None, dynamics=asdict(m.dynamics),
            dataset_hash=dataset.content_hash[:16], rows=dataset.num_transitions, stages=keys_of(config, dataset),
        )  # fmt: skip


def mean_line(case: Case, lines: Sequence[dict[str, Any]], plain: float | None, command: str) -> dict[str, Any]:
    """A method's mean over its seeds, beside the plain method's; no value where a seed has none."""
    seeds = of_seeds(lines)
    errors: dict[str, dict[str, float]] = {}
    for metric in lines[0]["rmse_by_step"]:
        steps = [line["rmse_by_step"].get(metric, {}) for line in lines]
        shared = [step for step in steps[0] if all(step in one for one in steps)]
        errors[metric] = {step: statistics.fmean(one[step] for one in steps) for step in shared}
    return record(
        BENCHMARK,
        f"{case.name}/mean",
        seeds.pop("mean"),
        lines[0]["unit"],
        plain,
        lines[0]["threads"],
        command,
        reference_is="the mean of the plain method",
        method=case.method,
        **seeds,
        rmse_by_step=errors,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = study_parser(BENCHMARK, __doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS))
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--mobile-updates", type=int, help="of MOBILE's runs, which take longer (default: --updates)")
    parser.add_argument("--learning-rate", type=float, help="of actor, critics and temperature (default: the methods')")
    parser.add_argument("--length", type=int, default=100, help="steps of long rollouts (default: %(default)s)")
    parser.add_argument(
        "--morec-rollout-batch", type=int, default=1_000, help="starts of long rollouts (default: %(default)s)"
    )
    parser.add_argument("--selection", help="method.filter.selection")
    parser.add_argument("--scorer", help="method.filter.scorer")
    parser.add_argument("--precision", help="method.filter.precision")
    parser.add_argument("--discriminators", type=int, help="method.filter.num_discriminators")
    parser.add_argument("--cut", help="method.filter.cut")
    parser.add_argument("--reward-epochs", type=int, help="of the dynamics reward (default: the variant's)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return study_main(BENCHMARK, build_parser(), run_all, argv)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What is trained, the plain method before the one with a filter."""
    return [Case(dataset, method) for dataset in args.datasets for method in METHODS if method in args.methods]


def run_all(args: argparse.Namespace, command: str) -> int:
    datasets = {name: load_dataset(name, args.workdir) for name in args.datasets}
    chosen = {case: overrides(case, args) for case in cases_of(args)}
    configs = {case: load_config([], given) for case, given in chosen.items()}
    stages = {
        (case.dataset, *item) for case in chosen for item in keys_of(configs[case], datasets[case.dataset]).items()
    }
    if len(stages) != len({(dataset, name) for dataset, name, _ in stages}):
        raise UserError("the methods would not share their stages; settings of the dynamics or their reward differ")
    means: dict[Case, float | None] = {}
    for case, folder in train_all(BENCHMARK, chosen, configs, args):
        dataset = datasets[case.dataset]
        lines = list(lines_of(case, folder, configs[case], dataset, args.workdir, command))
        for line in lines:
            print_line(line)
        mean = mean_line(case, lines, means.get(Case(case.dataset, case.plain)), command)
        print_line(mean)
        means[case] = mean["value"]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
