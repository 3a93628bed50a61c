"""How code reaches the machines of a cluster that is joined: installed there, or shipped by the driver.

A machine whose own packages have the same content as the driver's uses those. If any has others, or none, the driver
ships its four packages to all of them as Ray's `working_dir`: through the object store of the head, once per content,
unpacked once on every machine. Data needs no such step: datasets and models go through the object store, and what a
study keeps lies in the work folder, which all machines see.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from envs.errors import UserError
from orchestrator import node_report
from orchestrator.environment import PACKAGES, ROOT

MAX_BYTES = 500 * 2**20  # Ray refuses 512 MiB
TRIES = 3  # of unpacking: Ray nodes of one host that share a session folder disturb each other when they do it
ANSWER_SECONDS = 120.0  # for one machine to start a process and answer


def alive_nodes() -> dict[str, str]:
    """Id -> address of every node of the cluster that is joined."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def reporters(nodes: Mapping[str, str]) -> dict[str, Any]:
    """An actor of `node_report.Reporter` on every node, by the node's id; they hold no CPU."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(node_report)
    try:
        actor = ray.remote(node_report.Reporter)
        return {
            node: actor.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            ).remote()
            for node in nodes
        }
    finally:
        cloudpickle.unregister_pickle_by_value(node_report)


def ask_all(actors: Mapping[str, Any], method: str, *args: Any, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """What every node's reporter answers, by the node's id; an exception stands for an answer that did not come."""
    import ray

    calls = {node: getattr(actor, method).remote(*args) for node, actor in actors.items()}
    deadline, answers = time.monotonic() + timeout, dict[str, Any]()
    for node, call in calls.items():
        try:
            answers[node] = ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
        except Exception as error:
            answers[node] = error
    return answers


def release(actors: Mapping[str, Any]) -> None:
    """End the reporters."""
    import ray

    for actor in actors.values():
        ray.kill(actor)


def code_there() -> dict[str, str | None]:
    """Content of the packages that each node of the cluster would import, by the node's id; None: it has none.

    Raises:
        UserError: a node starts no process.
    """
    nodes = alive_nodes()
    actors = reporters(nodes)
    try:
        answers = ask_all(actors, "found_code", PACKAGES)
    finally:
        release(actors)
    for node, answer in answers.items():
        if isinstance(answer, Exception) and node in alive_nodes():
            reason = " ".join(str(answer).split())[:300] or type(answer).__name__
            raise UserError(
                f"node {nodes[node]} of the Ray cluster starts no worker process ({reason}); see Ray's logs there, and "
                "`offsweep cluster check --live`"
            )
    return {node: answer["digest"] for node, answer in answers.items() if isinstance(answer, dict)}


def own_digest() -> str:
    """Content of the driver's own packages, as `code_there` gives it."""
    return node_report.code_digest(ROOT, PACKAGES)


def must_ship() -> bool:
    """Whether a node of the cluster that is joined has other packages than the driver, or none."""
    return set(code_there().values()) != {own_digest()}


@contextlib.contextmanager
def staged_code() -> Iterator[Path]:
    """A folder with a copy of the four packages and nothing else, for as long as the context lasts.

    The checkout itself is not shipped: it may hold data, and what git ignores in it would be left out.

    Raises:
        UserError: they are too large for Ray.
    """
    files = node_report.code_files(ROOT, PACKAGES)
    size = sum(path.stat().st_size for path in files)
    if size > MAX_BYTES:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise UserError(
            f"offsweep's packages have {size / 2**20:.0f} MB, and Ray ships at most {MAX_BYTES / 2**20:.0f}; remove "
            f"data from them ({largest} is the largest file), or install offsweep on every machine"
        )
    with tempfile.TemporaryDirectory(prefix="offsweep-code-") as folder:
        for path in files:
            target = Path(folder) / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        yield Path(folder)


def check_arrived() -> None:
    """Make sure that every node imports what was shipped.

    Raises:
        UserError: one does not, though it was asked `TRIES` times.
    """
    own, nodes = own_digest(), alive_nodes()
    for attempt in range(TRIES):
        try:
            there = code_there()
        except UserError:
            if attempt + 1 == TRIES:
                raise
            continue
        missing = [nodes.get(node, node) for node, digest in there.items() if digest != own]
        if not missing:
            return
    raise UserError(
        f"offsweep's code did not reach {', '.join(missing)}; if several Ray nodes run on one host, start each with a "
        "--temp-dir of its own, or install the same offsweep on every machine"
    )
