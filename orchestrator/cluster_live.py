"""A cluster that runs already, checked before a study starts: one process on every node says what it finds there."""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from envs.errors import UserError
from orchestrator.cluster_files import FAIL, OK, TODO, Check, Found
from orchestrator.connection import connected
from orchestrator.environment import PACKAGES
from orchestrator.node_report import ask_server, machine
from orchestrator.shipping import alive_nodes, ask_all, own_digest, release, reporters
from orchestrator.tracking import check_reachable, default_tracking_uri

MUST_AGREE = ("python", "ray", "torch")  # other packages that differ change results in their last bits at most
CLOCK_TODO, CLOCK_FAIL = 1.0, 60.0  # seconds between a node's clock and the driver's
OPEN_FILES = 4096
CLOCK_READINGS = 3


def check_cluster(address: str, workdir: Path, tracking_uri: str | None = None) -> list[Check]:
    """The checks of a running cluster.

    Args:
        address: of the cluster.
        workdir: the work folder that studies will have.
        tracking_uri: of MLflow (default: $MLFLOW_TRACKING_URI, else SQLite under `workdir`).

    Raises:
        UserError: no cluster answers at the address, or it does not let this driver in.
    """
    uri = tracking_uri or default_tracking_uri(workdir)
    with connected(address, 1, ship_code=False) as capacity:
        nodes = alive_nodes()
        names = node_names(nodes)
        actors = reporters(nodes)
        try:
            answers = ask_all(actors, "machine")
            silent = {node: answer for node, answer in answers.items() if isinstance(answer, Exception)}
            there = {node: actor for node, actor in actors.items() if node not in silent}
            machines = {names[node]: answers[node] for node in there}
            found: list[Found] = [_nodes(machines, {names[node]: error for node, error in silent.items()})]
            if there:
                found += versions(machine(), machines)
                found.append(_code(there, names))
                found.append(authentication(machines))
                found += machine_resources(machines, _now(), capacity, _declared())
                found.append(_clocks(there, names))
                found.append(_storage(there, names, workdir.absolute()))
                found += _mlflow(there, names, uri)
        finally:
            release(actors)
    return [Check(address, *one) for one in found]


def node_names(nodes: Mapping[str, str]) -> dict[str, str]:
    """What nodes are called: their address, with the beginning of their id where several share one."""
    shared = Counter(nodes.values())
    return {node: name if shared[name] == 1 else f"{name} ({node[:6]})" for node, name in nodes.items()}


def _nodes(machines: Mapping[str, Any], silent: Mapping[str, Exception]) -> Found:
    name = "nodes"
    if silent:
        node, error = next(iter(silent.items()))
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return name, FAIL, f"{len(silent)} of {len(silent) + len(machines)} start no process; {node}: {reason}"
    return name, OK, f"{len(machines)} answer: {_list(machines)}"


def versions(here: Mapping[str, Any], machines: Mapping[str, Any]) -> Iterator[Found]:
    """Whether every node has the driver's Python and packages."""
    own = here["versions"]
    differ = {
        package: {
            node: one["versions"][package] for node, one in machines.items() if one["versions"][package] != version
        }
        for package, version in own.items()
    }
    for package, others in differ.items():
        if others:
            shown = _list(f"{version or 'none'} on {node}" for node, version in others.items())
            status = FAIL if package in MUST_AGREE or None in others.values() else TODO
            yield f"version of {package}", status, f"{own[package]} here, {shown}; install the same everywhere"
    if not any(differ.values()):
        yield "versions", OK, ", ".join(f"{package} {version}" for package, version in own.items())
    processors = Counter(one["processor"] for one in machines.values())
    if len(processors) > 1:
        shown = _list(f"{name or 'unknown'} ({count})" for name, count in processors.items())
        yield "processors", TODO, f"{shown}: on another kind of processor a run is resumed to other last bits"


def _code(actors: Mapping[str, Any], names: Mapping[str, str]) -> Found:
    answers, own = ask_all(actors, "found_code", PACKAGES), own_digest()
    other = [names[node] for node, found in answers.items() if not isinstance(found, dict) or found["digest"] != own]
    if other:
        return "code", OK, f"not the driver's on {_list(other)}; the driver ships its own when a study starts"
    return "code", OK, f"the driver's on every node ({own})"


