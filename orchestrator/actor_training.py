"""`offsweep data train-actor`: how the actors that the embedded datasets are collected from were made."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.cpu import configure_cpu
from agents.online import OnlineSACConfig, Snapshot, train_online
from envs.episodes import make_env, run_episodes
from envs.errors import UserError
from envs.files import write_atomically
from envs.policies import NetworkPolicy
from envs.scores import normalized_score, reference_scores
from orchestrator.artifacts import save_json, write_arrays
from orchestrator.progress import shown

CURVE_EPISODES = 10  # per point of an actor's learning curve


def train_actor(overrides: Sequence[str], out: Path, until: float | None = None) -> int:
    """Train an actor online and keep its snapshots and learning curve under `out`.

    Args:
        overrides: key=value words of `OnlineSACConfig`.
        out: an empty or new folder.
        until: stop at the first snapshot whose mean normalised score is at least this, and keep it as actor.npz too.

    Returns:
        The exit code: 1 if the score asked for was not reached.
    """
    config = _online_config(overrides)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose another folder")
    make_env(config.env_id).close()
    reference = reference_scores(config.env_id)
    if until is not None and reference is None:
        raise UserError(f"--until {until:g}: no reference pair is known for {config.env_id}, so it has no scores")
    configure_cpu(threads=1)
    command = " ".join(
        ["offsweep data train-actor", *overrides, *([f"--until {until:g}"] if until is not None else [])]
    )
    save_json(out / "training.json", {"command": command, "config": asdict(config)})
    rows: list[list[Any]] = []
    reached = False
    with shown(f"{config.env_id}, seed {config.seed}", "steps") as advance:
        for snapshot in train_online(config, lambda step: advance(step, config.steps)):
            rows.append([snapshot.step, *_save_snapshot(snapshot, config.env_id, out)])
            write_atomically(out / "learning_curve.csv", lambda p: _write_csv(p, rows))
            if until is not None and reference is not None:
                reached = normalized_score(rows[-1][1], reference) >= until
                if reached:
                    write_arrays(out / "actor.npz", snapshot.arrays)
                    break
    print(f"{len(rows)} snapshots and learning_curve.csv written to {out}")
    if until is None or reference is None:
        return 0
    scores = [normalized_score(row[1], reference) for row in rows]
    if reached:
        print(f"score {scores[-1]:.1f} after {rows[-1][0]:,} steps ({reference.label}): {out / 'actor.npz'}")
        return 0
    print(f"no snapshot reached score {until:g}, the best has {max(scores):.1f}: train longer or with another seed")
    return 1


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
