"""`offsweep cluster check`: what is right passes, and each kind of mistake is named."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import UserError
from orchestrator import cluster_live
from orchestrator.cli import main
from orchestrator.cluster_files import EXAMPLES, FAIL, OK, TODO, check_file, quantity
from orchestrator.environment import ROOT

Change = Callable[[Any], object]


def problems(path: Path, crd: Path | None = None) -> list[str]:
    return [f"{check.name}: {check.text}" for check in check_file(path, crd) if check.status == FAIL]


def changed(example: str, change: Change, folder: Path) -> Path:
    """The example with something else in it, as a file of its own."""
    documents = list(yaml.safe_load_all((ROOT / example).read_text()))
    change(documents[-1])
    path = folder / Path(example).name
    path.write_text(yaml.safe_dump_all(documents))
    return path


def put(*place: Any, value: Any) -> Change:
    """A change that sets the value at a place; None takes it away."""

    def change(document: Any) -> None:
        for key in place[:-1]:
            document = document[key]
        if value is None:
            del document[place[-1]]
        else:
            document[place[-1]] = value

    return change


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_pass_and_say_what_is_to_be_filled_in(example: str):
    checks = check_file(ROOT / example)
    assert not [check for check in checks if check.status == FAIL]
    assert "still the example's" in next(check.text for check in checks if check.status == TODO)


HEAD_START = ("head_start_ray_commands",)


@pytest.mark.parametrize(
    ("example", "change", "sentence"),
    [
        ("cluster.yaml", put("cluster_nam", value="x"), "no key cluster_nam; nearest: cluster_name"),
        ("cluster.yaml", put("idle_timeout_minutes", value="soon"), "idle_timeout_minutes: 'soon' is not of type"),
        ("cluster.yaml", put("provider", "type", value=None), "type"),
        ("cluster.yaml", put("worker_start_ray_commands", value=["ray start --address=$RAY_HEAD_IP:6379"]),
         "worker_start_ray_commands: RAY_AUTH_MODE must be token or disabled"),
        ("cluster.yaml", put("head_start_ray_commands", value=None), "head_start_ray_commands has no command"),
        ("cluster.yaml", put("metadata", "offsweep", "RAY_AUTH_MODE", value="disabled"), "the driver has disabled"),
        ("cluster.yaml", put("metadata", "offsweep", "OFFSWEEP_WORKDR", value="/x"), "nearest: OFFSWEEP_WORKDIR"),
        ("cluster.yaml", put("metadata", "offsweep", "OFFSWEEP_WORKDIR", value="work"), "must be the absolute path"),
        ("docs/cluster/aws.yaml", put("head_node_type", value="haed"), "nearest: head"),
        ("docs/cluster/aws.yaml", put("available_node_types", "gpu", "min_workers", value=9), "than max_workers 8"),
        ("docs/cluster/aws.yaml", put("available_node_types", "gpu", "resources", value={"GPU": 0.5}), "0.5 is not"),
        ("docs/cluster/aws.yaml",
         put("available_node_types", "head", "node_config", "InstanceMarketOptions", value={"MarketType": "spot"}),
         "must not be a spot instance"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_launcher_file_is_named(example: str, change: Change, sentence: str, tmp_path: Path):
    assert sentence in "\n".join(problems(changed(example, change, tmp_path)))


CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec")
HEAD_POD = (*HEAD, "template", "spec")
WORKER = (*CLUSTER, "workerGroupSpecs", 0)
WORKER_POD = (*WORKER, "template", "spec")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("apiVersion", value="ray.io/v1alpha1"), "must be ray.io/v1"),
        (put("kind", value="RayJobs"), "nearest: RayJob"),
        (put("spec", "entrypoint", value=None), "spec.entrypoint is missing"),
        (put("spec", "backoffLimit", value=2), "backoffLimit must be 0"),
        (put("spec", "shutdownAfterJobFinish", value=True), "nearest: shutdownAfterJobFinishes"),
        (put(*CLUSTER, "rayVersion", value="2.9.0"), "rayVersion is 2.9.0, the installed Ray is"),
        (put(*CLUSTER, "authOptions", value=None), "authOptions.mode must be token or disabled"),
        (put(*CLUSTER, "enableInTreeAutoscaling", value=False), "enableInTreeAutoscaling is not true"),
        (put(*CLUSTER, "headGroupSpec", value=None), "headGroupSpec is missing"),
        (put(*HEAD_POD, "containers", 0, "image", value="rayproject/ray:2.9.0"), "has another Ray"),
        (put(*HEAD, "rayStartParams", "num-cpus", value=0), "must be a string"),
        (put(*HEAD, "rayStartParams", "num-cpus", value="16"), "num-cpus is 16, but"),
        (put(*WORKER, "minReplica", value=1), "nearest: minReplicas"),
        (put(*WORKER, "replicas", value=20), "replicas is 20, not between 0 and 8"),
        (put(*WORKER, "maxReplicas", value=None), "maxReplicas is missing"),
        (put(*WORKER, "rayStartParams", value={"num-gpus": "2"}), "num-gpus is 2, but"),
        (put(*WORKER_POD, "containers", 0, "resources", "limits", "memory", value=None), "limits.memory is missing"),
        (put(*WORKER_POD, "containers", 0, "resources", "requests", "memory", value="64Gi"), "than the limit 32Gi"),
        (put(*WORKER_POD, "containers", 0, "env", value=[]), "does not set OFFSWEEP_WORKDIR"),
        (put(*WORKER_POD, "containers", 0, "volumeMounts", value=[]), "no volume is mounted at OFFSWEEP_WORKDIR"),
        (put(*WORKER_POD, "volumes", value=[{"name": "shared", "emptyDir": {}}]), "which no other pod sees"),
        (put(*WORKER_POD, "volumes", value=[{"name": "shared", "persistentVolumeClaim": {"claimName": "x"}}]),
         "not the same path in the same volume"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_manifest_is_named(change: Change, sentence: str, tmp_path: Path):
    assert sentence in "\n".join(problems(changed("docs/cluster/kuberay.yaml", change, tmp_path)))


def test_a_manifest_is_held_against_a_given_definition(tmp_path: Path):
    """A definition of the form of KubeRay's, which is too large to be kept here."""
    text = {"type": "string"}
    spec = {
        "type": "object",
        "properties": {
            "entrypoint": text, "submissionMode": text, "backoffLimit": {"type": "integer"},
            "shutdownAfterJobFinishes": {"type": "boolean"}, "ttlSecondsAfterFinished": {"type": "integer"},
            "rayClusterSpec": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}},
        },
    }  # fmt: skip
    properties = {"apiVersion": text, "kind": text, "metadata": {"type": "object"}, "spec": spec}
    schema = {"type": "object", "properties": properties}
    crd = tmp_path / "crd.yaml"
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    content = {"group": "ray.io", "names": {"kind": "RayJob"}, "versions": versions}
    crd.write_text(yaml.safe_dump({"kind": "CustomResourceDefinition", "spec": content}))
    example = "docs/cluster/kuberay.yaml"
    assert "CRD: ok" in [f"{c.name[-3:]}: {c.status}" for c in check_file(ROOT / example, crd)]
    wrong = changed(example, put("spec", "ttlSecondsAfterFinished", value="300"), tmp_path)
    assert "spec.ttlSecondsAfterFinished: '300' is not of type 'integer'" in problems(wrong, crd)[0]
    unknown = changed(example, put("spec", "suspend", value=True), tmp_path)  # ours know it, this definition does not
    assert "'suspend' was unexpected" in problems(unknown, crd)[0]
    with pytest.raises(UserError, match="holds no CustomResourceDefinition"):
        check_file(ROOT / example, ROOT / "cluster.yaml")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("cleanup() {", "cleanup() ", "bash: "),
        ("#SBATCH --time=24:00:00\n", "", "missing: --time"),
        ("--ntasks-per-node=1", "--ntasks-per-node=4", "must be 1"),
        ("export RAY_AUTH_MODE=token ", "export ", "must export RAY_AUTH_MODE"),
        ("export OFFSWEEP_WORKDIR=", "OFFSWEEP_WORKDIR=", "must export OFFSWEEP_WORKDIR"),
        ('--temp-dir="$temp"', "", "without --temp-dir"),
        ('--address="$head_ip:$port"', "", "no `ray start --address`"),
        ('cd "$offsweep"', "ray stop", "`ray stop` ends every Ray"),
    ],
)
def test_a_mistake_in_a_slurm_script_is_named(old: str, new: str, sentence: str, tmp_path: Path):
    text = (ROOT / "docs/cluster/slurm.sbatch").read_text()
    assert old in text
    path = tmp_path / "job.sbatch"
    path.write_text(text.replace(old, new))
    assert sentence in "\n".join(problems(path))


