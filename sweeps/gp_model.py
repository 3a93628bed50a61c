"""The model of the sampler `gp-mixed`, and the point that it expects most of. Needs BoTorch.

Kernel of points x, x' with ordered coordinates o and categorical ones c, w >= 0 fitted:

    k(x, x') = w_1 k_o(o, o') + w_2 k_c(c, c') + w_3 k_o(o, o') k_c(c, c')

k_o is squared-exponential, k_c = exp(-mean_i [c_i != c'_i] / l_i), each coordinate with a length scale of its own. It
is the form of BoTorch's `MixedSingleTaskGP`, but with one set of length scales for the sum and the product, as
CASMOPOLITAN has it, and computed in one piece: nested kernels were measured to take twice the time.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.exceptions.errors import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim.optimize_mixed import optimize_acqf_mixed_alternating
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.errors import NanError, NotPSDError
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from sweeps.gp_mixed import Encoding

Floats = NDArray[np.float64]

FAILURES = (ModelFittingError, NanError, NotPSDError)  # of `propose`
FIT_ITERATIONS = 30
MC_SAMPLES = 64
RAW_SAMPLES = 64  # points from which the optimiser's starts are drawn
RESTARTS = 4
RENEWAL = 1.1  # growth of the number of results by which a fit begins afresh, and not from the one before
SPRAY = 2  # of them near each point that may be the best
ALTERNATIONS = 3  # between ordered values and choices, and the continuous parameters
OTHERS = 256  # points to choose from where the best one has been tried
TOLERANCE = 1e-2  # of the logarithm of the expected improvement


class MixedKernel(Kernel):
    """The kernel above.

    Args:
        dimensions: of a point, D.
        categorical: which of them are; may be none or all.
    """

    has_lengthscale = True

    def __init__(self, dimensions: int, categorical: Collection[int]) -> None:
        # the prior of BoTorch's own kernels (Hvarfner et al., ICML 2024): smoother with more dimensions
        prior = LogNormalPrior(math.sqrt(2) + math.log(dimensions) / 2, math.sqrt(3))
        constraint = GreaterThan(2.5e-2, transform=None, initial_value=prior.mode)
        super().__init__(ard_num_dims=dimensions, lengthscale_prior=prior, lengthscale_constraint=constraint)
        self._ordered = [i for i in range(dimensions) if i not in categorical]
        self._categorical = sorted(categorical)
        parts = 3 if self._ordered and self._categorical else 1
        self.register_parameter("raw_weights", torch.nn.Parameter(torch.zeros(parts)))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **kwargs: Any) -> Tensor:
        """Covariances (..., N, N') of points (..., N, D) and (..., N', D), or (..., N) of pairs with `diag`."""
        weights = torch.nn.functional.softplus(self.raw_weights)
        if not self._categorical:
            return weights[0] * self._of_ordered(x1, x2, diag)
        if not self._ordered:
            return weights[0] * self._of_categorical(x1, x2, diag)
        ordered, categorical = self._of_ordered(x1, x2, diag), self._of_categorical(x1, x2, diag)
        return weights[0] * ordered + weights[1] * categorical + weights[2] * ordered * categorical

    def _of_ordered(self, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
        scale = self.lengthscale.squeeze(-2)[self._ordered]
        a, b = x1[..., self._ordered] / scale, x2[..., self._ordered] / scale
        if diag:
            return torch.exp(-((a - b) ** 2).sum(-1) / 2)
        squares = (a**2).sum(-1, keepdim=True) + (b**2).sum(-1).unsqueeze(-2) - 2 * a @ b.mT
        return torch.exp(-squares.clamp_min(0) / 2)

    def _of_categorical(self, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
        scale = self.lengthscale.squeeze(-2)[self._categorical]
        a, b = x1[..., self._categorical], x2[..., self._categorical]
        differs = a != b if diag else a.unsqueeze(-2) != b.unsqueeze(-3)
        return torch.exp(-(differs / scale).mean(-1))


def propose(
    encoding: Encoding,
    rows: Floats,
    values: Floats,
    variances: Floats | None,
    running: Floats,
    earlier: Sequence[float] | None,
    seed: int,
) -> tuple[Floats, list[float]]:
    """The point to be tried next.

    Args:
        encoding: of the space.
        rows: (N, D) of the trials that have ended.
        values: (N,), larger is better, standardised.
        variances: (N,) of the values' noise; None: fitted.
        running: (R, D) of the running trials.
        earlier: an earlier fit.
        seed: of all random numbers.

    Raises:
        FAILURES: the numbers do not allow a fit.

    Returns:
        Its row (D,), which no trial has yet unless the space is too small, and the fit.
    """
    with _alone(seed):
        model, fit = _fit(torch.tensor(rows), torch.tensor(values), variances, encoding.choices, earlier)
        acquisition = qLogNoisyExpectedImprovement(
            model, torch.tensor(rows), SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed % 2**31),
            X_pending=torch.tensor(running) if len(running) else None,
        )  # fmt: skip
        found, _ = optimize_acqf_mixed_alternating(
            acquisition, torch.tensor(encoding.bounds), encoding.levels, encoding.choices, raw_samples=RAW_SAMPLES,
            num_restarts=RESTARTS,
            options={
                "initialization_strategy": "random", "num_spray_points": SPRAY, "tol": TOLERANCE,
                "maxiter_alternating": ALTERNATIONS,
                "max_discrete_values": max(map(len, encoding.levels.values()), default=1),
            },
        )  # fmt: skip
        row = encoding.nearest(found[0].numpy())
        tried = np.concatenate([rows, running])
        if _is_among(row, tried):
            # the same settings with the same seeds would tell nothing new
            uniform = torch.quasirandom.SobolEngine(len(row), scramble=True, seed=seed % 2**31).draw(OTHERS).numpy()
            others = [other for other in encoding.even_rows(uniform.astype(np.float64)) if not _is_among(other, tried)]
            if others:
                with torch.no_grad():
                    row = others[int(acquisition(torch.tensor(np.array(others)).unsqueeze(-2)).argmax())]
    return row, fit


def _fit(
    rows: Tensor, values: Tensor, variances: Floats | None, categorical: Collection[int],
    earlier: Sequence[float] | None,
) -> tuple[SingleTaskGP, list[float]]:  # fmt: skip
    """The model, and what the next fit begins from: the number of results at the last fresh start, and its parameters.

    Fits that only ever began from the one before, the first from ten results, were seen to stay in its optimum where
    a fresh start finds a far better one.
    """
    noise = None if variances is None else torch.tensor(variances).unsqueeze(-1)
    kernel = MixedKernel(rows.shape[-1], categorical)
    model = SingleTaskGP(rows, values.unsqueeze(-1), noise, covar_module=kernel, outcome_transform=None)
    sizes = [p.numel() for p in model.parameters()]
    fresh = len(rows)
    if earlier is not None and len(earlier) == 1 + sum(sizes) and fresh < RENEWAL * earlier[0]:
        fresh = int(earlier[0])
        parts = torch.tensor(earlier[1:], dtype=torch.float64).split(sizes)
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.data.copy_(part.view_as(parameter))
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": FIT_ITERATIONS}})
    return model, [fresh, *torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()]


def _is_among(row: Floats, rows: Floats) -> bool:
    return bool((np.abs(rows - row) < 1e-9).all(axis=1).any())


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Torch with one thread and random numbers of its own; nothing of it is felt outside."""
    threads, state = torch.get_num_threads(), random.getstate()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        random.seed(seed)  # of categorical parameters with many choices BoTorch draws some
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(state)
