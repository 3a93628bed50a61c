"""An ensemble of Gaussian dynamics models: p(s' - s, r | s, a), as in MBPO, MOPO and RAVL.

Every member is an MLP with SiLU hidden layers and a mean and a log-variance for each of the S + 1 outputs (state
change and reward, raw units). Inputs are standardised and clipped to +-10. Log-variances are softly bounded by learned
vectors shared by the ensemble. Loss (released RAVL, `net.py:175-185`; Janner et al. 2019):

    sum_e mean_{b,d} [ logvar + (y - mu)^2 exp(-logvar) ] + 0.01 sum(max_logvar) - 0.01 sum(min_logvar)

with L2 on each layer's weights through Adam. Departures from the released RAVL, each a defect there: the holdout stays
apart from the training set, elites are chosen once on it, every member keeps its own bootstrap resample, and seeds
reach the weights.

Shapes: E ensemble member, B batch, S observation, A action, D = S + 1 outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim.adam import adam

from agents.randomness import generator
from envs.errors import UserError


@dataclass
class DynamicsConfig:
    """Architecture and training schedule; defaults from the released RAVL and MOPO (see papers' settings in the
    YAMLs)."""

    ensemble_size: int = 7
    num_elites: int = 5  # members with the lowest holdout error, used for rollouts
    hidden: list[int] = field(default_factory=lambda: [200, 200, 200, 200])
    learning_rate: float = 1e-3
    # L2 coefficient of each weight layer, the output layer last
    weight_decay: list[float] = field(default_factory=lambda: [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4])
    batch_size: int = 256
    holdout_fraction: float = 0.2
    max_holdout: int = 1_000_000  # rows; OfflineRL-Kit caps it at 1000
    improvement: float = 0.01  # relative fall of a member's holdout error that counts
    patience: int = 5  # epochs in a row without any member improving
    min_epochs: int = 0  # released RAVL: 350; a plateau before that lowers the learning rate once instead of stopping
    plateau_lr_factor: float = 0.3
    max_epochs: int = 2000
    seed: int = 0  # ensembles are a stage of their own: runs with other seeds share one

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "max_holdout", "patience", "max_epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"dynamics.{name}={getattr(self, name)} must be greater than 0 and finite")
        if not 1 <= self.num_elites <= self.ensemble_size:
            raise UserError(f"dynamics.num_elites={self.num_elites} must lie in 1..ensemble_size={self.ensemble_size}")
        if len(self.weight_decay) != len(self.hidden) + 1:
            raise UserError(
                f"dynamics.weight_decay needs {len(self.hidden) + 1} values, one per hidden layer and one for the "
                f"output, got {len(self.weight_decay)}"
            )
        if not 0 < self.holdout_fraction < 1:
            raise UserError(f"dynamics.holdout_fraction={self.holdout_fraction} must lie between 0 and 1")


class Ensemble:
    """E Gaussian models evaluated by one batched matrix product per layer.

    `tensors` holds everything: weights `(E, in, out)`, biases `(E, 1, out)`, `max_logvar`, `min_logvar` `(D,)`, and
    the input statistics `mean`, `std` `(S + A,)`. `elites` are indices into E.
    """

    def __init__(self, tensors: dict[str, Tensor], elites: list[int], observation_dim: int) -> None:
        self.tensors, self.elites, self.observation_dim = tensors, elites, observation_dim
        self.num_layers = sum(1 for name in tensors if name.startswith("W"))
        self.num_outputs = observation_dim + 1

    @property
    def size(self) -> int:
        return self.tensors["W0"].shape[0]

    def _normalise(self, state_action: Tensor) -> Tensor:
        return ((state_action - self.tensors["mean"]) / self.tensors["std"]).clamp_(-10.0, 10.0)

    def _bounded(self, out: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = out.split(self.num_outputs, dim=-1)
        upper, lower = self.tensors["max_logvar"], self.tensors["min_logvar"]
        logvar = upper - softplus(upper - logvar)
        return mean, lower + softplus(logvar - lower)

    def forward(self, x_EBX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `(E, B, D)` for normalised inputs `(E or 1, B, S + A)`."""
        x = x_EBX.expand(self.size, -1, -1)
        for layer in range(self.num_layers):
            x = torch.baddbmm(self.tensors[f"b{layer}"], x, self.tensors[f"W{layer}"])
            if layer < self.num_layers - 1:
                x = torch.nn.functional.silu(x, inplace=not x.requires_grad)
        return self._bounded(x)

    def predict_all(self, state_action_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(E, B, D)` of every member for raw inputs `(B, S + A)`."""
        mean, logvar = self.forward(self._normalise(state_action_BX).unsqueeze(0))
        return mean, logvar.mul_(0.5).exp_()

    def predict_one_each(self, state_action_BX: Tensor, member_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(B, D)`, row b by ensemble member `member_B[b]`: only what is drawn is
        computed."""
        order = member_B.argsort(stable=True)
        counts = torch.bincount(member_B, minlength=self.size).tolist()
        groups = self._normalise(state_action_BX[order]).split(counts)
        outs = []
        for e, x in enumerate(groups):
            if not len(x):
                continue
            for layer in range(self.num_layers):
                x = torch.addmm(self.tensors[f"b{layer}"][e], x, self.tensors[f"W{layer}"][e])
                if layer < self.num_layers - 1:
                    x = torch.nn.functional.silu(x, inplace=True)
            outs.append(x)
        mean, logvar = self._bounded(torch.cat(outs))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return mean[back], logvar.mul_(0.5).exp_()[back]

    def to(self, device: torch.device | str) -> Ensemble:
        return Ensemble({k: v.to(device) for k, v in self.tensors.items()}, self.elites, self.observation_dim)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "elites": self.elites, "observation_dim": self.observation_dim}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Ensemble:
        return cls(state["tensors"], list(state["elites"]), int(state["observation_dim"]))


@dataclass(frozen=True)
class EpochReport:
    """One epoch of ensemble training."""

    epoch: int
    train_loss: float
    holdout_mse: list[float]  # lowest so far, per ensemble member, of the mean prediction, raw units
    learning_rate: float


def train_ensemble(
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_observations: Tensor,
    config: DynamicsConfig,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Ensemble:
    """Fit an ensemble until no member improves on the holdout.

    Args:
        observations, actions, rewards, next_observations: `(N, S)`, `(N, A)`, `(N,)`, `(N, S)`, on the device to train
        on.
        on_epoch: called after every epoch.

    Returns:
        The ensemble with each member's best weights and the elites chosen on the holdout.
    """
    trainer = EnsembleTrainer(observations, actions, rewards, next_observations, config)
    for report in trainer.epochs():
        if on_epoch is not None:
            on_epoch(report)
    return trainer.finish()


class EnsembleTrainer:
    """Training in steps, so that a benchmark can time an epoch."""

    def __init__(
        self, observations: Tensor, actions: Tensor, rewards: Tensor, next_observations: Tensor, config: DynamicsConfig
    ) -> None:
        self.config = config
        self.device = observations.device
        n = len(observations)
        num_holdout = min(int(n * config.holdout_fraction), config.max_holdout)
        if num_holdout < 1 or n - num_holdout < 1:
            raise UserError(f"{n} transitions are too few to hold out {config.holdout_fraction:.0%} of them")
        split = torch.randperm(n, generator=generator(config.seed, "holdout")).to(self.device)
        held, kept = split[:num_holdout], split[num_holdout:]
        self.num_train = len(kept)
        inputs = torch.cat((observations, actions), dim=-1)
        targets = torch.cat((next_observations - observations, rewards.unsqueeze(-1)), dim=-1)
        mean, std = inputs.mean(0), inputs.std(0)
        std = torch.where(std < 1e-12, torch.ones_like(std), std)
        self.ensemble = self._initial(mean, std, observations.shape[1], actions.shape[1])
        self._inputs, self._targets = self.ensemble._normalise(inputs[kept]), targets[kept]
        self._held_inputs, self._held_targets = self.ensemble._normalise(inputs[held]), targets[held]
        e = config.ensemble_size
        bootstrap = torch.randint(self.num_train, (e, self.num_train), generator=generator(config.seed, "bootstrap"))
        self._bootstrap_EN = bootstrap.to(self.device)
        self._trained = [name for name in self.ensemble.tensors if name not in ("mean", "std")]
        self._first = {k: torch.zeros_like(self.ensemble.tensors[k]) for k in self._trained}
        self._second = {k: torch.zeros_like(self.ensemble.tensors[k]) for k in self._trained}
        self._steps = {k: torch.zeros((), device=self.device) for k in self._trained}
        self._decayed = [([f"W{i}"], decay) for i, decay in enumerate(config.weight_decay)]
        self._decayed.append(([k for k in self._trained if not k.startswith("W")], 0.0))
        self.learning_rate = config.learning_rate
        self._best_mse_E = torch.full((e,), float("inf"), device=self.device)
        self._best = {k: v.clone() for k, v in self.ensemble.tensors.items()}

    def _initial(self, mean: Tensor, std: Tensor, observation_dim: int, action_dim: int) -> Ensemble:
        """Truncated normal weights, std 1 / (2 sqrt(fan_in)), cut at two standard deviations; zero biases."""
        cfg, outputs = self.config, observation_dim + 1
        sizes = [observation_dim + action_dim, *cfg.hidden, 2 * outputs]
        draw = generator(cfg.seed, "init dynamics")
        tensors: dict[str, Tensor] = {}
        for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
            bound = 1.0 / (2.0 * math.sqrt(n_in))
            weight = torch.empty(cfg.ensemble_size, n_in, n_out)
            torch.nn.init.trunc_normal_(weight, 0.0, bound, -2 * bound, 2 * bound, generator=draw)
            tensors[f"W{layer}"] = weight.to(self.device)
            tensors[f"b{layer}"] = torch.zeros(cfg.ensemble_size, 1, n_out, device=self.device)
        tensors["max_logvar"] = torch.full((outputs,), 0.5, device=self.device)
        tensors["min_logvar"] = torch.full((outputs,), -10.0, device=self.device)
        return Ensemble({**tensors, "mean": mean, "std": std}, list(range(cfg.num_elites)), observation_dim)

    def loss(self, x_EBX: Tensor, y_EBD: Tensor) -> Tensor:
        """The loss of the module docstring, without the L2 terms (they enter through Adam)."""
        mean, logvar = self.ensemble.forward(x_EBX)
        nll = (logvar + (y_EBD - mean).square() * torch.exp(-logvar)).mean((1, 2)).sum()
        bounds = self.ensemble.tensors["max_logvar"].sum() - self.ensemble.tensors["min_logvar"].sum()
        return nll + 0.01 * bounds

    def step(self, rows_EB: Tensor) -> Tensor:
        """One Adam step of all members on their rows; returns the loss."""
        tensors = self.ensemble.tensors
        for k in self._trained:
            tensors[k].requires_grad_(True)
        loss = self.loss(self._inputs[rows_EB], self._targets[rows_EB])
        grads = dict(zip(self._trained, torch.autograd.grad(loss, [tensors[k] for k in self._trained]), strict=True))
        for k in self._trained:
            tensors[k].requires_grad_(False)
        for names, decay in self._decayed:
            adam(
                [tensors[k] for k in names], [grads[k] for k in names], [self._first[k] for k in names],
                [self._second[k] for k in names], [], [self._steps[k] for k in names], fused=True, foreach=False,
                amsgrad=False, beta1=0.9, beta2=0.999, lr=self.learning_rate, weight_decay=decay, eps=1e-8,
                maximize=False,
            )  # fmt: skip
        return loss.detach()

    def train_epoch(self, epoch: int) -> float:
        """One pass over every member's resample, in a new order; returns the mean loss."""
        draw = generator(self.config.seed, "order", epoch)
        order = torch.stack([torch.randperm(self.num_train, generator=draw) for _ in range(self.config.ensemble_size)])
        rows = self._bootstrap_EN.gather(1, order.to(self.device))
        return float(torch.stack([self.step(batch) for batch in rows.split(self.config.batch_size, dim=1)]).mean())

    def holdout_mse(self) -> Tensor:
        """Mean squared error of every member's mean over rows and outputs, `(E,)`."""
        total = torch.zeros(self.config.ensemble_size, device=self.device)
        for x, y in zip(self._held_inputs.split(4096), self._held_targets.split(4096), strict=True):
            total += (self.ensemble.forward(x.unsqueeze(0))[0] - y).square().sum((1, 2))
        return total / self._held_targets.numel()

    def _keep_best(self) -> bool:
        """Snapshot the members that improved by more than `improvement`; whether any did."""
        mse = self.holdout_mse()
        if not bool(torch.isfinite(mse).all()):
            raise UserError("dynamics training diverged: the holdout error is not finite; lower dynamics.learning_rate")
        better = (self._best_mse_E - mse) / self._best_mse_E > self.config.improvement
        better |= torch.isinf(self._best_mse_E)
        self._best_mse_E = torch.where(better, mse, self._best_mse_E)
        for k in self._trained:
            if k.endswith("logvar"):  # shared by the ensemble
                if bool(better.any()):
                    self._best[k].copy_(self.ensemble.tensors[k])
            else:
                self._best[k][better] = self.ensemble.tensors[k][better]
        return bool(better.any())

    def epochs(self) -> Iterator[EpochReport]:
        """Train until the stopping rule holds."""
        cfg, waited, lowered = self.config, 0, False
        for epoch in range(cfg.max_epochs):
            loss = self.train_epoch(epoch)
            waited = 0 if self._keep_best() else waited + 1
            yield EpochReport(epoch, loss, self._best_mse_E.tolist(), self.learning_rate)
            if waited < cfg.patience:
                continue
            if epoch >= cfg.min_epochs:
                return
            if not lowered:
                self.learning_rate *= cfg.plateau_lr_factor
                lowered, waited = True, 0

    def finish(self) -> Ensemble:
        """The best weights of every member, elites ranked by holdout error."""
        elites = self._best_mse_E.argsort(stable=True)[: self.config.num_elites].tolist()
        return Ensemble(self._best, sorted(elites), self.ensemble.observation_dim)
