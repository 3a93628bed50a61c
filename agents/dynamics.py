"""Ensembles of Gaussian dynamics models: p(s' - s, r | s, a), as in MBPO, MOPO and RAVL.

Every member is an MLP with SiLU hidden layers and a mean and a log-variance for each of the S + 1 outputs (state
change and reward, raw units). Inputs are standardised and clipped (`input_clip`). Log-variances are softly bounded by
learned vectors shared by the ensemble. Loss (released RAVL, `net.py:175-185`; Janner et al. 2019):

    sum_e mean_{b,d} [ logvar + (y - mu)^2 exp(-logvar) ] + 0.01 sum(max_logvar) - 0.01 sum(min_logvar)

with L2 on each layer's weights through Adam. Departures from the released RAVL, each a defect there: the holdout stays
apart from the training set, elites are chosen once on it, every member keeps its own bootstrap resample, and seeds
reach the weights. Statistics of the inputs are those of the observations themselves; there of the next observations.

All members of an ensemble train until none of them improves on the holdout, as in MOPO and RAVL; what is kept are each
member's own best weights. Several ensembles on the same data can train in one batch: see `train_ensembles`.

Gradients are written out; `tests/agents/test_dynamics.py` holds them against autograd.

Shapes: P ensembles trained together, E ensemble member, G = P * E, K elite, B batch, S observation, A action,
X = S + A inputs, D = S + 1 outputs, F parameters of one member, N transitions, H held out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from agents.checks import check_choice, check_positive, check_share
from agents.graphs import WARM_UP, Capture, CaptureError, default_capture, side_stream, warn_eager
from agents.randomness import generator
from agents.rollout import Penalty, Predictions, Step
from envs.errors import UserError

# what torch.optim.Adam(fused=True) calls, without that class's bookkeeping
_fused_adam = torch._fused_adam_

_GPU_HOLDOUT_ROWS = 4096  # evaluated at once, of every ensemble

FILTERS = ("none", "morec")

DEFAULT_INPUT_CLIP = 10.0
DEFAULT_INITIAL_CUT = 2.0

# what may differ between ensembles that train together: it enters arithmetic only
TOGETHER = ("seed", "learning_rate", "weight_decay")


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
    # standard deviations that inputs are clipped to: the released RAVL's 10. OfflineRL-Kit and MOREC have no clip
    # (.inf); where a column hardly varies in the data, all that lies far from it is one and the same to a clipped model
    input_clip: float = DEFAULT_INPUT_CLIP
    # standard deviations at which the normal distribution of the first weights is cut: the released RAVL's 2.
    # OfflineRL-Kit and MOREC, which cut at +-2 whatever the deviation, do so nowhere (.inf)
    initial_cut: float = DEFAULT_INITIAL_CUT
    # of rollouts: none | morec (see agents.transition_filter, settings method.filter.*). The ensemble is the same
    filter: str = "none"
    # of the ensemble's members only the first so many predict, the elites among them again those with the lowest
    # holdout error, num_elites at most. Runs that differ in this share one trained ensemble; None: all members
    use_members: int | None = None

    def __post_init__(self) -> None:
        part = "method.dynamics"
        check_choice(self, "filter", FILTERS, part)
        check_positive(self, "learning_rate", "batch_size", "max_holdout", "patience", "max_epochs", part=part)
        check_share(self, "holdout_fraction", part=part)
        if not self.initial_cut > 0:
            raise UserError(f"{part}.initial_cut={self.initial_cut} must be greater than 0; .inf cuts nothing")
        if not 1 <= self.num_elites <= self.ensemble_size:
            raise UserError(f"{part}.num_elites={self.num_elites} must lie in 1..ensemble_size={self.ensemble_size}")
        if self.use_members is not None and not 1 <= self.use_members <= self.ensemble_size:
            raise UserError(
                f"{part}.use_members={self.use_members} must lie in 1..ensemble_size={self.ensemble_size}, or be null"
            )
        if len(self.weight_decay) != len(self.hidden) + 1:
            raise UserError(
                f"{part}.weight_decay needs {len(self.hidden) + 1} values, one per hidden layer and one for the output,"
                f" got {len(self.weight_decay)}"
            )
        if not self.input_clip > 0:
            raise UserError(f"{part}.input_clip={self.input_clip} must be greater than 0; .inf clips nothing")

    @property
    def members_used(self) -> int:
        """Members that predict."""
        return self.ensemble_size if self.use_members is None else self.use_members

    @property
    def elites_used(self) -> int:
        """Members that rollouts are drawn from."""
        return min(self.num_elites, self.members_used)


def _normalised(inputs: Tensor, mean: Tensor, std: Tensor, clip: float) -> Tensor:
    standardised = (inputs - mean) / std
    return standardised if clip == math.inf else standardised.clamp_(-clip, clip)


class Ensemble:
    """E Gaussian models evaluated by one batched matrix product per layer.

    `tensors` holds everything: weights `(E, in, out)`, biases `(E, 1, out)`, `max_logvar`, `min_logvar` `(D,)`, and
    the input statistics `mean`, `std` `(S + A,)`. `elites` are indices into E; `input_clip` is in standard deviations;
    `holdout_mse` is the lowest holdout error of each member, raw units, where it is known.

    It is a `Dynamics` (`agents.rollout`) that carries nothing from step to step: for every row and step an elite is
    drawn and its Gaussian sampled, for the state change and for the reward (RAVL `rollout_generation.py:33-46`).
    """

    def __init__(
        self, tensors: dict[str, Tensor], elites: list[int], observation_dim: int,
        input_clip: float = DEFAULT_INPUT_CLIP, holdout_mse: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.holdout_mse = holdout_mse
        self.tensors, self.elites, self.observation_dim = tensors, elites, observation_dim
        self.input_clip = input_clip
        self.num_layers = sum(1 for name in tensors if name.startswith("W"))
        self.num_outputs = observation_dim + 1
        if self.device.type != "cpu":
            _ = self._elite_weights  # now: the first prediction may be captured as a CUDA graph

    @property
    def size(self) -> int:
        return self.tensors["W0"].shape[0]

    @property
    def device(self) -> torch.device:
        return self.tensors["W0"].device

    def _normalise(self, state_action: Tensor) -> Tensor:
        return _normalised(state_action, self.tensors["mean"], self.tensors["std"], self.input_clip)

    def _bounded(self, out: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = out.split(self.num_outputs, dim=-1)
        return mean, bounded_logvar(raw, self.tensors["max_logvar"], self.tensors["min_logvar"])

    def forward(self, x_EBX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `(E, B, D)` for normalised inputs `(E or 1, B, S + A)`."""
        weights = [(self.tensors[f"W{i}"], self.tensors[f"b{i}"]) for i in range(self.num_layers)]
        return self._bounded(_outputs(x_EBX.expand(self.size, -1, -1), weights))

    def predict_all(self, state_action_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(E, B, D)` of every member for raw inputs `(B, S + A)`."""
        mean, logvar = self.forward(self._normalise(state_action_BX).unsqueeze(0))
        return mean, logvar.mul_(0.5).exp_()

    def predict_elites(self, state_action_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(K, B, D)` of the elites, in their order."""
        weights, _ = self._elite_weights
        x_KBX = self._normalise(state_action_BX).expand(len(self.elites), -1, -1)
        mean, logvar = self._bounded(_outputs(x_KBX, weights))
        return mean, logvar.mul_(0.5).exp_()

    def of_elites(self, values_EBD: Tensor) -> Tensor:
        """The elites' part `(K, B, D)` of what all members have predicted."""
        return torch.stack([values_EBD[e] for e in self.elites])

    def predict_drawn(self, state_action_BX: Tensor, member_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(B, D)` for raw inputs `(B, S + A)`, row b by the elite `member_B[b]`.

        On a CPU only what is drawn is computed. To sort rows by member the host would have to know how many each has,
        so elsewhere all elites predict all rows.
        """
        if self.device.type == "cpu":
            mean, logvar = self._drawn_by_groups(state_action_BX, member_B)
        else:
            mean, logvar = self._drawn_of_all(state_action_BX, member_B)
        return mean, logvar.mul_(0.5).exp_()

    def _drawn_by_groups(self, state_action_BX: Tensor, member_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the drawn members, each of which computes its own rows."""
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
        return mean[back], logvar[back]

    def _drawn_of_all(self, state_action_BX: Tensor, member_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same without a look at the members: every elite computes every row."""
        weights, position_E = self._elite_weights
        x_KBX = self._normalise(state_action_BX).expand(len(self.elites), -1, -1)
        out_KBD = _outputs(x_KBX, weights)
        at_1BD = position_E.index_select(0, member_B).view(1, -1, 1).expand(-1, -1, out_KBD.shape[-1])
        return self._bounded(out_KBD.gather(0, at_1BD).squeeze(0))

    @cached_property
    def elite_numbers(self) -> Tensor:
        """`elites` on the ensemble's device, `(K,)`."""
        return torch.tensor(self.elites, device=self.device)

    @cached_property
    def _elite_weights(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Every layer's weights and biases of the elites, and where among them each member is, `(E,)`."""
        elites = self.elite_numbers
        position_E = torch.tensor([sum(k < e for k in self.elites) for e in range(self.size)], device=self.device)
        layers = [(self.tensors[f"W{i}"], self.tensors[f"b{i}"]) for i in range(self.num_layers)]
        return [(w.index_select(0, elites), b.index_select(0, elites)) for w, b in layers], position_E

    # ---- as the dynamics of rollouts ----------------------------------------------------------------------------

    @property
    def num_noises(self) -> int:
        return self.num_outputs

    @property
    def choices(self) -> list[int]:
        return self.elites

    @property
    def floats_per_row(self) -> int:
        widest = max(bias.shape[-1] for name, bias in self.tensors.items() if name.startswith("b"))
        return 3 * self.size * widest

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> None:
        return None

    def step(
        self, carried_MBX: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor,
        penalty: Penalty | None, next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        m, b, y = state_action_MBY.shape
        inputs, member, cost = state_action_MBY.reshape(m * b, y), choice_MB.reshape(-1), None
        if penalty is None:
            mean, std = self.predict_drawn(inputs, member)
        else:
            means, stds = self.predict_all(inputs)
            row = torch.arange(len(member), device=member.device)
            mean, std = means[member, row], stds[member, row]
        sample = torch.addcmul(mean.view(m, b, -1), std.view(m, b, -1), noise_MBZ)
        if penalty is not None:
            cost = penalty(Predictions(means, stds, member, sample.view(m * b, -1))).view(m, b)
        torch.add(state_action_MBY[..., : self.observation_dim], sample[..., :-1], out=next_obs_MBS)
        return Step(sample[..., -1], cost, None)

    # ---- copies -------------------------------------------------------------------------------------------------

    def untrained(self, seed: int, initial_cut: float = DEFAULT_INITIAL_CUT) -> Ensemble:
        """An ensemble of this architecture with the weights that training with a seed begins with; it has the input
        statistics, the bounds of the log-variances and the elites of this one."""
        sizes = [self.tensors["W0"].shape[1], *(self.tensors[f"W{i}"].shape[2] for i in range(self.num_layers))]
        tensors = dict(self.tensors)
        for i, layer in enumerate(_Networks.layers(sizes, _initial_rows(seed, self.size, sizes, initial_cut))):
            for name, part in ((f"W{i}", layer[:, :-1]), (f"b{i}", layer[:, -1:])):
                tensors[name] = part.clone(memory_format=torch.contiguous_format).to(self.device)
        return self._with(tensors)

    def first(self, count: int, num_elites: int) -> Ensemble:
        """The first `count` members; of these the `num_elites` with the lowest holdout error are the elites.

        Raises:
            UserError: it was trained by a version that did not keep the members' holdout errors.
        """
        if self.holdout_mse is None:
            raise UserError(
                "dynamics.use_members needs the holdout error of every member, which this stored ensemble lacks; give "
                "another dynamics.seed, with which one is trained that has them"
            )
        # cloned: a view would take the whole along wherever it is sent
        tensors = {k: v[:count].clone() if k[0] in "Wb" else v for k, v in self.tensors.items()}
        errors = self.holdout_mse[:count]
        elites = sorted(sorted(range(count), key=errors.__getitem__)[:num_elites])
        return Ensemble(tensors, elites, self.observation_dim, self.input_clip, errors)

    def to(self, device: torch.device | str) -> Ensemble:
        return self._with({k: v.to(device) for k, v in self.tensors.items()})

    def _with(self, tensors: dict[str, Tensor]) -> Ensemble:
        return Ensemble(tensors, self.elites, self.observation_dim, self.input_clip, self.holdout_mse)

    def __reduce__(self) -> tuple[object, ...]:
        # the copies of the elites' weights are not sent along
        return Ensemble, (self.tensors, self.elites, self.observation_dim, self.input_clip, self.holdout_mse)

    def state_dict(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors, "elites": self.elites, "observation_dim": self.observation_dim,
            "input_clip": self.input_clip, "holdout_mse": self.holdout_mse,
        }  # fmt: skip

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Ensemble:
        clip = float(state.get("input_clip", DEFAULT_INPUT_CLIP))  # stages of old have none
        errors = state.get("holdout_mse")
        return cls(state["tensors"], list(state["elites"]), int(state["observation_dim"]), clip, errors)


def bounded_logvar(raw: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """A log-variance that is softly kept between two bounds."""
    raw = upper - softplus(upper - raw)
    return lower + softplus(raw - lower)


def _outputs(x_EBX: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The outputs `(E, B, 2 D)` of networks given by each layer's weights and biases."""
    for layer, (weight, bias) in enumerate(weights):
        x_EBX = torch.baddbmm(bias, x_EBX, weight)
        if layer < len(weights) - 1:
            x_EBX = torch.nn.functional.silu(x_EBX, inplace=not x_EBX.requires_grad)
    return x_EBX


def _initial_rows(seed: int, size: int, sizes: Sequence[int], cut: float) -> Tensor:
    """Parameters `(E, F)` of `size` members before training: normal weights of std 1 / (2 sqrt(fan_in)), cut at so many
    standard deviations; zero biases. Drawn on the CPU."""
    draw = generator(seed, "init dynamics")
    rows_EF = torch.zeros(size, _Networks.num_parameters(sizes))
    for layer in _Networks.layers(sizes, rows_EF):
        weight = layer[:, :-1]
        std = 1.0 / (2.0 * math.sqrt(weight.shape[1]))
        drawn = torch.empty(weight.shape)
        if cut == math.inf:
            weight.copy_(drawn.normal_(0.0, std, generator=draw))
        else:
            weight.copy_(torch.nn.init.trunc_normal_(drawn, 0.0, std, -cut * std, cut * std, generator=draw))
    return rows_EF


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

    Raises:
        UserError: too few transitions, or the training diverged.
    """

    def report(_: int, epoch: EpochReport) -> None:
        if on_epoch is not None:
            on_epoch(epoch)

    (trained,) = train_ensembles(observations, actions, rewards, next_observations, [config], report)
    if isinstance(trained, UserError):
        raise trained
    return trained


def train_ensembles(
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_observations: Tensor,
    configs: Sequence[DynamicsConfig],
    on_epoch: Callable[[int, EpochReport], None] | None = None,
) -> list[Ensemble | UserError]:
    """Fit several ensembles to the same data in one batch, each as `train_ensemble` would (up to rounding).

    Each has its own holdout, resamples, order, best weights and end. One that ends leaves the batch; the others go on
    as if it had not been there.

    Args:
        observations, actions, rewards, next_observations: as in `train_ensemble`.
        configs: one per ensemble; they may differ in the fields of `TOGETHER`.
        on_epoch: called with an ensemble's place in `configs` after each of its epochs.

    Returns:
        The ensembles in the order of `configs`; for one whose training diverged, the error that says so.

    Raises:
        UserError: too few transitions.
        ValueError: the configs differ in another field.
    """
    trainer = EnsembleTrainer(observations, actions, rewards, next_observations, configs)
    for reports in trainer.epochs():
        for place, report in reports.items():
            if on_epoch is not None:
                on_epoch(place, report)
    return trainer.finish()


class _Networks:
    """The networks of G members: each member's parameters are one row, so that an ensemble is a block of rows, and what
    happens to a member (its best weights, leaving the batch) happens to a row.

    A layer's biases are the last row of its weights, and its inputs end in a column of ones: so they cost neither a
    copy in the forward pass nor a sum for their gradient.

    Args:
        sizes: input width, hidden widths, output width.
        rows_GF: parameters, `F = _Networks.num_parameters(sizes)`.
    """

    _ALIGNED = 16  # floats: layers and activations begin at a cache line

    def __init__(self, sizes: Sequence[int], rows_GF: Tensor) -> None:
        self.sizes = tuple(sizes)
        self.rows_GF, self.grad_GF = rows_GF, torch.zeros_like(rows_GF)
        # views are made once: a small step is bound by the number of calls
        self._layers, self._grads = self.layers(sizes, rows_GF), self.layers(sizes, self.grad_GF)
        self._transposed = [layer[:, :-1].mT for layer in self._layers]
        self._mean_layer = self._layers[-1][..., : self.sizes[-1] // 2]
        self._activations: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @classmethod
    def _aligned(cls, n: int) -> int:
        return -(-n // cls._ALIGNED) * cls._ALIGNED

    @classmethod
    def num_parameters(cls, sizes: Sequence[int]) -> int:
        """Length of a row, with its gaps."""
        return sum(cls._aligned((n_in + 1) * n_out) for n_in, n_out in pairwise(sizes))

    @classmethod
    def layers(cls, sizes: Sequence[int], rows_GF: Tensor) -> list[Tensor]:
        """Views of rows as layers `(G, in + 1, out)`, the biases last."""
        layers, offset = [], 0
        for n_in, n_out in pairwise(sizes):
            layers.append(rows_GF[:, offset : offset + (n_in + 1) * n_out].view(-1, n_in + 1, n_out))
            offset += cls._aligned((n_in + 1) * n_out)
        return layers

    def _hidden(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Room for what a hidden layer leaves, `(G, B, H)`, and for the same with its column of ones."""
        if batch not in self._activations:
            rooms = []
            for width in self.sizes[1:-1]:
                room = torch.ones(len(self.rows_GF), batch, self._aligned(width + 1), device=self.rows_GF.device)
                rooms.append((room[..., :width], room[..., : width + 1]))
            self._activations[batch] = rooms
        return self._activations[batch]

    def forward(self, x_GBX: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Outputs `(G, B, 2 D)` for inputs that end in a one, the inputs of every layer, and the hidden layers' values
        before the SiLU. What is returned is good until the next call."""
        inputs, before = [x_GBX], []
        for layer, (activation, with_one) in zip(self._layers, self._hidden(x_GBX.shape[1]), strict=False):
            before.append(torch.bmm(inputs[-1], layer))
            torch.ops.aten.silu.out(before[-1], out=activation)
            inputs.append(with_one)
        return torch.bmm(inputs[-1], self._layers[-1]), inputs, before

    def mean(self, x_GBX: Tensor) -> Tensor:
        """The first half of the outputs, `(G, B, D)`."""
        for layer, (activation, with_one) in zip(self._layers, self._hidden(x_GBX.shape[1]), strict=False):
            torch.ops.aten.silu.out(torch.bmm(x_GBX, layer), out=activation)
            x_GBX = with_one
        return torch.bmm(x_GBX, self._mean_layer)

    def write_gradients(self, inputs: list[Tensor], before: list[Tensor], grad_out: Tensor) -> None:
        """Fill `grad_GF` from what `forward` left and the gradient of its outputs."""
        delta = grad_out
        for layer in range(len(self._layers) - 1, -1, -1):
            torch.bmm(inputs[layer].mT, delta, out=self._grads[layer])
            if layer:
                delta = torch.bmm(delta, self._transposed[layer])
                torch.ops.aten.silu_backward.grad_input(delta, before[layer - 1], grad_input=delta)


def gaussian_nll(
    out_GBD2: Tensor, y_GBD: Tensor, upper_G1D: Tensor, lower_G1D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The negative log-likelihood of the module docstring and its gradients.

    Returns:
        `mean_{b,d} [...]` of every member `(G,)`; its gradient with respect to the outputs `(G, B, 2 D)`, and to the
        bounds of the log-variance `(G, D)` each, the regularisation of the bounds left out.
    """
    mean, raw = out_GBD2.chunk(2, dim=-1)
    below_upper = upper_G1D - raw
    bounded = upper_G1D - softplus(below_upper)
    above_lower = bounded - lower_G1D
    logvar = lower_G1D + softplus(above_lower)
    precision = torch.exp(-logvar)
    error = mean - y_GBD
    weighted = error * precision
    squares = weighted * error
    count = y_GBD.shape[1] * y_GBD.shape[2]
    loss_G = (logvar + squares).sum((1, 2)).div_(count)
    grad_logvar = squares.neg_().add_(1.0).div_(count)
    grad_bounded = grad_logvar * torch.sigmoid(above_lower)
    grad_raw = grad_bounded * torch.sigmoid(below_upper)
    grad_out = torch.cat((weighted.mul_(2.0 / count), grad_raw), dim=-1)
    return loss_G, grad_out, (grad_bounded - grad_raw).sum(1), (grad_logvar - grad_bounded).sum(1)


@dataclass
class _Course:
    """How far the training of one ensemble has come."""

    place: int  # in the configs
    config: DynamicsConfig
    learning_rate: float
    waited: int = 0  # epochs without improvement
    lowered: bool = False  # the learning rate, at a plateau

    def ends(self, epoch: int, improved: bool) -> bool:
        """Whether the training ends with this epoch; a plateau that comes too early lowers the learning rate once."""
        self.waited = 0 if improved else self.waited + 1
        if self.waited < self.config.patience:
            return False
        if epoch >= self.config.min_epochs:
            return True
        if not self.lowered:
            self.learning_rate *= self.config.plateau_lr_factor
            self.lowered, self.waited = True, 0
        return False


class EnsembleTrainer:
    """What `train_ensembles` does, in steps, so that a benchmark can time an epoch.

    A step is a function of tensors with fixed shapes and addresses, so on a GPU it is captured as a CUDA graph; what
    the host needs to know is read once an epoch.
    """

    def __init__(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_observations: Tensor,
        configs: Sequence[DynamicsConfig],
    ) -> None:
        self.config = configs[0]  # for what is equal in all of them
        for config in configs[1:]:
            if together_settings(config) != together_settings(self.config):
                raise ValueError(f"ensembles trained together may differ in {', '.join(TOGETHER)} only")
        self.device = observations.device
        self._capture = default_capture(self.device)
        n, size = len(observations), self.config.ensemble_size
        num_holdout = min(int(n * self.config.holdout_fraction), self.config.max_holdout)
        if num_holdout < 1 or n - num_holdout < 1:
            raise UserError(f"{n} transitions are too few to hold out {self.config.holdout_fraction:.0%} of them")
        self.num_train = n - num_holdout
        self._observation_dim = observations.shape[1]
        inputs = torch.cat((observations, actions), dim=-1)
        targets = torch.cat((next_observations - observations, rewards.unsqueeze(-1)), dim=-1)
        mean, std = inputs.mean(0), inputs.std(0)
        self._statistics = {"mean": mean, "std": torch.where(std < 1e-12, torch.ones_like(std), std)}
        # inputs, the ones that biases are multiplied with, and targets side by side: a minibatch is one gather
        ones = torch.ones(n, 1, device=self.device)
        normalised = _normalised(inputs, **self._statistics, clip=self.config.input_clip)
        self._table = torch.cat((normalised, ones, targets), dim=-1)
        self._sizes = (inputs.shape[1], *self.config.hidden, 2 * targets.shape[1])

        splits, resamples = [], []
        for config in configs:
            splits.append(torch.randperm(n, generator=self._draw(config, "holdout"), device=self.device))
            resample_EN = torch.randint(
                self.num_train, (size, self.num_train), generator=self._draw(config, "bootstrap"), device=self.device
            )
            resamples.append(splits[-1][num_holdout:][resample_EN])
        self._held_PH = torch.stack([split[:num_holdout] for split in splits])
        self._bootstrap_PEN = torch.stack(resamples)  # rows of the table

        self._courses = [_Course(place, config, config.learning_rate) for place, config in enumerate(configs)]
        self._results: dict[int, Ensemble | UserError] = {}
        rows = [_initial_rows(c.seed, size, self._sizes, c.initial_cut) for c in configs]
        self._rows_GF = torch.cat(rows).to(self.device)
        bounds_2D = torch.tensor([[0.5], [-10.0]], device=self.device).expand(2, targets.shape[1])
        self._bounds_P2D = bounds_2D.repeat(len(configs), 1, 1)  # max_logvar, min_logvar
        self._bounds_coef_21 = torch.tensor([[0.01], [-0.01]], device=self.device)
        # Adam's moments
        self._first_GF, self._second_GF = torch.zeros_like(self._rows_GF), torch.zeros_like(self._rows_GF)
        self._first_P2D, self._second_P2D = torch.zeros_like(self._bounds_P2D), torch.zeros_like(self._bounds_P2D)
        self._updates = torch.zeros((), device=self.device)
        self._best_GF, self._best_bounds_P2D = self._rows_GF.clone(), self._bounds_P2D.clone()
        self._best_mse_PE = torch.full((len(configs), size), float("inf"))  # on the host
        self._bind()

    # ---- set up -------------------------------------------------------------------------------------------------

    def _draw(self, config: DynamicsConfig, purpose: str, *counters: int) -> torch.Generator:
        return generator(config.seed, purpose, *counters, device=self.device)

    def _bind(self) -> None:
        """Make what a step works with from the parameters and moments."""
        self._networks = _Networks(self._sizes, self._rows_GF)
        self._grad_bounds_P2D = torch.zeros_like(self._bounds_P2D)
        self._learning_rates_P = torch.tensor([c.learning_rate for c in self._courses], device=self.device)
        of_members = (self._rows_GF, self._networks.grad_GF, self._first_GF, self._second_GF)
        of_bounds = (self._bounds_P2D, self._grad_bounds_P2D, self._first_P2D, self._second_P2D)
        # one call of Adam's kernel for all that has the same learning rate and L2 coefficient
        self._adam: list[tuple[list[list[Tensor]], Tensor, float]] = []
        for p, course in enumerate(self._courses):
            learning_rate = self._learning_rates_P[p]
            layers = [_Networks.layers(self._sizes, self._by_ensemble(vector)[p]) for vector in of_members]
            for i, decay in enumerate(course.config.weight_decay):
                weights = [[member[:-1] for member in of_vector[i]] for of_vector in layers]
                self._adam.append((weights, learning_rate, decay))
            biases = [[member[-1] for layer in of_vector for member in layer] for of_vector in layers]
            bounds = [[vector[p]] for vector in of_bounds]
            self._adam.append(([b + c for b, c in zip(biases, bounds, strict=True)], learning_rate, 0.0))
        self._captured: dict[int, _CapturedStep] = {}

    def _by_ensemble(self, rows_GF: Tensor) -> Tensor:
        return rows_GF.view(len(self._courses), self.config.ensemble_size, -1)

    # ---- training -----------------------------------------------------------------------------------------------

    def _gather(self, rows_GB: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs with a one at the end `(G, B, X + 1)` and targets `(G, B, D)` of rows of the table."""
        joined = self._table.index_select(0, rows_GB.reshape(-1)).view(*rows_GB.shape, -1)
        num_inputs = self._sizes[0] + 1
        return joined[..., :num_inputs], joined[..., num_inputs:]

    def step(self, rows_GB: Tensor) -> Tensor:
        """One Adam step of all members on their rows of the table; returns the loss before it, `(P,)`."""
        num, size = len(self._courses), self.config.ensemble_size
        x_GBX, y_GBD = self._gather(rows_GB)
        bounds_G2D = self._bounds_P2D.unsqueeze(1).expand(-1, size, -1, -1).flatten(0, 1)
        out, inputs, before = self._networks.forward(x_GBX)
        loss_G, grad_out, grad_upper_GD, grad_lower_GD = gaussian_nll(out, y_GBD, bounds_G2D[:, :1], bounds_G2D[:, 1:])
        self._networks.write_gradients(inputs, before, grad_out)
        grad_bounds_PE2D = torch.stack((grad_upper_GD, grad_lower_GD), dim=1).view(num, size, 2, -1)
        torch.add(grad_bounds_PE2D.sum(1), self._bounds_coef_21, out=self._grad_bounds_P2D)
        loss_P = loss_G.view(num, size).sum(1) + (self._bounds_P2D * self._bounds_coef_21).sum((1, 2))
        self._updates.add_(1.0)
        for (params, grads, first, second), learning_rate, decay in self._adam:
            _fused_adam(
                params, grads, first, second, [], [self._updates] * len(params), amsgrad=False, lr=learning_rate,
                beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, maximize=False,
            )  # fmt: skip
        return loss_P

    def train_epoch(self, epoch: int) -> Tensor:
        """One pass over every member's resample, in a new order; returns the mean loss `(P,)`."""
        size = self.config.ensemble_size
        orders = []
        for course in self._courses:
            draw = self._draw(course.config, "order", epoch)
            orders += [torch.randperm(self.num_train, generator=draw, device=self.device) for _ in range(size)]
        rows_GN = self._bootstrap_PEN.flatten(0, 1).gather(1, torch.stack(orders))
        return torch.stack([self._run(rows) for rows in rows_GN.split(self.config.batch_size, dim=1)]).mean(0)

    def _run(self, rows_GB: Tensor) -> Tensor:
        if self._capture is None:
            return self.step(rows_GB)
        batch = rows_GB.shape[1]
        if batch not in self._captured:
            self._captured[batch] = _CapturedStep(self.step, self._capture)
        return self._captured[batch](rows_GB)

    def holdout_mse(self) -> Tensor:
        """Mean squared error of every member's mean over rows and outputs, `(P, E)`."""
        size = self.config.ensemble_size
        total_G = torch.zeros(len(self._rows_GF), device=self.device)
        # on a CPU as many as a step takes: a layer's activations stay in the cache
        batch = _GPU_HOLDOUT_ROWS if self.device.type == "cuda" else self.config.batch_size
        for rows_PB in self._held_PH.split(batch, dim=1):
            x_GBX, y_GBD = self._gather(rows_PB.unsqueeze(1).expand(-1, size, -1).flatten(0, 1))
            total_G += (self._networks.mean(x_GBX) - y_GBD).square_().sum((1, 2))
        return total_G.view(-1, size) / (self._held_PH.shape[1] * y_GBD.shape[2])

    # ---- what is kept, and when it ends ---------------------------------------------------------------------------

    def epochs(self) -> Iterator[dict[int, EpochReport]]:
        """Train until every ensemble has ended; after each epoch a report of each that took part and did not diverge,
        by its place in the configs."""
        for epoch in range(self.config.max_epochs):
            if not self._courses:
                return
            loss_P = self.train_epoch(epoch)
            # the only time in an epoch that the host waits for the device
            read = torch.cat((loss_P.unsqueeze(1), self.holdout_mse()), dim=1).cpu()
            loss_P, mse_PE = read[:, 0], read[:, 1:]
            improved = self._keep_best(mse_PE).any(1).tolist()
            reports, going_on = {}, []
            for p, course in enumerate(self._courses):
                if not bool(torch.isfinite(mse_PE[p]).all()):
                    self._results[course.place] = UserError(
                        "dynamics training diverged: the holdout error is not finite; lower dynamics.learning_rate"
                    )
                    continue
                best = self._best_mse_PE[p].tolist()
                reports[course.place] = EpochReport(epoch, float(loss_P[p]), best, course.learning_rate)
                if course.ends(epoch, improved[p]):
                    self._results[course.place] = self._best(p)
                else:
                    going_on.append(p)
            self._go_on(going_on)
            yield reports

    def _keep_best(self, mse_PE: Tensor) -> Tensor:
        """Keep the members that improved by more than `improvement`; which did, `(P, E)`, on the host."""
        better_PE = (self._best_mse_PE - mse_PE) / self._best_mse_PE > self.config.improvement
        better_PE |= torch.isinf(self._best_mse_PE)
        self._best_mse_PE = torch.where(better_PE, mse_PE, self._best_mse_PE)
        mask_PE = better_PE.to(self.device)
        torch.where(mask_PE.view(-1, 1), self._rows_GF, self._best_GF, out=self._best_GF)
        # the bounds are shared by the ensemble
        any_P11 = mask_PE.any(1).view(-1, 1, 1)
        torch.where(any_P11, self._bounds_P2D, self._best_bounds_P2D, out=self._best_bounds_P2D)
        return better_PE

    def _go_on(self, kept: list[int]) -> None:
        """Leave the ensembles that have ended out of the batch, and take over the learning rates of the others."""
        if len(kept) == len(self._courses):
            self._learning_rates_P.copy_(torch.tensor([c.learning_rate for c in self._courses]))
            return
        index = torch.tensor(kept, dtype=torch.long)

        def members(rows_GF: Tensor) -> Tensor:
            return self._by_ensemble(rows_GF).index_select(0, index.to(self.device)).flatten(0, 1)

        def ensembles(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device))

        self._rows_GF, self._best_GF = members(self._rows_GF), members(self._best_GF)
        self._first_GF, self._second_GF = members(self._first_GF), members(self._second_GF)
        self._bounds_P2D, self._best_bounds_P2D = ensembles(self._bounds_P2D), ensembles(self._best_bounds_P2D)
        self._first_P2D, self._second_P2D = ensembles(self._first_P2D), ensembles(self._second_P2D)
        self._best_mse_PE = ensembles(self._best_mse_PE)
        self._held_PH, self._bootstrap_PEN = ensembles(self._held_PH), ensembles(self._bootstrap_PEN)
        self._courses = [self._courses[p] for p in kept]
        if kept:
            self._bind()

    @property
    def ensembles(self) -> list[Ensemble]:
        """The ensembles still in training as they are now; they share the trainer's memory."""
        rows, elites = self._by_ensemble(self._rows_GF), list(range(self.config.num_elites))
        return [self._ensemble(r, b, elites) for r, b in zip(rows, self._bounds_P2D, strict=True)]

    def _ensemble(self, rows_EF: Tensor, bounds_2D: Tensor, elites: list[int]) -> Ensemble:
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(_Networks.layers(self._sizes, rows_EF)):
            tensors |= {f"W{i}": layer[:, :-1], f"b{i}": layer[:, -1:]}
        tensors |= {"max_logvar": bounds_2D[0], "min_logvar": bounds_2D[1], **self._statistics}
        return Ensemble(tensors, elites, self._observation_dim, self.config.input_clip)

    def _best(self, p: int) -> Ensemble:
        """The best weights of every member, elites ranked by holdout error."""
        errors = self._best_mse_PE[p]
        elites = errors.argsort(stable=True)[: self.config.num_elites].tolist()
        best = self._ensemble(self._by_ensemble(self._best_GF)[p], self._best_bounds_P2D[p], sorted(elites))
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in best.tensors.items()}
        return Ensemble(copies, best.elites, best.observation_dim, best.input_clip, errors.tolist())

    def finish(self) -> list[Ensemble | UserError]:
        """Every ensemble with its members' best weights, or the error that ended it, in the order of the configs."""
        unfinished = {course.place: self._best(p) for p, course in enumerate(self._courses)}
        results = {**self._results, **unfinished}
        return [results[place] for place in sorted(results)]


class _CapturedStep:
    """A step on minibatches of one shape, as a graph once the libraries have set themselves up."""

    def __init__(self, step: Callable[[Tensor], Tensor], capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._to_warm_up = WARM_UP
        self._replay: Callable[[], None] | None = None
        self._rows_GB = self._loss_P = torch.empty(0)

    def __call__(self, rows_GB: Tensor) -> Tensor:
        if self._to_warm_up:
            self._to_warm_up -= 1
            with side_stream(rows_GB.device):
                loss_P = self._step(rows_GB)
            self._rows_GB, self._loss_P = torch.empty_like(rows_GB.contiguous()), torch.empty_like(loss_P)
            return loss_P
        self._rows_GB.copy_(rows_GB)
        if self._replay is None:
            self._replay = self._captured()
        else:
            self._replay()
        return self._loss_P.clone()

    def _captured(self) -> Callable[[], None]:
        """Do the step once; what does it again."""
        try:
            return self._capture(self._on_place)
        except CaptureError as error:
            warn_eager(error)
            self._on_place()
            return self._on_place

    def _on_place(self) -> None:
        self._loss_P.copy_(self._step(self._rows_GB))


def training_settings(config: DynamicsConfig) -> dict[str, Any]:
    """The settings that a trained ensemble depends on, in the form that stages' keys have always been made of."""
    unused = ("filter", "use_members")  # what is done with it
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}
    for name, default in (("input_clip", DEFAULT_INPUT_CLIP), ("initial_cut", DEFAULT_INITIAL_CUT)):
        if settings[name] == default:
            del settings[name]
    return settings


def together_settings(config: DynamicsConfig) -> dict[str, Any]:
    """The settings in which ensembles must agree to train together."""
    return {name: value for name, value in training_settings(config).items() if name not in TOGETHER}
