"""What benchmarks share that train studies by `offsweep train` and read what is left behind; no benchmark itself."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from agents.method import effective_settings, load_method
from benchmarks.common import ROOT
from envs.dataset import Dataset
from envs.errors import UserError
from orchestrator.artifacts import ArtifactStore, stage_keys
from orchestrator.config import Config, load_config, to_dict
from orchestrator.spool import read_records

EVALUATE_EVERY = 5_000  # updates
EPOCH = 1_000  # updates


def pack_parser(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark that trains packs of seeds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="actor's and critics' hidden widths")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, one pack (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--episodes", type=int, default=10, help="of an evaluation (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="packs trained at a time (default: %(default)s)")
    parser.add_argument("--name", default=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                        help="of the studies; with the name of an earlier call its studies are resumed")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each method (default: %(default)s)")
    workdir = Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    parser.add_argument("--workdir", type=Path, default=workdir, help="work folder (default: %(default)s)")
    return parser


def study_parser(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """Those, and what benchmarks of offline methods have besides."""
    parser = pack_parser(benchmark, description)
    parser.add_argument("--updates", type=int, default=20_000, help="of every run (default: %(default)s)")
    parser.add_argument("--rollout-batch", type=int, help="starts per epoch (default: the methods')")
    parser.add_argument("--dynamics-epochs", type=int, help="most for the ensemble (default: until it stops)")
    return parser


def pack_words(args: argparse.Namespace, updates: int, evaluate_every: int = EVALUATE_EVERY) -> list[str]:
    """The words behind `offsweep train` for what `pack_parser` asks: a pack of seeds in this process, its schedule,
    widths and evaluations, which are so many updates apart."""
    epoch = math.gcd(updates, evaluate_every, EPOCH)
    return [
        f"seed={args.seed}", f"num_seeds={args.seeds}", f"method.num_updates={updates}",
        f"method.updates_per_epoch={epoch}", f"method.hidden=[{','.join(map(str, args.hidden))}]",
        f"evaluation.every_epochs={max(1, evaluate_every // epoch)}", f"evaluation.episodes={args.episodes}",
        "compute.num_learners=0", f"compute.runs_per_pack={args.seeds}", f"compute.threads={args.threads}",
    ]  # fmt: skip


def shown_command(benchmark: str, words: Sequence[str]) -> str:
    """What was typed, without where it was run and under which name: that is of no use to others."""
    private = ("--workdir", "--name")
    shown = [w for w, before in zip(words, ["", *words], strict=False)
             if w.partition("=")[0] not in private and before not in private]  # fmt: skip
    return " ".join(["python", "-m", f"benchmarks.{benchmark}", *map(shlex.quote, shown)])


def short_name(dataset: str) -> str:
    """A dataset's name without its source, version and options, for names of cases and studies."""
    name = dataset.partition(",")[0]
    return name.removeprefix("embedded/").rpartition("-v")[0] or Path(name).stem


def keys_of(config: Config, dataset: Dataset) -> dict[str, str]:
    """The content keys of a configuration's stages, by name."""
    return stage_keys(load_method(config.method_name).stages(config.method), dataset.content_hash)


def stage_minutes(config: Config, dataset: Dataset, workdir: Path) -> dict[str, float]:
    """How long each stage of a trained configuration took when it was built, wherever that is known.

    Raises:
        UserError: a stage is not there, so that something else was trained.
    """
    store, minutes = ArtifactStore(workdir / "artifacts"), {}
    keys = keys_of(config, dataset)
    for name, stage in load_method(config.method_name).stages(config.method).items():
        key = keys[name]
        if not store.exists(stage.kind, key):
            raise UserError(
                f"there is no {name} of these settings in {store.root}: the study was trained when a method's settings "
                "were others; give another --name"
            )
        seconds = store.description(stage.kind, key).get("seconds")
        if seconds is not None:
            minutes[name] = seconds / 60
    return minutes


def train(benchmark: str, case: str, config: Config, words: Sequence[str], args: argparse.Namespace) -> Path:
    """Run `offsweep train`, or `offsweep resume` if it was begun under that name, in a process of its own.

    Args:
        case: a name for what is trained.
        config: what `words` mean.
        words: `key=value` for `offsweep train`.
        args: as `study_parser` gives them.

    Returns:
        The study's folder.

    Raises:
        UserError: it was begun with other settings, or ended with an error.
    """
    study = f"bench-{case.replace('/', '-')}-{args.name}"
    folder: Path = args.workdir / "studies" / study
    command = [sys.executable, "-m", "orchestrator"]
    if (folder / "config.yaml").exists():
        if _decisive(load_config([folder / "config.yaml"], [])) != _decisive(config):
            raise UserError(f"the study {study} was begun with other settings; give another --name")
        command += ["resume", study, "--workdir", str(args.workdir)]
    else:
        command += ["train", "--workdir", str(args.workdir), f"study.name={study}", *words]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    print(f"{benchmark}: training {case}", file=sys.stderr, flush=True)
    # what the program shows goes to standard error: standard output is for lines of results
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise UserError(f"training {case} ended with exit code {done.returncode}")
    return folder


