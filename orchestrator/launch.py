"""From a configuration to a finished study: checks, folders, MLflow, Ray, the driver, the summary."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from agents.cross_domain import CrossDomainConfig
from agents.method import load_method, method_names
from envs.dataset import Dataset
from envs.errors import UserError
from envs.registry import check_shapes, load_dataset
from envs.termination import termination_rule
from orchestrator import confirm, warm_start
from orchestrator.artifacts import save_json, write_text
from orchestrator.checkpoints import absolute, check_storage
from orchestrator.cluster import Slots, open_slots
from orchestrator.config import Config, check_space, corner_configs, load_config, to_dict, to_yaml
from orchestrator.connection import cluster_address, dashboard_url
from orchestrator.display import Display, episode_unit, print_summary, score_label, value_unit
from orchestrator.driver import Driver, Progress
from orchestrator.learner import dataset_record, evaluation_env, flatten, resolve_device
from orchestrator.node_tracking import NodeBacklog, NodeTrackers
from orchestrator.packing import COSTS_FILE, PACKING_FILE
from orchestrator.plan import Plan, choose_packing, duration, make_plan, print_plan
from orchestrator.population import check_population, keep_population
from orchestrator.profiling import TABLE, TRACE
from orchestrator.progress import shown
from orchestrator.prometheus import RayMetrics, is_exported
from orchestrator.reading import IMPORTANCES_FILE, about_study, save_figures, show_params
from orchestrator.schedule import check_schedule
from orchestrator.selection import keep_report, play_bandit
from orchestrator.spool import RunInfo, RunSpool, check_run_key
from orchestrator.status import StatusFile, note_backlog
from orchestrator.tracking import STATE_FILE, Tracker, check_reachable, default_tracking_uri, shown_uri
from sweeps.confirm import FOLDER as CONFIRM_FOLDER
from sweeps.confirm import Confirmation, confirmations
from sweeps.pruners import warnings_of
from sweeps.spec import StudySpec
from sweeps.study import SPEC_FILE, Study
from sweeps.summary import collapsing_runs, parameter_importances, state_counts, trial_rows

DRAIN_SECONDS = 120.0  # how long the end of a study waits for MLflow
RESUMABLE = ("compute.", "tracking_uri")  # what may change when a study is resumed: not the results
UNTIL_CONFIRMED = "study.confirm."  # may change, too, while the confirm stage has not begun


@dataclass(frozen=True)
class Outcome:
    """What a finished study leaves for its caller."""

    study: Study
    dataset: Dataset
    experiment: str
    confirmed: Sequence[Confirmation] = ()  # best first


Report = Callable[[Study, RunSpool], None]
"""What is added to a finished study: its files become artifacts of the study's own run."""


def start(
    config: Config, console: Console, report: Report | None = None, tags: Mapping[str, str] | None = None
) -> Outcome:
    """Run a new study to its end.

    Args:
        report: called when all trials have ended.
        tags: of every MLflow run, beside the study's own.

    Raises:
        UserError: before any compute is spent, whatever is wrong with the configuration, data or store.
    """
    workdir = Path(config.workdir).absolute()
    config.workdir = str(workdir)
    if not config.study.name:
        if config.study.storage is not None:
            raise UserError("study.storage needs a study.name, by which the drivers of a study find each other")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        config.study.name = f"{config.method_name}-{re.sub('[^A-Za-z0-9.]+', '-', Path(config.dataset).stem)}-{stamp}"
    check_run_key(config.study.name)
    spec = check_space(config)
    points = warm_start.points(config)
    dataset = check_before_compute(warm_start.with_points(config, points))
    folder = workdir / "studies" / config.study.name
    with Study.create(folder, spec, _alike(config, dataset)) as study:
        warm_start.save(folder, points)
        write_text(folder / "config.yaml", to_yaml(config))
        return _run(config, study, dataset, console, report, tags)


