"""Speed of policy-guided diffusion: updates of the denoiser and sampled trajectories per CPU-second.

Trajectories of 32 rows with Hopper's 11 observations and 3 actions, a U-Net of 3 blocks of 64 or 256 features, one
thread:

- `train/<features>/<precision>`: one update of 32 windows, its draws, Adam and the running means included;
- `unguided/<features>/<steps>/<precision>`: trajectories by so many steps of the second-order sampler with churn;
- `guided/<features>/<steps>/<precision>`: the same towards one deterministic policy of 2 x 256, with the settings that
  `method.guidance` has by default: direction normalised, at the denoised trajectory, which is the last one made.

`float32` and `mixed` (products in bfloat16) take turns, and with them another implementation, if `--peer COMMAND`
names one: a program that answers each line of its standard input, `train <features>`, `unguided <features> <steps>
<trajectories>` or `guided ...`, by doing that once (compilation and a first call left out) and printing a JSON object
with `done` (updates or trajectories) and `cpu_seconds`. `--peer-name` says what it is. Without a peer the reference is
`float32`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agents.actors import TanhActor
from agents.chunk import PRECISIONS
from agents.edm_sampler import SamplerConfig
from agents.guidance import GuidanceConfig
from agents.method import Termination, TrainingData
from agents.networks import StackedMLP, initialise
from agents.randomness import generator
from agents.trajectory_diffusion import DiffusionConfig, DiffusionTrainer, TrajectoryModel
from agents.trajectory_rollout import TrajectoryJob
from benchmarks.common import Answer, Work, measure_cases, measure_in_turns

BENCHMARK = "pgd_speed"
OBS, ACT, LENGTH, BATCH = 11, 3, 32, 32
TRAJECTORIES = {64: 128, 256: 32}  # of a call, by features
UPDATES = {64: 20, 256: 2}  # of a call
CASES = tuple(
    [f"train {features}" for features in TRAJECTORIES]
    + [f"{kind} 64 {steps}" for steps in (32, 64) for kind in ("unguided", "guided")]
    + [f"{kind} 256 32" for kind in ("unguided", "guided")]
)


def trainer(features: int, precision: str) -> DiffusionTrainer:
    """Of drawn data: what is learned does not matter here."""
    draw, n = torch.Generator().manual_seed(0), 20_000
    data = TrainingData(
        "Hopper-v5", torch.randn(n, OBS, generator=draw), torch.rand(n, ACT, generator=draw) * 2 - 1,
        torch.randn(n, generator=draw), torch.randn(n, OBS, generator=draw), torch.zeros(n),
        episode_starts=torch.arange(0, n, 500),
    )  # fmt: skip
    return DiffusionTrainer(data, DiffusionConfig(length=LENGTH, features=features, precision=precision))


def training(features: int, precision: str) -> Work:
    course, done = trainer(features, precision), 0
    batches = course.batches()

    @torch.inference_mode()
    def work() -> int:
        nonlocal done
        for _ in range(UPDATES[features]):
            course.step(done, *next(batches))
            done += 1
        return UPDATES[features]

    return work


def sampling(model: TrajectoryModel, guided: bool, steps: int, num_trajectories: int, precision: str) -> Work:
    policy = StackedMLP((1,), (OBS, 256, 256, ACT))
    initialise(policy, [generator(0, "actor")], scheme="torch", last_bound=0.0)
    sampler = SamplerConfig(num_steps=steps, precision=precision)
    job = TrajectoryJob(
        (0,), (0,), 0, 0, num_trajectories, TanhActor(policy) if guided else None, torch.ones(1), sampler,
        GuidanceConfig(), Termination("Hopper-v5"), torch.device("cpu"),
    )  # fmt: skip

    def work() -> int:
        job.run(model)
        return num_trajectories

    return work


def works_of(case: str) -> dict[str, Work]:
    """What a case does, by precision."""
    kind, size, *more = case.split()
    features = int(size)
    if kind == "train":
        return {precision: training(features, precision) for precision in PRECISIONS}
    model = trainer(features, "float32").model()
    how = (model, kind == "guided", int(more[0]), TRAJECTORIES[features])
    return {precision: sampling(*how, precision) for precision in PRECISIONS}


def measure(case: str, blocks: int, peer: Answer | None, name: str, command: str) -> list[dict[str, Any]]:
    kind, size = case.split()[:2]
    asked = case if kind == "train" else f"{case} {TRAJECTORIES[int(size)]}"
    unit = "updates" if kind == "train" else "trajectories"
    return measure_in_turns(BENCHMARK, case, unit, works_of(case), blocks, peer, asked, name, command)


def main(argv: Sequence[str] | None = None) -> int:
    measure_cases(BENCHMARK, __doc__, CASES, 5, measure, argv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
