"""Behaviour cloning of the source domain's actions in the loss of a policy that learns from two domains.

    J(pi) = c mean_b [ alpha log pi(a~|s) - min_k Q_k(s, a~) ] + mean_{b of the source} mean_a (pi(s) - a)^2

with c = coef / mean_b |min_k Q_k(s, a~)|, through which nothing is propagated (TD3+BC, Fujimoto and Gu 2021, arXiv
2106.06860, equation 5), or c = coef. pi(s) is an action drawn from the policy, or tanh of its mean.

    d/du (pi(s) - a)^2 = 2 (pi(s) - a) (1 - pi(s)^2),    u = mu(s) + sigma(s) eps

Shapes: M member, K noise, B batch row, A action, O = 2 A outputs of a policy's network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agents.domain_sac import DomainBatch, DomainSAC

SCALES = ("value", "none")
CLONED_ACTIONS = ("sample", "mean")
_LEAST_VALUE = 1e-8  # critics that are 0 everywhere, as drawn ones never are, would divide by it


class BehaviourCloning:
    """An `agents.domain_sac.ActorPenalty`.

    Args:
        coefs: weight of the reinforcement learning term, one per member; M of them.
        scale: "value": c = coef / mean |Q|, or "none": c = coef.
        action: what is drawn to the data: "sample" or "mean".
        device: the learner's.
    """

    def __init__(
        self, coefs: Sequence[float], scale: str = "value", action: str = "sample",
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.coefs, self.scale, self.action = list(coefs), scale, action
        self.num_noises = 1 if action == "sample" else 0
        self._coef_M11 = torch.tensor(self.coefs, dtype=torch.float32, device=device).view(-1, 1, 1)

    def __call__(
        self, sac: DomainSAC, batch: DomainBatch, out_MBO: Tensor, value_MB: Tensor, noise_KMBA: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        n, a, settings = batch.num_source, sac.action_dim, sac.settings
        weight = self._coef_M11
        if self.scale == "value":
            weight = weight / value_MB.abs().mean(1).clamp_(min=_LEAST_VALUE).view(-1, 1, 1)
        mean, raw = out_MBO[:, :n].split(a, dim=-1)
        log_std = raw.clamp(settings.log_std_min, settings.log_std_max)
        spread = log_std.exp() * noise_KMBA[0, :, :n] if self.action == "sample" else torch.zeros_like(mean)
        own = (mean + spread).tanh_()
        error = own - batch.rows_MBW[:, :n, sac.observation_dim : sac.observation_dim + a]
        grad_u = error * (1.0 - own * own) * (2.0 / (n * a))
        added = torch.zeros_like(out_MBO)
        added[:, :n, :a] = grad_u
        added[:, :n, a:] = (grad_u * spread).masked_fill_(raw != log_std, 0.0)
        return weight, added, {"cloning_loss": error.square().mean((1, 2)), "policy_weight": weight.view(-1)}