def _alike(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What several drivers of a study must have the same of: all that its results depend on."""
    elsewhere = ("compute.", "tracking_uri", "workdir", "study.")
    settings = {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith(elsewhere)}
    return {
        **settings,
        "study.objective_evaluations": config.study.objective_evaluations,
        "dataset.content_hash": dataset.content_hash,
    }


def resume(
    name: str, workdir: Path, overrides: Sequence[str], console: Console, asked: Config | None = None,
    report: Report | None = None, tags: Mapping[str, str] | None = None,
) -> Outcome:  # fmt: skip
    """Continue a study that was stopped or killed; a finished one is only summarised and its tracking completed.

    Args:
        overrides: of compute.* and tracking_uri.
        asked: the configuration as the study's file gives it now, instead of the stored one with `overrides`.
        report: called when all trials have ended.
        tags: of every MLflow run, beside the study's own.

    Raises:
        UserError: there is no such study, or something that its results depend on would change.
    """
    folder = workdir.absolute() / "studies" / name
    file = folder / "config.yaml"
    if (folder / SPEC_FILE).exists() and not file.exists():
        raise UserError(f"{folder} is of a study that was killed before it began; remove it and start the study anew")
    if not file.exists():
        known = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml"))
        raise UserError(f"there is no study {name!r} in {folder.parent}; it holds: {', '.join(known) or 'none'}")
    made_before = _older_blocks(file)
    stored = load_config([file, made_before], [])
    config = asked or load_config([file, made_before], overrides)
    if asked:
        config.workdir = stored.workdir  # given by the command line, perhaps relative
        for name in made_before["study"]:
            setattr(config.study, name, getattr(stored.study, name))
    resumable: tuple[str, ...] = RESUMABLE
    if not (folder / CONFIRM_FOLDER / confirm.CONFIG_FILE).exists():
        resumable += (UNTIL_CONFIRMED,)
    before, now = flatten(to_dict(stored)), flatten(to_dict(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(resumable):
            raise UserError(
                f"{key} was {before.get(key)} and is {now.get(key)}: it cannot change while a study is resumed; only "
                "compute.* and tracking_uri can"
            )
    config.workdir = str(workdir.absolute())
    dataset = check_before_compute(warm_start.with_points(config, warm_start.load(folder)))
    with Study.open(folder) as study:
        return _run(config, study, dataset, console, report, tags)


def _older_blocks(file: Path) -> dict[str, Any]:
    """What a study does that was begun before these settings existed: nothing of them."""
    content = yaml.safe_load(file.read_text()).get("study", {})
    off = {"confirm": {"top": 0}, "divergence": {"q_bound": None}}
    return {"study": {name: block for name, block in off.items() if name not in content}}


def _store_uri(config: Config) -> str:
    return config.tracking_uri or default_tracking_uri(config.workdir)


def check_before_compute(config: Config) -> Dataset:
    """The dataset of a study that can be started as far as can be told without a computation.

    Raises:
        UserError: whatever is wrong with the store, the device, the data or the settings.
    """
    if cluster_address(config.compute.address) is None:
        resolve_device(config.compute.device)
    check_reachable(_store_uri(config))
    if config.compute.checkpoints is not None:
        config.compute.checkpoints = absolute(config.compute.checkpoints)
        check_storage(config.compute.checkpoints)
    return _check_data(config)


def _check_data(config: Config) -> Dataset:
    check_population(config)
    wanted, given = config.study.confirm.enqueued, len(config.study.enqueue)
    if wanted > given:
        raise UserError(
            f"study.confirm.enqueued is {wanted}, but the study begins with {given} given trials (study.warm_start, "
            "study.enqueue)"
        )
    dataset = load_dataset(config.dataset, Path(config.workdir), shown)
    for one in corner_configs(config):
        check_rows(one, dataset)
        check_objective(one, dataset)
        check_schedule(one)
        load_method(one.method_name).check_environment(one.method, dataset.env_id)
    check_shapes(dataset, evaluation_env(config, dataset))
    return dataset


def check_objective(config: Config, dataset: Dataset) -> None:
    """Make sure that the objective can be measured with this dataset.

    Raises:
        UserError: rollouts of `model_return` would not know where to end.
    """
    if config.study.objective.metric == "model_return":
        termination_rule(dataset.env_id)


def check_rows(config: Config, dataset: Dataset) -> None:
    """Make sure that a method has something to learn from.

    Raises:
        UserError: it needs rows and the dataset has none, it takes none of those there are, no update would ever have
            a batch, or it is to collect ahead and never collects.
    """
    method, online = config.method, dataset.num_transitions == 0
    if not isinstance(method, CrossDomainConfig):
        if online:
            raise UserError(
                f"dataset={config.dataset} has no rows, which method={config.method_name} learns from; name a dataset "
                f"with rows, or a method that samples environments: {', '.join(online_methods())}"
            )
        return
    if online and method.recorded_source_only:
        raise UserError(
            f"method={config.method_name} is for a recorded source, and dataset={config.dataset} has no rows; name a "
            "dataset with rows, or another method, such as vgdf"
        )
    if not online and not method.uses_source:
        raise UserError(
            f"these settings of method={config.method_name} learn from the target alone and would ignore the rows of "
            f"dataset={config.dataset}; name the source's environment instead, dataset=online/{dataset.env_id}"
        )
    ends = method.num_updates
    if not method.learns_at(ends - 1, dataset.num_transitions):
        raise UserError(
            f"method.num_updates={ends} iterations end before every domain that the method learns from holds "
            f"method.batch_size={method.batch_size} rows (the target gets {method.target_steps(ends)}), and so nothing "
            "would be learned; raise method.num_updates or lower method.batch_size"
        )
    if method.asynchronous and not method.target_steps(ends) and not (online and method.source_steps(ends)):
        raise UserError("method.asynchronous=true has no effect where no environment is sampled; leave it out")


def online_methods() -> list[str]:
    """The methods that sample environments while learning."""
    configs = {name: load_method(name).Config for name in method_names()}
    return [
        name for name, config in configs.items()
        if issubclass(config, CrossDomainConfig) and not config.recorded_source_only
    ]  # fmt: skip


def _run(
    config: Config, study: Study, dataset: Dataset, console: Console, report: Report | None,
    more_tags: Mapping[str, str] | None,
) -> Outcome:  # fmt: skip
    config = warm_start.with_points(config, warm_start.load(study.folder))
    tracker = Tracker(
        _store_uri(config), study.spec.name, study.folder / "spool", study.folder / STATE_FILE,
        experiment_tags={
            "offsweep.study": study.spec.name, "method": config.method_name, "dataset": config.dataset,
            "mlflow.experimentKind": "custom_model_development",  # its page opens on training runs, not on traces
        },
    )  # fmt: skip
    # drivers that share a study may share an MLflow server, too
    own_run = "study" if study.driver is None else f"study-{study.driver}"
    tracker.set_experiment_note(_note(config, study.spec, score_label(config, dataset)))
    with tracking(tracker, console), RunSpool(study.folder / "spool", own_run) as spool:
        tags = _tags() | dict(more_tags or {})
        _announce(spool, config, dataset, tags)
        warnings = [] if config.study.trials else warnings_of(study.spec)
        for warning in warnings:
            console.print(f"[yellow]{warning}[/yellow]", highlight=False)
        if warnings:
            spool.set_tags({"warnings": " ".join(warnings)})
        with open_slots(config.compute, dataset) as slots:
            about_study(config, dataset, shown_uri(tracker.tracking_uri), slots.on_gpu).save(study.folder)
            packing = choose_packing(config, study.spec, dataset, slots, study.folder)
            stage = {"stage": "search"} if study.spec.searches else {}
            with (
                _node_tracking(config, tracker, study.folder, console) as nodes,
                Display(console, value_unit(config, dataset)) as display,
                _watched(study.folder, tracker, nodes, display) as on_change,
            ):
                driver = Driver(config, study, dataset, slots, tags | stage, spool, on_change, packing)
                driver.run()
            _compare_with_plan(console, spool, driver)
            concludes = study.claim("report")
            confirmed: list[Confirmation] = []
            if concludes:
                play_bandit(config, study, dataset, spool)
                confirmed = _confirm(config, study, dataset, slots, tags, console)
        if concludes:
            _record_confirmed(spool, confirmed)
            if study.spec.pbt is not None:
                keep_population(study, spool)
            if report is not None:
                report(study, spool)
            keep_report(spool, study, episode_unit(config, dataset))
            _conclude(spool, study, value_unit(config, dataset))
        else:
            console.print("another driver of this study confirms its best trials and draws its plots")
            spool.end("FINISHED")
    print_summary(console, study, config, dataset, shown_uri(tracker.tracking_uri))
    if config.compute.profile:
        _show_profiles(console, study.folder / "packs")
    return Outcome(study, dataset, study.spec.name, confirmed)


def _confirm(
    config: Config, study: Study, dataset: Dataset, slots: Slots, tags: Mapping[str, str], console: Console
) -> list[Confirmation]:
    """Train the best settings of an ended search again: a study of its own in the search's folder, whose runs are of
    the same experiment."""
    folder = study.folder / CONFIRM_FOLDER
    made = confirm.prepare(config, study, folder)
    if made is None:
        return []
    fresh, chosen = made
    numbers = [candidate.number for candidate in chosen]
    console.print(
        f"confirming {'trials' if len(numbers) > 1 else 'trial'} {', '.join(map(str, numbers))} with "
        f"{fresh.num_seeds} fresh seeds", highlight=False,
    )  # fmt: skip
    exists = (folder / SPEC_FILE).exists()
    tracker = Tracker(_store_uri(config), study.spec.name, folder / "spool", folder / STATE_FILE)
    unit = value_unit(fresh, dataset)
    with (
        Study.open(folder) if exists else Study.create(folder, check_space(fresh)) as repeated,
        tracking(tracker, console),
        RunSpool(folder / "spool", CONFIRM_FOLDER) as spool,
    ):
        _announce(spool, fresh, dataset, {**tags, "stage": "confirm"})
        packing = choose_packing(fresh, repeated.spec, dataset, slots, folder)
        with (
            _node_tracking(fresh, tracker, folder, console) as nodes,
            Display(console, unit, numbers) as display,
            _watched(folder, tracker, nodes, display) as on_change,
        ):
            stage = {**tags, "stage": "confirm"}
            Driver(fresh, repeated, dataset, slots, stage, spool, on_change, packing, numbers).run()
        spool.end("FINISHED")
    return confirmations(study.folder)


def _record_confirmed(spool: RunSpool, confirmed: Sequence[Confirmation]) -> None:
    """Of each confirmed trial, best first, what the search and the fresh seeds have found; the best as tags."""
    for rank, one in enumerate(confirmed):
        spool.metrics(rank, {
            "confirm/trial": float(one.number), "confirm/searched": one.searched, "confirm/confirmed": one.mean,
        })  # fmt: skip
    for one in [one for one in confirmed if not one.diverged][:1]:
        low, high = one.interval
        spool.set_tags({
            "confirmed_trial": str(one.number), "confirmed_value": str(one.mean), "searched_value": str(one.searched),
            "confirmed_interval": f"{low:.4g} to {high:.4g} (95 %)" if not math.isnan(low) else "none: a single seed",
        })  # fmt: skip


def _show_profiles(console: Console, folder: Path) -> None:
    """Say where the profiles of a study's packs are."""
    tables = sorted(folder.glob(f"*/profile/{TABLE}"))
    for table in tables[:3]:
        text = f"profile: {table} (and {TRACE} beside it, for https://ui.perfetto.dev)"
        console.print(text, highlight=False, soft_wrap=True)
    if len(tables) > 3:
        console.print(f"profiles of all {len(tables)} packs: {folder}/*/profile/", highlight=False, soft_wrap=True)


def planned(config: Config, gpus: int | None = None, cpus: int | None = None) -> Plan:
    """What a study would take, measured where it is not known.

    Raises:
        UserError: whatever is wrong with the configuration or the data, or too little memory.
    """
    config.workdir = str(Path(config.workdir).absolute())
    config.study.name = config.study.name or "plan"
    for name, value in (("--gpus", gpus), ("--cpus", cpus)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    spec = check_space(config)
    config = warm_start.with_points(config, warm_start.points(config))
    if cluster_address(config.compute.address) is None:
        resolve_device(config.compute.device)
    dataset = _check_data(config)
    with open_slots(config.compute, dataset) as slots:
        return make_plan(config, spec, dataset, slots, gpus, cpus)


def plan(
    config: Config, console: Console, as_json: bool = False, gpus: int | None = None, cpus: int | None = None
) -> None:
    """Print what a study would take, without starting it.

    Raises:
        UserError: whatever is wrong with the configuration or the data, or too little memory.
    """
    made = planned(config, gpus, cpus)
    if as_json:
        print(json.dumps(made.to_json(), indent=1))
    else:
        print_plan(console, made, config)


def _compare_with_plan(console: Console, spool: RunSpool, driver: Driver) -> None:
    """Say and record how long this process worked on the study beside what was planned for it."""
    planned = driver.packing.predicted_seconds
    done, total = driver.progress.done_at_start, driver.progress.updates_planned()
    if planned is None or done >= total:
        return
    planned *= 1 - done / total
    took = time.monotonic() - driver.progress.started
    pruned = sum(record.state == "pruned" for record in driver.study.trials())
    raced = driver.study.spec.searches and driver.config.study.racing.first_seeds is not None
    beside = [f"{pruned} trials were pruned"] * bool(pruned) + ["not every trial got all its seeds"] * raced
    beside += ["packs were profiled"] * driver.config.compute.profile
    note = f" ({' and '.join(beside)}, which is not planned)" if beside else ""
    console.print(f"planned {duration(planned)}, took {duration(took)}{note}", highlight=False)
    spool.set_tags({
        "plan/predicted_seconds": f"{planned:.1f}", "plan/actual_seconds": f"{took:.1f}",
        "plan/runs_per_pack": str(driver.packing.runs_per_pack),
    })  # fmt: skip
    for name in (PACKING_FILE, COSTS_FILE):
        if (driver.study.folder / name).exists():
            spool.artifact(driver.study.folder / name)


@contextmanager
def tracking(tracker: Tracker, console: Console) -> Iterator[None]:
    """Send the spool to MLflow in a thread of its own; at the end wait until all is sent."""
    stop = threading.Event()
    thread = threading.Thread(target=tracker.run_loop, args=(stop,), name="tracker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if not tracker.drain(DRAIN_SECONDS):
            status = tracker.status()
            console.print(
                f"[yellow]{status.pending_lines} lines are not in MLflow yet ({status.last_error or status.refused}); "
                "they are kept, and `offsweep resume` sends them[/yellow]"
            )
        note_backlog(tracker.state_file.parent, tracker.backlog())


Nodes = Callable[[], Sequence[NodeBacklog]]


@contextmanager
def _node_tracking(config: Config, tracker: Tracker, folder: Path, console: Console) -> Iterator[Nodes]:
    """A tracker on every machine that logs on a disk of its own; gives what waits on each."""
    if config.compute.spool_folder is None:
        yield tuple
        return
    trackers = NodeTrackers(tracker, folder, config.compute.spool_folder, DRAIN_SECONDS)
    with trackers:
        yield trackers.backlogs
    for text in trackers.left:
        console.print(
            f"[yellow]{text} are not in MLflow yet; they are kept, and `offsweep resume` sends them[/yellow]",
            highlight=False,
        )


@contextmanager
def _watched(
    folder: Path, tracker: Tracker, nodes: Nodes, display: Callable[[Progress], None]
) -> Iterator[Callable[[Progress], None]]:
    """What a driver tells of its progress: the display, `status.json`, and Ray's metrics where they are exported."""
    status = StatusFile(folder, tracker.backlog, nodes, dashboard_url())
    listeners: list[Callable[[Progress], None]] = [display, status]
    if is_exported():
        listeners.append(RayMetrics(status))
    last: list[Progress] = []

    def tell(progress: Progress) -> None:
        last[:] = [progress]
        for listener in listeners:
            listener(progress)

    try:
        yield tell
    finally:
        for progress in last:
            ended = progress.study.num_finished >= progress.study.spec.num_trials
            status.write(progress, finished=ended)


def _announce(spool: RunSpool, config: Config, dataset: Dataset, tags: Mapping[str, str]) -> None:
    params = flatten({k: v for k, v in to_dict(config).items() if k not in ("workdir", "tracking_uri")})
    params = {k: v for k, v in params.items() if v}
    kind = tags.get("stage", "study")
    tags = {
        **tags,
        "kind": kind,
        "study": config.study.name,
        "method": config.method_name,
        "dataset": config.dataset,
    }
    spool.start(RunInfo(f"{kind} {config.study.name}", params, tags, [dataset_record(dataset)]))
    spool.artifact(spool.path.parent.parent / "config.yaml")


def _conclude(spool: RunSpool, study: Study, unit: str) -> None:
    """Plots, the table of trials and the best configuration, as artifacts of the study's own run."""
    records, direction = study.trials(), study.spec.direction
    for path in save_figures(study, records, unit, study.folder / "plots"):
        spool.artifact(path, "plots")
    if study.space.parameters and (importances := parameter_importances(records, study.space, direction)):
        save_json(study.folder / IMPORTANCES_FILE, importances)
        spool.artifact(study.folder / IMPORTANCES_FILE)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "trial", "state", unit, "collapsing", "hyperparameters"])
    collapsing = {record.number: " ".join(collapsing_runs(record)) for record in records}
    for row in trial_rows(records, direction):
        state = "diverged" if row.diverged else row.state
        writer.writerow([row.rank, row.number, state, row.value, collapsing[row.number], show_params(row.params)])
    write_text(study.folder / "trials.csv", text.getvalue())
    spool.artifact(study.folder / "trials.csv")
    best = study.best
    if best is not None:
        spool.set_tags({
            "best_trial": str(best.number), "best_value": str(best.value), "best_params": show_params(best.active),
            "trials": ", ".join(f"{count} {state}" for state, count in state_counts(records).items()),
        })  # fmt: skip
    spool.end("FINISHED")


def _note(config: Config, spec: StudySpec, label: str) -> str:
    return (
        f"Study **{spec.name}**: {config.method_name} on {config.dataset}, {spec.num_trials} trials x "
        f"{spec.seeds_per_trial} seeds.\n\nEvery run is one seed of one trial, named t(trial)-s(seed). "
        f"Scores: {label}.\n\nContinue it with `offsweep resume {spec.name} --workdir {config.workdir}`."
    )


def _tags() -> dict[str, str]:
    """The commit this code is at, where it lies in a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")}
