"""Policy-guided diffusion held against the simulator: do guided trajectories follow the policy, and are they true?

On each dataset trajectory diffusion models (one per `--model-seeds`) and a dynamics ensemble are trained, as a run
would train them, and kept in the work folder's store of stages. Then the models are sampled under frozen policies of
three qualities, deterministic ones, whose density is N(pi(s), 1) as in the authors' code:

    early     an actor from the beginning of the training whose snapshots collected the data
    medium    the last of these actors
    expert    one trained to the end, whose episodes the data do not have

What is generated goes through `agents.trajectory_metrics`: log-likelihood of the actions under the policy, and squared
errors of next states against the simulator, in variances of the data's observations: of single steps from the generated
states (`dynamics_error`) and of all steps so far from the first one (`open_loop_error`). Cases are
`<task>/<what>`:

    guided/<policy>/<rule>/<lambda>     lambda 0 is unguided
    ensemble/<policy>                   the policy rolled out in the ensemble from states of the data for as many steps
                                        (PETS-style: a random elite every step): the reference of all others
    windows/<policy>                    windows of the data themselves: what the pipe gives for true transitions
    steps/<lambda>/<steps>              sampling with fewer or more steps, policy medium, rule code
    terminals/<kind>/<lambda>           sampler.terminals of either kind, policy medium, rule code; hopper only

`--trajectories` are drawn `--seeds` times from each model. Two intervals of 95 % stand beside a mean: `_interval` is
the bootstrap's over trajectories, `_interval_seeds` Student's over the means of models and seeds (the ensemble is one,
its rollouts' seeds differ). `_rise` is the difference to lambda = 0 from the same noise, with the bootstrap's interval
over pairs of trajectories.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.actors import TanhActor, actor_from_arrays
from agents.cpu import configure_cpu
from agents.dynamics import DynamicsConfig, Ensemble
from agents.edm_sampler import TERMINALS, SamplerConfig
from agents.guidance import GuidanceConfig
from agents.method import RolloutJob, Stage, TrainingData
from agents.model_based import ensemble_stage
from agents.randomness import generator
from agents.replay import transition_rows
from agents.rollout import tag_steps
from agents.trajectories import RULES, EpisodeRows, Trajectories, transitions
from agents.trajectory_diffusion import DiffusionConfig, TrajectoryModel, diffusion_stage
from agents.trajectory_metrics import PoolDiagnostics, log_likelihood
from agents.trajectory_rollout import TrajectoryJob
from benchmarks.common import RESULTS, parse_line, print_line, record
from benchmarks.studies import shown_command
from envs.collect import collect
from envs.errors import UserError
from envs.files import write_atomically
from envs.policies import EMBEDDED_FOLDER, load_policy
from envs.registry import load_dataset
from orchestrator.artifacts import ArtifactStore, Built, stage_key
from orchestrator.learner import training_data
from sweeps.plots_guidance import draw_guidance

BENCHMARK = "pgd_guidance"
TASKS = ("hopper", "halfcheetah")
POLICIES = {"early": "snapshot-0", "medium": "medium", "expert": "expert"}  # names of the embedded actors
COEFS = (0.0, 0.1, 0.3, 1.0, 4.0)  # lambda, rule code
SCORE_COEFS = (2.0, 16.0)  # an exponent of the policy's density, which has a standard deviation of 1
STEPS = (16, 32, 64, 128, 256)
STEP_COEFS = (0.0, 1.0)  # lambda where something else is compared
RISES = {"likelihood_R": "log_likelihood", "error_R": "dynamics_error"}
VISITED_ROWS = 5_000  # of a policy's own episodes
RESAMPLES = 1_000
UNIT = "squared error, variances of the data"

Interval = tuple[float, float]


# ---- ways of making transitions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """Transitions of N trajectories that were made in one way, R rows; several seeds made them."""

    rows_RW: Tensor
    steps_R: Tensor  # 1..H-1
    trajectory_R: NDArray[np.int64]  # 0..N-1, the first seed's first
    seed_N: NDArray[np.int64]  # by trajectory
    seconds: float = math.nan  # of processor time, for all of it

    @classmethod
    def of_parts(cls, parts: Sequence[Part], num_trajectories: int, seconds: float = math.nan) -> Arm:
        """What every seed has made of so many trajectories."""
        numbers = [part.trajectory_R + i * num_trajectories for i, part in enumerate(parts)]
        rows, steps = torch.cat([part.rows_RW for part in parts]), torch.cat([part.steps_R for part in parts])
        return cls(rows, steps, np.concatenate(numbers), np.arange(len(parts)).repeat(num_trajectories), seconds)


class Part(NamedTuple):
    """Transitions of one seed."""

    rows_RW: Tensor
    steps_R: Tensor
    trajectory_R: NDArray[np.int64]

    @classmethod
    def of_trajectories(cls, trajectories: Trajectories) -> Part:
        """The transitions in `(B, H, ...)`."""
        rows_BKW, kept_BK = transitions(trajectories)
        trajectory, step = kept_BK.nonzero(as_tuple=True)
        return cls(rows_BKW[kept_BK], step + 1, trajectory.numpy())

    @classmethod
    def of_rollouts(cls, rows_RW: Tensor, steps_R: Tensor, observation_dim: int) -> Part:
        """Rows of model rollouts, which do not say of which one they are: each but a first one has the state that a row
        of the step before has led to."""
        rows, steps = rows_RW.numpy(), steps_R.numpy()
        numbers, ends = np.zeros(len(rows), np.int64), dict[bytes, int]()
        for step in range(1, int(steps.max(initial=0)) + 1):
            here = np.flatnonzero(steps == step)
            starts = [rows[r, :observation_dim].tobytes() for r in here]
            numbers[here] = np.arange(len(here)) if step == 1 else [ends[start] for start in starts]
            ends = {rows[r, -observation_dim:].tobytes(): int(numbers[r]) for r in here}
        return cls(rows_RW, steps_R, numbers)


class Task:
    """A dataset, what was trained on it, and the policies; makes arms."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.dataset = load_dataset(f"embedded/{name}-medium-snapshots-v0", args.workdir)
        self.data = training_data(self.dataset, torch.device("cpu"))
        self.diffusions = [diffusion_config(args, seed) for seed in range(args.model_seeds)]
        self.dynamics = DynamicsConfig(max_epochs=args.ensemble_epochs)
        stages = [ensemble_stage(self.dynamics), *map(diffusion_stage, self.diffusions)]
        self.stages = {stage_key(stage, self.dataset.content_hash): stage for stage in stages}
        contents = build_stages(self.stages, self.data, ArtifactStore(args.workdir / "artifacts"))
        self.ensemble = Ensemble.from_state_dict(contents[0])
        self.models = [TrajectoryModel.from_state_dict(content) for content in contents[1:]]
        self.policies = {name: frozen_policy(f"{self.name}-{actor}") for name, actor in POLICIES.items()}
        self.windows = EpisodeRows.from_data(self.data).windows(args.length)
        self.diagnostics = PoolDiagnostics(self.data)
        self._made: dict[str, Arm] = {}

    def sampled(self, policy: str, sampler: SamplerConfig, guidance: GuidanceConfig) -> Arm:
        """Trajectories of the diffusion models, every model with every seed; in all calls with as many steps the noise
        is the same. What has been made before is not made again."""
        key = repr((sampler, guidance, policy) if guidance.coef else sampler)
        if key not in self._made:
            self._made[key] = self._sample(policy, sampler, guidance)
        return self._made[key]

    def _sample(self, policy: str, sampler: SamplerConfig, guidance: GuidanceConfig) -> Arm:
        count, started, parts = self.args.trajectories, time.process_time(), list[Part]()
        for model in self.models:
            for seed in range(self.args.seeds):
                job = TrajectoryJob(
                    (0,), (seed,), 0, 0, count, self.policies[policy], torch.tensor([guidance.coef]), sampler, guidance,
                    self.data.termination, torch.device("cpu"),
                )  # fmt: skip
                parts.append(Part.of_trajectories(Trajectories(*(x.squeeze(0) for x in job.trajectories(model)))))
        return Arm.of_parts(parts, count, time.process_time() - started)

    def rolled_out(self, policy: str) -> Arm:
        """The policy in the ensemble, as many rollouts of as many steps."""
        count, started, parts = self.args.trajectories, time.process_time(), list[Part]()
        for seed in range(self.args.model_seeds * self.args.seeds):
            chosen = torch.randint(len(self.data.observations), (1, count), generator=generator(seed, BENCHMARK))
            job = RolloutJob(
                (0,), (seed,), 0, 0, self.data.termination, self.policies[policy], self.data.observations[chosen],
                self.args.length - 1, None, torch.zeros(1),
            )  # fmt: skip
            result = job.run(self.ensemble)
            parts.append(Part.of_rollouts(result.rows[0], tag_steps(result.tags[0]), self.data.observation_dim))
        return Arm.of_parts(parts, count, time.process_time() - started)

    def recorded(self) -> Arm:
        """Windows of the dataset."""
        count, parts = min(self.args.trajectories, len(self.windows)), list[Part]()
        for seed in range(self.args.model_seeds * self.args.seeds):
            chosen = torch.randperm(len(self.windows), generator=generator(seed, BENCHMARK))[:count]
            parts.append(Part.of_trajectories(self.windows.gather(chosen)))
        return Arm.of_parts(parts, count)

    def visited(self, policy: str) -> Tensor:
        """Rows of the policy's own episodes in the environment."""
        actor = load_policy(f"{self.name}-{POLICIES[policy]}")
        dataset = collect(self.dataset.env_id, [(actor, 1.0)], VISITED_ROWS, seed=0, deterministic=True)
        data = training_data(dataset, torch.device("cpu"))
        return transition_rows(data.observations, data.actions, data.rewards, data.terminals, data.next_observations)


