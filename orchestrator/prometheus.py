"""Our own metrics for Prometheus: one list, exported by Ray while a study runs and by `offsweep status --prometheus`.

Ray's agents export what a process sets with `ray.util.metrics`, under the prefix `ray_`, where what that needs is
installed (`pip install 'ray[default]'`); without it nothing is made and nothing is spent.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.driver import Progress
    from orchestrator.status import StatusFile

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "offsweep_trials_ended": ("Trials that have ended.", ("study", "state")),
    "offsweep_trials_planned": ("Trials of the study.", ("study",)),
    "offsweep_share_done": ("Share of the planned updates that are done or no longer needed.", ("study",)),
    "offsweep_seconds_left": ("Estimated seconds until the end.", ("study",)),
    "offsweep_packs": ("Packs under way.", ("study", "node")),
    "offsweep_updates_per_second": ("Gradient updates of all runs.", ("study", "node")),
    "offsweep_steps_per_second": (
        "Transitions that rollouts, pools and environments gave for learning.", ("study", "node"),
    ),
    "offsweep_pack_restarts_total": (
        "Packs taken up again from a checkpoint since this driver's start.", ("study",),
    ),
    "offsweep_packs_failed_total": ("Packs given up since this driver's start.", ("study",)),
    "offsweep_unsent_bytes": ("Logged and not yet in MLflow.", ("study", "place")),
    "offsweep_unsent_runs": ("Runs of which something is not yet in MLflow.", ("study", "place")),
    "offsweep_tracking_failing": ("1 while MLflow does not take what is sent.", ("study", "place")),
}  # fmt: skip
"""Name -> what it is, and its labels. All are gauges but those whose names end with _total."""


@dataclass(frozen=True)
class Sample:
    """One value of a metric."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(status: Mapping[str, Any]) -> Iterator[Sample]:
    """What a study's status says, as `orchestrator.status.read_status` gives it."""
    active = status.get("confirm") or status
    study = {"study": str(status["name"])}
    for state, count in status["counts"].items():
        if state not in ("running", "waiting"):
            yield Sample("offsweep_trials_ended", {**study, "state": state}, count)
    yield Sample("offsweep_trials_planned", study, status["num_trials"])
    for name in ("share_done", "seconds_left"):
        if active[name] is not None:
            yield Sample(f"offsweep_{name}", study, active[name])
    running = status.get("state", "running") in ("running", "confirming")
    by_node: dict[str, list[Mapping[str, Any]]] = {}
    for pack in (active["packs"] or []) if running else []:
        by_node.setdefault(pack["node"], []).append(pack)
    for node, packs in by_node.items():
        yield Sample("offsweep_packs", {**study, "node": node}, len(packs))
        for name in ("updates_per_second", "steps_per_second"):
            yield Sample(f"offsweep_{name}", {**study, "node": node}, sum(pack[name] for pack in packs))
    if active["restarts"] is not None:
        yield Sample("offsweep_pack_restarts_total", study, active["restarts"])
        yield Sample("offsweep_packs_failed_total", study, active["failed_packs"])
    if active["tracking"] is not None:
        for one in ({**active["tracking"], "place": "driver"}, *active["nodes"]):
            labels = {**study, "place": str(one["place"])}
            yield Sample("offsweep_unsent_bytes", labels, one["bytes"])
            yield Sample("offsweep_unsent_runs", labels, one["runs"])
            yield Sample("offsweep_tracking_failing", labels, float(one["last_error"] is not None))


def text_of(found: Sequence[Mapping[str, Any]]) -> str:
    """Some studies' metrics in Prometheus' text format."""
    by_name: dict[str, list[Sample]] = {}
    for status in found:
        for sample in samples(status):
            by_name.setdefault(sample.name, []).append(sample)
    lines = []
    for name, (about, _) in METRICS.items():
        if name in by_name:
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"]
            for sample in by_name[name]:
                labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels.items())
                lines.append(f"{name}{{{labels}}} {sample.value:.17g}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def is_exported() -> bool:
    """Whether the Ray that this process has joined exports metrics."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("prometheus_client") is None:
        return False
    import ray

    return bool(ray.is_initialized()) and any(node.get("MetricsExportPort", 0) > 0 for node in ray.nodes())


class RayMetrics:
    """Sets our metrics in Ray, called with the driver's progress.

    Args:
        status: from whose content they follow.
    """

    def __init__(self, status: StatusFile) -> None:
        from ray.util.metrics import Counter, Gauge

        self._status = status
        self._gauges = {
            name: Gauge(name, about, labels)
            for name, (about, labels) in METRICS.items() if not name.endswith("_total")
        }  # fmt: skip
        # Ray appends _total to a counter's name
        self._counters = {
            name: Counter(name.removesuffix("_total"), about, labels)
            for name, (about, labels) in METRICS.items() if name.endswith("_total")
        }  # fmt: skip
        self._counted: dict[str, float] = {}
        self._set: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, str]] = {}
        self._written = 0.0

    def __call__(self, progress: Progress) -> None:
        content = self._status.latest
        if content is None or content["time"] == self._written:
            return
        self._written = content["time"]
        gone = dict(self._set)
        for sample in samples(content):
            labels = dict(sample.labels)
            if sample.name in self._counters:
                more = sample.value - self._counted.get(sample.name, 0.0)
                if more > 0:
                    self._counters[sample.name].inc(more, labels)
                    self._counted[sample.name] = sample.value
                continue
            key = (sample.name, tuple(sorted(labels.items())))
            self._gauges[sample.name].set(sample.value, labels)
            self._set[key] = labels
            gone.pop(key, None)
        for (name, _), labels in gone.items():  # such as a machine that has nothing to do any more
            self._gauges[name].set(0.0, labels)
