"""What runs leave behind, never half-written, and the store of stages (dynamics ensembles and the like).

A stage is built once per content key, the digest of its kind, its settings and the dataset's hash; every run, trial
and study with that key under the same work folder shares it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.method import Stage
from envs.files import locked, write_atomically
from orchestrator.config import digest

CONTENT, DESCRIPTION = "content.pt", "stage.json"


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save`, atomically."""
    write_atomically(path, lambda p: torch.save(dict(content), p))


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

    def get_or_build(
        self, stage: Stage, key: str, build: Callable[[], dict[str, Any]], description: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The stage's content; built here if nobody has. Two processes that need it at once build it once."""
        folder = self.folder(stage.kind, key)
        if not self.exists(stage.kind, key):
            with locked(folder.with_name(f".{key}.lock")):
                if not self.exists(stage.kind, key):
                    content = build()
                    save_json(folder / DESCRIPTION, {"kind": stage.kind, "settings": stage.settings, **description})
                    save_tensors(folder / CONTENT, content)
        return self.load(stage.kind, key)
