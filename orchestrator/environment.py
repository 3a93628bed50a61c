"""Start-up of every process: the environment variables of ray, torch and mlflow, and a check of the packages.

Both must come before those libraries are imported (they read the variables at import or at first use), so
this module imports the standard library only. The first lines of a program are

    from orchestrator.environment import UserError, check_packages, prepare_environment
    prepare_environment()
    check_packages()

A variable that the user has set is left alone.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the four packages."""

PACKAGES = ("orchestrator", "agents", "envs", "sweeps")

KNOBS: dict[str, str] = {
    # One thread per process: many processes share the cores, and two OpenMP threads on a core that another
    # process is using are many times slower than one, because they spin while they wait for each other.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    # PyTorch's profiler would print a line when it starts and one when it stops.
    "KINETO_LOG_LEVEL": "6",
    # Ray: no usage reports; and a driver started by `uv run` must not start its workers by `uv run`, each in
    # a new environment.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # In a job of `ray job submit`, variables and code that the submitter and the driver both name are the driver's;
    # otherwise Ray refuses the job.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    # Where worker output is shown at all, Ray's deduplication would drop lines that differ in numbers only.
    "RAY_DEDUP_LOGS": "0",
    # MLflow: telemetry changes os.environ from a thread, which has cost clients batches of metrics.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # The tracker retries from its spool; MLflow's own seven retries would block a call for over a minute.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; a server that hangs is one that is away
    # Ending a run over http would print its address between the lines of the display.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # `offsweep ui` needs none of the server's job consumers, which take most of its start-up time and memory.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""Variable -> value set by prepare_environment; RAY_AUTH_MODE comes on top, see ray_auth_mode."""

WORKER_KNOBS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
"""What a Ray worker reads itself; the rest concerns the driver, the Ray daemons and the MLflow server."""

PASSED_ON = ("OFFSWEEP_WORKDIR", "D4RL_DATASET_DIR")
"""Variables of the user that must mean the same on a cluster's other machines."""

_set_here: dict[str, str] = {}  # what prepare_environment has set, and so may change


def _load_user_error() -> type[ValueError]:
    if _location("envs") == ROOT / "envs":
        from envs.errors import UserError

        return UserError
    # envs is hidden by another package, which is what check_packages is about to say with this class.
    spec = importlib.util.spec_from_file_location("_offsweep_errors", ROOT / "envs" / "errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    error: type[ValueError] = module.UserError
    return error


def _location(package: str) -> Path | None:
    """The folder (or the file of a plain module) that `import package` gives; None if there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # in sys.modules without a spec
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


if TYPE_CHECKING:
    from envs.errors import UserError
else:
    UserError = _load_user_error()


def ray_auth_mode(address: str | None = None) -> str:
    """The value for RAY_AUTH_MODE: "disabled" or "token".

    Ray must be told in every process: in Ray 2.60 some commands turn token authentication on by themselves
    and others do not, and a driver and a cluster that differ cannot talk to each other. A cluster that this
    program starts for itself ends with it and needs no token: on a machine with users you do not trust, set
    RAY_AUTH_MODE=token (Ray then makes a token under ~/.ray). To a cluster that is joined, the token is shown
    if there is one.

    Args:
        address: of the Ray cluster to join; None, "" or "local" starts one on this machine.
    """
    if not address or address == "local":
        return "disabled"
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return "token" if os.environ.get("RAY_AUTH_TOKEN") or token_file.is_file() else "disabled"


def prepare_environment(address: str | None = None) -> dict[str, str]:
    """Sets the environment variables of KNOBS and RAY_AUTH_MODE, except those that the user has set.

    Call it before ray, torch or mlflow is imported. A second call may name the cluster's address once that is
    known (before ray is imported): it changes only what the first call had set.

    Args:
        address: of the Ray cluster to join, default $RAY_ADDRESS; see ray_auth_mode.

    Returns:
        Variable -> value now in force, the user's own included.
    """
    knobs = KNOBS | {"RAY_AUTH_MODE": ray_auth_mode(address or os.environ.get("RAY_ADDRESS"))}
    for name, value in knobs.items():
        if os.environ.get(name) == _set_here.get(name):  # not set at all, or by an earlier call
            os.environ[name] = _set_here[name] = value
    return {name: os.environ[name] for name in knobs}


def worker_environment() -> dict[str, str]:
    """What Ray workers must be given as `runtime_env={"env_vars": worker_environment()}`, as strings.

    The workers of a cluster that is joined inherit nothing from this process.
    """
    values = {name: os.environ.get(name, KNOBS[name]) for name in WORKER_KNOBS}
    return values | {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def check_packages() -> None:
    """Checks that `import agents` (envs, sweeps, orchestrator) gives the folder beside this one.

    The names are common: openai-agents, for one, installs a package called agents, and site-packages come
    before an editable install. No package is imported for the check.

    Raises:
        UserError: another package of that name is found first, or the folder is missing; one sentence that
            names the file and says what to do.
    """
    for package in PACKAGES:
        own = ROOT / package
        found = _location(package)
        if found == own:
            continue
        if found is None or not own.is_dir():
            raise UserError(
                f"The package '{package}' of offsweep is missing at {own}: install offsweep again, "
                "in a virtual environment of its own."
            )
        file = found / "__init__.py"
        raise UserError(
            f"Another package named '{package}' hides offsweep's own: "
            f"{file if file.is_file() else found} is found before {own}; uninstall it, use a virtual "
            f"environment with offsweep alone, or run `python -m orchestrator` in {ROOT}."
        )
