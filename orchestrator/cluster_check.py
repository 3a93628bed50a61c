"""`offsweep cluster check`: files that start clusters, and a cluster that runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from envs.errors import UserError
from orchestrator.cluster_files import EXAMPLES, FAIL, OK, TODO, Check, check_file
from orchestrator.connection import cluster_address
from orchestrator.environment import ROOT

STYLES = {OK: "green", TODO: "yellow", FAIL: "bold red"}


def run_checks(
    files: Sequence[Path], crd: Path | None, live: bool, address: str | None, workdir: Path, tracking_uri: str | None
) -> list[Check]:
    """The checks that were asked for.

    Args:
        files: to be checked; without any, and not `live`, the examples that come with offsweep.
        crd: a file with KubeRay's CustomResourceDefinitions.
        live: check the cluster at `address` (default: $RAY_ADDRESS), too.

    Raises:
        UserError: a file cannot be read or is of no known kind, or no cluster answers.
    """
    if address is not None and not live:
        raise UserError("--address is of a running cluster, which only --live checks; add --live")
    where = cluster_address(address)
    if live and where is None:
        raise UserError("--live needs the address of a running cluster: --address HOST:PORT, auto, or $RAY_ADDRESS")
    if not files and not live:
        files = [ROOT / name for name in EXAMPLES]
        if not all(path.exists() for path in files):
            raise UserError(f"name the files to be checked: offsweep's own ({', '.join(EXAMPLES)}) are in its checkout")
    checks = [check for path in files for check in check_file(path.absolute(), crd)]
    if live and where is not None:
        from orchestrator.cluster_live import check_cluster

        checks += check_cluster(where, workdir, tracking_uri)
    return checks


def show_checks(checks: Sequence[Check], console: Console, as_json: bool = False, strict: bool = False) -> int:
    """Print one line per check. Returns the exit code: 1 if one failed, or with `strict` if one is not ok."""
    bad = [check for check in checks if check.status == FAIL or (strict and check.status != OK)]
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
        return int(bool(bad))
    for subject in dict.fromkeys(check.subject for check in checks):
        shown = [check for check in checks if check.subject == subject]
        width = max(len(check.name) for check in shown)
        console.print(Text(subject, style="bold"), soft_wrap=True)
        for check in shown:
            line = Text.assemble(
                "  ", (f"{check.status:<4}", STYLES[check.status]), f"  {check.name:<{width}}  ", check.text
            )
            console.print(line, soft_wrap=True)
    counts = {status: sum(check.status == status for check in checks) for status in (OK, TODO, FAIL)}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count), highlight=False)
    return int(bool(bad))
