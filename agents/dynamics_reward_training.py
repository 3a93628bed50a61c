"""Learning a dynamics reward (MOREC, Luo, Xu, Cao and Yu, ICLR 2024, arXiv 2310.05422) as a stage of its own.

A discriminator D tells real transitions from those of a learner, a policy that maps (s, a) to s':

    max_D  E_data[log D(s, a, s')] + E_{(s, a) ~ data, s' ~ learner}[log(1 - D(s, a, s'))] + entropy_bonus E[H(D)]
    max_learner  E[-log(1 - D(s, a, s'))]

Snapshots of D, with running means of both classes' logits, are the mixture that `agents.dynamics_reward` scores by.

Of the paper's trainer nothing is public: not its rates, sizes of the head, intervals and regularisers, nor where the
learner's (s, a) come from. All settings here are this project's, chosen by the measurements in docs/morec.md:

- (s, a) are the data's and episodes have one step. What the filter judges are draws of likelihood models, and so is
  what D has to tell from the real: the learner begins as a Gaussian fitted by likelihood, and of its draws a share
  `likelihood_share` is of the policy as it was fitted, however far the learner has been improved.
- Standard deviations of the draws that D sees are multiplied by a factor, log-uniform between `min_draw_scale` (1 by
  default) and `draw_scale`, drawn for every row: so D tells far from near also where likelihood has fitted the data's
  own noise so well that it could learn nothing else, and the mean logit of the learner's draws, below which all scores
  are alike, lies lower than those of a model's usual predictions. Factors below 1 teach it that the middle of noisy
  data is not quite real, and where real ends: what generalises better is measured per task.
- Inputs are standardised for the training, by an affine map that the first layer takes over when a snapshot is taken:
  in the release's units, shares of the dataset's range, a step's change is nearly nothing.

Shapes: B batch, N transitions, S observation, A action, X inputs of D, K snapshot, C draw of a row.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from agents.checks import check_not_negative, check_positive, check_share, check_widths
from agents.diagnostics import spearman
from agents.distillation import distil
from agents.dynamics_policy import DynamicsPolicy
from agents.dynamics_reward import DynamicsReward, rescaled, reward_of
from agents.method import Stage, TrainingData
from agents.networks import StackedMLP, initialise
from agents.optim import Adam, half_cosine
from agents.randomness import generator
from agents.transition_inputs import NEARLY_CONSTANT, TransitionInputs
from envs.errors import UserError

NUM_CANDIDATES = 10  # of a held-out row, as the filter has them
_CHECKED_ROWS = 1_000  # held-out rows that the mixture is checked on
_DISTILLED_ROWS = 100_000  # examples, a quarter of each kind
_CHUNK = 2_048
_THRESHOLD = 0.6  # of r_D, the filter's default, at which the distilled scorer is held against the mixture


@dataclass
class DynamicsRewardConfig:
    """What the discriminators are and how they learn; all of it this project's own choice but the encoder's widths."""

    hidden: list[int] = field(default_factory=lambda: [128, 256, 256])  # encoder 128, 256 (released) and head
    delta_input: bool = True  # s' - s instead of s' among the inputs
    learning_rate: float = 1e-3
    weight_decay: float = 0.0  # L2 on the discriminator's parameters
    entropy_bonus: float = 0.0  # weight of the discriminator's own entropy
    batch_size: int = 256  # real transitions, and as many of the learner's
    max_epochs: int = 10  # passes over the data; never ends earlier
    num_snapshots: int = 40  # K
    snapshots_from: float = 0.25  # share of the updates that pass before the interval at whose end the first is taken
    logit_decay: float = 0.99  # of the running means of the logits, per update
    likelihood_share: float = 0.5  # of the learner's draws, those of the policy as likelihood fitted it
    draw_scale: float = 8.0  # the draws' standard deviations are multiplied by min_draw_scale .. draw_scale
    min_draw_scale: float = 1.0  # below 1 D learns more sharply where the peak is, but doubts the middle of noisy data
    policy_hidden: list[int] = field(default_factory=lambda: [256, 256])
    policy_learning_rate: float = 4e-5  # of the policy gradients; 0: the learner stays as likelihood fitted it
    policy_draws: int = 2  # C, of a row
    policy_passes: int = 2
    policy_clip: float = 0.2
    pretraining_epochs: int = 10  # by likelihood
    pretraining_learning_rate: float = 1e-3
    min_std: float = 0.01  # of the policy, in standard deviations of the data's change
    holdout_fraction: float = 0.1
    max_holdout: int = 5_000  # rows
    distil_epochs: int = 10  # of the distilled scorer; 0: none
    distil_hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    seed: int = 0  # a stage of its own: runs with other seeds share one

    def __post_init__(self) -> None:
        positive = (
            "learning_rate", "batch_size", "max_epochs", "num_snapshots", "pretraining_epochs",
            "pretraining_learning_rate", "min_std", "max_holdout", "policy_passes", "policy_clip",
        )  # fmt: skip
        part = "method.dynamics_reward"
        check_positive(self, *positive, part=part)
        check_not_negative(self, "weight_decay", "entropy_bonus", "policy_learning_rate", "distil_epochs", part=part)
        check_share(self, "snapshots_from", "logit_decay", interval="[0, 1)", part=part)
        check_share(self, "likelihood_share", interval="[0, 1]", part=part)
        check_share(self, "holdout_fraction", part=part)
        check_share(self, "min_draw_scale", interval="(0, 1]", part=part)
        check_widths(self, "hidden", "policy_hidden", "distil_hidden", part=part)
        if not 1 <= self.draw_scale < math.inf:
            raise UserError(f"{part}.draw_scale={self.draw_scale} must be 1 or greater, and finite")
        if self.policy_draws < 2:
            raise UserError(f"{part}.policy_draws={self.policy_draws} must be at least 2: a row's draws are compared")


def reward_stage(config: DynamicsRewardConfig) -> Stage:
    """The dynamics reward as a stage; its content is `DynamicsReward.state_dict`."""

    def build(data: TrainingData, report: Callable[[int, Mapping[str, float]], None]) -> dict[str, Any]:
        return train_dynamics_reward(data, config, report)

    return Stage("dynamics_reward", dataclasses.asdict(config), build)


def train_dynamics_reward(
    data: TrainingData,
    config: DynamicsRewardConfig,
    report: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Learn a dynamics reward.

    Args:
        data: on the device to train on.
        report: called with the number of the epoch and its metrics, and once more after the last epoch with those of
            the mixture (see `RewardTrainer`).

    Returns:
        What `DynamicsReward.from_state_dict` takes, on the CPU.

    Raises:
        UserError: too few transitions, or the training diverged.
    """
    started, tell = time.perf_counter(), report or (lambda step, metrics: None)
    trainer = RewardTrainer(data, config)
    trainer.pretrain()
    for epoch, metrics in enumerate(trainer.epochs()):
        tell(epoch, {**metrics, "minutes": (time.perf_counter() - started) / 60})
    state, metrics = trainer.finish()
    tell(config.max_epochs, {**metrics, "minutes": (time.perf_counter() - started) / 60})
    return state


