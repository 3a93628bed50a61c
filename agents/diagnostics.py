"""Edge-of-reach diagnostics: which bootstrapped states no rollout updates, and what the critics make of them.

A rollout of k steps from states of the dataset ends in s_k, whose value is a target but is itself learned only if s_k
also occurs as an input: as a state of the dataset, or as some s_t with t < k of a rollout. States for which that never
happens are edge-of-reach (Sims, Lu, Foerster and Teh, "The Edge-of-Reach Problem in Offline Model-Based Reinforcement
Learning", NeurIPS 2024): errors there are never corrected and spread through the targets. Where an environment has an
exact test for them (`envs.reach`) the labels are exact. Elsewhere they are a proxy of our own: a state is taken for one
if it ends a rollout, of full length or cut short by the dynamics, and lies farther from every input than 99 % of inputs
lie from the others.

Terminal rows are left out throughout: nothing is bootstrapped from their s'.

Everything is drawn by a generator of its own and nothing is changed, so that a run trains the same with and without.
Results stay on the device until all are there.

Shapes: M member, N critic, Q target looked at, R input compared with, S observation, A action, W column of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from agents.networks import StackedMLP
from agents.randomness import generator
from agents.replay import Replay
from agents.rollout import tag_cuts, tag_steps
from agents.squashed import squashed_sample
from envs.dataset import Scaling
from envs.environments import specification
from envs.scores import reference_scores
from envs.transforms import STD_OFFSET

NUM_TARGETS = 2_000  # of every member, in the proportion of its minibatches
NUM_HELD_OUT = 1_000  # inputs that the threshold is taken from
NUM_INPUTS = 50_000  # inputs that are compared with
THRESHOLD = 0.99  # quantile of the held-out inputs' distances
MAX_STEPS = 20  # steps of a rollout whose values are told apart
SLOPE_EVALUATIONS = 5
COLLAPSE_RATIO = 3.0  # mean Q over an expert's value, beyond which a rising Q is called collapsing

_CHUNK = 256  # targets that the critics see at once, as in a usual update
_FORBIDDEN = 1e30  # squared distance of pairs that must not be compared
_FARTHEST = 1e6  # standardised coordinates are cut there, so that squares of exploded predictions stay finite

EdgeTest = Callable[[Tensor, int], Tensor]  # observations (..., S) of the environment, rollout length -> bool (...)


# ---- single measures --------------------------------------------------------------------------------------------


def nearest_distances(queries_QS: Tensor, signs_Q: Tensor, inputs_RS: Tensor, signs_R: Tensor) -> Tensor:
    """Euclidean distance of every query to the nearest input that may belong to another rollout.

    Squared distances come from float32 matrix products: one is off by about 1e-6 of the squared norms of its points.

    Args:
        queries_QS, inputs_RS: states.
        signs_Q, signs_R: -1, 0 or 1, any number type; a query is not compared with inputs of its own sign, unless
            that is 0.

    Returns:
        `(Q,)`; very large for a query that is comparable with none.
    """
    squared_R1 = inputs_RS.square().sum(1, keepdim=True)
    # columns that add `_FORBIDDEN` where both are positive, or both negative, and else exactly nothing
    input_RX = torch.cat((inputs_RS, squared_R1, *(_FORBIDDEN * s for s in _sides(signs_R, inputs_RS))), 1)
    query_QX = torch.cat((-2.0 * queries_QS, torch.ones_like(queries_QS[:, :1]), *_sides(signs_Q, queries_QS)), 1)
    # reduced along the first axis, which on a CPU takes a third of the time of the last; blocks stay in its cache
    size = 512 if queries_QS.device.type == "cpu" else 8_192
    nearest = []
    for query in query_QX.split(size):
        squared, columns = torch.full_like(query[:, 0], math.inf), query.T.contiguous()
        for block in input_RX.split(size):
            torch.minimum(squared, (block @ columns).amin(0), out=squared)
        nearest.append(squared)
    return (torch.cat(nearest) + queries_QS.square().sum(1)).clamp_min_(0.0).sqrt_()


def _sides(signs: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    column = signs.unsqueeze(1)
    return (column > 0).to(like.dtype), (column < 0).to(like.dtype)


def auroc(scores_Q: Tensor, positive_Q: Tensor, negative_Q: Tensor) -> Tensor:
    """Probability that a positive's score is above a negative's, ties counted half (Mann and Whitney's U / (n m)).

    Args:
        scores_Q: finite numbers.
        positive_Q, negative_Q: which ones are compared; the others count for nothing.

    Returns:
        A scalar; not a number where there is no positive or no negative, or a score that is not finite.
    """
    below_all = torch.where(negative_Q, scores_Q, math.inf).sort().values
    lower = torch.searchsorted(below_all, scores_Q.contiguous())
    upto = torch.searchsorted(below_all, scores_Q.contiguous(), right=True)
    wins = torch.where(positive_Q, lower + upto, 0).sum() / 2
    ratio = wins / (positive_Q.sum().double() * negative_Q.sum())
    return torch.where(scores_Q.isfinite().all(), ratio, math.nan)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation along the last axis: Pearson's of the ranks, equal values sharing their mean rank.

    Returns:
        `(...)`; not a number where all values are equal.
    """
    x, y = (rank - rank.mean(-1, keepdim=True) for rank in (_ranks(x), _ranks(y)))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks along the last axis, float64."""
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + upto).double() / 2


@torch.inference_mode()
def ensemble_values(actor: StackedMLP, critics: StackedMLP, obs_MQS: Tensor, noise_MQA: Tensor) -> Tensor:
    """Every critic's value `(M, N, Q)` of states, with actions drawn from the policy.

    Args:
        actor: lead (M,).
        critics: lead (M, N).
        noise_MQA: standard normal draws of the actions.
    """
    values = [
        critics.values(torch.cat((obs, squashed_sample(actor.forward(obs)[0], noise)), -1))
        for obs, noise in zip(obs_MQS.split(_CHUNK, 1), noise_MQA.split(_CHUNK, 1), strict=True)
    ]
    return torch.cat(values, -1)


def expert_value(env_id: str, gamma: float, scaling: Scaling | None = None) -> float | None:
    """Roughly an expert's Q-value: the discounted sum of the expert's mean reward over a whole episode,

        Q* = (R / H) (1 - gamma^H) / (1 - gamma)

    with R the return of the reference pair's expert and H the environment's step limit: the value of a policy with a
    score of 100, which the paper plots its Q-values against.

    Args:
        env_id: of the environment that the data is of.
        scaling: of the dataset's rewards; R / H is scaled and shifted likewise.

    Returns:
        None where there is no reference pair or no step limit, or where the value is not positive: nothing can be
        said to be so many times such a value.
    """
    reference, spec = reference_scores(env_id), specification(env_id)
    if reference is None or spec is None or spec.max_episode_steps is None:
        return None
    scaling = scaling or Scaling()
    reward = scaling.reward_scale * reference.expert / spec.max_episode_steps + scaling.reward_shift
    value = reward * (1.0 - gamma**spec.max_episode_steps) / (1.0 - gamma)
    return value if value > 0 else None


def log10_slope(updates: Sequence[int], means: Sequence[float]) -> float | None:
    """Least-squares slope of log10 of the positive means, per 1,000 updates; None where the last mean is not
    positive, or fewer than two are."""
    points = [(u / 1000.0, math.log10(q)) for u, q in zip(updates, means, strict=True) if q > 0]
    if len(points) < 2 or not means[-1] > 0:
        return None
    x_mean, y_mean = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread


# ---- what is measured of a run ----------------------------------------------------------------------------------


def value_metrics(
    values_NQ: Tensor, tags_Q: Tensor, done_Q: Tensor, beyond_Q: Tensor, edge_Q: Tensor | None, length: int
) -> dict[str, Tensor]:
    """Metrics `reach/*` of one member's targets, scalars on the device; not a number where nothing is to be said.

    Args:
        values_NQ: every critic's value of s'.
        tags_Q: see `agents.rollout`; 0 is a row of the dataset.
        done_Q: whether s' is terminal.
        beyond_Q: whether s' lies beyond the threshold.
        edge_Q: exact labels, or None.
        length: k, steps of a rollout.
    """
    steps_Q, alive_Q = tag_steps(tags_Q), ~done_Q
    ends_Q = (steps_Q == length) | tag_cuts(tags_Q)  # s' from which the rollout does not go on
    last_Q = alive_Q & ends_Q
    exact = edge_Q is not None
    edge_Q = (alive_Q & edge_Q) if edge_Q is not None else last_Q & beyond_Q
    within_Q = alive_Q & ~edge_Q
    min_Q = values_NQ.amin(0)
    penalty_Q, variance_Q = values_NQ.mean(0) - min_Q, values_NQ.var(0, correction=0)
    metrics = {
        "share": _mean(beyond_Q, last_Q),
        "share_control": _mean(beyond_Q, alive_Q & (steps_Q > 0) & ~ends_Q),
        "q_mean": _mean(min_Q, alive_Q),
        "auroc": auroc(penalty_Q, edge_Q, within_Q),
        "auroc_variance": auroc(variance_Q, edge_Q, within_Q),
    }
    if exact:
        metrics["edge_share"] = edge_Q.double().mean()
    for name, group in (("edge", edge_Q), ("within", within_Q)):
        metrics[f"q_{name}"] = _mean(min_Q, group)
        metrics[f"penalty_{name}"] = _mean(penalty_Q, group)
        metrics[f"variance_{name}"] = _mean(variance_Q, group)
    for step in shown_steps(length):
        at_Q = alive_Q & (steps_Q == step)
        metrics[f"q_step_{step:02d}"] = _mean(min_Q, at_Q)
        edge_mean = _mean(min_Q, at_Q & edge_Q)
        metrics[f"q_step_{step:02d}_edge"] = edge_mean
        within_mean = _mean(min_Q, at_Q & within_Q)  # told only where it is not the mean of all
        metrics[f"q_step_{step:02d}_within"] = torch.where(edge_mean.isnan(), math.nan, within_mean)
    return {f"reach/{name}": value for name, value in metrics.items()}


def shown_steps(length: int) -> list[int]:
    """The steps 1 to k, or `MAX_STEPS` of them from the first to the last."""
    if length <= MAX_STEPS:
        return list(range(1, length + 1))
    return [1 + round(i * (length - 1) / (MAX_STEPS - 1)) for i in range(MAX_STEPS)]


def _mean(values_Q: Tensor, chosen_Q: Tensor) -> Tensor:
    """Mean of the chosen values; not a number where there are none."""
    return torch.where(chosen_Q, values_Q, 0).sum(dtype=torch.float64) / chosen_Q.sum()


class Standardiser:
    """Observations as a dataset's mean and standard deviation show them."""

    def __init__(self, observations_NS: Tensor) -> None:
        self.mean = observations_NS.mean(0, dtype=torch.float64).float()
        std = (observations_NS - self.mean).square().mean(0, dtype=torch.float64).sqrt()
        self.std = (std + STD_OFFSET).float()  # a column that hardly moves would decide every distance

    def __call__(self, observations: Tensor) -> Tensor:
        return ((observations - self.mean) / self.std).clamp_(-_FARTHEST, _FARTHEST)


def measure(
    actor: StackedMLP, critics: StackedMLP, replay: Replay, seeds: Sequence[int], epoch: int, real_ratio: float,
    length: int, standardiser: Standardiser, edge_test: EdgeTest | None,
) -> list[dict[str, float]]:  # fmt: skip
    """Metrics `reach/*` of every member, without those that are not defined; empty where there are no model rows.

    Args:
        actor, critics: lead (M,) and (M, N); the critics are those that targets are made of.
        replay: the members' rows.
        seeds: of the members.
        epoch: of the evaluation, counts the draws.
        real_ratio: share of a minibatch's rows that are of the dataset.
        length: k, steps of a rollout.
        standardiser: of the dataset's observations.
        edge_test: the exact test, of observations as the rows have them; None: labels are the proxy.
    """
    if not all(replay.sizes):
        return [{} for _ in seeds]
    num_members, state_dim = len(seeds), actor.sizes[0]
    num_real = round(NUM_TARGETS * real_ratio)
    rows, tags, beyond, noise = [], [], [], []
    for m, seed in enumerate(seeds):
        source = generator(seed, "diagnostics", epoch, device=replay.device)
        numbers = replay.draw_indices(m, 1, num_real, NUM_TARGETS - num_real, source).squeeze(0)
        row_QW, tag_Q = replay.gather_tagged(numbers)
        next_QS = standardiser(row_QW[:, -state_dim:])
        distance_Q, threshold = _distances(replay, m, next_QS, tag_Q, standardiser, source)
        rows.append(row_QW)
        tags.append(tag_Q)
        beyond.append(distance_Q > threshold)
        shape = (NUM_TARGETS, actor.sizes[-1] // 2)
        noise.append(torch.randn(shape, generator=source, device=replay.device))
    rows_MQW = torch.stack(rows)
    next_MQS, done_MQ = rows_MQW[..., -state_dim:], rows_MQW[..., -state_dim - 1] > 0
    values_MNQ = ensemble_values(actor, critics, next_MQS, torch.stack(noise))
    metrics = [
        value_metrics(
            values_MNQ[m], tags[m], done_MQ[m], beyond[m],
            None if edge_test is None else edge_test(next_MQS[m], length), length,
        )
        for m in range(num_members)
    ]  # fmt: skip
    names = list(metrics[0])
    table = _read(torch.stack([torch.stack([one[name].double() for name in names]) for one in metrics]))
    return [{name: x for name, x in zip(names, row, strict=True) if math.isfinite(x)} for row in table]


def _read(table_MX: Tensor) -> list[list[float]]:
    """The only point at which a device is waited for."""
    rows: list[list[float]] = table_MX.tolist()
    return rows


def _distances(
    replay: Replay, member: int, next_QS: Tensor, tag_Q: Tensor, standardiser: Standardiser, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Distances `(Q,)` of standardised next states to the inputs that others have made, and the threshold."""
    total = replay.num_real + replay.sizes[member]
    # every so many-th row from a random one on, in random order: shuffling all numbers would take longer than the rest
    stride = max(1, total // (4 * (NUM_INPUTS + NUM_HELD_OUT)))
    offset = torch.randint(stride, (1,), generator=source, device=replay.device)
    numbers = offset + stride * torch.randperm(total // stride, generator=source, device=replay.device)
    held_out = min(NUM_HELD_OUT, max(1, len(numbers) // 5))
    numbers = numbers[: held_out + NUM_INPUTS]
    row_RW, tag_R = replay.gather_tagged(numbers + (numbers >= replay.num_real) * (member * replay.capacity))
    state_RS, sign_R = standardiser(row_RW[:, : next_QS.shape[1]]), tag_R.sign()
    # a held-out row of the dataset is compared with one half of the rollouts' inputs as well, the first or the second
    sides = torch.arange(held_out, device=replay.device) % 2 * 2 - 1
    held_signs = torch.where(sign_R[:held_out] == 0, sides, sign_R[:held_out])
    queries = torch.cat((state_RS[:held_out], next_QS))
    signs = torch.cat((held_signs, tag_Q.sign().to(held_signs.dtype)))
    distances = nearest_distances(queries, signs, state_RS[held_out:], sign_R[held_out:])
    return distances[held_out:], distances[:held_out].quantile(THRESHOLD)


# ---- over the evaluations of a run ------------------------------------------------------------------------------


def growth_metrics(history: Sequence[tuple[int, float]], expert: float | None) -> dict[str, float]:
    """Metrics `reach/*` of how large a run's mean Q is and how it grows, those that are defined.

    Args:
        history: (updates, mean Q) of the run's evaluations, this one last.
        expert: an expert's value (`expert_value`), if it is known.
    """
    metrics, q = {}, history[-1][1]
    if q > 0:
        metrics["reach/log10_q"] = math.log10(q)
    if expert is not None:
        metrics["reach/q_over_qstar"] = q / expert
    updates, means = zip(*history[-SLOPE_EVALUATIONS:], strict=True)
    slope = log10_slope(updates, means)
    if slope is not None:
        metrics["reach/log10_q_slope"] = slope
    return metrics


def collapse(metrics: Mapping[str, float]) -> float | None:
    """Mean Q over an expert's value, if by these metrics of an evaluation it is beyond `COLLAPSE_RATIO` and rising."""
    ratio = metrics.get("reach/q_over_qstar", 0.0)
    return ratio if ratio > COLLAPSE_RATIO and metrics.get("reach/log10_q_slope", 0.0) > 0 else None
