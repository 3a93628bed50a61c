"""Domain classifiers: how much likelier a transition is in the target domain than in the source.

DARC (Eysenbach et al., "Off-Dynamics Reinforcement Learning", ICLR 2021, arXiv 2006.13916) learns two classifiers, of
the domain of (s, a, s') and of that of (s, a). By Bayes' rule the ratio of the two dynamics follows from them, whatever
the share of each domain and wherever the two policies have been:

    Delta r = log [ q(target|s,a,s') / q(source|s,a,s') ] - log [ q(target|s,a) / q(source|s,a) ]
            = log [ P_target(s'|s,a) / P_source(s'|s,a) ]

Each has one logit per domain, z = (z_source, z_target), so log [q(target) / q(source)] = z_target - z_source. It is
trained by the cross-entropy of softmax(z) on as many rows of the source as of the target, with normal noise added to
its inputs (another draw for each). Two forms:

    independent  two networks: z_sas = f(s,a,s'), z_sa = g(s,a)                       VGDF's paper, ODRL
    residual     z_sas = g(s,a) + f(s,a,s'), so Delta r is f's alone                  the release of DARC

ODRL's classifiers hand softmax(z) to a cross-entropy that takes a softmax again, so that no loss falls below 0.31 and
the logits go on growing; here the loss is the one that its Delta r is right for.

Gradients are written out (see `agents.networks`): d loss / d z = (softmax(z) - label) / rows.

Shapes: M member, B row of one domain, R = 2B rows of both, S observation, A action, W column of a row, Z noise of a
row, D = 2 domains, source first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from agents.checks import check_choice, check_not_negative, check_positive, check_widths
from agents.draws import Draws
from agents.method import per_member
from agents.optim import Adam
from agents.pack_networks import PackNetworks
from agents.replay import Replay

FORMS = ("independent", "residual")
METRICS = ("sa_classifier_loss", "sas_classifier_loss", "sas_classifier_accuracy")


@dataclass
class ClassifierConfig:
    """Settings of the classifiers, `method.classifiers.*`. Fields marked per member may differ inside a pack."""

    form: str = "independent"  # independent | residual
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    learning_rate: float = per_member(3e-4)
    input_noise: float = per_member(1.0)  # standard deviation, in the observations' and actions' own units
    batch_size: int = 128  # rows of each domain
    train_every: int = 1  # updates between two steps of the classifiers
    first_update: int = 0  # before which they are not trained

    def __post_init__(self) -> None:
        part = "method.classifiers"
        check_choice(self, "form", FORMS, part)
        check_positive(self, "learning_rate", "batch_size", "train_every", part=part)
        check_not_negative(self, "input_noise", "first_update", part=part)
        check_widths(self, "hidden", part=part)


class DomainClassifiers(PackNetworks):
    """The two classifiers of every member of a pack.

    Args:
        configs: one per member; M is their number.
        seeds: one per member.
        observation_dim, action_dim: S and A.
        device: where everything lives.

    Attributes:
        shown: metrics of the last training step, as `update` returns them.
    """

    stacks = ("sa", "sas")
    optimisers = ("sa_optim", "sas_optim")
    per_member = ("configs", "seeds")

    def __init__(
        self,
        configs: Sequence[ClassifierConfig],
        seeds: Sequence[int],
        observation_dim: int,
        action_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.configs, self.seeds, self.shared = list(configs), list(seeds), configs[0]
        self.observation_dim, self.action_dim = observation_dim, action_dim
        s, a, hidden = observation_dim, action_dim, self.shared.hidden
        self.sa = self.network("sa classifier", seeds, (s + a, *hidden, 2), device)
        self.sas = self.network("sas classifier", seeds, (2 * s + a, *hidden, 2), device)
        rates = [c.learning_rate for c in configs]
        self.sa_optim, self.sas_optim = Adam(self.sa, rates), Adam(self.sas, rates)
        self.bind()
        rows = 2 * self.shared.batch_size
        self._noise = Draws(seeds, "classifier noise", (rows, self.noise_width), device)
        self._places = Draws(seeds, "classifier rows", (rows,), device, uniform=True)
        self.shown = {name: torch.zeros(self.num_members, device=device) for name in METRICS}

    def bind(self) -> None:
        device = self.sa.flat.device
        noise = torch.tensor([c.input_noise for c in self.configs], dtype=torch.float32, device=device)
        self._input_noise_M11 = noise.view(-1, 1, 1)

    @property
    def noise_width(self) -> int:
        """Z, standard normal numbers that a row of a training step takes: S + A for (s, a), 2S + A for (s, a, s')."""
        return 3 * self.observation_dim + 2 * self.action_dim

    # ---- what they say ----------------------------------------------------------------------------------------

    def _inputs(self, rows_MBW: Tensor) -> tuple[Tensor, Tensor]:
        """[s, a] and [s, a, s'] of rows."""
        s, a = self.observation_dim, self.action_dim
        sa = rows_MBW[..., : s + a]
        return sa, torch.cat((sa, rows_MBW[..., s + a + 2 :]), dim=-1)

    @torch.inference_mode()
    def log_ratio(self, rows_MBW: Tensor) -> Tensor:
        """Delta r, the natural logarithm of P_target(s'|s,a) / P_source(s'|s,a), `(M, B)`, of rows `(M, B, W)`."""
        sa, sas = self._inputs(rows_MBW)
        of_sas = _log_odds(self.sas.forward(sas)[0])
        return of_sas if self.shared.form == "residual" else of_sas.sub_(_log_odds(self.sa.forward(sa)[0]))

    def ratio(self, rows_MBW: Tensor, low: float, high: float) -> Tensor:
        """P_target / P_source, `(M, B)`, clipped to [low, high], where low > 0."""
        return self.log_ratio(rows_MBW).clamp(math.log(low), math.log(high)).exp()

    # ---- training ---------------------------------------------------------------------------------------------

    def due(self, t: int) -> bool:
        """Whether they are trained before update t."""
        return t >= self.shared.first_update and t % self.shared.train_every == 0

    def train(self, t: int, source: Replay, target: Replay) -> None:
        """The training step before update t, on rows drawn uniformly from both domains.

        Args:
            source, target: what each member may draw from: the real rows and its ring, at least one row of each.
        """
        step = t // self.shared.train_every
        places_MR = self._places(step)
        halves = zip((source, target), places_MR.split(self.shared.batch_size, dim=1), strict=True)
        drawn = [replay.gather(replay.row_numbers(places_MB)) for replay, places_MB in halves]
        self.shown = self.update(drawn[0], drawn[1], self._noise(step))

    @torch.inference_mode()
    def update(self, source_MBW: Tensor, target_MBW: Tensor, noise_MRZ: Tensor) -> dict[str, Tensor]:
        """One gradient step of both, in place.

        Args:
            source_MBW, target_MBW: transitions of each domain.
            noise_MRZ: standard normal draws for the rows of the source, then those of the target.

        Returns:
            `(M,)` on the device, before the step: both cross-entropies in nats and the share of rows whose domain the
            classifier of (s, a, s') finds.
        """
        rows = torch.cat((source_MBW, target_MBW), dim=1)
        num_rows, is_target = rows.shape[1], torch.zeros(rows.shape[1], device=rows.device)
        is_target[source_MBW.shape[1] :] = 1.0
        sa, sas = self._inputs(rows)
        noise = (noise_MRZ * self._input_noise_M11).split((sa.shape[-1], sas.shape[-1]), dim=-1)
        out_sa, trace_sa = self.sa.forward(sa + noise[0])
        out_sas, trace_sas = self.sas.forward(sas + noise[1])
        residual = self.shared.form == "residual"
        odds_sa, odds_sas = _log_odds(out_sa), _log_odds(out_sas)
        if residual:
            odds_sas = odds_sas + odds_sa
        # of softmax(z): q(target) = sigmoid(z_target - z_source), and the gradients of the two logits are opposite
        error_sa, error_sas = ((odds.sigmoid() - is_target) / num_rows for odds in (odds_sa, odds_sas))
        of_networks = (
            (self.sa, self.sa_optim, trace_sa, error_sa + error_sas if residual else error_sa),
            (self.sas, self.sas_optim, trace_sas, error_sas),
        )
        for network, optim, trace, error in of_networks:
            grad = torch.stack((-error, error), dim=-1)
            network.write_gradients(trace, network.hidden_gradients(trace, grad), grad)
            optim.step()
        sign = 1.0 - 2.0 * is_target
        return {
            "sa_classifier_loss": softplus(sign * odds_sa).mean(1),
            "sas_classifier_loss": softplus(sign * odds_sas).mean(1),
            "sas_classifier_accuracy": (sign * odds_sas < 0).float().mean(1),
        }

    # ---- members and checkpoints ------------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> Self:
        """The classifiers of some members only."""
        other = super().select(members)
        other._noise, other._places = self._noise.select(members), self._places.select(members)
        other.shown = {name: values[list(members)] for name, values in self.shown.items()}
        return other

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "shown": dict(self.shown)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shown = {name: values.to(self.sa.flat.device) for name, values in state["shown"].items()}


def _log_odds(logits_MBD: Tensor) -> Tensor:
    """log q(target) - log q(source), `(M, B)`."""
    return logits_MBD[..., 1] - logits_MBD[..., 0]