def classification_gradients(real_B: Tensor, fake_B: Tensor, entropy_bonus: float) -> tuple[Tensor, Tensor, Tensor]:
    """The discriminator's loss for logits, `()`, and its gradients with respect to those of either class:

    -mean log sigmoid(real) - mean log(1 - sigmoid(fake)) - entropy_bonus (mean H(real) + mean H(fake)),
    H(l) = softplus(l) - l sigmoid(l)
    """
    p_real, p_fake = torch.sigmoid(real_B), torch.sigmoid(fake_B)
    loss = -logsigmoid(real_B).mean() + softplus(fake_B).mean()
    grad_real, grad_fake = p_real - 1, p_fake
    if entropy_bonus:
        entropy = [(softplus(x) - x * p).mean() for x, p in ((real_B, p_real), (fake_B, p_fake))]
        loss = loss - entropy_bonus * (entropy[0] + entropy[1])
        grad_real = grad_real + entropy_bonus * real_B * p_real * (1 - p_real)
        grad_fake = grad_fake + entropy_bonus * fake_B * p_fake * (1 - p_fake)
    return loss, grad_real / len(real_B), grad_fake / len(fake_B)


@dataclass(frozen=True)
class Snapshot:
    """A discriminator as it was, on standardised inputs."""

    update: int
    parameters: Tensor  # flat
    expert_logit: Tensor  # ()
    learner_logit: Tensor  # ()