def diffusion_config(args: argparse.Namespace, seed: int) -> DiffusionConfig:
    # running means over the last 500 updates: the default's 2,000 are a quarter of so short a training
    return DiffusionConfig(
        length=args.length, windows=args.windows, features=args.features, num_updates=args.updates, ema_decay=0.98,
        terminal_scale="standardised", precision="mixed", seed=seed,
    )  # fmt: skip


def frozen_policy(actor: str) -> TanhActor:
    """The deterministic policy of an embedded actor: tanh of its mean."""
    with np.load(EMBEDDED_FOLDER / f"{actor}.npz") as file:
        arrays = {name: file[name] for name in file.files if name not in ("Ws", "bs")}
    policy = actor_from_arrays([{**arrays, "kind": np.array("tanh")}])
    assert isinstance(policy, TanhActor)
    return policy


def build_stages(stages: Mapping[str, Stage], data: TrainingData, store: ArtifactStore) -> list[dict[str, Any]]:
    """Contents of stages by their keys, trained here where the store lacks them.

    Raises:
        UserError: one cannot be built.
    """

    def build(missing: list[Stage]) -> list[Built | UserError]:
        built: list[Built | UserError] = []
        for stage in missing:
            print(f"{BENCHMARK}: training {stage.kind}", file=sys.stderr, flush=True)
            started, history = time.perf_counter(), list[tuple[int, dict[str, float]]]()
            content = stage.build(data, lambda step, metrics, h=history: h.append((step, dict(metrics))))  # type: ignore[misc]
            about = {"seconds": time.perf_counter() - started, "history": [history]}
            built.append(Built(content, about))
        return built

    for key, stage in stages.items():  # one at a time: whoever stops this loses one only
        for failure in store.build_missing({key: stage}, build).values():
            raise failure
    return [store.load(stage.kind, key) for key, stage in stages.items()]


