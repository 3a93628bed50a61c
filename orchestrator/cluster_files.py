"""Files that start a cluster, checked without a network: Ray's cluster launcher, KubeRay, SLURM.

Launcher files are held against the schema of the installed Ray, manifests against a CRD of KubeRay where one is given,
and all of them against what offsweep needs: an authentication mode that stands in them, one version of Ray, one shared
work folder, resources that agree with each other.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from envs.errors import UserError, nearest
from orchestrator.environment import ROOT

OK, TODO, FAIL = "ok", "todo", "FAIL"

EXAMPLES = ("cluster.yaml", "docs/cluster/aws.yaml", "docs/cluster/kuberay.yaml", "docs/cluster/slurm.sbatch")
"""The files that come with offsweep, by their paths in the checkout."""

PLACEHOLDER = re.compile(r"CHANGE_ME\w*|\b(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d+\b")  # addresses of RFC 5737
MODES = ("token", "disabled")
VALUES = (
    "RAY_ADDRESS", "RAY_AUTH_MODE", "OFFSWEEP_WORKDIR", "OFFSWEEP_CACHE", "OFFSWEEP_OFFLINE", "D4RL_DATASET_DIR",
    "NEORL_DATASET_DIR", "MINARI_DATASETS_PATH", "MLFLOW_TRACKING_URI", "OFFSWEEP_MAX_CPUS", "OFFSWEEP_MAX_GPUS",
)  # fmt: skip
"""What may stand under `metadata: offsweep:` of a launcher file: variables for the driver."""

# The parts of a manifest that the examples use or that are often meant by a misspelt key; from KubeRay 1.7's types.
JOB_KEYS = (
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds",
    "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
    "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
)  # fmt: skip
CLUSTER_KEYS = (
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "historyServerOptions", "managedBy", "networkPolicy", "rayVersion", "suspend",
    "tlsOptions", "upgradeStrategy", "workerGroupSpecs",
)  # fmt: skip
HEAD_KEYS = (
    "enableIngress", "headService", "ingressOptions", "labels", "rayStartParams", "resources", "serviceType",
    "template",
)  # fmt: skip
WORKER_KEYS = (
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "priority",
    "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template",
)  # fmt: skip
UNITS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip
SBATCH_NEEDS = ("nodes", "ntasks-per-node", "cpus-per-task", "time")


@dataclass(frozen=True)
class Check:
    """What one check found."""

    subject: str  # a file, or the cluster
    name: str
    status: str  # OK; TODO: to be filled in, or worth a look; FAIL
    text: str


def check_file(path: Path, crd: Path | None = None) -> list[Check]:
    """The checks of a file, whatever kind it is.

    Args:
        crd: a file with KubeRay's CustomResourceDefinitions, for manifests.

    Raises:
        UserError: it cannot be read, or is none of the three kinds.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    subject = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    if path.suffix not in (".yaml", ".yml"):
        if "#SBATCH" not in text:
            raise UserError(
                f"{path} is neither YAML (.yaml) nor a SLURM script, which has lines that begin with #SBATCH"
            )
        found = check_slurm(path, text)
    else:
        try:
            documents = [document for document in yaml.safe_load_all(text) if document is not None]
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if documents and all(isinstance(d, dict) and "apiVersion" in d and "kind" in d for d in documents):
            found = check_manifests(documents, _definitions(crd) if crd else None)
        elif (
            len(documents) == 1 and isinstance(documents[0], dict) and {"cluster_name", "provider"} & set(documents[0])
        ):
            found = check_launcher(documents[0])
        else:
            raise UserError(
                f"{path} is neither a file of Ray's cluster launcher, which has cluster_name and provider, nor one of "
                "Kubernetes, each part of which has apiVersion and kind"
            )
    code = "\n".join(line.partition(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("# "))
    left = sorted(set(PLACEHOLDER.findall(code)))
    found += [("placeholders", TODO, f"still the example's: {', '.join(left)}") if left else
              ("placeholders", OK, "all filled in")]  # fmt: skip
    return [Check(subject, *one) for one in found]


Found = tuple[str, str, str]  # name, status, text


def check_launcher(content: Mapping[str, Any]) -> list[Found]:
    """A file of `ray up`."""
    found: list[Found] = [_schema(content)]
    commands = {
        key: [str(c) for c in content.get(key) or [] if "ray start" in str(c)]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    }
    own = (content.get("metadata") or {}).get("offsweep") or {}
    found.append(_authentication(commands, own.get("RAY_AUTH_MODE")))
    found.extend(_values(own))
    types = content.get("available_node_types")
    if isinstance(types, dict):
        found.append(_node_types(content, types))
    return found


def _schema(content: Mapping[str, Any]) -> Found:
    """The schema of the installed Ray, which `ray up` would hold it against, too."""
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    name = "Ray's schema"
    known = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())["properties"]
    for key in content:
        if key not in known:
            hint = nearest(str(key), known, 1) or "; values of your own stand under metadata:"
            return name, FAIL, f"Ray {ray.__version__} knows no key {key}{hint}"
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)  # it says what it fills in
    try:
        validate_config(prepare_config(copy.deepcopy(dict(content))))
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        return name, FAIL, f"{where}: {error.message}" if where else error.message
    except KeyError as error:
        return name, FAIL, f"the key {error} is missing"
    except Exception as error:  # Ray has no common type for what is wrong with a file
        return name, FAIL, " ".join(str(error).split()) or type(error).__name__
    return name, OK, f"as Ray {ray.__version__} wants it"


