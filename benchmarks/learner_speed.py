"""Speed of the learner's inner loops on a CPU, beside the speed of the matrix products it is made of.

Cases, all with Hopper's widths (11 observations, 3 actions) and batches of 256 gathered from 100,000 rows:

    sac_n10         SAC-N: 10 critics and an actor of 3 x 256
    ravl_n10        the same with RAVL's diversity term, eta = 1
    mopo            2 critics and an actor of 2 x 256
    small_net       2 critics and an actor of 2 x 64, the networks of the demo
    td3_bc          TD3+BC: 2 critics and an actor of 2 x 256, the actor every second update
    iql             IQL: 2 critics, a value and an actor of 2 x 256
    dynamics_epoch  7 Gaussian models of 4 x 200 on 100,000 rows, 20 % of them held out; the pass over the rest and the
                    error on the holdout
    ravl_rollout    model rollouts of one run: 50,000 starts, 5 steps, an actor of 3 x 256, one of 5 elites of 4 x 200
                    drawn for each row and step, Hopper's rule of termination; from the draw of the starts to the ring
    mopo_rollout    the same with MOPO's penalty, which takes all 7 models

`value` counts updates of single runs (an update of a pack of 8 counts as 8), epochs, or transitions that reach the
ring, per second of processor time. Processor time and not wall time, since the cores are shared; `per_wall_second` is
there too. Every line comes from a process of its own, in which blocks of the case, of the best matrix product and, for
packs, of the same case with a pack of 1 take turns, so that whatever else the machine does meets all of them alike.
Rates are medians over the blocks; of several such processes the one with the median ratio is shown.

`reference` is, for a pack of 1, the fastest other implementation in peers.json that was measured on the same kind of
processor, else what the matrix products alone would allow; for larger packs it is the pack of 1.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from agents.chunk import Updater
from agents.cpu import configure_cpu, cpu_name
from agents.dynamics import DynamicsConfig, EnsembleTrainer
from agents.iql import IQLConfig, IQLUpdater
from agents.method import TrainingData
from agents.model_based import ModelBasedConfig, ModelBasedSAC
from agents.mopo import MOPO, MOPOConfig
from agents.ravl import RAVL, RAVLConfig
from agents.replay import Replay, transition_rows
from agents.sac import SAC, SACHyperparameters, SACSettings, rows_pay
from agents.td3_bc import TD3BCConfig, TD3BCUpdater
from benchmarks.common import (
    Block,
    MatrixRate,
    print_line,
    print_medians,
    record,
    spread,
    timed_apart,
    timing_options,
    timing_parser,
)

BENCHMARK = "learner_speed"
PEERS = Path(__file__).parent / "peers.json"  # speed of other implementations, per second of processor time
OBSERVATION_DIM, ACTION_DIM = 11, 3  # Hopper's
NUM_ROWS, BATCH = 100_000, 256
DRAWN = 256  # minibatches whose row numbers and noise are drawn beforehand and used in turn


@dataclass(frozen=True)
class Case:
    """A learner whose networks all have the same hidden widths."""

    make: Callable[..., Updater]  # (runs of the pack, device="cpu") -> its learner
    flops: int  # of the matrix products of one update of one run
    sizes: dict[str, Any]  # for the line of results


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def products(layers: Sequence[tuple[int, int]], batch: int = BATCH) -> int:
    """One matrix product per layer, two operations per multiply-add."""
    return sum(2 * batch * n_in * n_out for n_in, n_out in layers)


def widths(hidden: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Layers (in, out) from observations to the last hidden one, and likewise from observations and actions."""
    s, a = OBSERVATION_DIM, ACTION_DIM
    return list(pairwise((s, *hidden))), list(pairwise((s + a, *hidden)))


def sac_flops(hidden: Sequence[int], num_critics: int, eta: float) -> int:
    """Floating-point operations of the matrix products of one update of one run with Hopper's widths.

    Counted are the products that the update in `agents.sac` does; elementwise work (activations, the outer products
    with a critic's last layer, Adam, Polyak averages) and sums are not. With f one forward pass, h the passage of the
    gradient back through the layers behind the first, w the gradients of all weights, i the gradient of the action
    columns of the input:

        actor      f on s and f on s' (2), h, w
        critics    f on (s', a~') by the targets; f on (s, a~) for the actor, h and i of all critics or, where that
                   pays, of each row's smallest critic only; f, h, w on (s, a)
        eta > 0    i for the critics' own unit gradients; a forward pass of the tangent, which enters by the action
                   columns; bias gradients as products with one row
    """
    of_state, of_action = widths(hidden)
    actor, critic = [*of_state, (hidden[-1], 2 * ACTION_DIM)], [*of_action, (hidden[-1], 1)]
    action_columns = products([(hidden[0], ACTION_DIM)])
    middle = products(critic[1:-1])  # back through the last layer is an outer product, elementwise here
    per_critic = 3 * products(critic)  # forward: targets, for the actor, for the critics
    per_critic += middle  # for the critics
    if eta == 0:
        per_critic += products(critic)
    else:
        per_critic += products(critic[:-1])  # the last layer's weight gradient is a sum here
        per_critic += action_columns + action_columns + middle
        per_critic += sum(2 * BATCH * width for width in hidden)
    # for the actor: of all critics, or of the rows that chose them
    passes = 1 if rows_pay(num_critics, hidden) else num_critics
    of_actor = 3 * products(actor) + products(actor[1:]) + passes * (middle + action_columns)
    return of_actor + num_critics * per_critic


