"""The base method, MOPO and RAVL in learned and in true dynamics, trained by `offsweep train`: scores and values.

The paper's claim in small (Sims et al. 2024, Figure 1 and Table 1): with the true dynamics, which have no error and no
uncertainty, a method that relies on a penalty is the base method and fails, its values growing without bound, since no
rollout ever starts at the edge-of-reach states; with many critics the values stay bounded.

    base   2 critics, eta = 0
    ravl   10 critics, eta = 1, otherwise the same program and settings
    mopo   2 critics and a penalty on the reward; in true dynamics it is zero, and MOPO is left out there

`--model-quality` takes `method.model_quality`: 0 the learned ensemble, 1 the true dynamics, -1 a random model, and what
lies between. Each method is trained on a pack of seeds; all methods of a dataset share one ensemble. Networks, number
of updates and datasets are far from the paper's and stand in every line: these are no results to put beside the paper's
tables.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agents.diagnostics import expert_value
from benchmarks.common import print_line, record
from benchmarks.studies import (
    EVALUATE_EVERY,
    keys_of,
    metric_courses,
    of_seeds,
    pack_words,
    run_summary,
    short_name,
    study_main,
    study_parser,
    train_all,
)
from envs.dataset import Dataset
from envs.errors import UserError
from envs.registry import load_dataset
from orchestrator.config import Config, load_config
from orchestrator.learner import flatten

BENCHMARK = "true_dynamics"
METHODS = {
    "base": ("method=ravl", "method.num_critics=2", "method.eta=0"),
    "ravl": ("method=ravl", "method.num_critics=10", "method.eta=1"),
    "mopo": ("method=mopo",),
}
QUALITIES = {-1.0: "random", 0.0: "learned", 1.0: "true"}  # names of method.model_quality
DATASETS = ("embedded/walker2d-medium-expert-v0", "embedded/hopper-medium-snapshots-v0")


@dataclass(frozen=True)
class Case:
    """A pack of seeds."""

    dataset: str
    quality: float
    method: str

    @property
    def dynamics(self) -> str:
        return QUALITIES.get(self.quality, f"{self.quality:g}")

    @property
    def name(self) -> str:
        return f"{short_name(self.dataset)}/{self.dynamics}/{self.method}"


def overrides(case: Case, args: argparse.Namespace) -> list[str]:
    """The words behind `offsweep train` for a case; what is not named keeps the method's settings for the dataset."""
    return [
        *METHODS[case.method], f"dataset={case.dataset}", *pack_words(args, args.updates),
        f"method.model_quality={case.quality}",
        *([f"method.rollout_batch={args.rollout_batch}"] if args.rollout_batch else []),
        *dynamics_overrides(case.dataset, args),
    ]  # fmt: skip


def dynamics_overrides(dataset: str, args: argparse.Namespace) -> list[str]:
    """RAVL's settings of the dynamics ensemble, spelled out: MOPO would otherwise train one of its own."""
    config = load_config([], ["method=ravl", f"dataset={dataset}"]).method.dynamics
    if args.dynamics_epochs is not None:
        config.max_epochs = args.dynamics_epochs
    settings = {key: value for key, value in asdict(config).items() if key != "use_members"}
    return [f"method.dynamics.{key}={value}" for key, value in flatten(settings).items()]


def ensemble_key(config: Config, dataset: Dataset) -> str | None:
    """The content key of the dynamics ensemble of a configuration; None in true dynamics."""
    return keys_of(config, dataset).get("dynamics")


def summary_of(spool: Path) -> dict[str, Any]:
    """What a run's spool says of it.

    Returns:
        What `studies.run_summary` does; of train/q_mean (the critics' mean value, over minibatches and critics, of
        every epoch) mean_q, the last, max_mean_q over the training, and log10_q_curve by update where it is positive.
    """
    mean_qs = metric_courses(spool, "train/q_mean").get("train/q_mean", {})
    finite = [q for q in mean_qs.values() if math.isfinite(q)]
    return run_summary(spool) | {
        "mean_q": mean_qs[max(mean_qs)] if mean_qs else None,
        "max_mean_q": max(finite, default=None),
        "log10_q_curve": {
            str(step): math.log10(q)
            for step, q in sorted(mean_qs.items())
            if 0 < q < math.inf and (step % EVALUATE_EVERY == 0 or step == max(mean_qs))
        },
    }


