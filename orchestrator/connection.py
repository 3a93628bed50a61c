"""The connection to Ray: one of our own on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from envs.errors import UserError
from orchestrator.environment import prepare_environment, worker_environment


def cluster_address(given: str | None) -> str | None:
    """The running Ray cluster to join: the one given, else $RAY_ADDRESS; None: one of our own on this machine."""
    return given or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def connected(address: str | None, cpus: int, gpus: int = 0) -> Iterator[dict[str, float]]:
    """A connection to Ray, and what its cluster has, such as {"CPU": 2.0}.

    One that this process has already is used and left as it is.

    Args:
        address: of a running cluster; None starts one on this machine and ends it afterwards.
        cpus: logical CPUs of one of our own: as many as processes are to run, even on fewer cores.
        gpus: of one of our own.

    Raises:
        UserError: no cluster answers at the address.
    """
    prepare_environment(address)
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local", "num_cpus": max(len(os.sched_getaffinity(0)), cpus), "num_gpus": gpus,
            "include_dashboard": False,
        }  # fmt: skip
    else:
        check_answers(address)
    try:
        ray.init(
            **options, logging_level=logging.ERROR, log_to_driver=False,
            runtime_env={"env_vars": worker_environment()},
        )  # fmt: skip
    except (ConnectionError, TimeoutError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from None
    try:
        yield ray.cluster_resources()
    finally:
        _shut_down()


def dashboard_url() -> str | None:
    """The address of Ray's dashboard, where this process has joined a Ray that has one."""
    import ray

    if not ray.is_initialized():
        return None
    context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def check_room(processes: int, resources: dict[str, float], advice: str) -> None:
    """Refuse more processes than a cluster has CPUs: Ray would wait for them for ever.

    Raises:
        UserError: they do not fit; ends with the advice.
    """
    there = resources.get("CPU", 0.0)
    if processes > there:
        raise UserError(f"{processes} worker processes do not fit the {there:.0f} CPUs of the Ray cluster; {advice}")


def check_answers(address: str) -> None:
    """Ask whether anything listens at the address of a Ray cluster, where it is one of a machine; Ray itself would try
    for minutes and then end the process.

    Raises:
        UserError: nothing listens there.
    """
    machine = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if machine is None:  # such as auto
        return
    try:
        socket.create_connection((machine[1].strip("[]"), int(machine[2])), timeout=5).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no Ray cluster answers at {address}: {reason}; start it, or give another address.") from None


def _shut_down() -> None:
    """Leave Ray. It ends this process on the spot if a reference of its own is collected while it shuts down, which the
    tracker's thread may do with what a caught exception held; so that is collected before, and nothing meanwhile."""
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
