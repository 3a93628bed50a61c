"""Learning a diffusion model of sub-trajectories as a stage of its own, for synthetic data (`agents.synthetic`).

The model of policy-guided diffusion (Jackson et al., RLC 2024, arXiv 2404.06356): EDM (`agents.edm`) with a 1-D U-Net
(`agents.unet`) over windows of a dataset (`agents.trajectories`), trained by Adam with a learning rate that rises
linearly from a tenth of itself and falls to 0 along a half cosine; what is kept are running means of the parameters.

Against the released code (EmptyJackson/policy-guided-diffusion, commit 9da606c), whose numbers the settings below have
where they say nothing else:

- the training is counted in updates and not in passes over the data, 10,000 of which are 7 to 36 million updates;
- windows may hold the transition that ends an episode whole and anywhere (`windows`), which theirs cannot. Of 8,000
  updates on embedded/hopper-medium-snapshots-v0, where 1.22 % of the transitions are terminal (64 features, H = 32),
  1.26 % of the sampled transitions were terminal with `padded` windows and 0.20 % with `whole` ones, and 58 and 14 % of
  those that the environment's rule ends were among them (benchmarks/results/pgd_guidance.jsonl);
- d need not be standardised (`terminal_scale`). A rare terminal is then a spike of many deviations, but so its errors
  weigh as much as any other channel's: of 8,000 updates on hopper-medium-snapshots (32 features, H = 8, 1.27 % of the
  transitions in windows terminal) 1.19 % of the samples' transitions were terminal where d was standardised, 0.77 %
  where it was 0 or 1 and 0.74 % where it was -1 or 1, and the environment's rule confirmed 48, 36 and 41 % of them.
  One training each.

Shapes: B window of a minibatch, H row of a window, C channel, U update of a chunk, L noise level.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.checks import check_choice, check_positive, check_share
from agents.chunk import PRECISIONS
from agents.edm import Denoiser, TrainedDenoiser
from agents.graphs import WARM_UP, Capture, CaptureError, default_capture, side_stream, warn_eager
from agents.method import Stage, TrainingData
from agents.optim import Adam, half_cosine
from agents.randomness import generator
from agents.trajectories import RULES, TERMINAL_SCALES, EpisodeRows, TrajectoryScaling, Windows
from agents.unet import NORMS, UNet
from agents.unet_inference import InferenceUNet
from envs.errors import UserError

KIND = "trajectory_diffusion"
HELD_SIGMAS = (0.01, 0.1, 1.0, 10.0)  # noise levels at which the held-out loss is told
MIN_COVERAGE = 0.1  # share of the transitions that windows have to hold
_MAX_HELD = 128  # windows
_CHUNK = 100  # updates that are drawn at once
_REPORTS = 50  # of a training, at most
_MIN_REPORTED = 10  # updates before a report


@dataclass
class DiffusionConfig:
    """What the model is and how it learns."""

    length: int = 32  # H, rows of a sub-trajectory; H - 1 transitions
    stride: int = 8  # of the windows inside episodes
    windows: str = "padded"  # padded | whole | release: see `agents.trajectories`
    terminal_scale: str = "standardised"  # standardised: as released | raw: 0, 1, as SynthER has it | bounded: -1, 1
    features: int = 256  # of the U-Net's first block, a multiple of 16; released: 1024
    num_blocks: int = 3
    norm: str = "step"  # step: as the released code computes it | trajectory: the usual group norm
    num_updates: int = 200_000
    batch_size: int = 32  # windows
    learning_rate: float = 2e-3
    warm_up: float = 0.1  # share of the updates
    ema_decay: float = 0.995
    ema_every: int = 10  # updates
    holdout_fraction: float = 0.05  # of the episodes
    p_mean: float = -1.2  # of ln(sigma)
    p_std: float = 1.2
    sigma_data: float = 1.0
    precision: str = "float32"  # of the convolutions' products: float32 | mixed (bfloat16 on a CPU, TF32 on CUDA)
    seed: int = 0  # a stage of its own: runs with other seeds share one

    def __post_init__(self) -> None:
        positive = (
            "stride", "features", "num_blocks", "num_updates", "batch_size", "learning_rate", "ema_every", "p_std",
            "sigma_data",
        )  # fmt: skip
        part = "method.diffusion"
        check_positive(self, *positive, part=part)
        for name, choices in (
            ("windows", RULES), ("terminal_scale", TERMINAL_SCALES), ("norm", NORMS), ("precision", PRECISIONS),
        ):  # fmt: skip
            check_choice(self, name, choices, part)
        check_share(self, "warm_up", "ema_decay", "holdout_fraction", interval="[0, 1)", part=part)
        if self.features % 16:
            raise UserError(f"method.diffusion.features={self.features} must be a multiple of 16, such as 64 or 256")
        shortest = max(3, 2 ** (self.num_blocks - 1))
        if self.length < shortest:
            raise UserError(
                f"method.diffusion.length={self.length} must be at least {shortest} with "
                f"method.diffusion.num_blocks={self.num_blocks}"
            )

    @property
    def updates_per_report(self) -> int:
        """Updates before each report of a training."""
        return max(_MIN_REPORTED, self.num_updates // _REPORTS)


class TrajectoryModel:
    """A trained model, with the running means of the parameters.

    Attributes:
        denoiser: D(x; sigma) (`agents.edm.Denoiser`), in the precision that is set where it is called
            (`agents.chunk.matrix_precision`).
        scaling: between its channels and the data.
        length: H; it is for no other.
    """

    def __init__(self, parameters: Tensor, scaling: TrajectoryScaling, settings: Mapping[str, Any]) -> None:
        self.scaling, self.length = scaling, int(settings["length"])
        self._settings = dict(settings)
        network = UNet(
            scaling.num_channels, settings["features"], settings["num_blocks"], settings["norm"], None,
            parameters.device,
        )  # fmt: skip
        network.stack.flat.copy_(parameters)
        self._parameters = network.stack.flat
        evaluated = InferenceUNet(network) if settings["norm"] == "step" else network
        self.denoiser = Denoiser(evaluated, settings["sigma_data"])

    def __reduce__(self) -> tuple[object, ...]:
        # what is computed from the parameters need not travel
        return TrajectoryModel, (self._parameters, self.scaling, self._settings)

    @property
    def observation_dim(self) -> int:
        return self.scaling.observation_dim

    @property
    def action_dim(self) -> int:
        return self.scaling.action_dim

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TrajectoryModel:
        """From what the stage holds."""
        return cls(state["parameters"], TrajectoryScaling.from_state_dict(state["scaling"]), state["settings"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": dict(self._settings), "scaling": self.scaling.state_dict(),
            "parameters": self._parameters,
        }  # fmt: skip

    def to(self, device: torch.device | str) -> TrajectoryModel:
        """A copy on another device."""
        return TrajectoryModel.from_state_dict(_on(device, self.state_dict()))


def diffusion_stage(config: DiffusionConfig) -> Stage:
    """The model as a stage; its content is `TrajectoryModel.state_dict`."""

    def build(data: TrainingData, report: Callable[[int, Mapping[str, float]], None]) -> dict[str, Any]:
        return train_trajectory_diffusion(data, config, report)

    return Stage(
        KIND, dataclasses.asdict(config), build, epochs=-(-config.num_updates // config.updates_per_report),
        epoch_updates=config.updates_per_report,
    )  # fmt: skip


@torch.inference_mode()
def train_trajectory_diffusion(
    data: TrainingData,
    config: DiffusionConfig,
    report: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Learn a model of a dataset's sub-trajectories.

    Args:
        data: on the device to train on.
        report: called with the number of updates done and metrics (see `DiffusionTrainer`), some fifty times.

    Returns:
        What `TrajectoryModel.from_state_dict` takes, on the CPU.

    Raises:
        UserError: too few windows, or the training diverged.
    """
    trainer = DiffusionTrainer(data, config)
    for done, metrics in trainer.train():
        if report is not None:
            report(done, metrics)
    return _on("cpu", trainer.model().state_dict())