def test_the_slurm_script_starts_a_head_then_the_others_then_the_command(tmp_path: Path):
    """Run with stand-ins for SLURM's commands, Ray and Python."""
    log, commands, checkout = tmp_path / "log", tmp_path / "bin", tmp_path / "checkout"
    scripts = {
        commands / "scontrol": "printf 'one\\ntwo\\nthree\\n'",
        commands / "srun": 'for word; do case "$word" in --nodelist=*) export ON="${word#*=}";; esac; done\n'
        'while [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        commands / "hostname": "echo 127.0.0.1",
        checkout / ".venv/bin/ray": f'echo "$ON $*" >> {log}; exec sleep 60',
        checkout / ".venv/bin/python": f"""case "$1" in
            -c) printf secret;;
            -) cat {log} | grep -c " start --block "; true;;
            *) echo "driver $*" >> {log}; cat "$RAY_AUTH_TOKEN_PATH" >> {log};;
        esac""",
    }
    for path, body in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    text = (ROOT / "docs/cluster/slurm.sbatch").read_text()
    script = tmp_path / "job.sbatch"
    text = text.replace("$(seq 60)", "1 2", 1)  # nobody listens at the head's port
    script.write_text(text.replace("sleep 2", "sleep 0.02").replace("$(seq 60)", "$(seq 500)"))
    variables = {
        "PATH": f"{commands}:/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "x",
        "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "1", "OFFSWEEP_CHECKOUT": str(checkout),
        "OFFSWEEP_WORKDIR": str(tmp_path / "work"),
    }  # fmt: skip
    done = subprocess.run(["bash", str(script), "resume", "name"], env=variables, capture_output=True, text=True,
                          timeout=30, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = log.read_text().splitlines()
    starts = sorted(line for line in said if " start --block " in line)
    options = "--num-cpus=16 --num-gpus=1 --temp-dir=/tmp/ray-123"
    head = f"one start --block {options} --head --node-ip-address=127.0.0.1 --port=20123 --include-dashboard=false"
    assert starts == [head, *(f"{name} start --block {options} --address=127.0.0.1:20123" for name in ("three", "two"))]
    assert [line for line in said if line not in starts] == [
        "driver -m orchestrator cluster check --live", "secretdriver -m orchestrator resume name", "secret",
    ]  # fmt: skip
    assert not list((tmp_path / "work").iterdir())  # the secret is gone


def test_the_command_line_reports_and_exits(capsys, tmp_path: Path):
    wrong = changed("cluster.yaml", put("metadata", "offsweep", "RAY_AUTH_MODE", value="disabled"), tmp_path)
    assert main(["cluster", "check", str(ROOT / "cluster.yaml")]) == 0
    assert "todo  placeholders" in capsys.readouterr().out
    assert main(["cluster", "check", str(ROOT / "cluster.yaml"), "--strict"]) == 1
    capsys.readouterr()
    assert main(["cluster", "check", str(wrong), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in said if one["status"] == FAIL] == ["authentication"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.yaml"], "cannot read .*nowhere.yaml: No such file"),
        (["{}/list.yaml"], "is neither a file of Ray's cluster launcher"),
        (["{}/broken.yaml"], "is not valid YAML"),
        (["{}/plain.txt"], "is neither YAML"),
        (["--live"], "--live needs the address"),
        (["--address", "127.0.0.1:1"], "add --live"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(words: list[str], sentence: str, capsys, tmp_path: Path):
    for name, text in {"list.yaml": "[1]", "broken.yaml": "a: [", "plain.txt": "hello"}.items():
        (tmp_path / name).write_text(text)
    capsys.readouterr()
    assert main(["cluster", "check", *(word.replace("{}", str(tmp_path)) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(sentence, captured.err)


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("8Gi", 2**33), ("4", 4), ("1k", 1000)])
def test_quantities_of_kubernetes(text: str, value: float):
    assert quantity(text) == value


def node(**changes: Any) -> dict[str, Any]:
    machine = {
        "host": "a", "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "numpy": "2.4.6"},
        "processor": "p", "cores": 8, "gpus": 1, "shm": 2**34, "open_files": 65536, "auth_mode": "token",
    }  # fmt: skip
    return {**machine, **changes}


@pytest.mark.parametrize(
    ("versions", "status"),
    [({}, OK), ({"torch": "2.12.0"}, FAIL), ({"torch": None}, FAIL), ({"numpy": "2.3.0"}, TODO)],
)
def test_versions_of_nodes(versions: Mapping[str, Any], status: str):
    own = node()
    other = node(versions={**own["versions"], **versions})
    (found,) = cluster_live.versions(own, {"a": own, "b": other})
    assert found[1] == status
    assert (status == OK) == ("on b" not in found[2])


def test_another_processor_is_worth_a_look():
    machines = {"a": node(), "b": node(processor="q")}
    assert "processors" in [name for name, _, _ in cluster_live.versions(node(), machines)]


@pytest.mark.parametrize(
    ("modes", "hosts", "status"),
    [
        (("token", "token"), "ab", OK), (("token", None), "ab", FAIL), (("disabled", "disabled"), "ab", TODO),
        (("disabled", "disabled"), "aa", OK), (("disabled", "token"), "ab", FAIL),
    ],
)  # fmt: skip
def test_authentication_of_nodes(modes: tuple[str | None, ...], hosts: str, status: str):
    machines = {str(i): node(auth_mode=m, host=h) for i, (m, h) in enumerate(zip(modes, hosts, strict=True))}
    assert cluster_live.authentication(machines)[1] == status


def resources(machines: Mapping[str, Any], **declared: Any) -> dict[str, str]:
    total = {"CPU": 8.0, **{k: v for k, v in declared.items() if k == "CPU"}}
    per_node = {name: {"CPU": 8.0, "GPU": 1.0, "object_store_memory": 2.0**33, **declared} for name in machines}
    return {name: status for name, status, _ in cluster_live.machine_resources(machines, total, total, per_node)}


def test_resources_of_nodes():
    assert resources({"a": node()}) == {"resources": OK}
    assert resources({"a": node(), "b": node()})["cores"] == TODO  # two Ray nodes of 8 CPUs on 8 cores
    assert resources({"a": node()}, GPU=2.0)["GPUs"] == FAIL
    assert resources({"a": node()}, GPU=0.0)["GPUs"] == TODO
    assert resources({"a": node(shm=2**26)})["/dev/shm"] == FAIL
    assert resources({"a": node(open_files=1024)})["open files"] == TODO
    assert resources({"a": node()}, CPU=0.0)["resources"] == FAIL
    # a head without CPUs, whose autoscaler starts machines when they are needed
    found = list(cluster_live.machine_resources({}, {"CPU": 0.0}, {"CPU": 64.0, "GPU": 8.0}, {}))
    assert [(name, status) for name, status, _ in found] == [("resources", OK)]
    assert "can grow to 64 CPUs and 8 GPUs" in found[0][2]


def test_a_work_folder_that_is_not_one_is_noticed():
    names = {"1": "a", "2": "b"}
    everybody = {reader: {"1": "1", "2": "2"} for reader in ("a", "b", "the driver")}
    assert cluster_live.storage_seen("work folder", everybody, names)[1] == OK
    apart = {**everybody, "b": {"2": "2"}}
    found = cluster_live.storage_seen("work folder", apart, names)
    assert found[1] == FAIL
    assert "b does not see what a wrote" in found[2]


@pytest.mark.parametrize(
    ("answer", "part"),
    [((200, "OK"), None), ((401, ""), None), ((403, "Forbidden"), "--allowed-hosts"), ((None, "refused"), "refused"),
     ((502, "Bad Gateway"), "502"), (TimeoutError("late"), "late")],
)  # fmt: skip
def test_answers_of_an_mlflow_server(answer: Any, part: str | None):
    problem = cluster_live.server_problem(answer)
    assert problem is None if part is None else part in str(problem)


def test_nodes_of_one_address_are_told_apart():
    names = cluster_live.node_names({"abcdef12": "10.0.0.1", "fedcba21": "10.0.0.1", "123456": "10.0.0.2"})
    assert names == {"abcdef12": "10.0.0.1 (abcdef)", "fedcba21": "10.0.0.1 (fedcba)", "123456": "10.0.0.2"}
