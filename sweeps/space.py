"""Search spaces: which configuration keys a study varies, and over what.

In YAML, keys are the dotted keys of the configuration:

    space:
      method.eta: {type: float, low: 0.1, high: 10.0, log: true}
      method.num_critics: {type: int, low: 2, high: 10}
      method.rollout_length: {type: categorical, choices: [1, 3, 5]}
      method.penalty_coef: {type: float, low: 0.01, high: 10, log: true, when: {method.penalty:
      [max_aleatoric]}}

A parameter with `when` applies only where every parameter named there is active and has one of the listed
values. Such conditional spaces are flattened: the sampler always suggests every parameter and the ones that
do not apply are ignored, so that every sampler models the whole space jointly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sweeps.errors import SpaceError, suggestion

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = None | bool | int | float | str
Params = dict[str, Any]  # configuration key -> Value

_FIELDS: dict[str, tuple[str, ...]] = {
    "float": ("type", "low", "high", "log", "step", "when"),
    "int": ("type", "low", "high", "log", "step", "when"),
    "categorical": ("type", "choices", "when"),
}


@dataclass(frozen=True)
class Parameter:
    """One varied configuration key; bounds are inclusive."""

    key: str
    type: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)  # parameter -> values it must have

    def distribution(self) -> BaseDistribution:
        """The same as an Optuna distribution."""
        from sweeps._optuna import optuna

        if self.type == "categorical":
            return optuna.distributions.CategoricalDistribution(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.type == "int":
            step = 1 if self.step is None else int(self.step)
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def contains(self, value: object) -> bool:
        """Whether `value` can be taken by this parameter (its condition left aside)."""
        if self.type == "categorical":
            return any(_same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.type == "int" and value != int(value):
            return False
        assert self.low is not None
        assert self.high is not None
        if not self.low <= value <= self.high:
            return False
        return self.step is None or _on_grid(value - self.low, self.step)

    def describe(self) -> str:
        """What it ranges over, in words for a message: `0.1 to 10.0`, `one of 1, 3, 5`."""
        if self.type == "categorical":
            return "one of " + ", ".join(map(_show, self.choices))
        grid = "" if self.step is None else f" in steps of {self.step}"
        return f"{'a whole number from ' if self.type == 'int' else ''}{self.low} to {self.high}{grid}"


@dataclass(frozen=True)
class SearchSpace:
    """The parameters of a study in the order of the configuration; may be empty (a study of one trial)."""

    parameters: Mapping[str, Parameter]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SearchSpace:
        """Read the YAML form shown at the top of this file.

        Args:
            config: configuration key -> {type, low, high, log, step | choices, when}.

        Raises:
            SpaceError: unknown type or field, missing or senseless bound, empty choices, a condition that
                names an unknown parameter, a value it cannot have, or itself in a circle.
        """
        if not isinstance(config, Mapping):
            raise SpaceError(f"The search space must map configuration keys to ranges, not be {_show(config)}.")
        parameters = {str(key): _parameter(str(key), entry) for key, entry in config.items()}
        for parameter in parameters.values():
            _check_condition(parameter, parameters)
        _check_no_circle(parameters)
        return cls(parameters)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter, conditional ones included (flattened)."""
        return {key: parameter.distribution() for key, parameter in self.parameters.items()}

    def active(self, params: Mapping[str, Any]) -> Params:
        """Those of `params` that apply at this point, in the order of the space.

        Args:
            params: a value for every parameter of the space.

        Raises:
            SpaceError: a parameter of the space has no value.
        """
        missing = [key for key in self.parameters if key not in params]
        if missing:
            raise SpaceError(f"No value for {', '.join(missing)}; a point needs a value for every parameter.")
        return {key: params[key] for key in self.parameters if self._applies(key, params)}

    def check(self, params: Mapping[str, Any]) -> None:
        """Refuse values that are not of this space; `params` may leave parameters out.

        Raises:
            SpaceError: naming the first unknown parameter or value outside its range.
        """
        for key, value in params.items():
            if key not in self.parameters:
                raise SpaceError(f"'{key}' is not in the search space; {suggestion(key, self.parameters)}.")
            if not self.parameters[key].contains(value):
                raise SpaceError(
                    f"{key} = {_show(value)} is outside the search space, which has "
                    f"{self.parameters[key].describe()}; widen the space or change the value."
                )

    def _applies(self, key: str, params: Mapping[str, Any]) -> bool:
        return all(
            self._applies(parent, params) and any(_same(params[parent], value) for value in values)
            for parent, values in self.parameters[key].when.items()
        )


