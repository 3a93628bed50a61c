"""What a dataset name may ask for beyond a source: slices, mixes, rewards and observations in other units.

    hopper-medium-v2,first=100000                          the first 100,000 transitions of the file
    hopper-medium-v2,subsample=0.1,seed=3                  whole trajectories drawn at random, a tenth of the rows
    hopper-random-v2:0.5+hopper-expert-v2:0.5              half of the rows of each, one after the other
    hopper-random-v2:200000+hopper-expert-v2:0.1           a number of rows above 1, else a share of the set's own rows
    walker2d-medium-v2,normalize=observations,reward_scale=0.1,reward_shift=-1
    walker2d-medium-v2,next_observations=following-row     as d4rl.qlearning_dataset makes them

`a+b` without shares is the whole of both, as D4RL's medium-expert sets are made. A share below all of a set is drawn
as `subsample` does. Options hold for the whole and are applied in this order: next_observations (of each source),
first, subsample, reward, normalize. The result has a content hash of its own; what was asked for and the hashes of its
parts are in its provenance.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.dataset import COLUMNS, Dataset
from envs.errors import UserError, nearest

# Added to the standard deviation, as in TD3+BC's code (Fujimoto & Gu 2021, section 5 and `normalize_states`).
STD_OFFSET = 1e-3
RETURN_RANGE = "return-range"
FOLLOWING_ROW = "following-row"


class TransformError(UserError):
    """A dataset name asks for something that does not exist or does not fit the data."""


@dataclass(frozen=True)
class Term:
    """One source of a mix."""

    name: str
    amount: float | None = None  # None: all rows; up to 1: a share of them; above: a number

    def __str__(self) -> str:
        return self.name if self.amount is None else f"{self.name}:{_spelled(self.amount)}"


@dataclass(frozen=True)
class Options:
    """What is done with the rows, in the order in which it is done."""

    # None: the true ones. FOLLOWING_ROW: after a terminal the first observation of the next episode, as
    # `d4rl.qlearning_dataset` has it, and the released RAVL with it; rows at a time limit are left out
    next_observations: str | None = None
    first: int | None = None  # transitions
    subsample: float | None = None  # a share, or a number of transitions, in whole trajectories
    seed: int = 0  # of the trajectories that are drawn
    reward_scale: float | str = 1.0  # r -> scale * r + shift; RETURN_RANGE: 1000 / (best - worst return), as IQL does
    reward_shift: float = 0.0
    normalize: str | None = None  # "observations": zero mean, unit standard deviation

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return "".join(f",{key}={_spelled(value)}" for key, value in given)


@dataclass(frozen=True)
class Request:
    """A dataset name, taken apart. `str` gives the name back in its one canonical spelling."""

    terms: tuple[Term, ...]
    options: Options

    def __str__(self) -> str:
        return "+".join(map(str, self.terms)) + str(self.options)

    @property
    def plain(self) -> bool:
        """Whether one source is asked for, as it is."""
        return len(self.terms) == 1 and self.terms[0].amount is None and self.options == Options()


def parse(name: str) -> Request:
    """Take a dataset name apart. A name that is the path of a file is that file, whatever characters it holds.

    Raises:
        TransformError: an option does not exist (with the nearest one) or has an impossible value.
    """
    if Path(name).expanduser().is_file():
        return Request((Term(name),), Options())
    sources, *words = name.split(",")
    terms = tuple(_term(part, name) for part in sources.split("+"))
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.strip().partition("=")
        if key not in _OPTIONS or not equals:
            raise TransformError(
                f"dataset '{name}': '{word}' is no option{nearest(key, _OPTIONS, 1)}; known are"
                f" {', '.join(f'{k}=...' for k in _OPTIONS)}."
            )
        if key in values:
            raise TransformError(f"dataset '{name}': option {key} is given twice.")
        try:
            values[key] = _OPTIONS[key](value)
        except ValueError as error:
            raise TransformError(f"dataset '{name}': {word} is not possible: {error}.") from None
    if "seed" in values and "subsample" not in values and all(_whole(term) for term in terms):
        raise TransformError(f"dataset '{name}': seed has no effect without subsample or a share of a set.")
    return Request(terms, Options(**values))


def base_name(name: str) -> str:
    """The source that a name of one source asks for, else the name: what per-dataset settings are looked up by."""
    request = parse(name)
    return request.terms[0].name if len(request.terms) == 1 else name


def check_one_environment(request: Request, env_ids: Collection[str]) -> None:
    """Refuse a mix of different environments.

    Raises:
        TransformError: there are several ids.
    """
    if len(env_ids) > 1:
        raise TransformError(
            f"dataset '{request}' mixes the environments {', '.join(sorted(env_ids))}: only sets of one environment"
            " can be mixed."
        )


def apply(request: Request, parts: Sequence[Dataset]) -> Dataset:
    """The dataset that a request asks for.

    Args:
        parts: one for every term.

    Raises:
        TransformError: parts of different environments, more rows than there are, or nothing left.
    """
    check_one_environment(request, {part.env_id for part in parts})
    options = request.options
    sources = [_following_rows(part) for part in parts] if options.next_observations else parts
    taken = [
        _amount(part, term, options.seed + i) for i, (part, term) in enumerate(zip(sources, request.terms, strict=True))
    ]
    data = taken[0] if len(taken) == 1 else _concatenate(taken)
    if options.first is not None:
        data = _first(data, options.first)
    if options.subsample is not None:
        data = _subsample(data, _rows(data, options.subsample, "subsample"), options.seed)
    if (options.reward_scale, options.reward_shift) != (1.0, 0.0):
        data = _transform_rewards(data, options.reward_scale, options.reward_shift)
    if options.normalize:
        data = _normalize_observations(data)
    provenance: dict[str, Any] = {
        "source": "derived",
        "request": str(request),
        "parts": [
            {"name": part.name, "content_hash": part.content_hash, "rows_taken": some.num_transitions,
             "provenance": dict(part.provenance)}
            for part, some in zip(parts, taken, strict=True)
        ],
    }  # fmt: skip
    without = [part.name for part in parts if part.states is None]
    if without and len(without) < len(parts):
        provenance["states"] = f"left out: there are none of {', '.join(without)}"
    return replace(data, name=str(request), provenance=provenance)


# ---- names ------------------------------------------------------------------------------------------------------


def _spelled(value: float | str) -> str:
    """The shortest text that is read back as this very value: what a result is stored under."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _term(text: str, name: str) -> Term:
    source, colon, amount = text.strip().partition(":")
    if not source:
        raise TransformError(
            f"dataset '{name}' names no source; an example is 'hopper-random-v2:0.5+hopper-expert-v2:0.5'."
        )
    try:
        return Term(source, _amount_value(amount) if colon else None)
    except ValueError as error:
        raise TransformError(f"dataset '{name}': the amount '{amount}' of {source} is not possible: {error}.") from None


