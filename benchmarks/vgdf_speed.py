"""Speed of VGDF: gradient steps of its dynamics, its updates, its environment steps and all of it together, and what a
full run of 1,000,000 source and 100,000 target steps takes by these.

HalfCheetah's 17 observations and 6 actions, the released settings, one thread:

- `refit/<rows>/<precision>`: gradient steps per CPU-second of a refit of 7 networks of 4 x 200 on so many target rows,
  its draws, gathers and holdout errors included; two epochs, the fewest that the released schedule takes;
- `update/<which>/<pack>/<precision>`: updates of runs per CPU-second on 128 source and 128 target rows, gathered, with
  the policies every second time; `unfiltered` as in the beginning of a run, when nobody asks for fictitious values, and
  `filtered` by these as behind `start_gate`;
- `step/<domain>`: environment steps per CPU-second, the policy's draw of an action included;
- `loop/<pack>/<precision>`: iterations of runs per CPU-second of all of it together, 250 of them from iteration 200,000
  on: a step in the source each, every tenth time one in the target, one refit on 20,000 rows, filtered updates;
- `full/<precision>`: CPU hours of a run, by its parts.

Data are drawn: how long a product takes does not depend on what is learned, and targets that cannot be learned end
every refit after its fewest epochs. The first `full` line is therefore a lower bound, as is the reference's.

`float32` and `mixed` take turns, and with them another implementation, if `--peer COMMAND` names one: a program that
answers each line of its standard input, a case without its pack and precision (`refit 2000`, `update filtered`,
`step source`, `loop`), by doing that once and printing a JSON object with `done` and `cpu_seconds`. `--peer-name` says
what it is. Without a peer the reference is `float32`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.chunk import PRECISIONS, matrix_precision
from agents.cross_domain import joined
from agents.domain_sac import DomainSAC, DomainSACConfig, make_domain_sac
from agents.method import TrainingData, load_method
from agents.randomness import generator
from agents.replay import Replay, transition_rows
from agents.target_dynamics import TargetDynamics, TargetDynamicsConfig
from agents.value_proximity import ValueGate
from benchmarks.common import Answer, Work, measure_cases, measure_in_turns, print_line, record
from envs.episodes import make_env
from envs.registry import load_dataset
from envs.termination import never_done
from orchestrator.config import load_config

BENCHMARK = "vgdf_speed"
OBS, ACT, BATCH = 17, 6, 128
ROWS = (2_000, 20_000, 100_000)  # of the target replay
PACKS = (1, 3)
UPDATES, STEPS = 50, 1_000  # of a measurement
ENVIRONMENTS = {"source": "offsweep/HalfCheetah-v5", "target": "offsweep/HalfCheetah-kinematic-v5"}
LOOP_AT, LOOP = 200_000, 250  # iterations: the first, and of a measurement
LATE = 10_000_000  # an update at which the schedule has no patience left
# a full run: source steps, of which so many before the filter; steps per target step; evaluation every so many updates
FULL, UNFILTERED, GAMMA, EVALUATE_EVERY, EVALUATION_STEPS = 1_000_000, 100_000, 10, 10_000, 5_000
PARTS = tuple(
    [f"refit {rows}" for rows in ROWS]
    + [f"update {which} {pack}" for which in ("unfiltered", "filtered") for pack in PACKS]
    + [f"step {domain}" for domain in ENVIRONMENTS]
)
CASES = (*PARTS, *(f"loop {pack}" for pack in PACKS))
UNITS = {
    "loop": "iterations of a run", "refit": "gradient steps", "update": "updates of a run", "step": "environment steps",
}  # fmt: skip


def drawn_rows(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    obs, next_obs = (torch.randn(count, OBS, generator=draw) for _ in range(2))
    action, reward = torch.rand(count, ACT, generator=draw) * 2 - 1, torch.randn(count, generator=draw)
    return transition_rows(obs, action, reward, torch.zeros(count), next_obs)


def refitting(rows: int, precision: str) -> Work:
    dynamics, data = TargetDynamics(TargetDynamicsConfig(precision=precision), [0], OBS, ACT), drawn_rows(rows)
    t = LATE

    def work() -> int:
        nonlocal t
        t += 1
        (metrics,) = dynamics.refit([data], t)
        return int(metrics["dynamics/gradient_steps"])

    return work


def learner(pack: int) -> DomainSAC:
    config = DomainSACConfig(actor_every=2, max_grad_norm=100.0)
    return make_domain_sac([config] * pack, range(pack), OBS, ACT, optimistic=True)


def updating(which: str, pack: int, precision: str) -> Work:
    sac, dynamics = learner(pack), TargetDynamics(TargetDynamicsConfig(precision=precision), range(pack), OBS, ACT)
    filtered, values = which == "filtered", ValueGate("code", "topk", 0.25, "batch", never_done)
    replays = [Replay(torch.empty(0, 2 * OBS + ACT + 2), pack, 20_000) for _ in range(2)]
    for replay in replays:
        for m in range(pack):
            replay.add(m, drawn_rows(20_000))
    starts = torch.arange(pack).unsqueeze(1) * 20_000
    draw = generator(0, "benchmark")

    def work() -> int:
        with matrix_precision(precision):
            noise = torch.randn(UPDATES, sac.num_noises, pack, 2 * BATCH, ACT, generator=draw)
            indices = torch.randint(20_000, (UPDATES, 2, pack, BATCH), generator=draw) + starts
            for i in range(UPDATES):
                drawn = [replay.gather(at) for replay, at in zip(replays, indices[i], strict=True)]
                batch = joined(drawn[0], drawn[1])
                targets = sac.targets(batch.rows_MBW, noise[i, 0])
                if filtered:
                    batch, _ = values(sac, dynamics.predict, batch, targets, noise[i], False)
                sac.update(batch, noise[i], i % 2, targets=targets)
        return UPDATES * pack

    return work


def stepping(domain: str) -> Work:
    env, sac = make_env(ENVIRONMENTS[domain]), learner(1)
    obs, _ = env.reset(seed=0)
    draw = generator(0, "benchmark")

    def work() -> int:
        nonlocal obs
        noise = torch.randn(STEPS, 1, 1, ACT, generator=draw)
        for i in range(STEPS):
            x = torch.as_tensor(obs, dtype=torch.float32).view(1, 1, -1)
            action = sac.sample_actions(x, noise[i]).view(-1).numpy()
            obs, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                obs, _ = env.reset()
        return STEPS

    return work


def looping(pack: int, precision: str) -> Work:
    words = [
        "method=vgdf", f"dataset=online/{ENVIRONMENTS['source']}", f"method.target={ENVIRONMENTS['target']}",
        f"method.updates_per_epoch={LOOP}", f"method.precision={precision}", f"method.dynamics.precision={precision}",
    ]  # fmt: skip
    config = load_config([], words)
    dataset, bound = load_dataset(config.dataset, Path(config.workdir)), np.ones(ACT, np.float32)
    data = TrainingData.from_dataset(dataset, -bound, bound)
    method: Any = load_method("vgdf")([config.method] * pack, range(pack), data, {}, "cpu")
    for m in range(pack):
        method.source.add(m, drawn_rows(LOOP_AT))
        method.target.add(m, drawn_rows(LOOP_AT // GAMMA))
    epoch = LOOP_AT // LOOP

    def work() -> int:
        nonlocal epoch
        method.train_epoch(epoch)
        epoch += 1
        return LOOP * pack

    return work


def works_of(case: str) -> dict[str, Work]:
    """What a case does, by precision."""
    kind, *more = case.split()
    if kind == "refit":
        return {precision: refitting(int(more[0]), precision) for precision in PRECISIONS}
    if kind == "loop":
        return {precision: looping(int(more[0]), precision) for precision in PRECISIONS}
    if kind == "update":
        return {precision: updating(more[0], int(more[1]), precision) for precision in PRECISIONS}
    return {"float32": stepping(more[0])}


def measure(case: str, blocks: int, peer: Answer | None, name: str, command: str) -> list[dict[str, Any]]:
    """The lines of a case, one for each precision."""
    kind = case.split()[0]
    asked = kind if kind == "loop" else " ".join(case.split()[:2])
    return measure_in_turns(BENCHMARK, case, UNITS[kind], works_of(case), blocks, peer, asked, name, command)


def full_run(lines: Sequence[dict[str, Any]], side: str, precision: str) -> dict[str, float]:
    """CPU hours of a full run of one member by its parts, from the measured rates.

    Args:
        side: "value" or "reference", whose rates count.
        precision: of the lines that count.
    """
    rates = {line["case"]: line[side] for line in lines}
    seconds = [1 / rates[f"refit/{rows}/{precision}"] for rows in ROWS]
    config, refits = TargetDynamicsConfig(), 0.0
    for t in range(0, FULL + 1, config.refit_every):
        rows = t // GAMMA + 1
        held = int(rows * config.holdout_fraction)
        if t + 1 >= config.batch_size and held:
            steps = (config.patience_at(t) + 2) * -(-(rows - held) // config.batch_size)
            refits += steps * float(np.interp(rows, ROWS, seconds))
    parts = {
        "refits": refits,
        "updates": UNFILTERED / rates[f"update/unfiltered/1/{precision}"]
        + (FULL - UNFILTERED) / rates[f"update/filtered/1/{precision}"],
        "environments": FULL / rates["step/source/float32"] + FULL / GAMMA / rates["step/target/float32"],
        "evaluations": FULL / EVALUATE_EVERY * EVALUATION_STEPS / rates["step/target/float32"],
    }
    return {name: value / 3600 for name, value in parts.items()}


def full_lines(lines: Sequence[dict[str, Any]], name: str, command: str) -> list[dict[str, Any]]:
    made = []
    for precision in PRECISIONS:
        mine, theirs = (full_run(lines, side, precision) for side in ("value", "reference"))
        made.append(record(
            BENCHMARK, f"full/{precision}", sum(mine.values()), "CPU hours of a run, at least", sum(theirs.values()), 1,
            command, reference_is=name, source_steps=FULL, target_steps=FULL // GAMMA, schedule="released",
            parts=mine, reference_parts=theirs,
        ))  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    with torch.inference_mode():
        args, lines = measure_cases(BENCHMARK, __doc__, CASES, 3, measure, argv)
    if set(args.cases) >= set(PARTS):
        command = f"python -m benchmarks.{BENCHMARK} --blocks {args.blocks}"
        for line in full_lines(lines, args.peer_name if args.peer else "ours in float32, in turns", command):
            print_line(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