def _parameter(key: str, entry: object) -> Parameter:
    if not isinstance(entry, Mapping):
        raise SpaceError(f"{key}: expected {{type: ..., ...}}, found {_show(entry)}.")
    kind = entry.get("type")
    if kind is None:
        raise SpaceError(f"{key}: 'type' is missing; give float, int or categorical.")
    if kind not in _FIELDS:
        raise SpaceError(f"{key}: unknown type {_show(kind)}; {suggestion(str(kind), _FIELDS)}.")
    for name in entry:
        if name not in _FIELDS[kind]:
            raise SpaceError(f"{key}: unknown field '{name}' of type {kind}; {suggestion(str(name), _FIELDS[kind])}.")
    when = _condition(key, entry.get("when"))
    if kind == "categorical":
        return Parameter(key, "categorical", choices=_choices(key, entry.get("choices")), when=when)

    whole = kind == "int"
    low = _number(key, "low", entry.get("low"), whole)
    high = _number(key, "high", entry.get("high"), whole)
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{key}: log must be true or false, not {_show(log)}.")
    step = None if entry.get("step") is None else _number(key, "step", entry["step"], whole)
    if low >= high:
        raise SpaceError(f"{key}: low ({low}) must be below high ({high}); a fixed value belongs in the configuration.")
    if log and low <= 0:
        raise SpaceError(f"{key}: a log range needs low > 0, not {low}; raise low or drop log.")
    if step is not None:
        if log:
            raise SpaceError(f"{key}: step and log cannot be combined; drop one of them.")
        if step <= 0 or not _on_grid(high - low, step):
            raise SpaceError(f"{key}: step ({step}) must be positive and divide high - low ({high - low}).")
    return Parameter(key, "int" if whole else "float", low=low, high=high, log=log, step=step, when=when)


def _number(key: str, name: str, value: object, whole: bool) -> float:
    if value is None:
        raise SpaceError(f"{key}: '{name}' is missing.")
    if isinstance(value, str):
        raise SpaceError(
            f"{key}: {name} must be a number, not the text '{value}'; YAML reads a number only unquoted, "
            "and only with a decimal point if it has an exponent (1.0e-4)."
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpaceError(f"{key}: {name} must be a finite number, not {_show(value)}.")
    if whole:
        if value != int(value):
            raise SpaceError(f"{key}: {name} of an int must be a whole number, not {value}; or make it a float.")
        return int(value)
    return float(value)


def _choices(key: str, value: object) -> tuple[Value, ...]:
    if value is None:
        raise SpaceError(f"{key}: 'choices' is missing.")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SpaceError(f"{key}: choices must be a list, not {_show(value)}.")
    if not value:
        raise SpaceError(f"{key}: choices is empty; list at least one value.")
    for choice in value:
        # What the study's journal can write and read back as the same value.
        if not (choice is None or isinstance(choice, bool | int | float | str)):
            raise SpaceError(
                f"{key}: the choice {_show(choice)} is not a number, text, true, false or null; "
                "give it a name that the configuration understands."
            )
    for number, choice in enumerate(value):
        # Optuna looks a choice up by ==, under which 1, 1.0 and true are one.
        if any(choice == other for other in value[:number]):
            raise SpaceError(f"{key}: the choice {_show(choice)} is listed twice (1, 1.0 and true count as one).")
    return tuple(value)


def _condition(key: str, value: object) -> dict[str, tuple[Value, ...]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SpaceError(f"{key}: when must map parameters to the values they must have, not be {_show(value)}.")
    condition: dict[str, tuple[Value, ...]] = {}
    for parent, values in value.items():
        listed = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
        if not listed:
            raise SpaceError(f"{key}: when.{parent} lists no value, so the parameter would never apply.")
        condition[str(parent)] = listed
    return condition


def _check_condition(parameter: Parameter, parameters: Mapping[str, Parameter]) -> None:
    for parent, values in parameter.when.items():
        if parent not in parameters:
            raise SpaceError(
                f"{parameter.key}: when refers to '{parent}', which the space does not vary; "
                f"{suggestion(parent, parameters)}."
            )
        if parameters[parent].type == "float":
            raise SpaceError(f"{parameter.key}: when refers to {parent}, a float; use an int or a categorical.")
        for value in values:
            if not parameters[parent].contains(value):
                raise SpaceError(
                    f"{parameter.key}: when asks for {parent} = {_show(value)}, but {parent} is "
                    f"{parameters[parent].describe()}."
                )


def _check_no_circle(parameters: Mapping[str, Parameter]) -> None:
    def visit(key: str, path: tuple[str, ...]) -> None:
        if key in path:
            circle = " -> ".join((*path[path.index(key) :], key))
            raise SpaceError(f"{key}: its when leads back to itself ({circle}); remove one of these conditions.")
        for parent in parameters[key].when:
            visit(parent, (*path, key))

    for key in parameters:
        visit(key, ())


def _same(left: object, right: object) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _on_grid(distance: float, step: float) -> bool:
    steps = distance / step
    return math.isclose(steps, round(steps), rel_tol=0.0, abs_tol=1e-8)


def _show(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