# ---- what is measured of them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over rows with its intervals of 95 %, or a median; not a number where there is nothing."""

    value: float
    interval: Interval  # bootstrap over trajectories
    interval_seeds: Interval = (math.nan, math.nan)  # Student's over the means of seeds

    def fields(self, name: str) -> dict[str, Any]:
        seeds = {} if math.isnan(self.interval_seeds[0]) else {f"{name}_interval_seeds": list(self.interval_seeds)}
        return {name: self.value, f"{name}_interval": list(self.interval), **seeds}


def mean_of(values_R: NDArray[np.float64], arm: Arm) -> Estimate:
    """The mean of rows' values; those that are not numbers are left out."""
    sums_N, counts_N = sums_by_trajectory(values_R, arm)
    drawn = resamples(len(counts_N))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums_N[drawn].sum(1) / counts_N[drawn].sum(1)
        of_seeds = [
            sums_N[arm.seed_N == seed].sum() / counts_N[arm.seed_N == seed].sum() for seed in np.unique(arm.seed_N)
        ]
        return Estimate(float(sums_N.sum() / counts_N.sum()), percentiles(means), student(of_seeds))


def median_of(values_R: NDArray[np.float64], arm: Arm) -> Estimate:
    """Their median."""
    known = np.isfinite(values_R)
    if not known.any():
        return Estimate(math.nan, (math.nan, math.nan))
    order = np.argsort(values_R[known])
    ordered, trajectory = values_R[known][order], arm.trajectory_R[known][order]
    medians = []
    for drawn in resamples(len(arm.seed_N)):
        weight = np.bincount(drawn, minlength=len(arm.seed_N))[trajectory].cumsum()
        medians.append(ordered[np.searchsorted(weight, weight[-1] / 2)])
    return Estimate(float(np.median(ordered)), percentiles(np.array(medians)))


