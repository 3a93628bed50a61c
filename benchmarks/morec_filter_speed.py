"""Speed of the transition filter: filtered transitions per CPU-second, and what its cheaper scorers are worth.

One filtered step of 2,000 rows as MOREC-MOPO's rollouts make it (7 networks of 4 x 200, 5 elites drawn twice, softmax,
penalty over all 7; four shards of 500), its draws included and the policy's action not, by scorers of one dynamics
reward, learned from 100,000 transitions of the embedded medium actors' snapshots:

- `float32`, 40 discriminators (128, 256, 256, 256): the exact one; `bfloat16`: the same ones in bfloat16;
- `float32_k10`, `bfloat16_k10`, `float32_k4`: 10 and 4 of them;
- `distilled`: the one network that was fitted to them;
- `unfiltered`: a step of the plain ensemble.

All take turns in one process. Each cheaper scorer is held against the exact one on the same candidates, of the data's
states with the data's actions (`data_...`) and with uniform ones (`random_...`): largest and mean difference of p,
share of rows with the same best candidate, mean total variation of the softmax's odds, share of rows in which the same
draw takes the same candidate, and in which both agree about a cut.

`--peer COMMAND` measures another implementation in turns with ours: a program that is started with the name of a file
(as written by `torch.save`: `reward`, `ensemble`, `observations`, `actions`) and, for every line of its standard input,
makes one such step and prints a JSON object with `rows` and `cpu_seconds`. `--peer-name` says what it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.cpu import configure_cpu
from agents.dynamics import DynamicsConfig, Ensemble, train_ensemble
from agents.dynamics_reward import DynamicsReward, reward_of
from agents.dynamics_reward_training import DynamicsRewardConfig, train_dynamics_reward
from agents.method import TrainingData
from agents.model_based import FILTERED_SHARD_ROWS
from agents.penalties import max_aleatoric
from agents.rollout import Dynamics
from agents.transition_filter import FilterConfig, FilteredDynamics
from benchmarks.common import print_line, record, spread
from envs.registry import load_dataset
from orchestrator.learner import training_data

BENCHMARK = "morec_filter_speed"
ROBOTS = ("hopper", "halfcheetah")
EXACT = "float32"
SCORERS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "bfloat16": {"precision": "bfloat16"},
    "float32_k10": {"num_discriminators": 10},
    "bfloat16_k10": {"num_discriminators": 10, "precision": "bfloat16"},
    "float32_k4": {"num_discriminators": 4},
    "distilled": {"scorer": "distilled"},
}


def learned(robot: str, folder: Path, ensemble_epochs: int, reward_epochs: int) -> tuple[TrainingData, dict[str, Any]]:
    """A robot's data, and the ensemble's and the reward's state, which are kept in the folder."""
    dataset = load_dataset(f"embedded/{robot}-medium-snapshots-v0,subsample=100000,seed=0", folder)
    data, file = training_data(dataset, torch.device("cpu")), folder / f"{robot}-{ensemble_epochs}-{reward_epochs}.pt"
    if not file.exists():
        columns = (data.observations, data.actions, data.rewards, data.next_observations)
        ensemble = train_ensemble(*columns, DynamicsConfig(max_epochs=ensemble_epochs, max_holdout=1000))
        reward = train_dynamics_reward(data, DynamicsRewardConfig(max_epochs=reward_epochs))
        torch.save({"ensemble": ensemble.state_dict(), "reward": reward}, file)
    return data, torch.load(file)


def stepper(dynamics: Dynamics, state_action_BY: Tensor) -> Callable[[], None]:
    """One step of all rows with new draws, in shards as rollouts are made."""
    shards = [part.unsqueeze(0) for part in state_action_BY.split(FILTERED_SHARD_ROWS)]
    source, choices = torch.Generator().manual_seed(0), torch.tensor(dynamics.choices)

    @torch.inference_mode()
    def step() -> None:
        for shard in shards:
            noise = torch.randn((1, shard.shape[1], dynamics.num_noises), generator=source)
            choice = choices[torch.randint(len(choices), (1, shard.shape[1]), generator=source)]
            after = torch.empty((1, shard.shape[1], dynamics.observation_dim))
            dynamics.step(None, shard, noise, choice, max_aleatoric, after)

    return step


