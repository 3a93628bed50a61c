"""How long a million transitions take to be there: from HDF5, from Minari, and from the flat store.

The rows are those of a random policy in Hopper, some 45,000 short episodes: what Minari's group per episode is
slowest at. Files are dropped from the page cache before a cold reading.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.common import print_line, record, spread
from envs.cache import flat_store
from envs.collect import collect, uniform_policy
from envs.dataset import COLUMNS, Dataset
from envs.hdf5 import write_hdf5
from envs.registry import load_dataset

BATCH, BATCHES = 256, 1000
OPEN_SECONDS = 0.050  # what opening from the flat store may take
MINARI_NAME = "benchmark/hopper-random-v0"


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def drop_from_page_cache(folder: Path) -> None:
    """Let the kernel forget the contents of all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """What reading the file costs without any check or conversion."""
    with h5py.File(path, "r") as file:
        return {column: file[column][()] for column in COLUMNS}


def make_minari(dataset: Dataset) -> None:
    """Store the rows as a Minari dataset, by Minari's own means."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    buffers = []
    index = dataset.episodes
    for e, (start, end) in enumerate(zip(index.starts.tolist(), index.ends.tolist(), strict=True)):
        rows = slice(start, end)
        buffers.append(EpisodeBuffer(
            id=e, observations=np.concatenate([dataset.observations[rows], dataset.next_observations[end - 1 : end]]),
            actions=dataset.actions[rows], rewards=dataset.rewards[rows],
            terminations=dataset.terminals[rows], truncations=dataset.timeouts[rows],
        ))  # fmt: skip
    minari.create_dataset_from_buffers(MINARI_NAME, buffers, env=dataset.env_id)


def read_minari(name: str) -> int:
    """Minari's own loop over episodes."""
    import minari

    return sum(len(episode.rewards) for episode in minari.load_dataset(name).iterate_episodes())


def lines(args: argparse.Namespace, folder: Path, command: str) -> Iterator[dict[str, Any]]:
    workdir, path = folder / "work", folder / "hopper-random.hdf5"
    print(f"collecting {args.rows} transitions of Hopper", file=sys.stderr)
    rows = collect("Hopper-v5", [(uniform_policy("Hopper-v5"), 1.0)], args.rows, seed=0)
    write_hdf5(rows, path)
    shared: dict[str, Any] = {"rows": rows.num_transitions, "episodes": len(rows.episodes)}

    def cold(name: str, source: Path, reference: Callable[[], object], case: str, reference_is: str) -> dict[str, Any]:
        ours, theirs = [], []
        for _ in range(args.repeats):
            drop_from_page_cache(source)
            theirs.append(seconds(reference))
            for stored in flat_store(workdir).folder.glob("sources/*.json"):
                stored.unlink()  # the store has not seen this source
            drop_from_page_cache(source)
            ours.append(seconds(lambda: load_dataset(name, workdir)))
        return record(
            "data_load", case, statistics.median(ours), "s", statistics.median(theirs), 1, command,
            reference_is=reference_is, includes="checks, content hash and writing the flat store", **shared,
            **spread("value", ours), **spread("reference", theirs),
        )  # fmt: skip

    yield cold(
        str(path), path.parent, lambda: read_columns(path), "hdf5_cold", "reading the file's columns with h5py, no more"
    )
    if args.minari:
        print("writing the Minari dataset", file=sys.stderr)
        os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
        make_minari(rows)
        yield cold(
            MINARI_NAME, folder / "minari", lambda: read_minari(MINARI_NAME), "minari_cold",
            "minari.load_dataset and its iterate_episodes, rows not kept",
        )  # fmt: skip
    yield warm(args, str(path), workdir, rows, shared, command)


def warm(
    args: argparse.Namespace, name: str, workdir: Path, rows: Dataset, shared: dict[str, Any], command: str
) -> dict[str, Any]:
    """Opening from the flat store, and batches from its mapped columns beside batches from arrays in memory."""
    stored = load_dataset(name, workdir)
    opening = [seconds(lambda: load_dataset(name, workdir)) for _ in range(20)]
    mapped: list[float] = []
    in_memory: list[float] = []
    for turn in range(max(args.repeats, 5)):
        for data, times in ((stored, mapped), (rows, in_memory)):
            rng = np.random.default_rng(turn)
            times.append(seconds(lambda: [data.sample(BATCH, rng) for _ in range(BATCHES)]))  # noqa: B023
    return record(
        "data_load", "cache_warm", statistics.median(opening), "s", OPEN_SECONDS, 1, command,
        reference_is="the target for opening", **spread("value", opening), batches=BATCHES, batch_size=BATCH,
        batches_seconds=statistics.median(mapped), batches_seconds_in_memory=statistics.median(in_memory),
        batches_ratio=statistics.median(mapped) / statistics.median(in_memory), **shared,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_load", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="cold readings of each kind (default: %(default)s)")
    parser.add_argument("--no-minari", dest="minari", action="store_false", help="where Minari is not installed")
    args = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks.data_load", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(args, Path(folder), command):
            print_line(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
