"""What policy guidance samples, where it can be known: Gaussian trajectories with their exact denoiser.

Trajectories are standard normal, D(x; sigma) = x / (1 + sigma^2), and the policy is N(2, 1) in the sampler's own space,
without a tanh: so the product p_b pi^lambda is Gaussian, for lambda = 1 with mean 1 and standard deviation 0.707. In
the cases "correlated ..." a row is a state and an action whose correlation is 0.8, and the policy is N(2, 0.2^2).

`value` is the mean of the sampled actions and `std` their standard deviation. In the cases "released rule ..." and
"score rule ..." `reference` and `reference_std` are those of another implementation of the same toy, of 20,000 to
40,000 samples, which was not made for this comparison; none of them is of the paper. In the other cases they are those
of the product, or of the same guidance in 256 steps. `reference_is` says which.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from agents.cpu import configure_cpu
from agents.edm import Denoise
from agents.edm_sampler import SamplerConfig, sample
from agents.guidance import GuidanceConfig, ScoreGuidedDenoiser, StepGuidance, step_coefficients
from agents.randomness import generator
from benchmarks.common import print_line, record

BENCHMARK = "pgd_toy"
ACTIONS = 6  # A; the rows of a trajectory are the dimensions divided by it
MEAN = 2.0  # of the policy
OTHER = "another implementation of the same toy, 20,000 to 40,000 samples; not of the paper"
PRODUCT = "the product p_b pi^lambda"
STEPS = "the same guidance with 256 steps"
RELEASE = {"reuse": False}
RAW = {"normalise": False, "allow_collapse": True}


@dataclass(frozen=True)
class Case:
    """A way to sample, and what it ought to give.

    Args:
        reference: mean and standard deviation of the actions.
        correlation: of a row's state and action; None: rows are actions.
    """

    name: str
    reference: tuple[float, float] | None  # None: those of the same case with 256 steps
    reference_is: str = OTHER
    sampler: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    dimensions: int = 1
    correlation: float | None = None
    policy_std: float = 1.0

    def samples(self, count: int, seed: int = 0) -> Tensor:
        """At least `count` actions `(n,)` and, where there are states, those behind them: `(2, n)`."""
        config = _sampler(self.sampler)
        guidance = GuidanceConfig(**{"coef": 0.0, **self.guidance})
        rows, width = (1, 1) if self.dimensions == 1 else (self.dimensions // ACTIONS, ACTIONS)
        states = 0 if self.correlation is None else 1
        noise = torch.empty(-(-count // (rows * width)), rows, states + width)
        source = generator(seed, "toy")
        actions, coef_N = slice(states, states + width), torch.full((len(noise),), guidance.coef)
        denoise: Denoise = exact if self.correlation is None else Correlated(self.correlation)

        def score(x: Tensor) -> Tensor:
            return (MEAN - x[..., actions]) / self.policy_std**2

        steering = None
        if guidance.coef and guidance.rule == "score":
            denoise = ScoreGuidedDenoiser(denoise, score, coef_N, actions, guidance)
        elif guidance.coef:
            steering = StepGuidance(score, coef_N, actions, guidance, step_coefficients(guidance, config))
        x = sample(denoise, lambda: noise.normal_(generator=source), config, steering)
        return x.flatten() if self.correlation is None else x.flatten(0, 1).T.flip(0)


def _sampler(settings: dict[str, Any]) -> SamplerConfig:
    """A sampler's config; the one combination that is refused elsewhere because samples collapse is wanted here."""
    predictor = settings.get("predictor", "edm")
    config = SamplerConfig(**{"num_steps": 256, **settings, "predictor": "edm"})
    config.predictor = predictor
    return config


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of standard normal data."""
    return x / (1.0 + sigma.square())


@dataclass(frozen=True)
class Correlated:
    """The denoiser of rows (state, action) of unit variance and some correlation."""

    correlation: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        covariance = torch.tensor([[1.0, self.correlation], [self.correlation, 1.0]])
        return x @ torch.linalg.solve(covariance + sigma.square() * torch.eye(2), covariance)


def product(correlation: float, policy_std: float, coef: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviations `(2,)` of (state, action) under p_b pi^lambda."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    precision = coef / policy_std**2
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + torch.diag(torch.tensor([0.0, precision])))
    return posterior @ torch.tensor([0.0, precision * MEAN]), posterior.diag().sqrt()


def _cases() -> list[Case]:
    release = {"predictor": "release"}
    cases = [
        Case("released rule, lambda 0", (-0.005, 1.034), sampler=release),
        Case("released rule, Euler's step from the churned point, lambda 0", (-0.006, 1.014)),
        Case("released rule, first order, lambda 0", (0.0, 0.059), sampler={**release, "order": 1}),
        Case("released rule, first order from the churned point, lambda 0", (-0.005, 0.926), sampler={"order": 1}),
    ]
    for coef, reference in ((0.01, (0.452, 0.836)), (0.1, (1.811, 0.166)), (1.0, (2.0, 0.0))):
        name = f"released rule, raw gradient at the denoised point, lambda {coef:g}"
        cases.append(Case(name, reference, sampler=release, guidance={"coef": coef, **RELEASE, **RAW}))
    noisy = {"coef": 1.0, "denoised": False, **RAW}
    cases.append(
        Case("released rule, raw gradient at the noisy point, lambda 1", (2.0, 0.0), sampler=release, guidance=noisy)
    )
    units = (
        (192, 0.1, (0.162, 0.96)),
        (192, 1.0, (1.576, 0.272)),
        (192, 4.0, (2.0, 0.002)),
        (768, 1.0, (0.803, 0.666)),
    )
    for dimensions, coef, reference in units:
        name = f"released rule, normalised gradient, {dimensions} dimensions, lambda {coef:g}"
        cases.append(Case(name, reference, sampler=release, guidance={"coef": coef, **RELEASE}, dimensions=dimensions))
    for smoothing, steps, churn, reference in (
        (True, 32, 80.0, (0.999, 0.743)), (True, 256, 80.0, (0.998, 0.713)), (False, 256, 80.0, (1.078, 0.697)),
        (False, 64, 80.0, (1.186, 0.683)), (False, 256, 0.0, (1.433, 0.608)),
    ):  # fmt: skip
        name = f"score rule, {'smoothed' if smoothing else 'at a point'}, {steps} steps, churn {churn:g}, lambda 1"
        guidance = {"rule": "score", "coef": 1.0, "smoothing": smoothing}
        cases.append(Case(name, reference, sampler={"num_steps": steps, "churn": churn}, guidance=guidance))
    for steps in (16, 32, 64, 128, 256):
        mean, std = product(0.8, 0.2, 1.0)
        ways: dict[str, dict[str, Any]] = {
            "": {},
            ", at a point": {"smoothing": False},
        }
        for name, guidance in ways.items():
            cases.append(Case(
                f"correlated, score rule{name}, {steps} steps", (float(mean[1]), float(std[1])), PRODUCT,
                {"num_steps": steps}, {"rule": "score", "coef": 1.0, **guidance}, correlation=0.8, policy_std=0.2,
            ))  # fmt: skip
    for steps in (16, 32, 64, 128):
        strengths: dict[str, dict[str, Any]] = {
            "1 of 256 steps": {"reuse": False},
            "1 of 256 steps, reuse": {},
            "1 of any step": {"coef_steps": None},
        }
        for name, guidance in strengths.items():
            cases.append(Case(
                f"normalised, {steps} steps, lambda {name}", None, STEPS, {"num_steps": steps},
                {"coef": 1.0, **guidance}, dimensions=192,
            ))  # fmt: skip
        cases.append(Case(f"lambda 0, {steps} steps", (0.0, 1.0), "the data's", {"num_steps": steps}))
    return cases


CASES = _cases()


def line_of(case: Case, count: int, command: str) -> dict[str, Any]:
    """Sample a case."""
    sampled = case.samples(count)
    actions = sampled if sampled.dim() == 1 else sampled[0]
    reference = case.reference
    if reference is None:
        full = replace(case, sampler={"num_steps": 256}).samples(count, seed=1)
        reference = float(full.mean()), float(full.std())
    more: dict[str, Any] = {"std": float(actions.std()), "reference_std": reference[1], "samples": len(actions)}
    if sampled.dim() == 2:
        mean, std = product(case.correlation or 0.0, case.policy_std, case.guidance["coef"])
        more |= {"state_mean": float(sampled[1].mean()), "state_std": float(sampled[1].std())}
        more |= {"reference_state_mean": float(mean[0]), "reference_state_std": float(std[0])}
    return record(
        BENCHMARK, case.name, float(actions.mean()), "mean action", reference[0], 1, command,
        reference_is=case.reference_is, **more, sampler=case.sampler, guidance=case.guidance,
        dimensions=case.dimensions,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=40_000, help="actions of every case (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error("--samples must be at least 2")
    configure_cpu(1)
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *(sys.argv[1:] if argv is None else argv)])
    for case in CASES:
        print_line(line_of(case, args.samples, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
