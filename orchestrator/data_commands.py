"""`offsweep data ...`: datasets. Nothing here loads torch before it is needed: most of these commands are quick."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from envs import shifts
from envs.catalogue import Entry
from envs.collect import collect, uniform_policy
from envs.dataset import Dataset
from envs.episodes import make_env
from envs.errors import UserError
from envs.hdf5 import write_hdf5
from envs.policies import Policy, load_policy
from envs.recipes import recipe
from envs.registry import FILE_KINDS, catalogue, datasets_folder, find_source, load_dataset
from orchestrator.collection import parallel_shards
from orchestrator.progress import shown


def load(name: str, workdir: Path) -> Dataset:
    """A dataset by name; what takes long shows its progress."""
    return load_dataset(name, workdir, shown)


def load_rows(name: str, workdir: Path) -> Dataset:
    """A dataset that has rows.

    Raises:
        UserError: it is an environment that is sampled while learning.
    """
    dataset = load(name, workdir)
    if dataset.num_transitions == 0:
        raise UserError(f"{name} has no rows: it is an environment that is sampled while learning")
    return dataset


def show_info(name: str, workdir: Path, as_json: bool) -> None:
    """Print what a dataset holds."""
    summary = load(name, workdir).summary()
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    table = Table(title=summary["name"], show_header=False)
    for key, value in summary.items():
        if key not in ("name", "provenance"):
            table.add_row(key, f"{value:.2f}" if isinstance(value, float) else str(value))
    table.add_row("provenance", json.dumps(summary["provenance"], indent=1))
    _console().print(table)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or pattern in name


def show_catalogue(workdir: Path, pattern: str, as_json: bool) -> None:
    """Print the datasets that are known by name."""
    entries = [e for e in catalogue(workdir) if _matches(e.name, pattern)]
    if not entries:
        raise UserError(f"no known dataset is called like '{pattern}'; `offsweep data list` shows all names")
    if as_json:
        print(json.dumps([asdict(entry) | {"path": entry.path and str(entry.path)} for entry in entries], indent=1))
        return
    table = Table(title="datasets known by name")
    for heading in ("name", "source", "scored in", "rows are", "size", "licence"):
        table.add_column(heading, justify="right" if heading == "size" else "left", no_wrap=heading == "name")
    for entry in entries:
        size = "" if entry.size is None else filesize.decimal(entry.size)
        table.add_row(
            entry.name, entry.source, entry.env_id or "see its file", _state(entry), size, entry.licence or ""
        )
    _console().print(table)
    print(
        "paths of .hdf5, .h5 and .npz files are names too; slices and mixes: hopper-medium-v2,first=100000 or "
        "hopper-random-v2:0.5+hopper-expert-v2:0.5"
    )


def show_environments(pattern: str | None, as_json: bool) -> None:
    """Print the environments of `envs.shifts`: ids, what they change and whose numbers these are.

    Without a pattern a table has one row for all levels or factors of a change.
    """
    found = {i: shift for i in shifts.ids() if _matches(i, pattern or "*") and (shift := shifts.parse(i)) is not None}
    if not found:
        raise UserError(f"no shifted environment is called like '{pattern}'; `offsweep data environments` shows them")
    if as_json:
        rows = [
            {
                "id": env_id, "robot": shift.robot, "shift": shift.name, "source_id": shifts.source_id(env_id),
                "change": shift.change.text, "numbers": shift.change.source,
            }
            for env_id, shift in found.items()
        ]  # fmt: skip
        print(json.dumps(rows, indent=1))
        return
    groups: dict[str, list[shifts.Shift]] = {}
    for env_id, shift in found.items():
        groups.setdefault(_family(env_id) if pattern is None else env_id, []).append(shift)
    table = Table(title="environments with shifted dynamics; observations, rewards and ends are those of their source")
    for heading in ("id", "what is changed", "numbers of"):
        table.add_column(heading, no_wrap=heading == "id")
    for name, members in groups.items():
        first, last = members[0].change, members[-1].change
        text = _from_to(first.text, last.text)
        source = first.source if first == last else first.source.partition(",")[0]
        table.add_row(name, text, source)
    _console().print(table)
    print(
        "gravity and friction take any positive factor, as in offsweep/Ant-gravity-0.3-v5; a pattern such as "
        "'Ant-kinematic' lists single ids"
    )


def _from_to(first: str, last: str) -> str:
    """Two sentences that differ in numbers as one: 0.8 of the range, 0.2 of the range: 0.8 to 0.2 of the range."""
    words = zip(first.split(), last.split(), strict=True)
    return " ".join(a if a == b else f"{a.rstrip(',')} to {b}" for a, b in words)


def _family(env_id: str) -> str:
    """The id with all its levels or factors, and all its versions."""
    stem, _, version = env_id.rpartition("-v")
    name, _, last = stem.rpartition("-")
    if last in shifts.LEVELS:
        stem = f"{name}-{{{','.join(shifts.LEVELS)}}}"
    elif last in shifts.FACTORS:
        stem = f"{name}-FACTOR"
    return f"{stem}-v{version if version == '1' else '{4,5}'}"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)


def _state(entry: Entry) -> str:
    if entry.cached:
        return "cached"
    if entry.source == "embedded":
        return "made on first use"
    return "here" if entry.present else "to be downloaded"


def download(names: Sequence[str], workdir: Path) -> None:
    """Have datasets on this machine, converted to the flat store."""
    for name in names:
        dataset = load_rows(name, workdir)
        print(f"{name}: {dataset.num_transitions:,} transitions, content hash {dataset.content_hash[:16]}")


def export(name: str, path: Path, workdir: Path) -> None:
    """Write a dataset as an HDF5 file in D4RL's layout."""
    if path.suffix not in (".hdf5", ".h5"):
        raise UserError(f"{path} must end in .hdf5")
    if path.exists():
        raise UserError(f"{path} exists already; choose another place or remove it")
    write_hdf5(load_rows(name, workdir), path)
    print(f"written to {path}")