def td3_bc_flops(hidden: Sequence[int], policy_freq: int) -> int:
    """Likewise for an update of `agents.td3_bc`, the mean over `policy_freq` of them, in the terms of `sac_flops`:

    every update    actor f on s' (target); both critics f on (s', a~') (targets) and f, h, w on (s, a)
    the last one    actor f, h, w on s; one critic f, h, i on (s, pi(s))
    """
    of_state, of_action = widths(hidden)
    actor, critic = [*of_state, (hidden[-1], ACTION_DIM)], [*of_action, (hidden[-1], 1)]
    middle = products(critic[1:-1])
    every = products(actor) + 2 * (3 * products(critic) + middle)
    last = 2 * products(actor) + products(actor[1:])
    last += products(critic) + middle + products([(hidden[0], ACTION_DIM)])
    return every + last // policy_freq


def iql_flops(hidden: Sequence[int]) -> int:
    """Likewise for an update of `agents.iql`:

    value       f, h, w on s; f on s and s' after the step
    critics     f on (s, a) by the targets; f, h, w on (s, a)
    actor       f, h, w on s
    """
    of_state, of_action = widths(hidden)
    actor, value, critic = (
        [*of_state, (hidden[-1], ACTION_DIM)],
        [*of_state, (hidden[-1], 1)],
        [*of_action, (hidden[-1], 1)],
    )
    of_value = 4 * products(value) + products(value[1:-1])
    of_critics = 2 * (3 * products(critic) + products(critic[1:-1]))
    return of_value + of_critics + 2 * products(actor) + products(actor[1:])


def dynamics_flops(observation_dim: int, action_dim: int, rows: int, held_out: int, config: DynamicsConfig) -> int:
    """Floating-point operations of the matrix products of one epoch: forward, weight gradients and the passage of the
    gradient back to the first layer for `rows` rows, forward for the `held_out` ones, for every member."""
    sizes = (observation_dim + action_dim, *config.hidden, 2 * (observation_dim + 1))
    per_row = [2 * n_in * n_out for n_in, n_out in pairwise(sizes)]
    return config.ensemble_size * (rows * (2 * sum(per_row) + sum(per_row[1:])) + held_out * sum(per_row))


def rollout_flops(observation_dim: int, action_dim: int, actor_hidden: Sequence[int], models: int) -> int:
    """Floating-point operations of the matrix products of one transition: the actor's and those of `models` dynamics
    models of the default widths (1 where only the drawn one is evaluated)."""
    s, a = observation_dim, action_dim
    actor = pairwise((s, *actor_hidden, 2 * a))
    model = pairwise((s + a, *DynamicsConfig().hidden, 2 * (s + 1)))
    return sum(2 * i * o for i, o in actor) + models * sum(2 * i * o for i, o in model)


# ---- work -----------------------------------------------------------------------------------------------------------