def sums_by_trajectory(values_R: NDArray[np.float64], arm: Arm) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values that are numbers, `(N,)` each."""
    known = np.isfinite(values_R)
    where, count = arm.trajectory_R[known], len(arm.seed_N)
    weights = values_R[known], np.ones(len(where))
    sums, counts = (np.bincount(where, weight, count).astype(np.float64) for weight in weights)
    return sums, counts


def rise_of(values_R: NDArray[np.float64], arm: Arm, base_R: NDArray[np.float64], base: Arm) -> Estimate:
    """The difference of two arms' means, whose trajectories are pairs made from the same noise."""
    (sums_N, counts_N), (from_N, of_N) = sums_by_trajectory(values_R, arm), sums_by_trajectory(base_R, base)
    drawn = resamples(len(counts_N))
    rises = sums_N[drawn].sum(1) / counts_N[drawn].sum(1) - from_N[drawn].sum(1) / of_N[drawn].sum(1)
    return Estimate(float(sums_N.sum() / counts_N.sum() - from_N.sum() / of_N.sum()), percentiles(rises))


def resamples(count: int) -> NDArray[np.int64]:
    """(`RESAMPLES`, N) numbers of trajectories, drawn with replacement."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def percentiles(values: NDArray[np.float64]) -> Interval:
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def student(means: Sequence[float]) -> Interval:
    """An interval of 95 % for the mean of what was repeated; not a number for a single one."""
    from scipy.stats import t  # takes half a second to load

    if len(means) < 2:
        return math.nan, math.nan
    mean = statistics.fmean(means)
    half = float(t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / math.sqrt(len(means))
    return mean - half, mean + half


@dataclass(frozen=True)
class Measured:
    """An arm's values by row, under one policy."""

    arm: Arm
    likelihood_R: NDArray[np.float64]
    error_R: NDArray[np.float64]  # squared, standardised, of single steps
    open_loop_R: NDArray[np.float64]  # of all steps so far

    @classmethod
    def of(cls, task: Task, policy: str, arm: Arm) -> Measured:
        assert task.diagnostics.error is not None
        likelihood, error = log_likelihood(task.policies[policy], arm.rows_RW), task.diagnostics.error
        open_loop = error.open_loop(arm.rows_RW, arm.steps_R, torch.from_numpy(arm.trajectory_R))
        return cls(arm, likelihood.double().numpy(), error(arm.rows_RW).standardised_R.numpy(), open_loop.numpy())

    def fields(self, task: Task, policy: str, visited_RW: Tensor | None = None) -> dict[str, Any]:
        """What a line says.

        Args:
            visited_RW: the policy's own rows in the environment, if supports are to be compared with these, too.
        """
        source = generator(0, BENCHMARK)
        plain = task.diagnostics.measures(
            task.policies[policy], self.arm.rows_RW, self.arm.steps_R, task.args.length - 1, source
        )
        steps = range(1, task.args.length)
        at_steps = [self.arm.steps_R.numpy() == step for step in steps]
        alive = [int(at.sum()) / len(self.arm.seed_N) for at in at_steps]
        kept = ("dynamics_error_raw", "dynamics_error_raw_median", "reward_error", "reward_error_median",
                "log_likelihood_dataset", "log_likelihood_policy", "clipped_share", "unhealthy_share")  # fmt: skip
        own = {} if visited_RW is None else task.diagnostics.support(self.arm.rows_RW, visited_RW)
        return {
            "policy": policy, **mean_of(self.likelihood_R, self.arm).fields("log_likelihood"),
            **mean_of(self.error_R, self.arm).fields("dynamics_error"),
            **median_of(self.error_R, self.arm).fields("dynamics_error_median"),
            **mean_of(self.open_loop_R, self.arm).fields("open_loop_error"),
            **median_of(self.open_loop_R, self.arm).fields("open_loop_error_median"),
            **{name: plain[name] for name in kept},
            **{name: value for name, value in plain.items() if name.startswith(("terminal_", "support_"))},
            **{f"support_policy_{name}": value for name, value in own.items()},
            "error_by_step": [middle(self.error_R[at], np.mean) for at in at_steps],
            "error_median_by_step": [middle(self.error_R[at], np.median) for at in at_steps],
            "open_loop_median_by_step": [middle(self.open_loop_R[at], np.median) for at in at_steps],
            "share_by_step": alive, "transitions": len(self.error_R), "trajectories": len(self.arm.seed_N),
            "seconds": self.arm.seconds, "H": task.args.length,
        }  # fmt: skip