def _amount_value(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf") or (value > 1 and value != int(value)):
        raise ValueError("it must be a share of at most 1, or a whole number of rows")
    return value


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError("it must be at least 1")
    return int(text)


def _seed(text: str) -> int:
    if int(text) < 0:
        raise ValueError("it must not be negative")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError("it must be finite")
    return value


def _scale(text: str) -> float | str:
    if text == RETURN_RANGE:
        return text
    try:
        value = _finite(text)
    except ValueError:
        raise ValueError(f"it must be a number or {RETURN_RANGE}") from None
    if value == 0:
        raise ValueError("it must not be 0")
    return value


def _normalize(text: str) -> str:
    if text != "observations":
        raise ValueError("only observations can be normalized")
    return text


def _next_observations(text: str) -> str:
    if text != FOLLOWING_ROW:
        raise ValueError(f"it can only be {FOLLOWING_ROW}")
    return text


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "next_observations": _next_observations,
    "first": _count, "subsample": _amount_value, "seed": _seed, "reward_scale": _scale, "reward_shift": _finite,
    "normalize": _normalize,
}  # fmt: skip


def _whole(term: Term) -> bool:
    return term.amount is None or term.amount == 1


# ---- rows -------------------------------------------------------------------------------------------------------


def _amount(part: Dataset, term: Term, seed: int) -> Dataset:
    if _whole(term):
        return part
    assert term.amount is not None
    return _subsample(part, _rows(part, term.amount, term.name), seed)


