"""The dynamics reward: how much a transition looks like one of the real dynamics (MOREC, Luo, Xu, Cao and Yu, ICLR
2024, arXiv 2310.05422). What learns it is `agents.dynamics_reward_training`; this is what the transition filter asks.

Discriminators of transitions (s, a, s') are learned adversarially, and K snapshots of them kept, each with the mean
logits of real transitions E_k and of the learner's L_k. Of a transition with logit l_k (released code, polixir/morec
be8a641, models/discriminator_ensemble_loader.py):

    l'_k = 2 (clip(l_k, L_k, E_k) - L_k) / (E_k - L_k + 1e-7) - 1       in [-1, 1]
    p    = mean_k sigmoid(l'_k)                                          in [0.2689, 0.7311]
    r_D  = -log(1 - p + 1e-9)                                            in [0.3133, 1.3133]

Probabilities are averaged first, the logarithm is taken once. An undecided mixture, p = 0.5, has r_D = 0.693.

A discriminator is one ReLU network, encoder (128, 256) and head together, of inputs [s, a, s'] or [s, a, s' - s], all
scaled by the dataset's smallest and largest values: observations and s' to [-0.8, 0.8] by the observations' bounds,
actions to [-1, 1]. Nothing is clipped there. The release also feeds a hidden factor of the environment that is always 0
in its tasks: it is left out. A column that never changes divides by zero there; here it scales to 0.

Two scorers take less time and are not exact: discriminators in bfloat16, and one *distilled* network, fitted to the
mixture's p. `benchmarks/morec_filter_speed.py` measures what they cost and how far they agree.

Shapes: K discriminator, C candidate, B row, S observation, A action, Y = S + A, X inputs, R = C * B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents.products import linear
from envs.errors import UserError

SCORERS = ("discriminators", "distilled")
SCORER_PRECISIONS = ("float32", "bfloat16")

LOWEST, HIGHEST = 1 / (1 + math.e), math.e / (1 + math.e)  # p where every rescaled logit is -1, or 1

_SCALED_OBSERVATION, _SCALED_ACTION = 0.8, 1.0
_RANGE_FLOOR = 1e-3  # of a column that (nearly) never changes
_CHUNK = 1536  # candidates seen at once on a CPU: a layer's input and output stay in a core's cache
_DEVICE_CHUNK = 1 << 18


# ---- inputs, shared with the training -------------------------------------------------------------------------------


def input_bounds(observations_NS: Tensor, actions_NA: Tensor) -> dict[str, Tensor]:
    """What inputs are scaled by: the smallest and largest value of every column of a dataset.

    Returns:
        `observation_low`, `observation_high` `(S,)`, `action_low`, `action_high` `(A,)`.
    """
    columns = {"observation": observations_NS, "action": actions_NA}
    ends = {name: torch.aminmax(values, dim=0) for name, values in columns.items()}
    return {
        f"{name}_{end}": bound for name, pair in ends.items() for end, bound in zip(("low", "high"), pair, strict=True)
    }


def scaled_inputs(
    observations: Tensor, actions: Tensor, next_observations: Tensor, bounds: Mapping[str, Tensor], delta_input: bool
) -> Tensor:
    """Inputs `(..., X)`, X = 2S + A, of discriminators.

    Args:
        observations, actions, next_observations: `(..., S)`, `(..., A)`, `(..., S)`; the last may have further leading
            axes.
        bounds: see `input_bounds`.
        delta_input: whether the last S columns are the scaled s' - s instead of the scaled s'.
    """
    obs = _scaled(observations, bounds, "observation", _SCALED_OBSERVATION)
    action = _scaled(actions, bounds, "action", _SCALED_ACTION)
    after = _scaled(next_observations, bounds, "observation", _SCALED_OBSERVATION)
    obs_of_each, action_of_each = (x.expand(*after.shape[:-1], -1) for x in (obs, action))
    return torch.cat((obs_of_each, action_of_each, after - obs if delta_input else after), -1)


def _scaled(values: Tensor, bounds: Mapping[str, Tensor], name: str, target: float) -> Tensor:
    """Columns with the bounds at -target and target."""
    low, high = bounds[f"{name}_low"], bounds[f"{name}_high"]
    return (values - (high + low) / 2) * (2 * target / (high - low).clamp_min(_RANGE_FLOOR))


# ---- from logits to the reward --------------------------------------------------------------------------------------


def rescaled(logits: Tensor, learner_logit: Tensor, expert_logit: Tensor) -> Tensor:
    """Logits l' in [-1, 1]; the means must broadcast."""
    span = expert_logit - learner_logit + 1e-7
    return 2 * (torch.clamp(logits, learner_logit, expert_logit) - learner_logit) / span - 1


