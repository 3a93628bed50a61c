"""What `offsweep data verify` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from envs.verify import Report

_STYLES = {"ok": "green", "flaw": "yellow", "error": "bold red", "skipped": "dim"}
_MEANING = {
    "genuine": "nothing is wrong, and the rows are what the simulator or D4RL's own statistics say they must be",
    "plausible": "nothing is wrong, but neither the simulator nor known statistics could confirm it",
    "usable with flaws": "learn from it, knowing of {flaw}",
    "rejected": "do not learn from it as it is: {error}",
}


def print_report(report: Report, console: Console) -> None:
    """Checks, results and what they mean as a table; the verdict last."""
    summary = report.dataset
    table = Table(title=escape(f"{summary['name']} ({summary['env_id']}, {summary['rows']:,} rows)"))
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found, what to do", overflow="fold")
    for finding in report.findings:
        style = _STYLES[finding.severity]
        table.add_row(finding.check.replace("_", " "), f"[{style}]{finding.severity}[/]", escape(finding.message))
    console.print(table)
    if summary["return_mean"] is not None:
        reference = (
            f", score {summary['score']:.1f} ({summary['score_source']})" if summary["score"] is not None else ""
        )
        console.print(
            escape(
                f"returns: {summary['return_mean']:.1f} +- {summary['return_std']:.1f} over"
                f" {summary['complete_episodes']:,} complete episodes{reference}"
            ),
            highlight=False,
        )
    names = {severity: ", ".join(report.named(severity)).replace("_", " ") for severity in ("flaw", "error")}
    style = _STYLES["error" if report.exit_code else "flaw" if report.named("flaw") else "ok"]
    meaning = _MEANING[report.verdict].format(**names)
    console.print(f"[{style}]verdict: {report.verdict}[/]: {escape(meaning)}", highlight=False)