def verify_dataset(name: str, workdir: Path, as_json: bool, replay_rows: int) -> int:
    """Check a dataset's rows and print what was found; returns the exit code, 1 for one that is rejected."""
    from envs.verify import verify  # loads torch, for the termination rules
    from orchestrator.verify_display import print_report

    report = verify(load_rows(name, workdir), replay_rows=replay_rows)
    if as_json:
        print(report.to_json())
    else:
        print_report(report, _console())
    return report.exit_code


@dataclass(frozen=True)
class CollectRequest:
    """The words of `offsweep data collect`."""

    recipe: str | None
    env_id: str | None
    policies: Sequence[str]
    rows: int | None
    name: str | None
    seed: int = 0
    deterministic: bool = False
    workers: int = 0


def collect_dataset(request: CollectRequest, workdir: Path) -> None:
    """Roll policies out and keep the set as `<workdir>/datasets/<name>.hdf5`."""
    env_id, policies, rows, about = _what_to_collect(request)
    name = request.name or f"collected/{request.recipe}"
    path = _free_path(name, workdir)
    make_env(env_id).close()
    with parallel_shards(request.workers) as run_shards, shown(f"{name}: {env_id}", "transitions") as advance:
        collect(
            env_id, policies, rows, request.seed, request.deterministic, name, path, run_shards,
            on_rows=lambda done: advance(done, rows), about=about,
        )  # fmt: skip
    show_info(name, workdir, as_json=False)
    print(f"written to {path}; train on it with dataset={name}")


def _what_to_collect(request: CollectRequest) -> tuple[str, list[tuple[Policy, float]], int, dict[str, Any]]:
    """Environment, policies with their shares, number of rows, and what the provenance says of the recipe."""
    if request.recipe is not None:
        if request.policies:
            raise UserError("give either a recipe or --policy, not both")
        found = recipe(request.recipe, request.env_id)
        rows = found.rows if request.rows is None else _positive(request.rows)
        return found.env_id, found.policies(), rows, found.about()
    if not (request.env_id and request.policies and request.name and request.rows is not None):
        raise UserError("give a recipe such as hopper-medium, or --env, --policy, --rows and --name")
    env_id, rows = request.env_id, _positive(request.rows)
    chosen = [uniform_policy(env_id) if p == "random" else load_policy(p) for p in request.policies]
    return env_id, [(policy, 1.0) for policy in chosen], rows, {}


def _positive(rows: int) -> int:
    if rows < 1:
        raise UserError(f"--rows {rows} must be at least 1")
    return rows


def _free_path(name: str, workdir: Path) -> Path:
    """Where a set of this name is to be written: a name that means nothing else, and no file there yet."""
    if not re.fullmatch(r"(?:[A-Za-z0-9][\w.-]*/)*[A-Za-z0-9][\w.-]*", name) or Path(name).suffix in FILE_KINDS:
        raise UserError(f"--name {name!r} must be a plain name such as my-hopper-set, without an ending")
    path = datasets_folder(workdir) / f"{name}.hdf5"
    if path.exists():
        raise UserError(f"{path} exists already; choose another --name or remove the file")
    if find_source(name, workdir) is not None:
        raise UserError(f"--name {name!r} is the name of a dataset already; choose another one")
    return path
