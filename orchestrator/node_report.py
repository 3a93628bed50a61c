"""What a machine of a cluster says of itself.

This module is sent to the machines by value, since some of them may not have offsweep, or not the same one: it imports
the standard library only, and each function all that it needs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("ray", "torch", "numpy", "gymnasium", "mujoco")
"""Whose versions decide whether processes understand each other, or whether results are the same."""


def code_files(root: Path, packages: tuple[str, ...]) -> list[Path]:
    """The files of some packages in the folder, without byte code, sorted."""
    found = (path for package in packages for path in (root / package).rglob("*"))
    return sorted(path for path in found if "__pycache__" not in path.parts and path.is_file())


def code_digest(root: Path, packages: tuple[str, ...]) -> str:
    """16 hexadecimal digits of the names and contents of a folder's packages."""
    content = hashlib.sha256()
    for path in code_files(root, packages):
        content.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def found_code(packages: tuple[str, ...]) -> dict[str, str | None]:
    """The packages that a process of this machine imports: `root`, their folder, and `digest` of all of them; None if
    one is missing or lies elsewhere than the first. Nothing is imported."""
    roots = set()
    for package in packages:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        places = list(spec.submodule_search_locations or []) if spec else []
        roots.add(Path(places[0]).resolve().parent if places else None)
    root = roots.pop()
    if roots or root is None:
        return {"root": None, "digest": None}
    return {"root": str(root), "digest": code_digest(root, packages)}


def machine() -> dict[str, Any]:
    """Versions, processor, memory and limits; sizes in bytes."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    processor = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    shm = Path("/dev/shm")
    return {
        "host": socket.gethostname(),
        "versions": versions,
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm": shutil.disk_usage(shm).total if shm.exists() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
    }


def write_mark(folder: str, name: str, content: str) -> str | None:
    """Write a file into a folder that must be there. Returns what went wrong."""
    try:
        Path(folder, name).write_text(content)
    except OSError as error:
        return error.strerror or str(error)
    return None


def read_marks(folder: str) -> dict[str, str]:
    """The files of a folder and their contents; nothing where the folder is not."""
    try:
        return {path.name: path.read_text() for path in Path(folder).iterdir()}
    except OSError:
        return {}


def ask_server(url: str, timeout: float = 10.0) -> tuple[int | None, str]:
    """Status and first 200 characters of an HTTP server's answer; (None, reason) if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status, answer.read(200).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, str(error.reason)
    except (OSError, ValueError) as error:
        return None, str(getattr(error, "reason", None) or error)


class Reporter:
    """The functions of this module on one machine, for a Ray actor there."""

    def found_code(self, packages: tuple[str, ...]) -> dict[str, str | None]:
        return found_code(packages)

    def machine(self) -> dict[str, Any]:
        return machine()

    def write_mark(self, folder: str, name: str, content: str) -> str | None:
        return write_mark(folder, name, content)

    def read_marks(self, folder: str) -> dict[str, str]:
        return read_marks(folder)

    def ask_server(self, url: str) -> tuple[int | None, str]:
        return ask_server(url)

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()