class DiffusionTrainer:
    """What `train_trajectory_diffusion` does, in steps.

    Metrics: `loss`, mean over the updates since the last report; `holdout_loss` of the running means on windows of
    held-out episodes, with noise levels as in the training, and `holdout_loss_sigma_<level>` at single ones;
    `learning_rate`, that of the last update; `seconds_per_update`; `minutes`. With the first report also the windows:
    `windows`, `windows_strided`, `windows_start`, `windows_terminal_end`, `windows_held_out`; `coverage`, the share of
    the transitions that some window holds; `terminal_share_data` of the transitions and `terminal_share_windows` of
    those in windows.

    Args:
        data: on the device to train on.
        capture: how an update becomes a graph; None: as a CUDA graph, on CUDA.
    """

    def __init__(self, data: TrainingData, config: DiffusionConfig, capture: Capture | None = None) -> None:
        self.config, self.device = config, data.observations.device
        self.windows, self._held = split_windows(data, config)
        self.scaling = TrajectoryScaling.fit(self.windows, config.terminal_scale)
        self._rows_RC = self.scaling.encode(self.windows.episodes.rows)
        network = UNet(
            self.scaling.num_channels, config.features, config.num_blocks, config.norm, config.precision, self.device
        )
        network.initialise(self._draw("init", device="cpu"))
        self.network = network
        self.denoiser = TrainedDenoiser(network, config.sigma_data)
        self._optimiser = Adam(network.stack, [config.learning_rate])
        self._rate_scale = torch.zeros((), device=self.device)
        self._optimiser.follow(self._rate_scale)
        self.averaged = network.stack.flat.clone()
        self._loss = torch.zeros((), device=self.device)
        batch = (config.batch_size, config.length, self.scaling.num_channels)
        self._x_BHC, self._noise_BHC = (torch.empty(batch, device=self.device) for _ in range(2))
        self._sigma_B = torch.empty(self.config.batch_size, device=self.device)
        self._capture, self._to_warm_up = capture or default_capture(self.device), WARM_UP
        self._replay: Callable[[], None] | None = None

    def _draw(self, purpose: str, *counters: int, device: torch.device | str | None = None) -> torch.Generator:
        where = self.device if device is None else device
        return generator(self.config.seed, f"trajectory diffusion {purpose}", *counters, device=where)

    # ---- training -------------------------------------------------------------------------------------------------

    def train(self) -> Iterator[tuple[int, dict[str, float]]]:
        """All updates; now and then how many are done, and metrics."""
        config, started = self.config, time.perf_counter()
        every = config.updates_per_report
        batches = self.batches()
        since, reported = started, 0
        for update in range(config.num_updates):
            self.step(update, *next(batches))
            done = update + 1
            if done % every == 0 or done == config.num_updates:
                metrics = {"loss": float(self._loss) / (done - reported)}  # waits for the device, before the clock
                now = time.perf_counter()
                metrics |= {
                    "seconds_per_update": (now - since) / (done - reported),
                    "learning_rate": config.learning_rate * self.schedule(update),
                    **self.holdout_losses(), "minutes": (time.perf_counter() - started) / 60,
                }  # fmt: skip
                if not reported:
                    metrics |= self.window_metrics()
                if not all(map(math.isfinite, metrics.values())):
                    raise UserError(
                        "the trajectory diffusion diverged; lower "
                        f"method.diffusion.learning_rate={config.learning_rate}"
                    )
                yield done, metrics
                self._loss.zero_()
                since, reported = time.perf_counter(), done

    def schedule(self, update: int) -> float:
        """What the learning rate is multiplied with."""
        rising = int(self.config.warm_up * self.config.num_updates)
        if update < rising:
            return 0.1 + 0.9 * update / rising
        return half_cosine((update - rising) / (self.config.num_updates - rising))

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Minibatches, ln(sigma) less its mean over its deviation, and noise: `(B, H, C)`, `(B,)`, `(B, H, C)`."""
        numbers = self._window_numbers()
        shape, chunk = self._x_BHC.shape, 0
        while True:
            draw = self._draw("noise", chunk)
            levels_UB = torch.randn((_CHUNK, self.config.batch_size), generator=draw, device=self.device)
            noise_UBHC = torch.randn((_CHUNK, *shape), generator=draw, device=self.device)
            rows = [self.windows.row_numbers(next(numbers)) for _ in range(_CHUNK)]
            rows_UBH = torch.stack(rows).to(self.device)
            for rows_BH, level_B, noise_BHC in zip(rows_UBH, levels_UB, noise_UBHC, strict=True):
                yield self._rows_RC.index_select(0, rows_BH.view(-1)).view(shape), level_B, noise_BHC
            chunk += 1

    def _window_numbers(self) -> Iterator[Tensor]:
        """Windows of one minibatch after the other, pass after pass; what a pass leaves over is left out."""
        passes = 0
        while True:
            order = torch.randperm(len(self.windows), generator=self._draw("batches", passes, device="cpu"))
            yield from order.split(self.config.batch_size)[: len(order) // self.config.batch_size]
            passes += 1

    def step(self, update: int, x_BHC: Tensor, level_B: Tensor, noise_BHC: Tensor) -> None:
        """One update of the network, and of the running means if they are due."""
        self._x_BHC.copy_(x_BHC)
        self._noise_BHC.copy_(noise_BHC)
        torch.exp(level_B * self.config.p_std + self.config.p_mean, out=self._sigma_B)
        self._rate_scale.fill_(self.schedule(update))
        self._learn()
        if (update + 1) % self.config.ema_every == 0:
            self.averaged.lerp_(self.network.stack.flat, 1 - self.config.ema_decay)

    def _learn(self) -> None:
        """The update of what lies in the buffers: on CUDA as a graph."""
        if self._replay is not None:
            self._replay()
        elif self._capture is None:
            self._learn_as_written()
        elif self._to_warm_up:
            self._to_warm_up -= 1
            with side_stream(self.device):
                self._learn_as_written()
        else:
            try:
                self._replay = self._capture(self._learn_as_written)
            except CaptureError as error:  # nothing of the update has been executed
                warn_eager(error)
                self._capture = None
                self._learn_as_written()

    def _learn_as_written(self) -> None:
        self._loss.add_(self.denoiser.write_gradient(self._x_BHC, self._sigma_B, self._noise_BHC))
        self._optimiser.step()

    # ---- what is told and kept ------------------------------------------------------------------------------------

    def model(self) -> TrajectoryModel:
        """The model with the running means as they are."""
        return TrajectoryModel(self.averaged, self.scaling, dataclasses.asdict(self.config))

    def holdout_losses(self) -> dict[str, float]:
        """Of the running means, on the same windows with the same noise every time; nothing if none are held out."""
        if not len(self._held):
            return {}
        denoiser, config = self.model().denoiser, self.config
        chosen = torch.arange(len(self._held))[:: max(1, len(self._held) // _MAX_HELD)][:_MAX_HELD]
        x_BHC = self._rows_RC[self._held.row_numbers(chosen).to(self.device)]
        draw = self._draw("holdout noise")
        level_B = torch.randn(len(x_BHC), generator=draw, device=self.device)
        noise_BHC = torch.randn(x_BHC.shape, generator=draw, device=self.device)
        sigmas = [(level_B * config.p_std + config.p_mean).exp(), *(torch.full_like(level_B, s) for s in HELD_SIGMAS)]
        losses = [
            torch.stack([
                denoiser.loss(*part).sum()
                for part in zip(*(t.split(self.config.batch_size) for t in (x_BHC, sigma_B, noise_BHC)), strict=True)
            ]).sum() / x_BHC.numel()
            for sigma_B in sigmas
        ]  # fmt: skip
        names = ["holdout_loss", *(f"holdout_loss_sigma_{level:g}" for level in HELD_SIGMAS)]
        return dict(zip(names, torch.stack(losses).tolist(), strict=True))

    def window_metrics(self) -> dict[str, float]:
        """What the model is to learn from."""
        windows, rows = self.windows, self.windows.episodes.rows
        # of a window all rows but the last are transitions
        transitions = ~windows.episodes.state_only
        inner = dataclasses.replace(windows, length=windows.length - 1).row_counts() * transitions
        return {
            "windows": float(len(windows)),
            **{f"windows_{kind}": float(count) for kind, count in windows.counts.items()},
            "windows_held_out": float(len(self._held)), "coverage": windows.coverage,
            "terminal_share_data": float(rows.terminals[transitions].mean()),
            "terminal_share_windows": float((inner * rows.terminals).sum() / inner.sum()),
        }  # fmt: skip


def split_windows(data: TrainingData, config: DiffusionConfig) -> tuple[Windows, Windows]:
    """The windows to learn from, and those of held-out episodes.

    Raises:
        UserError: there are fewer windows than a minibatch has, or they hold hardly anything of the data.
    """
    rows = EpisodeRows.from_data(data, config.length - 1 if config.windows == "padded" else 0)
    num_held = int(config.holdout_fraction * len(rows))
    if config.holdout_fraction and len(rows) > 1:
        num_held = max(num_held, 1)
    order = torch.randperm(len(rows), generator=generator(config.seed, "trajectory diffusion holdout"))
    held, kept = order[:num_held].sort().values, order[num_held:].sort().values

    def windows(length: int) -> Windows:
        return rows.windows(length, config.windows, config.stride, kept)

    def enough(of: Windows) -> bool:
        return len(of) >= config.batch_size and of.coverage >= MIN_COVERAGE

    train = windows(config.length)
    if not enough(train):
        median = int(rows.lengths[kept].median())
        shorter = next((n for n in range(config.length - 1, 2, -1) if enough(windows(n))), None)
        raise UserError(
            f"episodes with a median of {median} transitions give {len(train)} windows of "
            f"method.diffusion.length={config.length} rows, with {train.coverage:.0%} of the transitions; "
            + (
                f"the greatest length that gives {config.batch_size} windows with {MIN_COVERAGE:.0%} of them is "
                f"method.diffusion.length={shorter}"
                if shorter is not None
                else "use a dataset with longer episodes, or with more of them"
            )
        )
    return train, rows.windows(config.length, config.windows, config.stride, held)


def _on(device: torch.device | str, content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _on(device, value) for name, value in content.items()}
    return content.to(device) if isinstance(content, Tensor) else content