def middle(values: NDArray[np.float64], of: Callable[[Any], Any]) -> float | None:
    """A mean or median of the values that are numbers; None where none is."""
    known = values[np.isfinite(values)]
    return float(of(known)) if len(known) else None


def marginal_distance(made_RW: Tensor, real_RW: Tensor, columns: int) -> float:
    """Wasserstein distance of order 1 of single columns (s, a, r), in standard deviations of the real ones, mean over
    columns."""
    levels = torch.linspace(0.0025, 0.9975, 200)
    made, real = made_RW[:, :columns], real_RW[:, :columns]
    gaps = (made.quantile(levels, 0) - real.quantile(levels, 0)).abs().mean(0) / real.std(0)
    return float(gaps.mean())


# ---- lines ----------------------------------------------------------------------------------------------------------


def line(task: Task, case: str, fields: Mapping[str, Any], reference: float | None, command: str) -> dict[str, Any]:
    return record(
        BENCHMARK, f"{task.name}/{case}", fields["dynamics_error"], UNIT, reference, 1, command,
        reference_is="the same policy in the ensemble, rollouts of as many steps", dataset=task.dataset.name, **fields,
        dataset_hash=task.dataset.content_hash[:16], stages=list(task.stages), model_seeds=task.args.model_seeds,
        sampling_seeds=task.args.seeds, diffusion=asdict(task.diffusions[0]), ensemble_epochs=task.args.ensemble_epochs,
    )  # fmt: skip


def sampler_config(num_steps: int, terminals: str = "generated") -> SamplerConfig:
    # mixed precision takes half the time of float32, and errors differ by a hundredth
    return SamplerConfig(num_steps=num_steps, terminals=terminals, precision="mixed")


def guided_fields(arm_fields: Mapping[str, Any], sampler: SamplerConfig, guidance: GuidanceConfig) -> dict[str, Any]:
    settings = {"rule": guidance.rule, "lambda": guidance.coef, "steps": sampler.num_steps}
    return {**settings, **arm_fields, "sampler": asdict(sampler), "guidance": asdict(guidance)}


def guidance_lines(task: Task, command: str) -> Iterator[dict[str, Any]]:
    """Guidance curves of every policy beside the ensemble's rollouts."""
    args, sampler = task.args, sampler_config(task.args.steps)
    for policy in args.policies:
        visited = task.visited(policy)
        rollouts = Measured.of(task, policy, task.rolled_out(policy))
        fields = rollouts.fields(task, policy, visited)
        ensemble_error = fields["dynamics_error"]
        yield line(task, f"ensemble/{policy}", fields, None, command)
        recorded = Measured.of(task, policy, task.recorded())
        yield line(task, f"windows/{policy}", recorded.fields(task, policy, visited), ensemble_error, command)
        base: Measured | None = None
        for rule, coefs in (("code", args.coefs), ("score", args.score_coefs)):
            for coef in coefs:
                guidance = GuidanceConfig(rule=rule, coef=coef)
                made = Measured.of(task, policy, task.sampled(policy, sampler, guidance))
                base = made if base is None else base
                fields = guided_fields(made.fields(task, policy, visited), sampler, guidance)
                if made is not base:
                    for name in ("likelihood_R", "error_R"):
                        pair = getattr(made, name), made.arm, getattr(base, name), base.arm
                        fields |= rise_of(*pair).fields(f"{RISES[name]}_rise")
                yield line(task, f"guided/{policy}/{rule}/{coef:g}", fields, ensemble_error, command)


