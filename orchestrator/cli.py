"""The command line: subcommands in front, `key=value` overrides behind. Bad input ends with one sentence and exit code
2."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.environment import UserError, check_packages, prepare_environment

STUDIES = Path(__file__).parent.parent / "sweeps" / "studies"
EPILOG = """examples:
  offsweep train method=ravl dataset=hopper-medium-replay-v2 seed=0 method.num_critics=10
  offsweep train method=ravl dataset=embedded/pendulum-medium-v0 num_seeds=3
  offsweep sweep study.yaml study.num_trials=40
  offsweep sweep show my-study --figures figures
  offsweep report my-study --out my-study.html
  offsweep compare my-study/0 my-study/7 other-study --html compared.html
  offsweep status my-study --watch 5
  offsweep plan study.yaml compute.price_per_gpu_hour=2.5
  offsweep resume my-study
  offsweep table show ravl-table-2
  offsweep table run edge-of-reach --scale 0.1
  offsweep lab edge-of-reach
  offsweep lab refrigerator --seeds 3
  offsweep data verify hopper-medium-v2
  offsweep data collect hopper-medium-expert --workers 2
  offsweep cluster check my-cluster.yaml
  offsweep cluster check --live --address auto
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; its help is the reference of the command line."""
    parser = argparse.ArgumentParser(
        prog="offsweep", description="Offline reinforcement learning studies on Ray, recorded in MLflow.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_text: str, group: argparse._SubParsersAction = commands) -> argparse.ArgumentParser:
        return group.add_parser(name, help=help_text, description=help_text)

    def add_workdir(sub: argparse.ArgumentParser) -> None:
        text = "work folder (default: the workdir that a given file names, else $OFFSWEEP_WORKDIR, else offsweep-work)"
        sub.add_argument("--workdir", type=Path, help=text)

    def add_overrides(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=text)

    def add_profile(sub: argparse.ArgumentParser) -> None:
        text = "trace one epoch of every pack and tabulate where its time goes; the same as compute.profile=true"
        sub.add_argument("--profile", action="store_true", help=text)

    train = add("train", "Train one setting, with one or more seeds.")
    train.add_argument("--config", type=Path, help="a YAML file, such as the config.yaml of an earlier run")
    add_profile(train)
    add_workdir(train)
    add_overrides(train, "method=NAME, dataset=NAME, seed=0, num_seeds=1, method.*, evaluation.*, compute.*")

    sweep = add("sweep", "Search hyperparameters: run the study that a YAML file describes; or `sweep show NAME`.")
    sweep.add_argument(
        "study", type=Path, metavar="study.yaml | NAME | show",
        help="the study's YAML file, or a study that comes with offsweep, such as demo; `show NAME` is offsweep show",
    )  # fmt: skip
    sweep.add_argument("--resume", action="store_true", help="continue the study of that name")
    add_profile(sweep)
    add_workdir(sweep)
    add_overrides(sweep, "anything in the file, and study.num_trials, study.sampler.name, ...")

    plan = add(
        "plan", "Print what a training or study would take before it is started: runs, packs, time, memory, money."
    )
    plan.add_argument(
        "overrides", nargs="*", metavar="study.yaml | key=value",
        help="a study's YAML file, and what train or sweep takes; compute.price_per_gpu_hour and price_per_cpu_hour",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true")
    plan.add_argument("--gpus", type=int, help="plan for a cluster with so many of the GPUs of this machine")
    plan.add_argument("--cpus", type=int, help="plan for a cluster with so many of the cores of this machine")
    add_workdir(plan)

    resume = add("resume", "Continue a killed or stopped training or sweep where it was.")
    resume.add_argument("name", help="the study's name")
    add_workdir(resume)
    add_overrides(resume, "compute.* and tracking_uri only")

    text = "Print what is known of a study, running, stopped or finished; the same as `sweep show`."
    show = add("show", text)
    show.add_argument("name", help="the study's name")
    show.add_argument("--top", type=int, metavar="N", help="trials in the table (default: 30; as JSON all)")
    show.add_argument("--json", action="store_true")
    show.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the study's figures there, as PNG files")
    add_workdir(show)

    text = "Write a study as one HTML file: what `sweep show` says, figures, all trials, links to their runs in MLflow."
    report = add("report", text)
    report.add_argument("name", help="the study's name")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the study's folder")
    text = "address of MLflow's pages, for links (default: the study's server, else that of `offsweep ui`)"
    report.add_argument("--mlflow", metavar="ADDRESS", help=text)
    add_workdir(report)

    compare = add("compare", "Hold runs, trials or studies against each other: settings, scores, differences, curves.")
    compare.add_argument(
        "groups", nargs="+", metavar="WHAT",
        help="STUDY (its best trial), STUDY/3 (a trial), STUDY/t0003-s0 or an MLflow id (a run); differences are to "
        "the first",
    )  # fmt: skip
    compare.add_argument("--json", action="store_true")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write a page with the learning curves")
    add_workdir(compare)

    text = "How studies stand: packs, throughput, restarts, time left, what waits for MLflow; from files alone."
    status = add("status", text)
    status.add_argument("name", nargs="?", metavar="STUDY", help="a study's name (default: all of the work folder)")
    status.add_argument("--json", action="store_true")
    status.add_argument("--prometheus", action="store_true", help="in Prometheus' text format")
    status.add_argument("--watch", type=float, metavar="SECONDS", help="print it anew every so many seconds")
    add_workdir(status)

    ui = add(
        "ui", "Serve MLflow's pages for the runs in the work folder. Optuna's pages of a study's trials: copy "
        "studies/NAME/journal.log and open the copy with optuna-dashboard (pip install -e '.[dashboard]').",
    )  # fmt: skip
    ui.add_argument("--host", default="127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument("--auth", action="store_true", help="ask for a name and a password (pip install 'mlflow[auth]')")
    text = "host names under which the pages may be asked for, besides this machine's private addresses"
    ui.add_argument("--allowed-hosts", metavar="NAMES", help=text)
    add_workdir(ui)

    demo = add("demo", "A Bayesian study on embedded data, in a few minutes on two cores.")
    add_workdir(demo)
    add_overrides(demo, "as for sweep")

    lab = add(
        "lab",
        "Train and draw a paper's experiment on a toy task; a stopped one goes on, a finished one is drawn again.",
    )
    lab.add_argument("lab", nargs="?", metavar="name", help="which; without a name the labs are listed")
    lab.add_argument("--seeds", type=int, metavar="N", help="how often everything is repeated")
    lab.add_argument("--updates", type=int, metavar="N", help="gradient updates of every run")
    add_workdir(lab)

    _add_table_commands(add, add_workdir)

    add("methods", "List the methods and their variants.")

    _add_cluster_commands(add, add_workdir)
    _add_data_commands(add, add_workdir)
    return parser


def _add_table_commands(add: Callable[..., Any], add_workdir: Callable[[argparse.ArgumentParser], None]) -> None:
    text = "Paper tables (docs/tables.md): list, plan, run, show, import."
    group = add("table", text).add_subparsers(dest="table_command", required=True, metavar="COMMAND")
    add("list", "The tables that come with offsweep.", group)

    def add_one(name: str, help_text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = add(name, help_text, group)
        sub.add_argument("table", help="a table that comes with offsweep, or the YAML file of your own")
        sub.add_argument(
            "--scale", type=float, metavar="S", help="a share of the updates, such as 0.05; outputs say so"
        )
        sub.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="names or patterns such as 'hopper-*'")
        sub.add_argument("--columns", nargs="+", default=[], metavar="COLUMN", help="likewise")
        add_workdir(sub)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="compute.* and tracking_uri")
        return sub

    plan = add_one("plan", "What `table run` would train: what is in MLflow already is not trained again.")
    plan.add_argument("--json", action="store_true")
    plan.add_argument("--time", action="store_true", help="how long it would take, too (measures what is not known)")

    text = "address of MLflow's pages, for links (default: the store if it is a server, else that of `offsweep ui`)"
    run = add_one(
        "run", "Train what a table misses, go on with what was killed, and write it in all formats. Exit code 1: "
        "something is still missing.",
    )  # fmt: skip
    run.add_argument("--mlflow", metavar="ADDRESS", help=text)

    show = add_one("show", "Print a table as far as it is filled: ours beside the published values.")
    show.add_argument("--json", action="store_true")
    show.add_argument("--cells", action="store_true", help="a line for every cell: verdict, interval, source")
    show.add_argument("--out", type=Path, metavar="FOLDER", help="write Markdown, LaTeX, CSV, JSON and HTML there")
    show.add_argument("--mlflow", metavar="ADDRESS", help=text)
    show.add_argument("--refresh", action="store_true", help="ask MLflow for all runs, not only for what is new")

    take = add("import", "Add published values from a CSV file to the tables of this work folder.", group)
    take.add_argument("file", type=Path, help="with the columns that docs/tables.md names")
    add_workdir(take)


def _add_cluster_commands(add: Callable[..., Any], add_workdir: Callable[[argparse.ArgumentParser], None]) -> None:
    text = "Clusters of several machines (docs/cluster.md): check."
    cluster = add("cluster", text).add_subparsers(dest="cluster_command", required=True, metavar="COMMAND")
    check = add(
        "check", "Check files that start a cluster (Ray's launcher, KubeRay, SLURM) without a network, or with --live "
        "a cluster that runs. Exit code 1: something is wrong.", cluster,
    )  # fmt: skip
    check.add_argument(
        "files", nargs="*", type=Path, metavar="FILE",
        help="files to check; without any and without --live those that come with offsweep",
    )  # fmt: skip
    check.add_argument("--crd", type=Path, help="KubeRay's CustomResourceDefinitions, to hold manifests against")
    check.add_argument("--live", action="store_true", help="check a running cluster before a study starts on it")
    check.add_argument("--address", help="of the running cluster: HOST:PORT or auto (default: $RAY_ADDRESS)")
    check.add_argument("--tracking-uri", help="of MLflow (default: $MLFLOW_TRACKING_URI, else the work folder's)")
    check.add_argument("--strict", action="store_true", help="exit code 1 also for what is marked todo")
    check.add_argument("--json", action="store_true")
    add_workdir(check)


def _add_data_commands(add: Callable[..., Any], add_workdir: Callable[[argparse.ArgumentParser], None]) -> None:
    text = "Datasets: list, info, verify, download, export, collect, train-actor; environments."
    data = add("data", text).add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    name_help = "a name, a path, or either with options behind it: hopper-medium-v2,first=100000"

    listing = add("list", "The datasets known by name: what is here, in the flat store, or to be downloaded.", data)
    listing.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern such as 'hopper-*-v2'")
    listing.add_argument("--json", action="store_true")
    add_workdir(listing)

    environments = add("environments", "The environments with shifted dynamics, and what each one changes.", data)
    environments.add_argument(
        "pattern", nargs="?", help="part of an id, or a pattern such as '*/Ant-kinematic*-v5': lists single ids"
    )
    environments.add_argument("--json", action="store_true")

    info = add("info", "What a dataset holds: rows, returns, score, hash, provenance.", data)
    info.add_argument("dataset", help=name_help)
    info.add_argument("--json", action="store_true")
    add_workdir(info)

    check = add(
        "verify", "Check a dataset: bounds, episode ends, duplicates, statistics, and its steps repeated in the "
        "simulator. Exit code 1: not what it says it is.", data,
    )  # fmt: skip
    check.add_argument("dataset", help="a name or a path")
    check.add_argument("--rows", type=int, default=2000, help="rows repeated in the simulator (default: %(default)s)")
    check.add_argument("--json", action="store_true")
    add_workdir(check)

    fetch = add("download", "Download datasets of D4RL, Minari or NeoRL and convert them to the flat store.", data)
    fetch.add_argument("datasets", nargs="+", metavar="dataset", help="names")
    add_workdir(fetch)

    export = add("export", "Write a dataset as an HDF5 file in D4RL's layout.", data)
    export.add_argument("dataset", help=name_help)
    export.add_argument("file", type=Path, help="the .hdf5 file to be written")
    add_workdir(export)

    collect = add("collect", "Collect a dataset by D4RL's recipe: whole trajectories, sampled actions.", data)
    collect.add_argument(
        "recipe", nargs="?", help="such as hopper-medium-expert (see README): names the environment and the actors"
    )
    collect.add_argument("--env", help="a Gymnasium id, such as Hopper-v5; with a recipe: instead of its own")
    collect.add_argument(
        "--policy", action="append",
        help="instead of a recipe: random, an embedded actor's name or a policy file (.npz); several share the rows in "
        "the order given",
    )  # fmt: skip
    collect.add_argument("--rows", type=int, help="transitions; with a recipe by default as many as D4RL has")
    collect.add_argument("--name", help="the dataset's name from now on; default: collected/RECIPE")
    collect.add_argument("--seed", type=int, default=0)
    collect.add_argument("--deterministic", action="store_true", help="the policies' mean actions")
    collect.add_argument(
        "--workers", type=int, default=0, help="Ray actors that step environments; 0 (default): this process. The rows "
        "are the same",
    )  # fmt: skip
    add_workdir(collect)

    actor = add("train-actor", "Train an actor online with soft actor-critic; keep snapshots and learning curve.", data)
    actor.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    text = "stop at the first snapshot with this normalised score (33: D4RL's medium) and keep it as actor.npz"
    actor.add_argument("--until", type=float, metavar="SCORE", help=text)
    actor.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="env_id, steps, seed, hidden, learning_rate, snapshot_every, ...",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["sweep", "show"]:
        words = words[1:]
    # argparse takes overrides that come behind an option for words it does not know
    args, rest = parser.parse_known_args(words)
    if rest and (any(word.startswith("-") for word in rest) or "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        check_packages()
        prepare_environment()
        return _dispatch(args)
    except UserError as error:
        print(f"offsweep: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `offsweep data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it does not complain again
        return 0
    except KeyboardInterrupt:
        print("offsweep: stopped; nothing is lost, `offsweep resume NAME` goes on", file=sys.stderr)
        return 130


def _dispatch(args: argparse.Namespace) -> int:
    given, default = getattr(args, "workdir", None), Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    args.workdir = given or default
    # imported here: torch, ray and mlflow read the environment that prepare_environment has set
    if args.command == "data":
        return _data(args)
    if args.command == "methods":
        return _methods()
    if args.command == "ui":
        from orchestrator.tracking import check_reachable, default_tracking_uri, ui_command, ui_environment

        uri = default_tracking_uri(args.workdir)
        check_reachable(uri)
        command = ui_command(uri, host=args.host, port=args.port, allowed_hosts=args.allowed_hosts, auth=args.auth)
        if args.host not in ("127.0.0.1", "localhost", "::1") and not args.auth:
            print("anyone who reaches this address can read, change and delete runs; --auth asks for a password")
        print(f"open http://{args.host}:{args.port} (stop with Ctrl-C)")
        environment = os.environ | ui_environment(uri, args.auth)
        return subprocess.run(command, check=False, env=environment).returncode
    from rich.console import Console

    if args.command == "cluster":
        from orchestrator.cluster_check import run_checks, show_checks

        checks = run_checks(args.files, args.crd, args.live, args.address, args.workdir, args.tracking_uri)
        return show_checks(checks, Console(), args.json, args.strict)
    if args.command == "show":  # before torch, which takes longer to load than this does
        from orchestrator import reading

        console = Console() if sys.stdout.isatty() else Console(width=140)
        reading.show(args.name, args.workdir, console, args.top, args.json, args.figures)
        return 0
    if args.command == "report":
        from orchestrator.report import report

        print(report(args.name, args.workdir, args.out, args.mlflow))
        return 0
    if args.command == "compare":
        from orchestrator.comparison import compare

        compare(
            args.groups, args.workdir, Console() if sys.stdout.isatty() else Console(width=160), args.json, args.html
        )
        return 0
    if args.command == "table":
        return _table(args, Console() if sys.stdout.isatty() else Console(width=160))
    if args.command == "status":
        return _status(args, Console() if sys.stdout.isatty() else Console(width=160))
    from orchestrator import launch
    from orchestrator.config import load_config

    console = Console() if sys.stdout.isatty() else Console(width=140)
    if args.command == "lab":
        from orchestrator.labs import list_labs, run_lab

        if args.lab is None:
            list_labs(console)
        else:
            run_lab(args.lab, str(args.workdir), args.seeds, args.updates, console)
        return 0
    if args.command == "resume":
        launch.resume(args.name, args.workdir, args.overrides, console)
        return 0
    files: list[Path] = []
    if args.command == "train" and args.config:
        files = [args.config]
    elif args.command == "sweep":
        files = [_study_file(args.study)]
    elif args.command == "plan":
        files = [Path(word) for word in args.overrides if word.endswith((".yaml", ".yml")) and "=" not in word]
        args.overrides = [word for word in args.overrides if Path(word) not in files]
    elif args.command == "demo":
        files = [STUDIES / "demo.yaml"]
    option = [{"workdir": str(given)}] if given else []
    profile = ["compute.profile=true"] if getattr(args, "profile", False) else []
    config = load_config([{"workdir": str(default)}, *files, *option], [*args.overrides, *profile])
    workdir = Path(config.workdir)
    if args.command == "plan":
        launch.plan(config, console, args.json, args.gpus, args.cpus)
        return 0
    if args.command in ("sweep", "demo") and not config.study.name:
        config.study.name = files[0].stem
    if args.command == "demo":
        config.study.name = _free_name(workdir, config.study.name)
    if args.command == "sweep" and args.resume:
        launch.resume(config.study.name, workdir, [], console, asked=config)
        return 0
    launch.start(config, console)
    return 0


def _table(args: argparse.Namespace, console: Any) -> int:
    from orchestrator import tables

    workdir = Path(args.workdir).absolute()
    if args.table_command == "list":
        tables.list_tables(console)
        return 0
    if args.table_command == "import":
        tables.import_references(args.file, workdir, console)
        return 0
    wanted = tables.Wanted(args.table, workdir, args.scale, args.rows, args.columns, args.overrides)
    if args.table_command == "run":
        return tables.run_table(wanted, console, args.mlflow)
    if args.table_command == "plan":
        tables.plan_table(wanted, console, as_json=args.json, measure=args.time)
    else:
        tables.show_table(
            wanted, console, as_json=args.json, cells=args.cells, out=args.out, mlflow=args.mlflow, anew=args.refresh
        )
    return 0


def _status(args: argparse.Namespace, console: Any) -> int:
    from orchestrator.status import show_status, watch_status

    if args.watch is None:
        show_status(args.workdir, console, args.name, args.json, args.prometheus)
        return 0
    if args.json or args.prometheus or args.watch <= 0:
        raise UserError("--watch takes a number of seconds above 0, and neither --json nor --prometheus")
    try:
        watch_status(args.workdir, console, args.name, args.watch)
    except KeyboardInterrupt:
        return 0
    return 0


def _study_file(given: Path) -> Path:
    """The file that is named, or that of a study that comes with offsweep."""
    if given.exists() or given.suffix or len(given.parts) > 1:
        return given
    known = {path.stem.replace("_", "-"): path for path in STUDIES.glob("*.yaml")}
    name = str(given).replace("_", "-")
    if name not in known:
        raise UserError(
            f"there is no file {str(given)!r} here and no such study comes with offsweep; known: "
            f"{', '.join(sorted(known))}"
        )
    return known[name]


def _free_name(workdir: Path, name: str) -> str:
    """demo, demo-2, demo-3, ...: the demo can be run again."""
    names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
    return next(n for n in names if not (workdir / "studies" / n).exists())


def _data(args: argparse.Namespace) -> int:
    from orchestrator import data_commands

    if args.data_command == "train-actor":
        from orchestrator.actor_training import train_actor

        return train_actor(args.overrides, args.out, args.until)
    if args.data_command == "list":
        data_commands.show_catalogue(args.workdir, args.pattern, args.json)
    elif args.data_command == "environments":
        data_commands.show_environments(args.pattern, args.json)
    elif args.data_command == "info":
        data_commands.show_info(args.dataset, args.workdir, args.json)
    elif args.data_command == "verify":
        return data_commands.verify_dataset(args.dataset, args.workdir, args.json, args.rows)
    elif args.data_command == "download":
        data_commands.download(args.datasets, args.workdir)
    elif args.data_command == "export":
        data_commands.export(args.dataset, args.file, args.workdir)
    elif args.data_command == "collect":
        data_commands.collect_dataset(
            data_commands.CollectRequest(
                recipe=args.recipe, env_id=args.env, policies=args.policy or [], rows=args.rows, name=args.name,
                seed=args.seed, deterministic=args.deterministic, workers=args.workers,
            ),
            args.workdir,
        )  # fmt: skip
    return 0


def _methods() -> int:
    from agents.method import load_method, method_names, settings_file

    width = max(map(len, method_names()))
    for name in method_names():
        content = settings_file(name)
        variants = ", ".join(f"{v} (default)" if v == content["default_variant"] else v for v in content["variants"])
        print(f"{name:<{width}} {(sys.modules[load_method(name).__module__].__doc__ or '').splitlines()[0]}")
        print(f"{'':<{width}} variants: {variants}")
    return 0
