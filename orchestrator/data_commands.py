"""`offsweep data ...`: datasets and the actors that the embedded ones are collected from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agents.online import OnlineSACConfig, Snapshot, train_online
from envs.collect import collect, uniform_policy
from envs.episodes import make_env, run_episodes
from envs.errors import UserError
from envs.hdf5 import check_writable
from envs.policies import NetworkPolicy, Policy, load_policy
from envs.registry import dataset_names, load_dataset
from orchestrator.artifacts import save_json, write_arrays, write_atomically

CURVE_EPISODES = 10  # per point of an actor's learning curve


def show_info(name: str, workdir: Path, as_json: bool) -> None:
    """Print what a dataset holds."""
    summary = load_dataset(name, workdir).summary()
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    table = Table(title=summary["name"], show_header=False)
    for key, value in summary.items():
        if key not in ("name", "provenance"):
            table.add_row(key, f"{value:.2f}" if isinstance(value, float) else str(value))
    table.add_row("provenance", json.dumps(summary["provenance"], indent=1))
    Console().print(table)


def show_names(workdir: Path) -> None:
    """Print the names that can be loaded now."""
    print("\n".join(dataset_names(workdir)))
    print(
        "D4RL's names (such as hopper-medium-replay-v2) too, where their files are in place, and paths to .hdf5 files"
    )


def collect_dataset(
    env_id: str, policies: Sequence[str], rows: int, seed: int, name: str, workdir: Path, deterministic: bool
) -> None:
    """Roll policies in an environment and keep the set as `<workdir>/datasets/<name>.hdf5`."""
    if not name or Path(name).suffix in (".hdf5", ".h5") or "/" in name:
        raise UserError(f"--name {name!r} must be a plain name such as my-hopper-set, without a folder or an ending")
    path = workdir / "datasets" / f"{name}.hdf5"
    if path.exists():
        raise UserError(f"{path} exists already; choose another --name or remove the file")
    if rows < 1:
        raise UserError(f"--rows {rows} must be at least 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    make_env(env_id).close()
    chosen: list[tuple[Policy, float]] = [
        (uniform_policy(env_id) if p == "random" else load_policy(p), 1.0) for p in policies
    ]
    collect(env_id, chosen, rows, seed, deterministic, name, path)
    show_info(name, workdir, as_json=False)
    print(f"written to {path}; train on it with dataset={name}")


def train_actor(overrides: Sequence[str], out: Path) -> None:
    """Train an actor online and keep its snapshots and learning curve under `out`."""
    config = _online_config(overrides)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose another folder")
    make_env(config.env_id).close()
    rows: list[list[Any]] = []
    with Progress() as progress:
        task = progress.add_task(f"{config.env_id}, seed {config.seed}", total=config.steps)
        for snapshot in train_online(config, lambda step: progress.update(task, completed=step)):
            rows.append([snapshot.step, *_save_snapshot(snapshot, config.env_id, out)])
            write_atomically(out / "learning_curve.csv", lambda p: _write_csv(p, rows))
    command = " ".join(["offsweep data train-actor", *overrides])
    save_json(out / "training.json", {"command": command, "config": asdict(config)})
    print(f"{len(rows)} snapshots and learning_curve.csv written to {out}")


def _online_config(overrides: Sequence[str]) -> OnlineSACConfig:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(OnlineSACConfig), OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    assert isinstance(config, OnlineSACConfig)
    return config


def _save_snapshot(snapshot: Snapshot, env_id: str, out: Path) -> tuple[float, float, float]:
    write_arrays(out / f"{snapshot.step:07d}.npz", snapshot.arrays)
    policy = NetworkPolicy(snapshot.arrays, "snapshot", "")
    episodes = run_episodes(env_id, lambda obs: policy.act(obs, None), range(CURVE_EPISODES))
    returns: np.ndarray = episodes.returns
    return float(returns.mean()), float(returns.std()), float(episodes.lengths.mean())


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "return_mean", "return_std", "length_mean"])
        writer.writerows([[row[0], *(f"{x:.2f}" for x in row[1:])] for row in rows])
