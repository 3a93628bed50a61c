"""Does a learned dynamics reward know which of a model's predictions are wrong? (docs/morec.md)

For each dataset an ensemble of the usual kind and dynamics rewards with several seeds are trained. Then, at states and
actions that neither has seen, the ensemble's five elites draw ten next observations, as the transition filter has them,
and each is held against the simulator. Cases are `<task>/<states and actions>`:

    fresh            other episodes of the policies that collected the data
    random actions   uniform actions at the same states
    expert           episodes of the expert, which the data do not have
    near, far        of the refrigerator: temperatures -4..10 and powers 0..4; -15..20 and 0..10, of which the data have
                     a narrow band

`value` is the mean error of the candidate with the largest r_D, `reference` that of a random candidate: errors are root
mean squares over observation columns, in standard deviations of the data. Means over the rewards' seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from agents.cpu import configure_cpu
from agents.diagnostics import spearman
from agents.dynamics import DynamicsConfig, Ensemble, train_ensemble
from agents.dynamics_reward import DynamicsReward, reward_of
from agents.dynamics_reward_training import DynamicsRewardConfig, train_dynamics_reward
from agents.method import TrainingData
from agents.randomness import generator
from benchmarks.common import print_line, record, spread
from envs.errors import UserError
from envs.recipes import EMBEDDED
from envs.registry import load_dataset
from envs.toys import Refrigerator
from envs.true_dynamics import TrueDynamics
from orchestrator.learner import action_bounds, training_data

BENCHMARK = "dynamics_reward"
TASKS = {
    "refrigerator": "embedded/refrigerator-behaviour-v0",
    "hopper": "embedded/hopper-medium-snapshots-v0",
    "halfcheetah": "embedded/halfcheetah-medium-snapshots-v0",
}
ROWS = 2_000  # of every case
FRESH_SEED = 991  # of the episodes that nobody has learned from
DRAWS, THRESHOLD, TEMPERATURE = 2, 0.6, 0.1  # of each elite; the filter's defaults


class Transitions(NamedTuple):
    """What the simulator makes of states and actions, as a `TrainingData` has them: (B, S), (B, A), (B, S)."""

    observations: Tensor
    actions: Tensor
    next_observations: Tensor


def robot_cases(task: str, data: TrainingData, fresh: TrainingData, workdir: Path) -> dict[str, Transitions]:
    """Rows of data that are there, and what the simulator says of random actions."""
    assert fresh.states is not None
    draw = generator(0, BENCHMARK)
    rows = torch.randperm(len(fresh.observations), generator=draw)[:ROWS]
    expert = training_data(load_dataset(f"embedded/{task}-expert-v0", workdir), torch.device("cpu"))
    actions = torch.rand((ROWS, data.action_dim), generator=draw) * 2 - 1
    low, high = action_bounds(data.env_id)
    in_environment = (low + high) / 2 + (high - low) / 2 * actions.double().numpy()
    after = TrueDynamics(data.env_id).step(fresh.states[rows].numpy(), in_environment).observations
    others = torch.randperm(len(expert.observations), generator=draw)[:ROWS]
    return {
        "fresh": Transitions(fresh.observations[rows], fresh.actions[rows], fresh.next_observations[rows]),
        "random actions": Transitions(fresh.observations[rows], actions, torch.tensor(after).float()),
        "expert": Transitions(
            expert.observations[others], expert.actions[others], expert.next_observations[others]
        ),
    }  # fmt: skip


def refrigerator_cases(fresh: TrainingData) -> dict[str, Transitions]:
    """Its true dynamics: without the sensor's noise, door shut."""
    true = TrueDynamics(fresh.env_id)

    def after(temperature: Tensor, action: Tensor) -> Tensor:
        power = (action.double().numpy() + 1) * Refrigerator.MAX_POWER / 2
        return torch.tensor(true.step(true.states_of(temperature.numpy()), power).observations).float()

    draw = generator(0, BENCHMARK)
    rows = torch.randperm(len(fresh.observations), generator=draw)[:ROWS]
    cases = {"fresh": (fresh.observations[rows], fresh.actions[rows])}
    for name, (low, high), power in (("near", (-4, 10), 4), ("far", (-15, 20), Refrigerator.MAX_POWER)):
        temperature, share = torch.rand((2, ROWS, 1), generator=draw).unbind()
        cases[name] = low + (high - low) * temperature, 2 * power / Refrigerator.MAX_POWER * share - 1
    return {name: Transitions(*pair, after(*pair)) for name, pair in cases.items()}