def hopper_shaped(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observations, actions, rewards, terminals and next observations of Hopper's widths, drawn at random: what is
    learned does not change the time."""
    draw = torch.Generator().manual_seed(0)
    obs = torch.randn(num_rows, OBSERVATION_DIM, generator=draw)
    action = torch.rand(num_rows, ACTION_DIM, generator=draw) * 2 - 1
    reward = torch.randn(num_rows, generator=draw)
    done = (torch.rand(num_rows, generator=draw) < 0.01).float()
    next_obs = obs + 0.1 * torch.randn(num_rows, OBSERVATION_DIM, generator=draw)
    return obs, action, reward, done, next_obs


def work_of(updater: Updater, replay: Replay) -> Callable[[], object]:
    """One update with its gather; row numbers and noise are drawn beforehand, as in an epoch of training."""
    pack, draw = replay.num_members, torch.Generator().manual_seed(1)
    indices = torch.randint(replay.num_real, (DRAWN, pack, BATCH), generator=draw)
    noise = torch.randn((DRAWN, updater.num_noises, pack, BATCH, ACTION_DIM), generator=draw)
    number = 0

    def work() -> None:
        nonlocal number
        i, turn, number = number % DRAWN, number % updater.period, number + 1
        updater.update(replay.gather(indices[i]), noise[i], turn)

    return work


ROLLOUT_CASES: dict[str, tuple[type[ModelBasedSAC], type[ModelBasedConfig]]] = {
    "ravl_rollout": (RAVL, RAVLConfig),
    "mopo_rollout": (MOPO, MOPOConfig),
}
NUM_STARTS, ROLLOUT_LENGTH = 50_000, 5


def rollout_method(case: str, num_starts: int) -> ModelBasedSAC:
    """A run of the case's method in made-up dynamics that move little: few rollouts fall before their end."""
    obs, action, reward, done, _ = hopper_shaped(NUM_ROWS)
    obs = 0.05 * obs
    obs[:, 0] += 1.25  # Hopper's height when it stands
    data = TrainingData("Hopper-v4", obs, action, reward, obs, done)
    trainer = EnsembleTrainer(obs[:100], action[:100], reward[:100], obs[:100], [DynamicsConfig()])
    (ensemble,) = trainer.ensembles
    ensemble.tensors["max_logvar"].fill_(-8.0)  # standard deviations below 0.02
    method, config_of = ROLLOUT_CASES[case]
    config = config_of(
        hidden=[256, 256, 256], rollout_batch=num_starts, rollout_length=ROLLOUT_LENGTH, rollout_epochs_retained=1
    )
    return method([config], [0], data, {"dynamics": ensemble.state_dict()})


def rollout_work(method: ModelBasedSAC) -> tuple[Callable[[], object], list[float]]:
    """The rollouts of one epoch, and a list to which each call appends how many transitions it has made."""
    made: list[float] = []

    def work() -> None:
        results = [job.run(method.dynamics) for job in method.rollout_jobs(len(made))]
        made.append(method.add_rollouts(results)[0]["rollout/transitions"])

    return work, made


def sac_case(hidden: Sequence[int], num_critics: int, eta: float) -> Case:
    def make(pack: int, device: torch.device | str = "cpu") -> Updater:
        settings = SACSettings(num_critics=num_critics, actor_hidden=tuple(hidden), critic_hidden=tuple(hidden))
        hyperparameters = [SACHyperparameters(eta=eta)] * pack
        return SAC(range(pack), hyperparameters, settings, OBSERVATION_DIM, ACTION_DIM, device)

    sizes = {"num_critics": num_critics, "hidden": hidden, "eta": eta, "batch": BATCH}
    return Case(make, sac_flops(hidden, num_critics, eta), sizes)


def td3_bc_case(config: TD3BCConfig) -> Case:
    def make(pack: int, device: torch.device | str = "cpu") -> Updater:
        return TD3BCUpdater([config] * pack, range(pack), OBSERVATION_DIM, ACTION_DIM, device)

    sizes = {"hidden": config.hidden, "policy_freq": config.policy_freq, "batch": BATCH}
    return Case(make, td3_bc_flops(config.hidden, config.policy_freq), sizes)


def iql_case(config: IQLConfig) -> Case:
    def make(pack: int, device: torch.device | str = "cpu") -> Updater:
        return IQLUpdater([config] * pack, range(pack), OBSERVATION_DIM, ACTION_DIM, device)

    return Case(make, iql_flops(config.hidden), {"hidden": config.hidden, "batch": BATCH})


UPDATES = {
    "sac_n10": sac_case([256, 256, 256], 10, 0.0),
    "ravl_n10": sac_case([256, 256, 256], 10, 1.0),
    "mopo": sac_case([256, 256], 2, 0.0),
    "small_net": sac_case([64, 64], 2, 0.0),
    "td3_bc": td3_bc_case(TD3BCConfig()),
    "iql": iql_case(IQLConfig()),
}
CASES = (*UPDATES, "dynamics_epoch", *ROLLOUT_CASES)


def measure(case: str, pack: int, threads: int, blocks: int, seconds: float, command: str) -> dict[str, Any]:
    """Time one case in this process; the line of results.

    Args:
        case: one of `CASES`.
        pack: runs in the pack; 1 but for the updates.
        blocks: measurements of each of the things that take turns.
        seconds: length of a block, and of each one's warm-up.
    """
    configure_cpu(threads)
    obs, action, reward, done, next_obs = hopper_shaped(NUM_ROWS)
    sizes: dict[str, Any] = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "rows": NUM_ROWS}
    single: Block | None = None  # the same case with a pack of 1
    counted, per_call = "update", float(pack)  # what is counted, and how many of them a call does
    if case in ROLLOUT_CASES:
        method = rollout_method(case, NUM_STARTS)
        work, made = rollout_work(method)
        unit, block = "transitions per CPU-second", Block.warmed_up(work, seconds)
        counted, per_call = "transition", statistics.mean(made)
        config, hidden = method.shared.dynamics, method.shared.hidden
        models = config.ensemble_size if method.penalty is not None else 1
        flops = rollout_flops(OBSERVATION_DIM, ACTION_DIM, hidden, models)
        sizes |= {
            "members": config.ensemble_size, "elites": config.num_elites, "hidden": config.hidden,
            "actor_hidden": hidden, "starts": NUM_STARTS, "length": ROLLOUT_LENGTH, "transitions_per_call": per_call,
        }  # fmt: skip
    elif case == "dynamics_epoch":
        config = DynamicsConfig()
        trainer = EnsembleTrainer(obs, action, reward, next_obs, [config])
        epochs = iter(range(1_000_000))

        def epoch() -> None:
            trainer.train_epoch(next(epochs))
            trainer.holdout_mse()

        held_out = NUM_ROWS - trainer.num_train
        flops = dynamics_flops(OBSERVATION_DIM, ACTION_DIM, trainer.num_train, held_out, config)
        unit, block = "epochs per CPU-second", Block.warmed_up(epoch, seconds)
        sizes |= {"members": config.ensemble_size, "hidden": config.hidden, "batch": config.batch_size}
    else:
        chosen = UPDATES[case]
        replay = Replay(transition_rows(obs, action, reward, done, next_obs), pack, 0)
        flops = chosen.flops
        unit, block = "run-updates per CPU-second", Block.warmed_up(work_of(chosen.make(pack), replay), seconds)
        if pack > 1:
            alone = Replay(transition_rows(obs, action, reward, done, next_obs), 1, 0)
            single = Block.warmed_up(work_of(chosen.make(1), alone), seconds)
        sizes |= chosen.sizes
    matrix = MatrixRate(seconds)
    rates, of_single = [], []
    for _ in range(blocks):
        matrix.measure()
        if single is not None:
            of_single.append(single.measure())
        rates.append(block.measure())
    per_cpu = [per_call * rate.per_cpu for rate in rates]
    value = statistics.median(per_cpu)
    gflops = statistics.median(matrix.of_best())
    bound = gflops * 1e9 / flops
    peer = best_peer(case) if pack == threads == 1 else None
    if single is not None:
        reference, what = statistics.median(r.per_cpu for r in of_single), "a pack of 1, in turns in the same process"
        paired = [v / r.per_cpu for v, r in zip(per_cpu, of_single, strict=True)]
    elif peer is not None:
        reference, what = peer["value"], f"{peer['peer']} {peer['commit']}, see peers.json"
        paired = [v / reference for v in per_cpu]
        sizes["ratio_at_equal_matrix_rate"] = value / reference * peer["matrix_gflops"] / gflops
    else:
        reference, what = bound, f"the matrix products alone at matrix_gflops ({matrix.best})"
        paired = [v / (g * 1e9 / flops) for v, g in zip(per_cpu, matrix.of_best(), strict=True)]
    return record(
        BENCHMARK, case, value, unit, reference, threads, command, pack=pack, reference_is=what,
        per_wall_second=statistics.median(per_call * rate.per_wall for rate in rates),
        **{f"flops_per_{counted}": flops}, matrix_gflops=gflops, share_of_matrix_rate=value / bound,
        **spread("value", per_cpu), **spread("ratio", paired), **spread("matrix_gflops", matrix.of_best()),
        matrix_rates=matrix.medians(), **sizes, blocks=blocks, calls_per_block=block.calls,
        load_average=os.getloadavg()[0],
    )  # fmt: skip