def step_lines(task: Task, command: str) -> Iterator[dict[str, Any]]:
    """Quality against time for several numbers of steps."""
    policy = "medium"
    real = task.recorded().rows_RW
    columns = task.data.observation_dim + task.data.action_dim + 1
    for coef in STEP_COEFS:
        for num_steps in task.args.step_counts:
            sampler, guidance = sampler_config(num_steps), GuidanceConfig(coef=coef)
            made = Measured.of(task, policy, task.sampled(policy, sampler, guidance))
            fields = guided_fields(made.fields(task, policy), sampler, guidance)
            fields["marginal_distance"] = marginal_distance(made.arm.rows_RW, real, columns)
            yield line(task, f"steps/{coef:g}/{num_steps}", fields, None, command)


def terminal_lines(task: Task, command: str) -> Iterator[dict[str, Any]]:
    """Where trajectories end, by who says so."""
    policy = "medium"
    for coef in STEP_COEFS:
        # what padded windows teach to come behind a terminal is no transition whoever says where trajectories end
        padded = task.args.windows == "padded"
        for kind in ("generated",) if padded else TERMINALS:
            sampler, guidance = sampler_config(task.args.steps, kind), GuidanceConfig(coef=coef)
            made = Measured.of(task, policy, task.sampled(policy, sampler, guidance))
            fields = {**guided_fields(made.fields(task, policy), sampler, guidance), "terminals": kind}
            yield line(task, f"terminals/{'padded' if padded else kind}/{coef:g}", fields, None, command)


def draw(results: Path, path: Path) -> None:
    """Draw the lines of a file of results.

    Raises:
        UserError: there is no such file.
    """
    if not results.exists():
        raise UserError(f"there are no results {results} to draw; run python -m benchmarks.run {BENCHMARK} first")
    lines = [parse_line(text, BENCHMARK) for text in results.read_text().splitlines()]
    figure = draw_guidance(lines)
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=80))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--length", type=int, default=32, help="H, rows of a trajectory (default: %(default)s)")
    parser.add_argument(
        "--windows", choices=RULES, default="whole", help="method.diffusion.windows (default: %(default)s)"
    )
    parser.add_argument("--features", type=int, default=64, help="of the U-Net (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8_000, help="of a diffusion model (default: %(default)s)")
    parser.add_argument("--ensemble-epochs", type=int, default=50, help="at most (default: %(default)s)")
    parser.add_argument("--model-seeds", type=int, default=1, help="diffusion models (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="samplings of each model (default: %(default)s)")
    parser.add_argument("--trajectories", type=int, default=64, help="of a sampling (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of the sampler (default: %(default)s)")
    parser.add_argument("--step-counts", type=int, nargs="+", default=list(STEPS), help="compared with each other")
    parser.add_argument("--coefs", type=float, nargs="+", default=list(COEFS), help="lambda, rule code; 0 comes first")
    parser.add_argument("--score-coefs", type=float, nargs="*", default=list(SCORE_COEFS), help="lambda, rule score")
    workdir = Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    parser.add_argument("--workdir", type=Path, default=workdir, help="datasets and stages (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="draw the kept results there and measure nothing")
    return parser


PARTS = {"guidance": guidance_lines, "steps": step_lines, "terminals": terminal_lines}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    if min(args.model_seeds, args.seeds, args.trajectories) < 1 or args.coefs[:1] != [0.0]:
        parser.error("seeds and trajectories must be greater than 0, and --coefs begin with 0")
    configure_cpu(1)
    try:
        if args.figure is not None:
            draw(RESULTS / f"{BENCHMARK}.jsonl", args.figure)
            return 0
        for name in args.tasks:
            task = Task(name, args)
            for part in args.parts:
                if part != "terminals" or task.data.terminals.any():
                    for one in PARTS[part](task, shown_command(BENCHMARK, words)):
                        print_line(one)
    except UserError as error:
        print(f"{BENCHMARK}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