def _authentication(commands: Mapping[str, Sequence[str]], driver: Any) -> Found:
    name, modes = "authentication", set()
    for key, starts in commands.items():
        if not starts:
            return name, FAIL, f"{key} has no command with `ray start`; Ray's own ones set no RAY_AUTH_MODE"
        for command in starts:
            mode = re.search(r"\bRAY_AUTH_MODE=(\w+)", command)
            if mode is None or mode[1] not in MODES:
                return name, FAIL, f"{key}: RAY_AUTH_MODE must be token or disabled in front of `ray start`"
            modes.add(mode[1])
    if driver not in MODES:
        return name, FAIL, "metadata.offsweep.RAY_AUTH_MODE, the driver's, must be token or disabled"
    if modes != {driver}:
        return name, FAIL, f"machines start with RAY_AUTH_MODE {' and '.join(sorted(modes))}, the driver has {driver}"
    return _mode(name, driver)


def _mode(name: str, mode: str) -> Found:
    if mode == "disabled":
        return name, TODO, "disabled: whoever reaches the head's ports can run code on every machine"
    return name, OK, "by token, everywhere"


def _values(own: Mapping[str, Any]) -> Iterator[Found]:
    name = "metadata.offsweep"
    unknown = [key for key in own if key not in VALUES]
    for key in unknown:
        yield name, FAIL, f"unknown key {key}{nearest(str(key), VALUES, 1)}"
    workdir = own.get("OFFSWEEP_WORKDIR")
    if not isinstance(workdir, str) or not workdir.startswith("/"):
        yield name, FAIL, "OFFSWEEP_WORKDIR must be the absolute path of a folder that every machine sees"
    elif not unknown:
        yield name, OK, f"work folder {workdir}"


def _node_types(content: Mapping[str, Any], types: Mapping[str, Any]) -> Found:
    name, head = "node types", content.get("head_node_type")
    if head not in types:
        return name, FAIL, f"head_node_type {head} is none of {', '.join(types)}{nearest(str(head), types, 1)}"
    parts = []
    for key, node in types.items():
        resources = (node or {}).get("resources") or {}
        spot = "InstanceMarketOptions" in ((node or {}).get("node_config") or {})
        least, most = (node or {}).get("min_workers", 0), (node or {}).get("max_workers", content.get("max_workers", 0))
        if least > most:
            return name, FAIL, f"{key}: min_workers {least} is more than max_workers {most}"
        if key == head and spot:
            return name, FAIL, f"{key} is the head and must not be a spot instance: a study ends with its head"
        count = "head" if key == head else f"{least}-{most}"
        parts.append(f"{key} ({count}{', spot' if spot else ''}): " + (
            ", ".join(f"{k} {v}" for k, v in resources.items()) or "resources by its instance type"
        ))  # fmt: skip
    return name, OK, "; ".join(parts)