def best_peer(case: str) -> dict[str, Any] | None:
    """The fastest other implementation of a case that was measured on this kind of machine."""
    known = [entry for entry in json.loads(PEERS.read_text()) if entry["case"] == case and entry["cpu"] == cpu_name()]
    return max(known, key=lambda entry: entry["value"], default=None)


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = timing_parser(BENCHMARK, __doc__, blocks=9, seconds=0.8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--packs", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    args = parser.parse_args(argv)
    options = timing_options(parser, args)
    if min(*args.packs, *args.threads, 1) < 1:
        parser.error("packs and threads must be greater than 0")
    chosen = [
        (["--cases", case, "--packs", str(pack), "--threads", str(threads), *options], threads)
        for case in args.cases
        for threads in args.threads
        for pack in (args.packs if case in UPDATES else [1])
    ]
    if not args.in_process:
        return print_medians(BENCHMARK, args.repeats, lambda: [timed_apart(BENCHMARK, *one) for one in chosen])
    if len(chosen) != 1:
        parser.error("--in-process times one case with one pack and one number of threads")
    [(words, threads)] = chosen
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *words])
    pack = args.packs[0] if args.cases[0] in UPDATES else 1
    print_line(measure(args.cases[0], pack, threads, args.blocks, args.seconds, command))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
