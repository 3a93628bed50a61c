"""What runs leave behind, never half-written, and the store of stages (dynamics ensembles and the like).

A stage is built once per content key, the digest of its kind, its settings and the dataset's hash; every run, trial
and study with that key under the same work folder shares it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.method import Stage
from envs.errors import UserError
from envs.files import locked, write_atomically
from orchestrator.hashing import digest

CONTENT, DESCRIPTION = "content.pt", "stage.json"


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save`, atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # to a name, torch hides why it cannot write
            torch.save(dict(content), file)

    write_atomically(path, write)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The inverse of `save_tensors`; only tensors and plain values are unpickled."""
    content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return content


def save_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """A compressed .npz, atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # numpy appends .npz to a name, not to a file
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda p: p.write_text(text))


def stage_key(stage: Stage, dataset_hash: str) -> str:
    """The content key of a stage on a dataset."""
    return digest([stage.kind, dict(stage.settings), dataset_hash])


def stage_keys(stages: Mapping[str, Stage], dataset_hash: str) -> dict[str, str]:
    """The content keys of a run's stages on a dataset, by name."""
    return {name: stage_key(stage, dataset_hash) for name, stage in stages.items()}


@dataclass(frozen=True)
class Built:
    """A stage's content, and what is said about it."""

    content: Mapping[str, Any]
    description: Mapping[str, Any]


class ArtifactStore:
    """Stages under `<workdir>/artifacts/<kind>/<key>/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def exists(self, kind: str, key: str) -> bool:
        # the content is written last
        return (self.folder(kind, key) / CONTENT).exists()

    def load(self, kind: str, key: str) -> dict[str, Any]:
        return load_tensors(self.folder(kind, key) / CONTENT)

    def description(self, kind: str, key: str) -> dict[str, Any]:
        """What was said about the stage when it was built."""
        content: dict[str, Any] = json.loads((self.folder(kind, key) / DESCRIPTION).read_text())
        return content

    def build_missing(
        self,
        stages: Mapping[str, Stage],
        build: Callable[[list[Stage]], list[Built | UserError]],
    ) -> dict[str, UserError]:
        """Build what nobody has built. Two processes that need a stage at once build it once.

        Args:
            stages: by content key.
            build: called with those that are missing; what comes of each, in their order.

        Returns:
            Why a stage could not be built, by its key.
        """
        failures: dict[str, UserError] = {}
        with contextlib.ExitStack() as locks:
            # always in the same order, so that no two processes wait for each other
            for key, stage in sorted(stages.items(), key=lambda item: item[0]):
                if not self.exists(stage.kind, key):
                    locks.enter_context(locked(self.folder(stage.kind, key).with_name(f".{key}.lock")))
            missing = {key: stage for key, stage in stages.items() if not self.exists(stage.kind, key)}
            results = build(list(missing.values())) if missing else []
            for (key, stage), result in zip(missing.items(), results, strict=True):
                if isinstance(result, UserError):
                    failures[key] = result
                    continue
                folder = self.folder(stage.kind, key)
                description = {"kind": stage.kind, "settings": stage.settings, **result.description}
                save_json(folder / DESCRIPTION, description)
                save_tensors(folder / CONTENT, result.content)
        return failures
