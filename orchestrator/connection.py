"""The connection to Ray: one of our own on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from envs.errors import UserError
from orchestrator.environment import prepare_environment, worker_environment
from orchestrator.shipping import check_arrived, must_ship, staged_code


def cluster_address(given: str | None) -> str | None:
    """The running Ray cluster to join: the one given, else $RAY_ADDRESS; None: one of our own on this machine."""
    return given or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def connected(address: str | None, cpus: int, gpus: int = 0, ship_code: bool = True) -> Iterator[dict[str, float]]:
    """A connection to Ray, and what its cluster has or can grow to, such as {"CPU": 2.0}.

    One that this process has already is used and left as it is. To a cluster that is joined, the code is shipped if a
    node of it does not have the same, or if nodes can come that nobody has asked yet (`orchestrator.shipping`).

    Args:
        address: of a running cluster; None starts one on this machine and ends it afterwards.
        cpus: logical CPUs of one of our own: as many as processes are to run, even on fewer cores.
        gpus: of one of our own.
        ship_code: to nodes of a cluster that is joined, where they need it.

    Raises:
        UserError: no cluster answers at the address, offsweep's code does not get to a node of it, or Ray does not
            start here.
    """
    prepare_environment(address)
    import ray

    if ray.is_initialized():
        yield capacity()
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local", "num_cpus": max(len(os.sched_getaffinity(0)), cpus), "num_gpus": gpus,
            "include_dashboard": False,
        }  # fmt: skip
    else:
        check_answers(address)
    _connect(options)
    try:
        if address is not None and ship_code and (_growth() or must_ship()):
            leave()
            with staged_code() as folder:
                _connect(options, {"working_dir": str(folder)})
            check_arrived()
        yield ray.cluster_resources() if address is None else capacity()
    finally:
        leave()


def _connect(options: Mapping[str, Any], code: Mapping[str, str] | None = None) -> None:
    import ray
    from ray.exceptions import AuthenticationError, RuntimeEnvSetupError

    try:
        ray.init(
            **options, logging_level=logging.ERROR, log_to_driver=False,
            runtime_env={"env_vars": worker_environment(), **(code or {})},
        )  # fmt: skip
    except RuntimeEnvSetupError as error:
        raise UserError(f"offsweep's code could not be shipped to the Ray cluster: {_first_sentence(error)}.") from None
    except Exception as error:
        if options["address"] == "local":  # Ray raises a bare Exception where its processes do not come up
            raise UserError(
                f"Ray did not start on this machine ({_first_sentence(error)}); try again when it has less to do"
            ) from error
        if not isinstance(error, AuthenticationError | ConnectionError | TimeoutError):
            raise
        # Ray says no more than that it cannot connect where the token is not the cluster's
        raise UserError(
            f"no Ray cluster answers at {options['address']}, or it does not let this driver in, whose RAY_AUTH_MODE "
            f"is {os.environ['RAY_AUTH_MODE']} ({_first_sentence(error)}); start the cluster, or give the driver the "
            "cluster's mode and its token, in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from None


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def capacity() -> dict[str, float]:
    """What the cluster has, or can grow to where an autoscaler starts machines when there is work for them."""
    import ray

    grown = _growth()
    return grown | {key: max(value, grown.get(key, 0.0)) for key, value in ray.cluster_resources().items()}


def can_grow() -> bool:
    """Whether an autoscaler may start machines that are not there yet, of kinds that nobody knows here."""
    return bool(_growth())


def _growth() -> dict[str, float]:
    """CPUs and GPUs up to which an autoscaler lets the cluster grow, as the user says it: Ray's launcher tells its
    drivers only what is there already. Nothing where it is not said.

    Raises:
        UserError: not a number.
    """
    grown = {}
    for key, name in (("CPU", "OFFSWEEP_MAX_CPUS"), ("GPU", "OFFSWEEP_MAX_GPUS")):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise UserError(f"{name}={value!r} must be a whole number, of all machines that an autoscaler may start")
        if int(value):
            grown[key] = float(value)
    return grown


def dashboard_url() -> str | None:
    """The address of Ray's dashboard, where this process has joined a Ray that has one."""
    import ray

    if not ray.is_initialized():
        return None
    context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def check_room(cpus: int, resources: dict[str, float], advice: str) -> None:
    """Refuse processes for more CPUs than a cluster has: Ray would wait for them for ever.

    Raises:
        UserError: they do not fit; ends with the advice.
    """
    there = resources.get("CPU", 0.0)
    if cpus > there:
        raise UserError(
            f"worker processes for {cpus} CPUs do not fit the {there:.0f} CPUs of the Ray cluster; {advice}"
        )


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


def leave() -> None:
    """Leave Ray. It ends this process on the spot if a reference of its own is collected while it shuts down, which the
    tracker's thread may do with what a caught exception held; so that is collected before, and nothing meanwhile."""
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