def authentication(machines: Mapping[str, Any]) -> Found:
    """Whether RAY_AUTH_MODE was set where each node was started; the driver got in, so that the modes agree."""
    name, modes = "authentication", {node: one["auth_mode"] for node, one in machines.items()}
    unset = [node for node, mode in modes.items() if mode is None]
    if unset:
        return name, FAIL, f"RAY_AUTH_MODE is not set where {_list(unset)} was started; Ray's commands then differ"
    if set(modes.values()) == {"disabled"}:
        alone = len({one["host"] for one in machines.values()}) == 1
        text = "disabled everywhere: whoever reaches the head's ports can run code on every machine"
        return name, OK if alone else TODO, text
    if len(set(modes.values())) > 1:
        return name, FAIL, "the nodes differ: " + _list(f"{mode} on {node}" for node, mode in modes.items())
    return name, OK, f"{modes.popitem()[1]}, everywhere"


def _now() -> dict[str, float]:
    import ray

    now: dict[str, float] = ray.cluster_resources()
    return now


def _declared() -> dict[str, dict[str, float]]:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = node_names({node["NodeID"]: node["NodeManagerAddress"] for node in nodes})
    return {names[node["NodeID"]]: node["Resources"] for node in nodes}


def machine_resources(
    machines: Mapping[str, Any],
    total: Mapping[str, float],
    capacity: Mapping[str, float],
    declared: Mapping[str, Mapping[str, float]],
) -> Iterator[Found]:
    """What the cluster has, and nodes that promise more than their machine can give.

    Args:
        machines: `node_report.machine` of every node.
        total: resources of the cluster, bytes and numbers.
        capacity: what they can become where an autoscaler starts machines.
        declared: resources of every node, as Ray counts them.
    """
    gib = {key: f"{total.get(key, 0) / 2**30:.0f} GiB" for key in ("memory", "object_store_memory")}
    shown = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, memory {gib['memory']}, objects "
    shown += gib["object_store_memory"]
    grows = [f"{capacity[key]:g} {key}s" for key in ("CPU", "GPU") if capacity.get(key, 0) > total.get(key, 0)]
    if grows:
        shown += f"; can grow to {' and '.join(grows)}"
    if capacity.get("CPU", 0) >= 1:
        yield "resources", OK, shown
    else:
        yield "resources", FAIL, f"{shown}; nothing could run: start a worker node, or the head with --num-cpus"
    cpus, cores, hosts = Counter[str](), dict[str, int](), dict[str, str]()
    for node, one in machines.items():
        cpus[one["host"]] += declared.get(node, {}).get("CPU", 0)  # type: ignore[assignment]
        cores[one["host"]], hosts[one["host"]] = one["cores"], node
    for host, count in cpus.items():
        if count > cores[host]:
            yield (
                "cores",
                TODO,
                f"{host} has {cores[host]} cores and its Ray nodes say {count:g} CPUs: they would share",
            )
    for node, one in machines.items():
        gpus = declared.get(node, {}).get("GPU", 0)
        if gpus > one["gpus"]:
            yield "GPUs", FAIL, f"{node} says {gpus:g} and has {one['gpus']}; start it with the right --num-gpus"
        elif gpus < one["gpus"]:
            yield "GPUs", TODO, f"{node} has {one['gpus']}, of which its Ray node offers {gpus:g}"
        store = declared.get(node, {}).get("object_store_memory", 0)
        if one["shm"] is not None and one["shm"] < store:
            yield "/dev/shm", FAIL, (
                f"{node}: {one['shm'] / 2**30:.1f} GiB for objects of {store / 2**30:.1f} GiB, which go to disk "
                "instead; enlarge it (containers: --shm-size, an emptyDir of medium Memory)"
            )  # fmt: skip
        if one["open_files"] < OPEN_FILES:
            yield "open files", TODO, f"{node} allows {one['open_files']}; `ulimit -n 65536` in front of `ray start`"