@contextmanager
def peer_of(command: str | None, inputs: dict[str, Any]) -> Iterator[Callable[[], dict[str, Any]] | None]:
    """What makes a step of another implementation; None where there is none."""
    if command is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.pt"
        torch.save(inputs, file)
        words = [*shlex.split(command), str(file)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            stdin, stdout = process.stdin, process.stdout

            def step() -> dict[str, Any]:
                stdin.write("\n")
                stdin.flush()
                answer: dict[str, Any] = json.loads(stdout.readline())
                return answer

            yield step
            stdin.close()


def agreement(
    exact: DynamicsReward, other: DynamicsReward, ensemble: Ensemble, state_action_BY: Tensor
) -> dict[str, float]:
    """How far two scorers of the same candidates go together."""
    settings = FilterConfig()
    dynamics = FilteredDynamics(ensemble, exact, settings)
    source = torch.Generator().manual_seed(1)
    noise = torch.randn((len(state_action_BY), dynamics.num_noises), generator=source)
    candidates = dynamics.candidates(state_action_BY, *ensemble.predict_elites(state_action_BY), noise)
    p, q = (one.probability(state_action_BY, candidates[..., :-1].transpose(0, 1)) for one in (exact, other))
    scores = [reward_of(x) for x in (p, q)]
    odds = [torch.softmax(x / settings.temperature, 1) for x in scores]
    taken = [dynamics.choose(x, noise[:, -1]) for x in scores]
    cut = [x.gather(1, at.unsqueeze(1)) < settings.threshold for x, at in zip(scores, taken, strict=True)]
    return {
        "max_difference": float((p - q).abs().max()),
        "mean_difference": float((p - q).abs().mean()),
        "same_best": float((p.argmax(1) == q.argmax(1)).double().mean()),
        "total_variation": float((odds[0] - odds[1]).abs().sum(1).mean() / 2),
        "same_choice": float((taken[0] == taken[1]).double().mean()),
        "same_cut": float((cut[0] == cut[1]).double().mean()),
        "cut_share": float(cut[1].double().mean()),
    }


def measure(
    robot: str,
    folder: Path,
    rows: int,
    blocks: int,
    epochs: tuple[int, int],
    peer: tuple[str, str] | None,
    command: str,
) -> list[dict[str, Any]]:
    """The lines of one robot.

    Args:
        epochs: of the ensemble and of the reward.
        peer: name and command of another implementation.
    """
    data, states = learned(robot, folder, *epochs)
    ensemble = Ensemble.from_state_dict(states["ensemble"])
    at = torch.randperm(len(data.observations), generator=torch.Generator().manual_seed(0))[:rows]
    obs, action = data.observations[at], data.actions[at]
    state_action = torch.cat((obs, action), 1)
    scorers = {name: DynamicsReward.from_state_dict(states["reward"], **how) for name, how in SCORERS.items()}
    steps = {
        name: stepper(FilteredDynamics(ensemble, scorer, FilterConfig()), state_action)
        for name, scorer in scorers.items()
    }
    steps["unfiltered"] = stepper(ensemble, state_action)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    theirs: list[float] = []
    inputs = {"reward": states["reward"], "ensemble": states["ensemble"], "observations": obs, "actions": action}
    with peer_of(None if peer is None else peer[1], inputs) as their_step:
        for block in range(blocks + 1):  # the first is not counted
            if their_step is not None:
                answer = their_step()
                theirs += [answer["rows"] / answer["cpu_seconds"]] if block else []
            for name, step in steps.items():
                begun, made = time.process_time(), 0
                while not made or (time.process_time() - begun < 0.5):
                    step()
                    made += rows
                rates[name] += [made / (time.process_time() - begun)] if block else []
    uniform = 2 * torch.rand(action.shape, generator=torch.Generator().manual_seed(2)) - 1
    places = {"data": state_action, "random": torch.cat((obs, uniform), 1)}
    against = theirs or rates[EXACT]
    reference_is = "ours in float32, in turns" if peer is None else f"{peer[0]}: its own code, in turns on equal inputs"
    lines = []
    for name, mine in rates.items():
        paired = [a / b for a, b in zip(mine, against, strict=True)]
        more: dict[str, Any] = {}
        if name in scorers:
            for place, where in places.items():
                found = agreement(scorers[EXACT], scorers[name], ensemble, where)
                more |= {f"{place}_{key}": value for key, value in found.items()}
        lines.append(record(
            BENCHMARK, f"{robot}/{name}", statistics.median(mine), "filtered transitions per CPU-second",
            statistics.median(against), 1, command, reference_is=reference_is, rows=rows, candidates=10,
            discriminators=scorers[name].num_discriminators if name in scorers else 0,
            widths=[states["reward"]["tensors"][f"b{i}"].shape[-1] for i in range(4)], blocks=blocks,
            ensemble_epochs=epochs[0], reward_epochs=epochs[1], **spread("value", mine), **spread("ratio", paired),
            **more, load_average=os.getloadavg()[0],
        ))  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--robots", nargs="+", choices=ROBOTS, default=list(ROBOTS))
    parser.add_argument("--rows", type=int, default=2_000, help="of a step (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=5, help="measurements of each thing (default: %(default)s)")
    parser.add_argument("--ensemble-epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--reward-epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where data and what is learned from it are kept (default: nowhere)"
    )
    parser.add_argument("--peer", help="command of another implementation")
    parser.add_argument("--peer-name", default="another implementation", help="repository and commit")
    args = parser.parse_args(argv)
    if min(args.rows, args.blocks, args.ensemble_epochs, args.reward_epochs) < 1:
        parser.error("rows, blocks and epochs must be greater than 0")
    configure_cpu(1)
    peer = None if args.peer is None else (args.peer_name, args.peer)
    sizes = f"--rows {args.rows} --blocks {args.blocks}"
    learning = f"--ensemble-epochs {args.ensemble_epochs} --reward-epochs {args.reward_epochs}"
    with tempfile.TemporaryDirectory() as none:
        folder = args.folder or Path(none)
        for i, robot in enumerate(args.robots, start=1):
            print(f"[{i}/{len(args.robots)}] {robot}", file=sys.stderr, flush=True)
            command = f"python -m benchmarks.{BENCHMARK} --robots {robot} {sizes} {learning}"
            epochs = args.ensemble_epochs, args.reward_epochs
            for line in measure(robot, folder, args.rows, args.blocks, epochs, peer, command):
                print_line(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