class NamedCase(Protocol):
    """What is trained as one study."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=NamedCase)


def train_all(
    benchmark: str, chosen: Mapping[C, Sequence[str]], configs: Mapping[C, Config], args: argparse.Namespace
) -> Iterator[tuple[C, Path]]:
    """Train cases, `--at-once` of them at a time (see `train`).

    Args:
        chosen: the words behind `offsweep train` by case.
        configs: what they mean.

    Returns:
        Each case and its study's folder in the order of `chosen`, as soon as it and those before it are trained.
    """
    with ThreadPoolExecutor(max(1, args.at_once)) as pool:
        # a stage is built once: the store lets a second process wait for it
        futures = {
            case: pool.submit(train, benchmark, case.name, configs[case], words, args) for case, words in chosen.items()
        }
        for case, future in futures.items():
            yield case, future.result()


def _decisive(config: Config) -> dict[str, Any]:
    """What the results of a study depend on."""
    plain = {key: to_dict(config)[key] for key in ("dataset", "seed", "num_seeds", "evaluation")}
    plain["method"] = {"name": config.method_name, **effective_settings(config.method)}
    if not getattr(config.method, "filtered", False):
        for unused in ("filter", "dynamics_reward"):
            plain["method"].pop(unused, None)
    return plain


def study_main(
    benchmark: str, parser: argparse.ArgumentParser, run_all: Callable[[argparse.Namespace, str], int],
    argv: Sequence[str] | None,
) -> int:  # fmt: skip
    """Run a benchmark with `--workdir` on what was typed.

    Args:
        run_all: from the arguments and the command as lines of results show it to the exit code.
        argv: None: of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.workdir = args.workdir.absolute()
    try:
        return run_all(args, shown_command(benchmark, words))
    except UserError as error:
        print(f"{benchmark}: {error}", file=sys.stderr)
        return 2


def of_seeds(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a line of a method's mean says of the lines of its seeds; `mean` is None where a seed has no score."""
    scores = [line["normalized_score"] for line in lines]
    whole = None not in scores
    return {
        "mean": statistics.fmean(scores) if whole else None,
        "std": statistics.stdev(scores) if whole and len(scores) > 1 else None,
        "seeds": [line["seed"] for line in lines], "normalized_scores": scores,
        "updates": min(line["updates"] for line in lines), "wall_s": max(line["wall_s"] for line in lines),
        **{name: lines[0][name] for name in ("dataset", "environment", "hidden")},
    }  # fmt: skip


def run_summary(spool: Path) -> dict[str, Any]:
    """What a run's spool says of it.

    Returns:
        environment, score_reference; outcome (finished, diverged); updates done; wall_s that its pack was being trained
        and evaluated (without its stages and without the time between a kill and a resume); scores by update and
        normalized_score, the last.
    """
    scores: dict[int, float] = {}
    tags: dict[str, str] = {}
    wall_ms, previous, updates = 0, 0, 0
    for line, _ in read_records(spool):
        if line is None:
            continue
        if line["type"] != "start":
            wall_ms += line["time"] - previous
        previous = line["time"]
        if line["type"] == "metrics":
            if "eval/score" in line["values"]:
                scores[line["step"]] = float(line["values"]["eval/score"])
            if any(name.startswith("train/") for name in line["values"]):
                updates = max(updates, line["step"])
        tags |= line.get("tags", {})
    return {
        "environment": tags["environment"],
        "score_reference": tags["score_reference"],
        "outcome": tags.get("outcome", "unfinished"),
        "updates": updates,
        "normalized_score": scores[max(scores)] if scores and tags.get("outcome") == "finished" else None,
        "scores": {str(step): score for step, score in sorted(scores.items())},
        "wall_s": wall_ms / 1000,
    }


def metric_courses(spool: Path, *prefixes: str) -> dict[str, dict[int, float]]:
    """Every metric of a run whose name begins with one of the prefixes, by update; the last value of a step counts."""
    courses: dict[str, dict[int, float]] = {}
    for line, _ in read_records(spool):
        if line is not None and line["type"] == "metrics":
            for name, value in line["values"].items():
                if name.startswith(prefixes):
                    courses.setdefault(name, {})[line["step"]] = float(value)
    return courses