def _clocks(actors: Mapping[str, Any], names: Mapping[str, str]) -> Found:
    import ray

    name, apart = "clocks", {}
    for node, actor in actors.items():
        readings = []
        for _ in range(CLOCK_READINGS):
            before = time.time()
            try:
                remote = ray.get(actor.clock.remote(), timeout=30)
            except Exception as error:
                return name, FAIL, f"{names[node]} stopped answering: {' '.join(str(error).split())[:200]}"
            after = time.time()
            readings.append((after - before, remote - (before + after) / 2))
        apart[names[node]] = min(readings)[1]  # the quickest answer is the most exact one
    node, worst = max(apart.items(), key=lambda item: abs(item[1]))
    text = f"at most {abs(worst):.2f} s from the driver's"
    if abs(worst) < CLOCK_TODO:
        return name, OK, text
    return name, FAIL if abs(worst) >= CLOCK_FAIL else TODO, f"{text} ({node}); set them by NTP"


def _storage(actors: Mapping[str, Any], names: Mapping[str, str], workdir: Path) -> Found:
    """A file from every node, which every other one and the driver must read."""
    name, made = f"work folder {workdir}", not workdir.exists()
    folder = workdir / f".check-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return name, FAIL, f"the driver cannot write there: {error.strerror}"
    try:
        problems: dict[str, str | None] = {}
        for node, actor in actors.items():
            problems |= ask_all({node: actor}, "write_mark", str(folder), node, node)
        refused = {names[node]: problem for node, problem in problems.items() if problem}
        if refused:
            node, problem = next(iter(refused.items()))
            return (
                name,
                FAIL,
                (
                    f"{_list(refused)} cannot write there ({problem}); mount one folder under this path on every "
                    "machine and give it as --workdir or $OFFSWEEP_WORKDIR"
                ),
            )
        seen = {names[node]: marks for node, marks in ask_all(actors, "read_marks", str(folder)).items()}
        seen["the driver"] = {path.name: path.read_text() for path in folder.iterdir()}
        return storage_seen(name, seen, names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            workdir.rmdir()


def storage_seen(name: str, seen: Mapping[str, Any], names: Mapping[str, str]) -> Found:
    """Whether everybody has read what every node has written.

    Args:
        seen: reader -> {node's id: content}, or an exception.
        names: of the nodes that have written.
    """
    for reader, marks in seen.items():
        missing = [names[node] for node in names if not isinstance(marks, Mapping) or marks.get(node) != node]
        missing = [node for node in missing if node in seen]
        if missing:
            return name, FAIL, f"{reader} does not see what {_list(missing)} wrote there: it is not one folder"
    return name, OK, f"{len(seen) - 1} nodes write there, and all read all of it"


def _mlflow(actors: Mapping[str, Any], names: Mapping[str, str], uri: str) -> Iterator[Found]:
    from mlflow import __version__ as own

    try:
        check_reachable(uri)
    except UserError as error:
        yield "MLflow", FAIL, str(error)
        return
    if not uri.startswith(("http://", "https://")):
        yield "MLflow", OK, "its store is a file or database of the driver; other machines send nothing to it"
        return
    parts = urlsplit(uri)
    # without a login, which is not for the nodes
    server = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    refused = {}
    for node, answer in ask_all(actors, "ask_server", f"{server}/health").items():
        problem = server_problem(answer)
        if problem:
            refused[names[node]] = problem
    if refused:
        node, problem = next(iter(refused.items()))
        yield "MLflow", FAIL, f"{_list(refused)} cannot reach the server: {problem}"
    else:
        yield "MLflow", OK, "the driver and every node reach the server"
    status, version = ask_server(f"{server}/version")
    if status == 200 and version.strip() != own:
        yield "version of MLflow", TODO, f"{own} here, {version.strip()} on the server"


def server_problem(answer: Any) -> str | None:
    """What is wrong with a server's answer to `/health`, if anything is. A server that asks for a login is there."""
    if isinstance(answer, Exception):
        return " ".join(str(answer).split())[:200]
    status, text = answer
    if status == 403:
        return "it refuses the name it is called by; start it with --allowed-hosts"
    if status is None:
        return str(text)
    return None if status in (200, 401) else f"HTTP {status} {text}"


def _list(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
