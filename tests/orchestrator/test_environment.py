import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs.errors import UserError
from orchestrator.environment import (
    KNOBS,
    ROOT,
    check_packages,
    prepare_environment,
    ray_auth_mode,
    worker_environment,
)


def run_python(code: str, **environment: str) -> str:
    """What a new interpreter in the checkout prints when it was started without any of the knobs."""
    knobs = {*KNOBS, "RAY_AUTH_MODE"}
    clean = {name: value for name, value in os.environ.items() if name not in knobs}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_knobs_reach_the_libraries():
    code = """
from orchestrator.environment import prepare_environment
prepare_environment()
import torch
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_SERVER_ENABLE_JOB_EXECUTION
from mlflow.telemetry.utils import is_telemetry_disabled
from ray._private import ray_constants
from ray._common.usage.usage_lib import usage_stats_enabled
print(torch.get_num_threads(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get())
print(MLFLOW_SERVER_ENABLE_JOB_EXECUTION.get(), is_telemetry_disabled())
print(ray_constants.RAY_DEDUP_LOGS, ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, usage_stats_enabled())
"""
    assert run_python(code).split() == ["1", "1", "False", "True", "False", "False", "False"]


def test_what_the_user_has_set_stays():
    code = """
from orchestrator.environment import prepare_environment, worker_environment
knobs = prepare_environment()
print(knobs["OMP_NUM_THREADS"], worker_environment()["OMP_NUM_THREADS"], knobs["RAY_AUTH_MODE"])
"""
    assert run_python(code, OMP_NUM_THREADS="2", RAY_AUTH_MODE="token").split() == ["2", "2", "token"]


def test_imports_nothing_that_reads_the_knobs():
    code = """
import sys
import orchestrator.environment
print(*sorted({"ray", "torch", "mlflow", "numpy", "optuna"} & set(sys.modules)))
"""
    assert run_python(code) == ""


def test_a_local_cluster_needs_no_token_and_a_joined_one_gets_the_token_there_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert ray_auth_mode("10.0.0.1:6379") == "disabled"
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert ray_auth_mode("10.0.0.1:6379") == "token"
    assert ray_auth_mode() == ray_auth_mode("local") == "disabled"


def test_an_address_known_later_changes_our_setting_only(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as conftest's own call left it
    assert prepare_environment()["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    second = prepare_environment("auto")
    assert (second["RAY_AUTH_MODE"], second["OMP_NUM_THREADS"]) == ("token", "3")
    prepare_environment()


def test_workers_get_the_environment(ray_cluster, monkeypatch):
    import ray

    monkeypatch.setenv("D4RL_DATASET_DIR", "/data/d4rl")

    @ray.remote(num_cpus=2)
    def seen():
        import torch

        return torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"], os.environ["D4RL_DATASET_DIR"]

    task = seen.options(runtime_env={"env_vars": worker_environment()})
    assert ray.get(task.remote()) == (1, "passive", "/data/d4rl")


def shadow(folder: Path, package: str) -> Path:
    file = folder / package / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("raise RuntimeError('imported')\n")
    return file


def test_own_packages_pass():
    check_packages()


@pytest.mark.parametrize("package", ["agents", "envs", "sweeps"])
def test_a_package_that_hides_ours_is_named_in_one_sentence(tmp_path, package):
    file = shadow(tmp_path, package)
    code = f"""
import sys
import orchestrator
sys.path.insert(0, {str(tmp_path)!r})
from orchestrator.environment import UserError, check_packages
try:
    check_packages()
except UserError as error:
    print(error)
"""
    message = run_python(code)
    assert str(file) in message
    assert f"'{package}'" in message
    assert "virtual environment" in message
    assert len(message.splitlines()) == 1


def test_the_error_is_the_one_that_the_command_line_prints(tmp_path, monkeypatch):
    shadow(tmp_path, "agents")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "agents"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="hides offsweep's own"):
        check_packages()