class RewardTrainer:
    """What `train_dynamics_reward` does, in steps.

    Metrics of an epoch: `loss`; `expert_logit` and `learner_logit`, the running means; `p_real`, `p_learner` and
    `p_likelihood`, what the discriminator as it stands gives to held-out transitions, to the learner's draws at the
    same (s, a) and to those of the policy that likelihood fitted; `policy_std`; `snapshots` taken so far.

    Metrics of the mixture, on held-out rows: `mixture_p_real`, `mixture_p_learner`, `mixture_p_likelihood`;
    `rank_correlation` of r_D with the error of the likelihood policy's draws, and `choice_error`, the mean error of
    the best of ten such draws by r_D over that of a random one. Errors are Euclidean, in standard deviations of the
    observations, from the next observation in the data, which has the environment's own noise if there is any.
    """

    def __init__(self, data: TrainingData, config: DynamicsRewardConfig) -> None:
        self.config, self.data = config, data
        self.device = data.observations.device
        n = len(data.observations)
        num_held = min(int(n * config.holdout_fraction), config.max_holdout)
        if num_held < 1 or n - num_held < 2:
            raise UserError(
                f"{n} transitions are too few for a dynamics reward, which holds out {config.holdout_fraction:.0%} of "
                "them; use more data, or raise dynamics_reward.holdout_fraction"
            )
        split = torch.randperm(n, generator=self._draw("holdout"), device=self.device)
        self._held, self._rows = split[:num_held], split[num_held:]
        self._transitions = TransitionInputs(data, config.delta_input)
        s, a = data.observation_dim, data.action_dim
        self.batch_size = min(config.batch_size, len(self._rows))
        self.updates_per_epoch = len(self._rows) // self.batch_size
        self.num_updates = config.max_epochs * self.updates_per_epoch

        self.likelihood_policy = self.policy = DynamicsPolicy(
            config.seed, (s + a, *config.policy_hidden, 2 * s), config.min_std, self.device
        )
        self.discriminator = StackedMLP((1,), (2 * s + a, *config.hidden, 1))
        initialise(self.discriminator, [generator(config.seed, "init discriminator")], scheme="torch", last_bound=0.01)
        self.discriminator = self.discriminator.to(self.device)
        self._optimiser = Adam(self.discriminator, [config.learning_rate])
        self.snapshots: list[Snapshot] = []
        self._expert_logit, self._learner_logit = torch.zeros(2, device=self.device).unbind()
        self._update = 0
        waited = int(config.snapshots_from * self.num_updates)
        self._due = [
            waited + math.ceil((self.num_updates - waited) * (k + 1) / config.num_snapshots)
            for k in range(config.num_snapshots)
        ]

    def _draw(self, purpose: str, *counters: int) -> torch.Generator:
        return generator(self.config.seed, f"dynamics reward {purpose}", *counters, device=self.device)

    def _batches(self, purpose: str, epoch: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Row numbers of every batch of an epoch, and what draws the epoch's noise."""
        draw = self._draw(purpose, epoch)
        order = self._rows[torch.randperm(len(self._rows), generator=draw, device=self.device)]
        for rows in order[: self.updates_per_epoch * self.batch_size].split(self.batch_size):
            yield rows, draw

    def _noise(self, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=draw, device=self.device)

    # ---- training -------------------------------------------------------------------------------------------------

    def pretrain(self) -> float:
        """Fit the policy by likelihood; returns the last epoch's mean loss."""
        config = self.config
        optimiser = Adam(self.policy.network, [config.pretraining_learning_rate])
        loss, total = torch.zeros((), device=self.device), config.pretraining_epochs * self.updates_per_epoch
        for epoch in range(config.pretraining_epochs):
            loss = torch.zeros_like(loss)
            for i, (rows, _) in enumerate(self._batches("pretraining", epoch)):
                optimiser.scale_rates(half_cosine((epoch * self.updates_per_epoch + i) / total))
                context, change, _ = self._transitions.parts(rows)
                loss += self.policy.likelihood_step(optimiser, context, change)
        self.likelihood_policy = self.policy.copy()
        self._policy_optimiser = Adam(self.policy.network, [config.policy_learning_rate])
        mean = float(loss) / self.updates_per_epoch
        if not math.isfinite(mean):
            raise UserError(
                "the dynamics reward's policy diverged while it was fitted by likelihood; lower "
                "dynamics_reward.pretraining_learning_rate"
            )
        return mean

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train adversarially; after every epoch its metrics."""
        for epoch in range(self.config.max_epochs):
            loss = torch.zeros((), device=self.device)
            for rows, draw in self._batches("training", epoch):
                loss += self._step(rows, draw)
            metrics = self._metrics(loss / self.updates_per_epoch)
            if not math.isfinite(metrics["loss"]):
                raise UserError("the dynamics reward diverged; lower dynamics_reward.learning_rate")
            yield metrics

    def _step(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """One update of D, and one of the learner; returns D's loss before it."""
        config = self.config
        context, _, real = self._transitions.parts(rows)
        fake, own = self._learner_draws(context, draw)
        out, inputs = self.discriminator.forward(torch.cat((real, fake)).unsqueeze(0))
        logits_real, logits_fake = out.view(-1).split((len(real), len(fake)))
        loss, *grads = classification_gradients(logits_real, logits_fake, config.entropy_bonus)
        grad_out = torch.cat(grads).view(1, -1, 1)
        deltas = self.discriminator.hidden_gradients(inputs, grad_out)
        self.discriminator.write_gradients(inputs, deltas, grad_out)
        if config.weight_decay:
            self.discriminator.grad.add_(self.discriminator.flat, alpha=config.weight_decay)
        self._optimiser.step()
        self._update += 1
        self._follow(logits_real.mean(), logits_fake.mean())
        if own is not None:
            reward_CB = softplus(self._logits(self._transitions.inputs(context[: own.shape[1]], own)))
            self.policy.policy_steps(
                self._policy_optimiser, context[: own.shape[1]], own, reward_CB, config.policy_clip,
                config.policy_passes,
            )  # fmt: skip
        return loss

    def _learner_draws(self, context_BY: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The fake class's inputs `(B, X)`; of its rows that are the learner's, which come first, also unscaled draws
        `(C, n, S)` of the policy for its own update, where it has one."""
        config, s = self.config, self.data.observation_dim
        num_own = len(context_BY) - round(config.likelihood_share * len(context_BY))
        scale_B1 = self._draw_scales(len(context_BY), draw)
        noise_BS = self._noise((len(context_BY), s), draw)
        policies = ((self.policy, slice(0, num_own)), (self.likelihood_policy, slice(num_own, None)))
        changes = [
            policy.sample(context_BY[part], noise_BS[part], scale_B1[part])
            for policy, part in policies if len(context_BY[part])
        ]  # fmt: skip
        own = None
        if num_own and config.policy_learning_rate:
            noise = self._noise((config.policy_draws, num_own, s), draw)
            own = self.policy.sample(context_BY[:num_own], noise)
        return self._transitions.inputs(context_BY, torch.cat(changes)), own

    def _draw_scales(self, num: int, draw: torch.Generator) -> Tensor:
        """Factors of the draws' standard deviations, `(num, 1)`."""
        uniform = torch.rand((num, 1), generator=draw, device=self.device)
        low, high = math.log(self.config.min_draw_scale), math.log(self.config.draw_scale)
        return torch.exp(low + (high - low) * uniform)

    def _logits(self, inputs: Tensor) -> Tensor:
        """D's logits `(...)` of standardised inputs `(..., X)`."""
        flat = inputs.reshape(1, -1, inputs.shape[-1])
        return self.discriminator.forward(flat)[0].view(inputs.shape[:-1])

    def _follow(self, expert_logit: Tensor, learner_logit: Tensor) -> None:
        """Take an update's mean logits in, and a snapshot if one is due."""
        # as a plain mean of the first updates, so that the start of 0 leaves nothing behind
        weight = max(1 - self.config.logit_decay, 1 / self._update)
        self._expert_logit = torch.lerp(self._expert_logit, expert_logit, weight)
        self._learner_logit = torch.lerp(self._learner_logit, learner_logit, weight)
        for _ in range(self._due.count(self._update)):
            parameters = self.discriminator.flat.clone()
            self.snapshots.append(Snapshot(self._update, parameters, self._expert_logit, self._learner_logit))

    # ---- what is told ---------------------------------------------------------------------------------------------

    def _metrics(self, loss: Tensor) -> dict[str, float]:
        """Of an epoch; read from the device in one go."""
        context, _, real = self._transitions.parts(self._held[:_CHECKED_ROWS])
        noise = self._noise((len(context), self.data.observation_dim), self._draw("check", self._update))
        draws = [policy.sample(context, noise) for policy in (self.policy, self.likelihood_policy)]
        values = [loss, self._expert_logit, self._learner_logit]
        for inputs in (real, *(self._transitions.inputs(context, change) for change in draws)):
            values.append(self._current_probability(self._logits(inputs)).mean())
        values.append(self.policy.moments(context).log_std_BS.exp().mean())
        names = ("loss", "expert_logit", "learner_logit", "p_real", "p_learner", "p_likelihood", "policy_std")
        read = dict(zip(names, torch.stack(values).tolist(), strict=True))
        return {**read, "snapshots": float(len(self.snapshots))}

    def _current_probability(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(rescaled(logits, self._learner_logit, self._expert_logit))

    # ---- what is kept ---------------------------------------------------------------------------------------------

    def finish(self) -> tuple[dict[str, Any], dict[str, float]]:
        """The state of the mixture, on the CPU, and its metrics."""
        state = self._state()
        reward, candidates_BCS = DynamicsReward.from_state_dict(state), self._candidates()
        p_BC = self._probabilities(reward, candidates_BCS)
        metrics = self._check(candidates_BCS, p_BC)
        if self.config.distil_epochs:
            state["distilled"] = self._distilled()
            fitted = DynamicsReward.from_state_dict(state, scorer="distilled")
            metrics |= _agreement(p_BC[:, 2:], self._probabilities(fitted, candidates_BCS)[:, 2:])
        undefined = {name for name, value in metrics.items() if not math.isfinite(value)}
        # a rank correlation is not defined where all scores are equal
        if not undefined <= {"rank_correlation", "distilled_rank_correlation"}:
            raise UserError("the dynamics reward diverged; lower dynamics_reward.learning_rate")
        metrics = {name: value for name, value in metrics.items() if name not in undefined}
        return _on_cpu(state), metrics

    def _state(self) -> dict[str, Any]:
        stack = StackedMLP((len(self.snapshots),), self.discriminator.sizes, self.device)
        for target, source in zip(
            stack.blocks(stack.flat),
            zip(*(self.discriminator.blocks(one.parameters) for one in self.snapshots), strict=True),
            strict=True,
        ):
            target.copy_(torch.cat(source))
        tensors = {
            **self._transitions.bounds, **self._transitions.layers(stack),
            "expert_logit": torch.stack([one.expert_logit for one in self.snapshots]),
            "learner_logit": torch.stack([one.learner_logit for one in self.snapshots]),
        }  # fmt: skip
        return {
            "tensors": tensors, "delta_input": self.config.delta_input, "observation_dim": self.data.observation_dim,
            "snapshot_updates": [one.update for one in self.snapshots], "distilled": None,
        }  # fmt: skip

    def _check(self, candidates_BCS: Tensor, p: Tensor) -> dict[str, float]:
        """How the mixture judges held-out rows and draws at their (s, a).

        Args:
            candidates_BCS: see `_candidates`.
            p: of them, `(B, 2 + C)`.
        """
        data, rows = self.data, self._held[:_CHECKED_ROWS]
        after = data.next_observations[rows]
        std = data.observations.std(0, correction=0)
        unit = torch.where(std > NEARLY_CONSTANT, 1 / std, 0.0)
        error_BC = torch.linalg.vector_norm((candidates_BCS[:, 2:] - after.unsqueeze(1)) * unit, dim=-1)
        best = p[:, 2:].argmax(1, keepdim=True)
        return {
            "mixture_p_real": float(p[:, 0].mean()), "mixture_p_learner": float(p[:, 1].mean()),
            "mixture_p_likelihood": float(p[:, 2:].mean()),
            "rank_correlation": float(spearman(reward_of(p[:, 2:]).flatten(), error_BC.flatten())),
            "choice_error": float(error_BC.gather(1, best).mean() / error_BC.mean()),
        }  # fmt: skip

    def _candidates(self) -> Tensor:
        """Next observations `(B, 2 + C, S)` of held-out rows: the real one, a draw of the learner, and C draws of the
        policy that likelihood fitted."""
        rows, s = self._held[:_CHECKED_ROWS], self.data.observation_dim
        context, obs = self._transitions.parts(rows)[0], self.data.observations[rows]
        noise = self._noise((NUM_CANDIDATES, len(rows), s), self._draw("check"))
        own, drawn = (
            self._transitions.changed(obs, policy.sample(context, z))
            for policy, z in ((self.policy, noise[:1]), (self.likelihood_policy, noise))
        )
        return torch.cat((self.data.next_observations[rows].unsqueeze(0), own, drawn)).transpose(0, 1)

    def _probabilities(self, reward: DynamicsReward, candidates_BCS: Tensor) -> Tensor:
        """p of `_candidates`, `(B, 2 + C)`."""
        rows = self._held[:_CHECKED_ROWS]
        return reward.probability(torch.cat((self.data.observations[rows], self.data.actions[rows]), 1), candidates_BCS)

    def _distilled(self) -> dict[str, Tensor]:
        """The layers of one network in place of the mixture.

        It is fitted on what the filter may ask about: real transitions, draws of both policies with standard
        deviations scaled as in the training, and draws at actions other than the data's."""
        config, s, a = self.config, self.data.observation_dim, self.data.action_dim
        draw = self._draw("distillation")
        order = torch.randperm(len(self._rows), generator=draw, device=self.device)
        context, _, real = self._transitions.parts(self._rows[order[: _DISTILLED_ROWS // 4]])
        elsewhere = context.clone()
        elsewhere[:, s:] += self._noise((len(context), a), draw)
        parts = [real]
        kinds = ((context, self.likelihood_policy), (context, self.policy), (elsewhere, self.likelihood_policy))
        for where, policy in kinds:
            noise = self._noise((len(where), s), draw)
            parts.append(
                self._transitions.inputs(where, policy.sample(where, noise, self._draw_scales(len(where), draw)))
            )
        inputs = torch.cat(parts)
        p = torch.cat([self._mixture_probability(part) for part in inputs.split(_CHUNK)])
        network = distil(inputs, p, config.distil_hidden, config.distil_epochs, config.seed)
        return self._transitions.layers(network)

    def _mixture_probability(self, inputs_BX: Tensor) -> Tensor:
        """p of standardised inputs, `(B,)`."""
        total = torch.zeros(len(inputs_BX), device=self.device)
        network = self.discriminator.clone()
        for one in self.snapshots:
            network.flat.copy_(one.parameters)
            logits = network.forward(inputs_BX.unsqueeze(0))[0].view(-1)
            total += torch.sigmoid(rescaled(logits, one.learner_logit, one.expert_logit))
        return total / len(self.snapshots)


def _agreement(exact_BC: Tensor, fitted_BC: Tensor) -> dict[str, float]:
    """How far the distilled network's p of candidates agree with the mixture's."""
    cut = [reward_of(x) < _THRESHOLD for x in (exact_BC, fitted_BC)]
    return {
        "distilled_rmse": float((exact_BC - fitted_BC).square().mean().sqrt()),
        "distilled_rank_correlation": float(spearman(exact_BC.flatten(), fitted_BC.flatten())),
        "distilled_same_choice": float((exact_BC.argmax(1) == fitted_BC.argmax(1)).float().mean()),
        "distilled_same_cut": float((cut[0] == cut[1]).float().mean()),
    }


def _on_cpu(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _on_cpu(value) for name, value in content.items()}
    return content.cpu() if isinstance(content, Tensor) else content