def judged(
    ensemble: Ensemble, reward: DynamicsReward, scorer: DynamicsReward, case: Transitions, std_S: Tensor
) -> dict[str, float]:
    """What the reward says of the ensemble's candidates, and what they are worth.

    Args:
        scorer: the same reward's distilled network.
        std_S: of the data's observations, the unit of errors.
    """
    state_action = torch.cat((case.observations, case.actions), 1)
    mean, std = (x[..., :-1] for x in ensemble.predict_elites(state_action))
    noise = torch.randn((DRAWS, *mean.shape), generator=generator(1, BENCHMARK))
    candidates = (case.observations + (mean + std * noise).flatten(0, 1)).transpose(0, 1)  # (B, C, S)

    def errors(predicted: Tensor) -> Tensor:
        return ((predicted - case.next_observations.unsqueeze(1)) / std_S).square().mean(-1).sqrt()

    error = errors(candidates)
    p, p_real = reward.probability(state_action, candidates), reward.probability(
        state_action, case.next_observations.unsqueeze(1)
    )  # fmt: skip
    score, mean_error = reward_of(p), error.mean()
    weights = torch.softmax(score / TEMPERATURE, 1)
    best = score.argmax(1, keepdim=True)
    # what can be had without a reward: the candidate nearest to the middle of all
    middle = candidates.median(1, keepdim=True).values
    central = ((candidates - middle) / std_S).square().mean(-1).argmin(1, keepdim=True)
    ranks = torch.stack([spearman(s, e) for s, e in zip(score, error, strict=True)])
    distilled = scorer.probability(state_action, candidates)
    return {
        "error": float(error.gather(1, best).mean()), "random_error": float(mean_error),
        "softmax_ratio": float((weights * error).sum(1).mean() / mean_error),
        "central_ratio": float(error.gather(1, central).mean() / mean_error),
        "oracle_ratio": float(error.amin(1).mean() / mean_error),
        "distilled_ratio": float(error.gather(1, distilled.argmax(1, keepdim=True)).mean() / mean_error),
        "p_real": float(p_real.mean()), "p_candidates": float(p.mean()),
        "correlation": float(spearman(score.flatten(), error.flatten())),
        "correlation_within": float(ranks.nanmean()),
        "cut_real": float((reward_of(p_real) < THRESHOLD).float().mean()),
        "cut_argmax": float((score.gather(1, best) < THRESHOLD).float().mean()),
        "cut_softmax": float((weights * (score < THRESHOLD)).sum(1).mean()),
    }  # fmt: skip


def measure(task: str, args: argparse.Namespace, workdir: Path, command: str) -> None:
    """Train and print the lines of one task."""
    name = TASKS[task]
    data = training_data(load_dataset(name, workdir), torch.device("cpu"))
    recipe = dataclasses.replace(EMBEDDED[name], rows=20_000, seed=FRESH_SEED)
    fresh = training_data(recipe.collect(name=f"{name} again"), torch.device("cpu"))
    cases = refrigerator_cases(fresh) if task == "refrigerator" else robot_cases(task, data, fresh, workdir)
    hidden = [64, 64] if task == "refrigerator" else [200, 200, 200, 200]
    dynamics = DynamicsConfig(
        hidden=hidden, weight_decay=[*[2.5e-5, 5e-5, 7.5e-5, 7.5e-5][: len(hidden)], 1e-4], max_holdout=1000,
        max_epochs=args.ensemble_epochs,
    )  # fmt: skip
    print(f"{BENCHMARK}: {task}, ensemble", file=sys.stderr, flush=True)
    ensemble = train_ensemble(data.observations, data.actions, data.rewards, data.next_observations, dynamics)
    config = DynamicsRewardConfig(**dict(args.set))
    of_seeds: list[dict[str, dict[str, float]]] = []
    stages: list[dict[str, float]] = []
    for seed in range(args.seeds):
        print(f"{BENCHMARK}: {task}, reward {seed}", file=sys.stderr, flush=True)
        told: dict[str, float] = {}
        started = time.process_time()

        def tell(step: int, metrics: Mapping[str, float], told: dict[str, float] = told) -> None:
            told.update(metrics)

        state = train_dynamics_reward(data, dataclasses.replace(config, seed=seed), tell)
        stages.append({**told, "minutes": (time.process_time() - started) / 60})
        reward = DynamicsReward.from_state_dict(state)
        scorer = DynamicsReward.from_state_dict(state, scorer="distilled")
        std = data.observations.std(0)
        of_seeds.append({at: judged(ensemble, reward, scorer, case, std) for at, case in cases.items()})
    of_stage = {name: statistics.mean(stage[name] for stage in stages) for name in _OF_STAGE}
    for at in cases:
        results = [one[at] for one in of_seeds]
        means = {key: statistics.mean(one[key] for one in results) for key in results[0]}
        ratios = [one["error"] / one["random_error"] for one in results]
        print_line(record(
            BENCHMARK, f"{task}/{at}", means.pop("error"), "standard deviations", means.pop("random_error"), 1, command,
            reference_is="a random one of the ten candidates", **spread("ratio", ratios), **means, **of_stage,
            dataset=name, rows=len(data.observations), seeds=args.seeds, ensemble_epochs=args.ensemble_epochs,
            settings=dataclasses.asdict(config),
        ))  # fmt: skip


_OF_STAGE = (
    "minutes", "mixture_p_real", "mixture_p_likelihood", "mixture_p_learner", "rank_correlation", "choice_error",
    "distilled_rmse", "distilled_rank_correlation", "distilled_same_choice", "distilled_same_cut",
)  # fmt: skip


def _setting(text: str) -> tuple[str, Any]:
    """`name=value` of a setting of the dynamics reward."""
    name, sign, value = text.partition("=")
    if not sign or name not in {item.name for item in dataclasses.fields(DynamicsRewardConfig)}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting of the dynamics reward, such as max_epochs=5")
    return name, yaml.safe_load(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="rewards of each task (default: %(default)s)")
    parser.add_argument("--ensemble-epochs", type=int, default=15, help="at most (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="where datasets are kept (default: nowhere)")
    parser.add_argument("--set", nargs="+", type=_setting, default=[], help="settings of the reward, as name=value")
    args = parser.parse_args(argv)
    if min(args.seeds, args.ensemble_epochs) < 1:
        parser.error("seeds and ensemble-epochs must be greater than 0")
    configure_cpu(1)
    words = list(sys.argv[1:] if argv is None else argv)
    if args.workdir is not None:  # where things lie on this machine is nobody's concern
        at = words.index("--workdir")
        del words[at : at + 2]
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *words])
    with tempfile.TemporaryDirectory() as folder:
        try:
            for task in args.tasks:
                measure(task, args, args.workdir or Path(folder), command)
        except UserError as error:
            print(f"{BENCHMARK}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