def check_manifests(documents: Sequence[Mapping[str, Any]], crds: Mapping[str, Any] | None) -> list[Found]:
    """Manifests of Kubernetes, of which at least one is a RayCluster or a RayJob."""
    found: list[Found] = []
    rays = [d for d in documents if str(d["apiVersion"]).startswith("ray.io/")]
    if not rays:
        return [("kinds", FAIL, "no part is of apiVersion ray.io/v1: there is no RayCluster or RayJob")]
    for document in rays:
        kind = str(document["kind"])
        if document["apiVersion"] != "ray.io/v1" or kind not in ("RayCluster", "RayJob"):
            hint = nearest(kind, ("RayCluster", "RayJob"), 1)
            found.append((kind, FAIL, f"{document['apiVersion']} {kind} must be ray.io/v1 RayCluster or RayJob{hint}"))
            continue
        title = f"{kind} {(document.get('metadata') or {}).get('name', '')}".strip()
        problems = list(_ray_problems(document))
        found += [(title, FAIL, problem) for problem in problems]
        if not problems:
            cluster = _cluster_of(document)
            groups = ", ".join(
                f"{g['groupName']} {g['minReplicas']}-{g['maxReplicas']}" for g in cluster.get("workerGroupSpecs") or []
            )
            found.append((title, OK, f"Ray {cluster['rayVersion']}; workers: {groups or 'none'}"))
            found.append(_mode(f"{title}: authentication", cluster["authOptions"]["mode"]))
        if crds is not None:
            found.append(_by_crd(document, crds, f"{title}: CRD"))
    return found


