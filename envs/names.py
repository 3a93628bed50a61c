"""Which environment a name points at."""

import re


def env_id_of(name: str) -> str | None:
    """The Gymnasium id that a dataset name or a file's stem points at; None when it says nothing.

    An id (`Hopper-v5`) is its own answer.
    """
    # Imported here: these modules make datasets, and datasets are named and scored by what this function says.
    from envs import d4rl_sets, neorl_sets, shifts
    from envs.online_sets import online_env
    from envs.recipes import EMBEDDED

    if name in EMBEDDED:
        return EMBEDDED[name].env_id
    if (env_id := online_env(name)) is not None:
        return env_id
    spec = d4rl_sets.d4rl_spec(name) or neorl_sets.neorl_spec(name)
    if spec is not None:
        return spec.env_id
    if re.fullmatch(r"(?:[\w.-]+/)*[A-Z]\w*-v\d+", name) or shifts.parse(name) is not None:
        return name
    return d4rl_sets.env_id_of_file(name)
