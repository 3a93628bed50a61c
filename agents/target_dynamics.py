"""The target domain's dynamics as VGDF learns them: one ensemble per member of a pack, fitted again and again to a
replay that grows.

A network is an MLP with SiLU hidden layers and a mean and a log-variance for each of the S + 1 outputs [r, s' - s], in
raw units; inputs are standardised with the mean and standard deviation of the rows it trains on. Log-variances are
softly kept in a fixed range, [-10, 0.5]. The loss of an ensemble is

    sum_e mean_{b,d} [ logvar + (y - mu)^2 exp(-logvar) ] + sum_layers decay_l / 2 |W_l|^2

Source: Xu et al. 2023 (arXiv 2305.17625), sections 4.2 and E, and its released code (Kavka1/VGDF at 9f65d60,
`model/dynamics.py`), of which the schedule "released" is a faithful rendering. It departs from MBPO's and from this
package's `agents.dynamics` in this: the bounds of the log-variance do not learn, all networks see all rows (each in an
order of its own, without resampling), training begins where the last refit has ended, optimiser included, and ends with
the weights of the last epoch, not the best ones (`restore_best`). Its function for cut normal weights does not assign
what it cuts, so weights begin as normal draws that nothing cuts (`initialisation`).

A refit of that schedule goes on until no network's holdout error has fallen by more than 1 % for more than
p = max(0, patience - floor(t / patience_decay)) epochs. Errors are compared with 1e10 at first, so that the first epoch
counts as a fall, and a refit takes p + 2 epochs or more.

Members of a pack are refitted in one batch; one that ends leaves it. All randomness follows from a member's seed and t.

Shapes: M member, P members in a refit, E ensemble member, G = P * E, B batch, S observation, A action, X = S + A,
D = S + 1 outputs, W columns of a row [s, a, r, d, s'], n rows, H held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from agents.checks import check_choice, check_not_negative, check_positive, check_share
from agents.chunk import PRECISIONS
from agents.networks import StackedMLP, gather_members
from agents.products import affine, product
from agents.randomness import generator
from envs.errors import UserError

# what torch.optim.Adam(fused=True) calls, without that class's bookkeeping
_fused_adam = torch._fused_adam_

SCHEDULES = ("released", "one-epoch", "fixed-steps")
INITIALISATIONS = ("normal", "truncated")
MAX_LOGVAR, MIN_LOGVAR = 0.5, -10.0
_FIRST_BEST = 1e10  # holdout error that a refit's first epoch is compared with
_SMALLEST_STD = 1e-12  # of an input; columns that vary less are not scaled


@dataclass
class TargetDynamicsConfig:
    """The ensemble and how it is refitted; defaults are the released VGDF's."""

    ensemble_size: int = 7
    hidden: list[int] = field(default_factory=lambda: [200, 200, 200, 200])
    learning_rate: float = 1e-3  # the paper's Table 2 has one rate for all networks, 3e-4
    # of each layer's weights, the output layer last; the loss has half of it times the squared norm
    weight_decay: list[float] = field(default_factory=lambda: [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4])
    batch_size: int = 256
    holdout_fraction: float = 0.1  # of the target rows, drawn anew at every refit
    initialisation: str = "normal"  # of weights, std 1 / (2 sqrt(inputs)): normal (as released) | truncated at 2 std
    refit_every: int = 250  # updates
    # released: until the holdout error stands still | one-epoch and fixed-steps: cheaper, and not the authors'
    schedule: str = "released"
    steps: int = 250  # gradient steps of a refit; with fixed-steps
    improvement: float = 0.01  # relative fall of a network's holdout error that counts
    patience: int = 5  # epochs without such a fall, at t = 0
    patience_decay: int = 150_000  # updates after which patience is one less
    restore_best: bool = False  # end with every network's weights of its last epoch that counted
    # float32 | mixed: weights and activations rounded to bfloat16; parameters, Adam, predictions and losses float32
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.ensemble_size < 2:
            raise UserError(
                f"method.dynamics.ensemble_size={self.ensemble_size} must be 2 or more: the spread of one network is "
                "not defined"
            )
        part = "method.dynamics"
        check_positive(self, "learning_rate", "batch_size", "refit_every", "steps", "patience_decay", part=part)
        check_not_negative(self, "patience", part=part)
        check_share(self, "holdout_fraction", part=part)
        if len(self.weight_decay) != len(self.hidden) + 1:
            raise UserError(
                f"method.dynamics.weight_decay needs {len(self.hidden) + 1} values, one per hidden layer and one for "
                f"the output, got {len(self.weight_decay)}"
            )
        for name, known in (("schedule", SCHEDULES), ("initialisation", INITIALISATIONS), ("precision", PRECISIONS)):
            check_choice(self, name, known, part)

    def patience_at(self, t: int) -> int:
        """Epochs without improvement that a refit at update t waits for."""
        return max(0, self.patience - t // self.patience_decay)


class TargetDynamics:
    """One ensemble of E networks per member of a pack.

    Args:
        config: the settings.
        seeds: one per member.
        observation_dim, action_dim: S, A.
        device: where the ensembles live, and where rows come from and predictions go to.

    Attributes:
        fitted: whether every member's ensemble has been trained.
    """

    def __init__(
        self, config: TargetDynamicsConfig, seeds: Sequence[int], observation_dim: int, action_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.config, self.seeds = config, list(seeds)
        self.observation_dim, self.action_dim = observation_dim, action_dim
        inputs, outputs = observation_dim + action_dim, observation_dim + 1
        lead, sizes = (len(self.seeds), config.ensemble_size), (inputs, *config.hidden, 2 * outputs)
        networks = StackedMLP(lead, sizes, device)
        self._training = _Training(config, networks)
        for m, seed in enumerate(self.seeds):
            _initialise(networks, m, generator(seed, "init target dynamics"), config.initialisation)
        self._training.round_weights()
        self._mean_MX = torch.zeros(len(self.seeds), inputs, device=device)
        self._std_MX = torch.ones(len(self.seeds), inputs, device=device)
        self._fits_M = [0] * len(self.seeds)

    @property
    def device(self) -> torch.device:
        return self._mean_MX.device

    @property
    def fitted(self) -> bool:
        return all(self._fits_M)

    @property
    def networks(self) -> StackedMLP:
        """The parameters, `(M, E)` networks."""
        return self._training.networks

    def due(self, t: int, source_rows: int) -> bool:
        """Whether the release refits before update t: every `refit_every` updates once the source domain's replay holds
        a batch of the dynamics."""
        return t % self.config.refit_every == 0 and source_rows >= self.config.batch_size

    def enough_rows(self, num_rows: int) -> bool:
        """Whether so many rows leave one for the holdout. The release trains on fewer, and on a single one where the
        source is recorded, with a holdout error of nothing (not a number) and so for patience + 1 epochs."""
        return int(num_rows * self.config.holdout_fraction) > 0

    # ---- refits ---------------------------------------------------------------------------------------------------

    def refit(self, rows: Sequence[Tensor], t: int) -> list[dict[str, float]]:
        """Train every member's ensemble on all rows of its target replay.

        Args:
            rows: `(n, W)` of each member, actions and rewards as the learner has them. A member whose rows do not
                leave one for the holdout is left as it is.
            t: updates so far; what is drawn follows from it and the seed.

        Returns:
            Per member, nothing for one that was left as it is: `dynamics/rows`, `dynamics/epochs`,
            `dynamics/gradient_steps`, `dynamics/train_loss` (per network, of the last epoch) and `dynamics/holdout_mse`
            (over rows, outputs and networks, at the end).
        """
        metrics: list[dict[str, float]] = [{} for _ in self.seeds]
        by_count: dict[int, list[int]] = {}
        for m, of_member in enumerate(rows):
            if self.enough_rows(len(of_member)):
                by_count.setdefault(len(of_member), []).append(m)
        for members in by_count.values():
            for m, values in zip(members, self._refit(members, [rows[m] for m in members], t), strict=True):
                metrics[m] = values
        return metrics

    def _refit(self, members: list[int], rows: list[Tensor], t: int) -> list[dict[str, float]]:
        """Refit members that have as many rows as each other."""
        whole = members == list(range(len(self.seeds)))
        training = self._training if whole else self._training.select(members)
        splits = [
            torch.randperm(len(of_member), generator=generator(self.seeds[m], "target dynamics split", t))
            for m, of_member in zip(members, rows, strict=True)
        ]
        data = _Rows(self.config, self.observation_dim, self.action_dim, rows, splits)
        index = torch.tensor(members, device=self.device)
        self._mean_MX[index], self._std_MX[index] = data.mean_PX, data.std_PX
        if self.config.restore_best:
            training.begin_to_keep()
        active, finished = list(range(len(members))), dict[int, dict[str, float]]()
        watches = [_Watch(self.config, t) for _ in members]
        while active:
            seeds = [self.seeds[members[p]] for p in active]
            loss_P, steps = training.epoch(data, seeds, t, watches[0].epochs)
            # the only time in an epoch that the host waits for the device
            read_PE = torch.cat((loss_P.unsqueeze(1), training.holdout_mse(data)), 1).tolist()
            going_on = []
            for place, (p, (loss, *mse_E)) in enumerate(zip(active, read_PE, strict=True)):
                improved_E, ends = watches[p].after_epoch(mse_E, steps)
                if self.config.restore_best:
                    training.keep(place, improved_E)
                if not ends:
                    going_on.append(place)
                    continue
                if self.config.restore_best:
                    training.restore(place)
                if training is not self._training:
                    training.give(place, self._training, members[p])
                finished[p] = {
                    "dynamics/rows": float(len(rows[p])), "dynamics/epochs": float(watches[p].epochs),
                    "dynamics/gradient_steps": float(watches[p].steps), "dynamics/train_loss": loss,
                    "dynamics/holdout_mse": sum(mse_E) / len(mse_E),
                }  # fmt: skip
                self._fits_M[members[p]] += 1
            if 0 < len(going_on) < len(active):
                training, data = training.select(going_on), data.select(going_on)
            active = [active[place] for place in going_on]
        self._training.round_weights()
        return [finished[p] for p in range(len(members))]

    # ---- predictions ------------------------------------------------------------------------------------------------

    def predict(self, state_action_MBX: Tensor) -> tuple[Tensor, Tensor]:
        """What every network of a member expects of the member's rows.

        Returns:
            Mean and variance `(M, E, B, 1 + S)`, columns [r, s' - s], in raw units.
        """
        m, b, _ = state_action_MBX.shape
        x_MBX = (state_action_MBX - self._mean_MX.unsqueeze(1)) / self._std_MX.unsqueeze(1)
        out_GBO = self._training.outputs(self.networks.spread(x_MBX))
        mean, raw = out_GBO.view(m, -1, b, out_GBO.shape[-1]).chunk(2, dim=-1)
        return mean, _bounded_logvar(raw)[0].exp_()

    # ---- copies -----------------------------------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> TargetDynamics:
        """The ensembles of some members, copied."""
        seeds = [self.seeds[m] for m in members]
        other = TargetDynamics(self.config, seeds, self.observation_dim, self.action_dim, self.device)
        for new, old in enumerate(members):
            self._training.give(old, other._training, new)
            other._mean_MX[new], other._std_MX[new] = self._mean_MX[old], self._std_MX[old]
            other._fits_M[new] = self._fits_M[old]
        other._training.round_weights()
        return other

    def state_dict(self) -> dict[str, Any]:
        training = self._training
        return {
            "flat": training.networks.flat, "first": training.first, "second": training.second,
            "steps": training.steps_P, "mean": self._mean_MX, "std": self._std_MX, "fits": list(self._fits_M),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        training = self._training
        training.networks.flat.copy_(state["flat"])
        training.first.copy_(state["first"])
        training.second.copy_(state["second"])
        training.steps_P.copy_(state["steps"])
        training.round_weights()
        self._mean_MX.copy_(state["mean"])
        self._std_MX.copy_(state["std"])
        self._fits_M = list(state["fits"])


def _initialise(networks: StackedMLP, member: int, draw: torch.Generator, scheme: str) -> None:
    """Normal weights of std 1 / (2 sqrt(inputs)), cut at two of these or nowhere, zero biases. Drawn on the CPU."""
    size = networks.lead[1]
    for weight in networks.weights:
        of_member = weight[member * size : (member + 1) * size]
        std = 1.0 / (2.0 * math.sqrt(weight.shape[1]))
        drawn = torch.empty(of_member.shape)
        if scheme == "truncated":
            torch.nn.init.trunc_normal_(drawn, 0.0, std, -2.0 * std, 2.0 * std, generator=draw)
        else:
            drawn.normal_(0.0, std, generator=draw)
        of_member.copy_(drawn)


def _bounded_logvar(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-variance that is softly kept in its fixed range, and the arguments of the two softplus that do so.

    The bounds are numbers: as tensors that spread over the rows they made each pass twice as long on a CPU.
    """
    below_upper = MAX_LOGVAR - raw
    above_lower = softplus(below_upper).neg_().add_(MAX_LOGVAR - MIN_LOGVAR)
    return softplus(above_lower).add_(MIN_LOGVAR), below_upper, above_lower


def _likelihood_loss(out_GBO: Tensor, y_GBD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the module docstring without its weight decay, of every network `(G,)`, and its gradient with respect
    to the outputs [mean, raw log-variance], `(G, B, 2 D)`."""
    mean, raw = out_GBO.chunk(2, dim=-1)
    logvar, below_upper, above_lower = _bounded_logvar(raw)
    error, count = mean - y_GBD, y_GBD.shape[1] * y_GBD.shape[2]
    weighted = torch.exp(-logvar).mul_(error)
    squares = error.mul_(weighted)
    loss_G = logvar.add_(squares).sum((1, 2)).div_(count)
    grad_raw = squares.neg_().add_(1.0).mul_(1.0 / count).mul_(above_lower.sigmoid_()).mul_(below_upper.sigmoid_())
    return loss_G, torch.cat((weighted.mul_(2.0 / count), grad_raw), dim=-1)


@dataclass
class _Watch:
    """When the refit of one member ends."""

    config: TargetDynamicsConfig
    t: int
    epochs: int = 0
    steps: int = 0
    waited: int = 0  # epochs without improvement
    best_E: list[float] = field(default_factory=list)

    def after_epoch(self, mse_E: Sequence[float], steps: int) -> tuple[list[bool], bool]:
        """Which networks improved, and whether the refit ends."""
        best_E = self.best_E or [_FIRST_BEST] * len(mse_E)
        # an error that is not finite, or none at all against 0, is no improvement
        improved_E = [b > 0 and (b - e) / b > self.config.improvement for b, e in zip(best_E, mse_E, strict=True)]
        self.best_E = [e if better else b for b, e, better in zip(best_E, mse_E, improved_E, strict=True)]
        self.epochs, self.steps = self.epochs + 1, self.steps + steps
        self.waited = 0 if any(improved_E) else self.waited + 1
        if self.config.schedule == "one-epoch":
            return improved_E, True
        if self.config.schedule == "fixed-steps":
            return improved_E, self.steps >= self.config.steps
        return improved_E, self.waited > self.config.patience_at(self.t)


class _Rows:
    """The rows of P members, as many of each, standardised: inputs and targets side by side in one table, the held-out
    rows of a member before those it trains on."""

    def __init__(
        self, config: TargetDynamicsConfig, observation_dim: int, action_dim: int, rows: Sequence[Tensor],
        splits: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.num_inputs = observation_dim + action_dim
        self.num_held = int(len(rows[0]) * config.holdout_fraction)
        self.num_train = len(rows[0]) - self.num_held
        tables, means, stds = [], [], []
        for of_member, split in zip(rows, splits, strict=True):
            mixed = of_member.index_select(0, split.to(of_member.device))
            x, reward = mixed[:, : self.num_inputs], mixed[:, self.num_inputs : self.num_inputs + 1]
            train = x[self.num_held :].double()
            mean, std = train.mean(0), train.std(0, correction=0)
            means.append(mean.float())
            stds.append(torch.where(std < _SMALLEST_STD, 1.0, std).float())
            change = mixed[:, self.num_inputs + 2 :] - mixed[:, :observation_dim]
            tables.append(torch.cat(((x - means[-1]) / stds[-1], reward, change), 1))
        self._take_over(torch.stack(tables), torch.stack(means), torch.stack(stds))

    def _take_over(self, table_PnY: Tensor, mean_PX: Tensor, std_PX: Tensor) -> None:
        self._table_PnY, self.mean_PX, self.std_PX = table_PnY, mean_PX, std_PX
        self._flat = table_PnY.flatten(0, 1)
        self.device = table_PnY.device

    def select(self, places: Sequence[int]) -> _Rows:
        """The rows of some of the members."""
        other = _Rows.__new__(_Rows)
        other.num_inputs, other.num_held, other.num_train = self.num_inputs, self.num_held, self.num_train
        index = torch.tensor(places, device=self.device)
        other._take_over(*(x.index_select(0, index) for x in (self._table_PnY, self.mean_PX, self.std_PX)))
        return other

    def orders(self, orders_PEN: Sequence[Tensor]) -> Tensor:
        """Numbers of the table `(G, N)` of numbers of each member's training rows."""
        starts = range(self.num_held, len(self._flat), self._table_PnY.shape[1])
        return torch.cat([order_EN + start for order_EN, start in zip(orders_PEN, starts, strict=True)]).to(self.device)

    def gather(self, rows_GB: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `(G, B, X)` and targets `(G, B, D)` of rows of the table."""
        joined = self._flat.index_select(0, rows_GB.reshape(-1)).view(*rows_GB.shape, -1)
        return joined[..., : self.num_inputs], joined[..., self.num_inputs :]

    def held(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs `(P, B, X)` and targets `(P, B, D)` of the held-out rows, piece by piece."""
        pieces = self._table_PnY[:, : self.num_held].split(batch, dim=1)
        return [(piece[..., : self.num_inputs], piece[..., self.num_inputs :]) for piece in pieces]


class _Training:
    """The networks of P members, their optimisers, and what a gradient step does.

    Adam counts every member's steps apart: members of a pack do not end their refits together.
    """

    def __init__(self, config: TargetDynamicsConfig, networks: StackedMLP) -> None:
        self.config, self.networks = config, networks
        device, num = networks.flat.device, networks.lead[0]
        self.first, self.second = torch.zeros_like(networks.flat), torch.zeros_like(networks.flat)
        self.steps_P = torch.zeros(num, device=device)
        self._rounded: StackedMLP | None = None
        if config.precision == "mixed":
            self._rounded = StackedMLP(networks.lead, networks.sizes, device, torch.bfloat16)
        # what computes: with weights rounded, or the parameters themselves
        self._acting = networks if self._rounded is None else self._rounded
        self._adam = self._groups()
        self._best: Tensor | None = None

    def _groups(self) -> list[tuple[tuple[list[Tensor], ...], list[Tensor], float]]:
        """Parameters, gradients and moments of each member's layers, and its steps, by their L2 coefficient."""
        nets, steps = self.networks, self.steps_P.unbind()
        groups: dict[float, tuple[tuple[list[Tensor], ...], list[Tensor]]] = {}
        vectors = [nets.blocks(v) for v in (nets.flat, nets.grad, self.first, self.second)]
        decays = [coefficient for decay in self.config.weight_decay for coefficient in (decay, 0.0)]
        for layer, decay in enumerate(decays):
            tensors, counts = groups.setdefault(decay, (tuple([] for _ in vectors), []))
            for p, count in enumerate(steps):
                for found, blocks in zip(tensors, vectors, strict=True):
                    found.append(blocks[layer][p])
                counts.append(count)
        return [(tensors, counts, decay) for decay, (tensors, counts) in groups.items()]

    def select(self, places: Sequence[int]) -> _Training:
        """The training of some members, copied."""
        other = _Training(self.config, self.networks.select(places))
        for mine, theirs in ((self.first, other.first), (self.second, other.second)):
            gather_members(self.networks, mine, other.networks, theirs, places)
        other.steps_P.copy_(self.steps_P[list(places)])
        if self._best is not None:
            other._best = torch.zeros_like(other.networks.flat)
            gather_members(self.networks, self._best, other.networks, other._best, places)
        other.round_weights()
        return other

    def give(self, place: int, to: _Training, member: int) -> None:
        """Write a member's parameters and optimiser over those of a member of another training."""
        mine = (self.networks.flat, self.first, self.second)
        theirs = (to.networks.flat, to.first, to.second)
        for source, target in zip(mine, theirs, strict=True):
            for a, b in zip(self.networks.blocks(source), to.networks.blocks(target), strict=True):
                b[member] = a[place]
        to.steps_P[member] = self.steps_P[place]

    def begin_to_keep(self) -> None:
        """Remember all parameters as they are."""
        self._best = self.networks.flat.clone()

    def keep(self, place: int, improved_E: Sequence[bool]) -> None:
        """Remember the parameters of some networks of a member instead."""
        assert self._best is not None
        found = [e for e, better in enumerate(improved_E) if better]
        for now, best in zip(self.networks.blocks(self.networks.flat), self.networks.blocks(self._best), strict=True):
            for e in found:
                best[place, e] = now[place, e]

    def restore(self, place: int) -> None:
        """Take a member's networks back to what is remembered."""
        assert self._best is not None
        for now, best in zip(self.networks.blocks(self.networks.flat), self.networks.blocks(self._best), strict=True):
            now[place] = best[place]

    def round_weights(self) -> None:
        """Called whenever the parameters have changed."""
        if self._rounded is not None:
            self._rounded.flat.copy_(self.networks.flat)

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def _hidden(self, x_GBX: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of every layer and the hidden layers' values before the SiLU."""
        acting, inputs, before = self._acting, [x_GBX.to(self._acting.flat.dtype)], []
        for weight, bias in zip(acting.weights[:-1], acting.biases[:-1], strict=True):
            before.append(affine(bias, inputs[-1], weight, relu=False))
            inputs.append(silu(before[-1]))
        return inputs, before

    def outputs(self, x_GBX: Tensor) -> Tensor:
        """Means and raw log-variances `(G, B, 2 D)`, float32, of standardised inputs."""
        acting, hidden = self._acting, x_GBX.to(self._acting.flat.dtype)
        for weight, bias in zip(acting.weights[:-1], acting.biases[:-1], strict=True):
            hidden = silu(affine(bias, hidden, weight, relu=False), inplace=True)
        return self._last(hidden)

    def _last(self, hidden_GBH: Tensor) -> Tensor:
        # in float32 whatever the precision: an output's rounding would be an error of the prediction
        nets = self.networks
        return affine(nets.biases[-1], hidden_GBH.float(), nets.weights[-1], relu=False)

    def write_gradients(self, x_GBX: Tensor, y_GBD: Tensor) -> Tensor:
        """Fill the networks' `grad`, weight decay left out; returns the loss of every network, `(G,)`."""
        acting = self._acting
        inputs, before = self._hidden(x_GBX)
        loss_G, grad_out = _likelihood_loss(self._last(inputs[-1]), y_GBD)
        delta = grad_out.to(acting.flat.dtype)
        for layer in range(len(acting.weights) - 1, -1, -1):
            torch.bmm(inputs[layer].mT, delta, out=acting.weight_grads[layer])
            torch.sum(delta, dim=1, keepdim=True, out=acting.bias_grads[layer])
            if layer:
                delta = product(delta, acting.weights[layer].mT)
                torch.ops.aten.silu_backward.grad_input(delta, before[layer - 1], grad_input=delta)
        if self._rounded is not None:
            self.networks.grad.copy_(self._rounded.grad)
        return loss_G

    def step(self, x_GBX: Tensor, y_GBD: Tensor) -> Tensor:
        """One Adam step of all networks on their rows; returns the loss of every network before it, `(G,)`."""
        loss_G = self.write_gradients(x_GBX, y_GBD)
        self.steps_P.add_(1.0)
        for (params, grads, first, second), steps, decay in self._adam:
            _fused_adam(
                params, grads, first, second, [], steps, amsgrad=False, lr=self.config.learning_rate, beta1=0.9,
                beta2=0.999, weight_decay=decay, eps=1e-8, maximize=False,
            )  # fmt: skip
        self.round_weights()
        return loss_G

    def epoch(self, data: _Rows, seeds: Sequence[int], t: int, epoch: int) -> tuple[Tensor, int]:
        """One pass over all training rows, of every network in an order of its own, or as far as the fixed number of
        steps goes; returns the mean loss per network, `(P,)`, and the number of steps."""
        draws = [generator(seed, "target dynamics order", t, epoch) for seed in seeds]
        size, batch = self.config.ensemble_size, self.config.batch_size
        orders = [torch.stack([torch.randperm(data.num_train, generator=g) for _ in range(size)]) for g in draws]
        pieces = data.orders(orders).split(batch, dim=1)
        if self.config.schedule == "fixed-steps":
            pieces = pieces[: self.config.steps - epoch * -(-data.num_train // batch)]
        total_G = torch.zeros(self.networks.num_stacked, device=data.device)
        for rows_GB in pieces:
            total_G += self.step(*data.gather(rows_GB))
        return total_G.view(-1, size).mean(1) / len(pieces), len(pieces)

    def holdout_mse(self, data: _Rows) -> Tensor:
        """Mean squared error of every network's mean over rows and outputs, `(P, E)`."""
        num, size = self.networks.lead
        total_PE = torch.zeros(num, size, device=data.device)
        for x_PBX, y_PBD in data.held(self.config.batch_size):
            out_GBO = self.outputs(self.networks.spread(x_PBX))
            mean = out_GBO.view(num, size, *out_GBO.shape[1:])[..., : y_PBD.shape[-1]]
            total_PE += (mean - y_PBD.unsqueeze(1)).square_().sum((2, 3))
        return total_PE / (data.num_held * self.networks.sizes[-1] * 0.5)