def reward_of(probability: Tensor) -> Tensor:
    """r_D of a mean probability."""
    return -torch.log(1 - probability + 1e-9)


def distilled_probability(output: Tensor) -> Tensor:
    """p of the distilled network's output, which a sigmoid squashes into the range that p has."""
    return LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(output)


# ---- the scorer -----------------------------------------------------------------------------------------------------


class DynamicsReward:
    """The mixture of K discriminators, or the network distilled from it.

    Args:
        state: see `state_dict`; discriminators that are not there are not needed by the distilled scorer.
        scorer: "discriminators" or "distilled".
        precision: "float32", or "bfloat16" for the matrix products. Inputs keep 16 bits of their own there, since
            candidates differ by little.
    """

    def __init__(self, state: dict[str, Any], scorer: str = "discriminators", precision: str = "float32") -> None:
        self._state, self.scorer, self.precision = state, scorer, precision
        self.observation_dim = int(state["observation_dim"])
        self.delta_input = bool(state["delta_input"])
        self.num_discriminators = len(state["snapshot_updates"])  # K
        self._bounds = {name: state["tensors"][name] for name in _BOUNDS}
        source = state["distilled"] if scorer == "distilled" else state["tensors"]
        layers = _layers(source)
        self._widest = max(weight.shape[-1] for weight, _ in layers)
        self._networks = [
            [self._prepared(w[k], b[k, 0], i) for i, (w, b) in enumerate(layers)] for k in range(layers[0][0].shape[0])
        ]

    def _prepared(self, weight_IO: Tensor, bias_O: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if self.precision == "float32":
            return weight_IO.contiguous(), bias_O
        if layer == 0:
            weight_IO = torch.cat((weight_IO, weight_IO))  # see `_inputs`
        # stored transposed, as oneDNN wants weights
        return weight_IO.bfloat16().t().contiguous().t(), bias_O.bfloat16()

    @torch.inference_mode()
    def probability(self, state_action_BY: Tensor, next_obs_BCS: Tensor) -> Tensor:
        """p of C candidates for every row, `(B, C)`."""
        # one candidate of all rows after the other: a chunk then needs no copies
        next_CBS = next_obs_BCS.transpose(0, 1)
        limit = _CHUNK if next_obs_BCS.device.type == "cpu" else _DEVICE_CHUNK
        rows = max(1, limit // max(1, len(next_CBS)))
        parts = zip(state_action_BY.split(rows), next_CBS.split(rows, dim=1), strict=True)
        return torch.cat([self._of_chunk(*part) for part in parts], 1).transpose(0, 1)

    def __call__(self, state_action_BY: Tensor, next_obs_BCS: Tensor) -> Tensor:
        """r_D of C candidates for every row, `(B, C)`.

        Args:
            state_action_BY: observations and actions as the `TrainingData` has them.
            next_obs_BCS: the candidates' next observations.
        """
        return reward_of(self.probability(state_action_BY, next_obs_BCS))

    def _of_chunk(self, state_action_BY: Tensor, next_CBS: Tensor) -> Tensor:
        c, b, _ = next_CBS.shape
        x_RX = self._inputs(state_action_BY, next_CBS).view(c * b, -1)
        outputs = torch.empty((len(self._networks), c * b), device=x_RX.device)
        for output, (*hidden, last) in zip(outputs, self._networks, strict=True):
            h = x_RX
            for layer in hidden:
                h = linear(h, *layer, relu=True)
            output.copy_(linear(h, *last, relu=False).squeeze(-1))
        if self.scorer == "distilled":
            return distilled_probability(outputs).view(c, b)
        tensors = self._state["tensors"]
        means = (tensors[f"{name}_logit"].unsqueeze(1) for name in ("learner", "expert"))
        return torch.sigmoid(rescaled(outputs, *means)).mean(0).view(c, b)

    def _inputs(self, state_action_BY: Tensor, next_CBS: Tensor) -> Tensor:
        """`(C, B, X)`, or `(C, B, 2X)` in bfloat16: each column, and behind all of them what rounding has taken off.

        The share of (s, a) in the first layer, the same for all candidates, is not kept apart: that layer is 2 % of the
        work, and joining the shares takes as long as computing them.
        """
        obs, action = state_action_BY.tensor_split((self.observation_dim,), -1)
        x = scaled_inputs(obs, action, next_CBS, self._bounds, self.delta_input)
        if self.precision == "float32":
            return x
        rounded = x.bfloat16()
        return torch.cat((rounded, (x - rounded).bfloat16()), -1)

    @property
    def floats_per_candidate(self) -> int:
        """About how many floats of the device scoring needs at once for a candidate, of at most `_DEVICE_CHUNK`."""
        return 3 * self._widest + len(self._networks)

    # ---- copies -----------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> DynamicsReward:
        return DynamicsReward(_moved(self._state, device), self.scorer, self.precision)

    def state_dict(self) -> dict[str, Any]:
        """What its stage stores, tensors and plain values:

        - `tensors`: of every layer i the weights `W<i>` `(K, in, out)` and biases `b<i>` `(K, 1, out)`, the last with
          one output; `expert_logit`, `learner_logit` `(K,)`; `observation_low`, `observation_high` `(S,)`,
          `action_low`, `action_high` `(A,)`;
        - `delta_input`, `observation_dim`;
        - `snapshot_updates`: after how many updates each snapshot was taken, oldest first;
        - `distilled`: None, or the layers of one network as in `tensors`, with a leading axis of 1 and inputs and
          hidden layers of the same kind, whose output is p by `distilled_probability`.
        """
        return self._state

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], *, num_discriminators: int | None = None, scorer: str = "discriminators",
        precision: str = "float32",
    ) -> DynamicsReward:  # fmt: skip
        """A scorer that holds what it needs of a state.

        Args:
            num_discriminators: how many of the K, taken evenly from the oldest on: of 400 every 10th for 40, as the
                release does. None: all.
            scorer, precision: see the class.

        Raises:
            UserError: more discriminators are asked for than there are, or there is no distilled network.
        """
        known = len(state["snapshot_updates"])
        if scorer == "distilled":
            if state["distilled"] is None:
                raise UserError(NOT_DISTILLED)
            bounds = {name: state["tensors"][name] for name in _BOUNDS}
            return cls({**state, "tensors": bounds}, scorer, precision)
        wanted = known if num_discriminators is None else num_discriminators
        if wanted > known:
            raise UserError(too_many(wanted, known))
        chosen = [i * known // wanted for i in range(wanted)]
        tensors = {
            name: value if name in _BOUNDS else value[chosen] for name, value in state["tensors"].items()
        }  # fmt: skip
        updates = [state["snapshot_updates"][k] for k in chosen]
        return cls({**state, "tensors": tensors, "snapshot_updates": updates, "distilled": None}, scorer, precision)

    def __reduce__(self) -> tuple[object, ...]:
        # what is made of the state is not sent along with it
        return DynamicsReward, (self._state, self.scorer, self.precision)


_BOUNDS = ("observation_low", "observation_high", "action_low", "action_high")


NOT_DISTILLED = (
    "method.filter.scorer=distilled needs a dynamics reward with a distilled network; set "
    "method.dynamics_reward.distil_epochs to 1 or more, or method.filter.scorer=discriminators"
)


def too_many(wanted: int, known: int) -> str:
    """The sentence for more discriminators than are kept."""
    return (
        f"method.filter.num_discriminators={wanted} is more than the {known} snapshots that the dynamics reward keeps; "
        f"set it to {known} or fewer, or raise method.dynamics_reward.num_snapshots"
    )


def _layers(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    count = sum(1 for name in tensors if name.startswith("W"))
    return [(tensors[f"W{i}"], tensors[f"b{i}"]) for i in range(count)]


def _moved(content: Any, device: torch.device | str) -> Any:
    if isinstance(content, dict):
        return {name: _moved(value, device) for name, value in content.items()}
    return content.to(device) if isinstance(content, Tensor) else content
