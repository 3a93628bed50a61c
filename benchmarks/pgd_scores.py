"""TD3+BC and IQL on a dataset alone and with each synthetic source, trained by `offsweep train`: scores.

    data      the dataset alone
    unguided  a pool of sub-trajectories of the diffusion model, regenerated as the learner goes on, lambda = 0
    guided    the same guided by the learner's current policy
    pets      rollouts of the learner's current policy through the dynamics ensemble, from states of the dataset, as
              long as the sub-trajectories and as many

The learners are those of policy-guided diffusion's code (variants pgd-code and pgd) in all four: with a source only the
minibatch's synthetic part is another. Each case is trained on a pack of seeds. All cases of a dataset share one
diffusion model or one dynamics ensemble: seeds do not cover these. Networks, number of updates, pools and datasets are
far from the paper's and stand in every line: these are no results to put beside the paper's tables.
"""

from __future__ import annotations

import argparse
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
from envs.registry import load_dataset
from orchestrator.config import Config, load_config

BENCHMARK = "pgd_scores"
LEARNERS = ("td3_bc", "iql")
SOURCES = {
    "data": ("method.variant=pgd-code",),
    "unguided": ("method.variant=pgd", "method.guidance.coef=0"),
    "guided": ("method.variant=pgd",),
    "pets": ("method.variant=pgd", "method.synthetic.source=ensemble"),
}
DATASETS = tuple(f"embedded/{robot}-medium-snapshots-v0" for robot in ("hopper", "halfcheetah"))


@dataclass(frozen=True)
class Case:
    """A pack of seeds."""

    dataset: str
    learner: str
    source: str

    @property
    def name(self) -> str:
        return f"{short_name(self.dataset)}/{self.learner}/{self.source}"


def overrides(case: Case, args: argparse.Namespace) -> list[str]:
    """The words behind `offsweep train` for a case; what is not named keeps the method's settings for the dataset."""
    settings: dict[str, Any] = dict.fromkeys(("actor_lr", "critic_lr"), args.learning_rate)
    if case.learner == "iql":
        settings["value_lr"] = args.learning_rate
    if case.source != "data":
        settings |= {
            "synthetic.num_trajectories": args.trajectories, "synthetic.refresh_every": args.refresh_every,
            "synthetic.real_ratio": args.real_ratio,
        }  # fmt: skip
    if case.source == "guided":
        settings["guidance.coef"] = args.coef
    if case.source == "pets":
        settings["dynamics.max_epochs"] = args.dynamics_epochs
    elif case.source != "data":
        settings["sampler.num_steps"] = args.sampling_steps
        settings |= {f"diffusion.{key}": value for key, value in (word.split("=", 1) for word in args.diffusion)}
    return [
        f"method={case.learner}", *SOURCES[case.source], f"dataset={case.dataset}", *pack_words(args, args.updates),
        *(f"method.{key}={value}" for key, value in settings.items() if value is not None),
    ]  # fmt: skip


def lines_of(
    case: Case, folder: Path, config: Config, dataset: Dataset, workdir: Path, command: str
) -> Iterator[dict[str, Any]]:
    """One line per seed of a trained study."""
    m = config.method
    synthetic = None
    if case.source != "data":
        synthetic = {"pool": asdict(m.synthetic), "stage_minutes": stage_minutes(config, dataset, workdir)}
        synthetic |= {"dynamics": asdict(m.dynamics)} if case.source == "pets" else {
            "diffusion": asdict(m.diffusion), "sampler": asdict(m.sampler), "guidance": asdict(m.guidance)
        }  # fmt: skip
    for seed in config.seeds:
        spool = folder / "spool" / f"t0000-s{seed}.jsonl"
        run = run_summary(spool)
        courses = metric_courses(spool, "synthetic/")
        yield record(
            BENCHMARK, f"{case.name}/s{seed}", run["normalized_score"],
            f"D4RL-normalised score in {run['environment']}", dataset.summary().get("score"), config.compute.threads,
            command, reference_is="mean score of the dataset's episodes", dataset=dataset.name, learner=case.learner,
            source=case.source, seed=seed, **run,
            synthetic={name.removeprefix("synthetic/"): course[max(course)] for name, course in courses.items()},
            settings=synthetic, stages=keys_of(config, dataset), updates_planned=m.num_updates,
            seeds_in_pack=config.num_seeds, episodes=config.evaluation.episodes, hidden=m.hidden, batch=m.batch_size,
            actor_lr=m.actor_lr, critic_lr=m.critic_lr, dataset_hash=dataset.content_hash[:16],
            rows=dataset.num_transitions,
        )  # fmt: skip


def mean_line(case: Case, lines: Sequence[dict[str, Any]], data: float | None, command: str) -> dict[str, Any]:
    """A case's mean over its seeds, beside that of the dataset alone; no value where a seed has none."""
    seeds = of_seeds(lines)
    return record(
        BENCHMARK, f"{case.name}/mean", seeds.pop("mean"), lines[0]["unit"], data, lines[0]["threads"], command,
        reference_is="the mean of the learner on the dataset alone", learner=case.learner, source=case.source, **seeds,
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = study_parser(BENCHMARK, __doc__)
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--learning-rate", type=float, help="of actor, critics and value (default: the learners')")
    parser.add_argument("--coef", type=float, help="method.guidance.coef of `guided`")
    parser.add_argument("--trajectories", type=int, help="method.synthetic.num_trajectories")
    parser.add_argument("--refresh-every", type=int, help="method.synthetic.refresh_every")
    parser.add_argument("--real-ratio", type=float, help="method.synthetic.real_ratio")
    parser.add_argument("--diffusion", nargs="*", default=[], metavar="KEY=VALUE", help="settings method.diffusion.*")
    parser.add_argument("--sampling-steps", type=int, help="method.sampler.num_steps")
    return parser


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What is trained, each learner on the dataset alone before its synthetic sources."""
    return [
        Case(dataset, learner, source)
        for dataset in args.datasets for learner in LEARNERS if learner in args.learners
        for source in SOURCES if source in args.sources
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return study_main(BENCHMARK, build_parser(), run_all, argv)


def run_all(args: argparse.Namespace, command: str) -> int:
    datasets = {name: load_dataset(name, args.workdir) for name in args.datasets}
    chosen = {case: overrides(case, args) for case in cases_of(args)}
    configs = {case: load_config([], given) for case, given in chosen.items()}
    of_data: dict[tuple[str, str], float | None] = {}
    for case, folder in train_all(BENCHMARK, chosen, configs, args):
        lines = list(lines_of(case, folder, configs[case], datasets[case.dataset], args.workdir, command))
        for line in lines:
            print_line(line)
        mean = mean_line(case, lines, of_data.get((case.dataset, case.learner)), command)
        print_line(mean)
        if case.source == "data":
            of_data[case.dataset, case.learner] = mean["value"]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