def lines_of(case: Case, folder: Path, config: Config, dataset: Dataset, command: str) -> Iterator[dict[str, Any]]:
    """One line per seed of a trained study."""
    m = config.method
    behaviour = dataset.summary().get("score")
    for seed in config.seeds:
        run = summary_of(folder / "spool" / f"t0000-s{seed}.jsonl")
        score, q = run["normalized_score"], run["mean_q"]
        yield record(
            BENCHMARK, f"{case.name}/s{seed}", score, f"D4RL-normalised score in {run['environment']}", behaviour,
            config.compute.threads, command, reference_is="mean score of the dataset's episodes",
            dataset=dataset.name, dynamics=case.dynamics, method=case.method, seed=seed,
            log10_q=math.log10(q) if q is not None and 0 < q < math.inf else None, **run,
            q_of_expert=expert_value(dataset.env_id, m.gamma), updates_planned=m.num_updates,
            seeds_in_pack=config.num_seeds, episodes=config.evaluation.episodes, num_critics=m.num_critics, eta=m.eta,
            penalty_coef=getattr(m, "penalty_coef", None), hidden=m.hidden, batch=m.batch_size,
            real_ratio=m.real_ratio, rollout_length=m.rollout_length, rollout_batch=m.rollout_batch,
            dataset_hash=dataset.content_hash[:16], rows=dataset.num_transitions,
            dynamics_ensemble=ensemble_key(config, dataset),
        )  # fmt: skip


def mean_line(case: Case, lines: Sequence[dict[str, Any]], base: float | None, command: str) -> dict[str, Any]:
    """A method's mean over its seeds, beside the base method's in the same dynamics; no value where a seed has none."""
    seeds = of_seeds(lines)
    qs = [line["mean_q"] for line in lines if line["mean_q"] is not None]
    return record(
        BENCHMARK, f"{case.name}/mean", seeds.pop("mean"), lines[0]["unit"], base, lines[0]["threads"], command,
        reference_is="the base method's mean over its seeds in the same dynamics", dynamics=case.dynamics,
        method=case.method, **seeds, mean_q=statistics.fmean(qs) if qs else None,
        max_mean_q=max((line["max_mean_q"] for line in lines if line["max_mean_q"] is not None), default=None),
        q_of_expert=lines[0]["q_of_expert"],
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = study_parser(BENCHMARK, __doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument(
        "--model-quality", type=float, nargs="+", default=[0.0, 1.0], help="0 learned, 1 true (default: both)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return study_main(BENCHMARK, build_parser(), run_all, argv)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What is trained, the base method first wherever there is one."""
    return [
        Case(dataset, quality, method)
        for dataset in args.datasets
        for quality in args.model_quality
        for method in METHODS
        if method in args.methods and (method, quality) != ("mopo", 1.0)
    ]


def run_all(args: argparse.Namespace, command: str) -> int:
    datasets = {name: load_dataset(name, args.workdir) for name in args.datasets}
    chosen = {case: overrides(case, args) for case in cases_of(args)}
    configs = {case: load_config([], given) for case, given in chosen.items()}
    keys = {(case.dataset, ensemble_key(configs[case], datasets[case.dataset])) for case in chosen if case.quality < 1}
    if len(keys) != len({dataset for dataset, _ in keys}):
        raise UserError("the methods would not share one dynamics ensemble; their dynamics settings differ")
    base: float | None = None
    for case, folder in train_all(BENCHMARK, chosen, configs, args):
        lines = list(lines_of(case, folder, configs[case], datasets[case.dataset], command))
        for line in lines:
            print_line(line)
        base = None if case.method == "base" else base
        mean = mean_line(case, lines, base, command)
        print_line(mean)
        if case.method == "base":
            base = mean["value"]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