def _cluster_of(document: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = document.get("spec") or {}
    return (spec.get("rayClusterSpec") or {}) if document["kind"] == "RayJob" else spec


def _ray_problems(document: Mapping[str, Any]) -> Iterator[str]:
    import ray

    spec, job = document.get("spec"), document["kind"] == "RayJob"
    if not (document.get("metadata") or {}).get("name"):
        yield "metadata.name is missing"
    if not isinstance(spec, dict):
        yield "spec is missing"
        return
    where = "spec"
    if job:
        yield from _unknown(spec, JOB_KEYS, where)
        for key in ("entrypoint", "rayClusterSpec"):
            if not spec.get(key):
                yield f"spec.{key} is missing"
        if spec.get("backoffLimit"):
            yield (
                "spec.backoffLimit must be 0: another attempt repeats `offsweep sweep`, which refuses a study that "
                "exists; apply a job with `offsweep resume NAME` instead"
            )
        where = "spec.rayClusterSpec"
    cluster = _cluster_of(document)
    if not cluster:
        return
    yield from _unknown(cluster, CLUSTER_KEYS, where)
    version = cluster.get("rayVersion")
    if version != ray.__version__:
        yield f"{where}.rayVersion is {version}, the installed Ray is {ray.__version__}"
    mode = (cluster.get("authOptions") or {}).get("mode")
    if mode not in MODES:
        yield f"{where}.authOptions.mode must be token or disabled, it is {mode}"
    head = cluster.get("headGroupSpec")
    if not isinstance(head, dict):
        yield f"{where}.headGroupSpec is missing"
        return
    yield from _unknown(head, HEAD_KEYS, f"{where}.headGroupSpec")
    groups = [("headGroupSpec", head)]
    for number, group in enumerate(cluster.get("workerGroupSpecs") or []):
        place = f"{where}.workerGroupSpecs[{number}]"
        yield from _unknown(group, WORKER_KEYS, place)
        missing = [key for key in ("groupName", "minReplicas", "maxReplicas") if key not in group]
        if missing:
            yield f"{place}.{missing[0]} is missing"
            continue
        least, most = group["minReplicas"], group["maxReplicas"]
        if not least <= group.get("replicas", least) <= most:
            yield f"{place}.replicas is {group.get('replicas', least)}, not between {least} and {most}"
        if least != most and not cluster.get("enableInTreeAutoscaling"):
            yield f"{place} has room from {least} to {most}, but {where}.enableInTreeAutoscaling is not true"
        groups.append((f"workerGroupSpecs[{number}]", group))
    folders = {}
    for name, group in groups:
        containers = (((group.get("template") or {}).get("spec")) or {}).get("containers") or []
        if not containers:
            yield f"{where}.{name}.template.spec.containers is missing"
            continue
        container = containers[0]  # KubeRay's: Ray runs in the first one
        yield from _container_problems(container, group.get("rayStartParams") or {}, f"{where}.{name}", version)
        variables = {e.get("name"): e.get("value") for e in container.get("env") or []}
        workdir = variables.get("OFFSWEEP_WORKDIR")
        if workdir is None:
            yield f"{where}.{name}: the container's env does not set OFFSWEEP_WORKDIR"
            continue
        claims = {v["name"]: v for v in group["template"]["spec"].get("volumes") or []}
        mounts = [
            (mount["mountPath"], {k: v for k, v in claims.get(mount["name"], {}).items() if k != "name"})
            for mount in container.get("volumeMounts") or []
            if workdir == mount["mountPath"] or workdir.startswith(mount["mountPath"].rstrip("/") + "/")
        ]
        if not mounts:
            yield f"{where}.{name}: no volume is mounted at OFFSWEEP_WORKDIR={workdir}"
            continue
        folders[name] = (workdir, *max(mounts, key=lambda one: len(one[0])))
        if "emptyDir" in folders[name][2]:
            yield f"{where}.{name}: OFFSWEEP_WORKDIR={workdir} lies in an emptyDir, which no other pod sees"
    if len({repr(folder) for folder in folders.values()}) > 1:
        yield "OFFSWEEP_WORKDIR is not the same path in the same volume in every group"


def _container_problems(
    container: Mapping[str, Any], start: Mapping[str, Any], where: str, version: Any
) -> Iterator[str]:
    image = str(container.get("image", ""))
    tag = re.search(r"rayproject/ray(?:-ml)?:(\d+\.\d+\.\d+)", image)
    if not image:
        yield f"{where}: the container has no image"
    elif tag and tag[1] != version:
        yield f"{where}: the image {image} has another Ray than rayVersion {version}"
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for key in ("cpu", "memory"):
        if key not in limits:
            yield f"{where}: resources.limits.{key} is missing; Ray would take the whole machine for its own"
    for key in limits.keys() & requests.keys():
        if quantity(requests[key]) > quantity(limits[key]):
            yield f"{where}: resources.requests.{key} {requests[key]} is more than the limit {limits[key]}"
    for key, value in start.items():
        if not isinstance(value, str):
            yield f"{where}.rayStartParams.{key} must be a string: '{value}'"
    for key, resource in (("num-cpus", "cpu"), ("num-gpus", "nvidia.com/gpu")):
        if key in start and float(start[key]) > quantity(limits.get(resource, 0)):
            yield (
                f"{where}.rayStartParams.{key} is {start[key]}, but the container has "
                f"resources.limits.{resource} {limits.get(resource, 0)}"
            )


def quantity(value: Any) -> float:
    """A quantity of Kubernetes as a number: 500m is 0.5, 8Gi is 2^33; not a number if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(value).strip())
    return float(match[1]) * UNITS.get(match[2], float("nan")) if match else float("nan")


def _unknown(content: Mapping[str, Any], known: Iterable[str], where: str) -> Iterator[str]:
    known = tuple(known)
    for key in content:
        if key not in known:
            yield f"unknown key {where}.{key}{nearest(str(key), known, 1)}"


def _definitions(path: Path) -> dict[str, Any]:
    """Kind -> schema of ray.io/v1 from a file of CustomResourceDefinitions.

    Raises:
        UserError: the file holds none.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # it has more than a megabyte
    try:
        documents = list(yaml.load_all(path.read_text(), Loader=loader))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    schemas = {
        document["spec"]["names"]["kind"]: _closed(version["schema"]["openAPIV3Schema"])
        for document in documents
        if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition"
        for version in document["spec"]["versions"]
        if version["name"] == "v1" and document["spec"]["group"] == "ray.io"
    }
    if not schemas:
        raise UserError(f"{path} holds no CustomResourceDefinition of ray.io/v1; KubeRay's repository has them")
    return schemas


def _closed(schema: Any) -> Any:
    """The schema with unknown keys made errors, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not free:
        closed["additionalProperties"] = False
    return closed


def _by_crd(document: Mapping[str, Any], crds: Mapping[str, Any], name: str) -> Found:
    import jsonschema

    schema = crds.get(document["kind"])
    if schema is None:
        return name, TODO, f"the file of CRDs has none of kind {document['kind']}, only {', '.join(sorted(crds))}"
    # these fields are free-form here, and Kubernetes' own schema has them
    schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(document), key=lambda e: len(e.absolute_path))
    if errors:
        where = ".".join(str(part) for part in errors[-1].absolute_path)
        return name, FAIL, f"{where}: {errors[-1].message[:300]}"
    return name, OK, "as KubeRay's definition wants it"


def check_slurm(path: Path, text: str) -> list[Found]:
    """A script for `sbatch`."""
    found: list[Found] = []
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    problem = parsed.stderr.strip().splitlines()
    found.append(("bash", FAIL, problem[0] if problem else "not valid") if parsed.returncode else
                 ("bash", OK, "its syntax is valid"))  # fmt: skip
    options = dict(re.findall(r"^#SBATCH\s+--([\w-]+)(?:[= ]\s*(\S+))?", text, re.MULTILINE))
    missing = [name for name in SBATCH_NEEDS if name not in options]
    if missing:
        found.append(("#SBATCH", FAIL, f"missing: {', '.join('--' + name for name in missing)}"))
    elif options["ntasks-per-node"] != "1":
        found.append(("#SBATCH", FAIL, f"--ntasks-per-node is {options['ntasks-per-node']}, must be 1: Ray's node"))
    else:
        shown = ", ".join(f"{k}={v}" if v else k for k, v in options.items() if k not in ("job-name", "output"))
        found.append(("#SBATCH", OK, shown))
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    mode = re.search(r"^\s*export\s+(?:.*\s)?RAY_AUTH_MODE=(\w+)", code, re.MULTILINE)
    if mode is None or mode[1] not in MODES:
        found.append(("authentication", FAIL, "the script must export RAY_AUTH_MODE=token, or disabled"))
    else:
        found.append(_mode("authentication", mode[1]))
    workdir = re.search(r"^\s*export\s+(?:.*\s)?OFFSWEEP_WORKDIR=[\"']?([^\s\"']+)", code, re.MULTILINE)
    if workdir is None:
        found.append(("work folder", FAIL, "the script must export OFFSWEEP_WORKDIR, a folder that every machine sees"))
    else:
        found.append(("work folder", OK, workdir[1]))
    problems = []
    if not re.search(r"ray start.*--head|\bstart\b.*--head", code):
        problems.append("no `ray start --head`")
    if "--address" not in code:
        problems.append("no `ray start --address`: the other machines do not join")
    if re.search(r"\bray stop\b", code):
        problems.append("`ray stop` ends every Ray of a machine, other people's, too; the end of the job ends its own")
    if "--temp-dir" not in code:
        problems.append("`ray start` without --temp-dir: jobs that share a machine would share /tmp/ray")
    if "SLURM_CPUS_PER_TASK" not in code:
        problems.append("`ray start` without --num-cpus=$SLURM_CPUS_PER_TASK takes all cores for its own")
    found += [("ray", FAIL, problem) for problem in problems] or [("ray", OK, "a head, and machines that join it")]
    return found