def _rows(data: Dataset, amount: float, what: str) -> int:
    """A share, or a number, as a number of rows."""
    count = round(amount * data.num_transitions) if amount <= 1 else int(amount)
    if not 1 <= count <= data.num_transitions:
        raise TransformError(f"{what}: {count:,} rows are asked for, '{data.name}' has {data.num_transitions:,}.")
    return count


def _take(data: Dataset, index: NDArray[np.int64] | slice, cut: NDArray[np.int64] | Sequence[int]) -> Dataset:
    """Some rows in order; `cut` are those (of the result) at which an episode is left before its end."""
    columns = {column: getattr(data, column)[index] for column in COLUMNS}
    timeouts = columns["timeouts"].copy()
    timeouts[cut] |= ~columns["terminals"][cut]
    states = None if data.states is None else data.states[index]
    return replace(data, **(columns | {"timeouts": timeouts}), states=states)


def _following_rows(data: Dataset) -> Dataset:
    """What `d4rl.qlearning_dataset` makes of a file (Farama-Foundation/D4RL 1.1, d4rl/__init__.py, terminate_on_end
    False): without the rows at a time limit and the last one, each next observation that of the row behind it."""
    kept = np.flatnonzero(~data.timeouts[:-1])
    if not len(kept):
        raise TransformError(f"next_observations={FOLLOWING_ROW}: '{data.name}' has no row that another one follows.")
    left = np.append(np.flatnonzero(np.diff(kept) > 1), len(kept) - 1)  # the rest of the episode is not there
    return replace(_take(data, kept, left), next_observations=data.observations[kept + 1])


def _first(data: Dataset, count: int) -> Dataset:
    if count > data.num_transitions:
        raise TransformError(f"first={count}: '{data.name}' has only {data.num_transitions:,} rows.")
    return _take(data, slice(count), [-1])


def _subsample(data: Dataset, count: int, seed: int) -> Dataset:
    """Whole trajectories drawn at random until they have `count` rows, in file order; the last one drawn is cut."""
    episodes = data.episodes
    order = np.random.default_rng(seed).permutation(len(episodes))
    total = np.cumsum(episodes.lengths[order])
    drawn = int(np.searchsorted(total, count)) + 1
    lengths = episodes.lengths.copy()
    lengths[order[drawn - 1]] -= total[drawn - 1] - count
    chosen = np.sort(order[:drawn])
    index = np.concatenate([np.arange(episodes.starts[e], episodes.starts[e] + lengths[e]) for e in chosen])
    return _take(data, index, np.cumsum(lengths[chosen]) - 1)


def _concatenate(parts: Sequence[Dataset]) -> Dataset:
    ended = [_take(part, slice(None), [-1]) for part in parts]  # an episode does not go on in the next part
    columns: dict[str, Any] = {c: np.concatenate([getattr(part, c) for part in ended]) for c in COLUMNS}
    states = [part.states for part in ended if part.states is not None]
    return replace(ended[0], **columns, states=np.concatenate(states) if len(states) == len(ended) else None)


def _transform_rewards(data: Dataset, scale: float | str, shift: float) -> Dataset:
    if isinstance(scale, str):
        returns = data.episode_returns()
        if len(returns) < 2 or returns.max() == returns.min():
            raise TransformError(
                f"reward_scale={RETURN_RANGE}: '{data.name}' has no two complete episodes of different returns; give"
                " a number."
            )
        scale = float(1000.0 / (returns.max() - returns.min()))
    before = data.scaling
    scaling = replace(
        before, reward_scale=before.reward_scale * scale, reward_shift=before.reward_shift * scale + shift
    )
    return replace(data, rewards=(data.rewards * scale + shift).astype(np.float32), scaling=scaling)


def _normalize_observations(data: Dataset) -> Dataset:
    mean = data.observations.mean(axis=0, dtype=np.float64)
    std = data.observations.std(axis=0, dtype=np.float64) + STD_OFFSET
    scaling = replace(data.scaling, observation_mean=mean.astype(np.float32), observation_std=std.astype(np.float32))
    observations, next_observations = (
        ((values - mean) / std).astype(np.float32) for values in (data.observations, data.next_observations)
    )
    return replace(data, observations=observations, next_observations=next_observations, scaling=scaling)
