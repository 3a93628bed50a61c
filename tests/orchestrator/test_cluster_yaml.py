"""cluster.yaml against the cluster launcher of the installed Ray, without a network."""

from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.environment import ROOT, ray_auth_mode


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_ray_accepts_it(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    workers = config["provider"]["worker_ips"]
    assert prepared["max_workers"] == len(workers)
    # The commands are ours, not the launcher's defaults, which know neither the environment nor the token.
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]
    assert prepared["worker_start_ray_commands"] == config["worker_start_ray_commands"]


def test_ray_would_refuse_our_values_anywhere_but_under_metadata(config):
    config["offsweep"] = config.pop("metadata")["offsweep"]
    with pytest.raises(jsonschema.ValidationError, match="offsweep"):
        validate_config(prepare_config(config))


def test_machines_and_driver_agree_on_the_token(config, monkeypatch, tmp_path):
    """The secret that the machines are given is the one by which a driver turns its authentication on."""
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[commands] if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token " in command for command in starts)
    assert config["metadata"]["offsweep"]["RAY_AUTH_MODE"] == "token"
    (secret,) = [path for path in config["file_mounts"] if path.endswith("auth_token")]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    mounted = tmp_path / secret.removeprefix("~/")
    mounted.parent.mkdir()
    mounted.write_text("secret")
    assert ray_auth_mode("auto") == "token"


def test_setup_runs_what_the_makefile_offers(config):
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    for command in config["setup_commands"]:
        assert command.startswith("cd ~/offsweep && make ")
        assert command.split()[-1] in targets
