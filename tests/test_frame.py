"""The frame that all folders stand in: which way imports point, and what an installation must bring."""

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "agents", "envs", "sweeps")

# envs <- agents <- orchestrator -> sweeps. A name with a dot allows that module only.
MAY_IMPORT = {
    "envs": {"envs"},
    "agents": {"envs", "agents"},
    "sweeps": {"sweeps", "envs.errors"},
    "orchestrator": set(PACKAGES),
}
# A method can be used in a notebook, and a study tested with made-up results, without any of these.
MUST_NOT_IMPORT = {
    "envs": {"ray", "mlflow", "optuna"},
    "agents": {"ray", "mlflow", "optuna"},
    "sweeps": {"ray", "mlflow", "torch"},
    "orchestrator": set(),
}
MAY_ALL_THE_SAME = {"sweeps/gp_model.py": {"torch"}}  # imported with the sampler that needs BoTorch, an extra


def imports(file: Path, root: Path) -> Iterator[str]:
    """Absolute name of everything that a file imports, anywhere in it; `from a import b` gives a.b."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def wrong_imports(root: Path) -> list[str]:
    return [
        f"{file.relative_to(root)} imports {name}"
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
        for name in imports(file, root)
        if is_within(name, MUST_NOT_IMPORT[package] - MAY_ALL_THE_SAME.get(str(file.relative_to(root)), set()))
        or (is_within(name, set(PACKAGES)) and not is_within(name, MAY_IMPORT[package]))
    ]


def test_imports_point_one_way():
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("envs/a.py", "import agents.sac"),
        ("envs/a.py", "def f():\n    from ray import remote"),
        ("agents/a.py", "from orchestrator import cli"),
        ("agents/sub/a.py", "from ...sweeps import study"),
        ("sweeps/a.py", "from envs import dataset"),
        ("sweeps/a.py", "import envs"),
        ("sweeps/a.py", "import mlflow.data"),
        ("sweeps/a.py", "import torch"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sweeps/a.py", "from envs.errors import UserError\nimport optuna"),
        ("agents/a.py", "from envs.dataset import Dataset\nfrom . import sac"),
        ("orchestrator/a.py", "import ray, mlflow\nfrom sweeps.study import Study\nimport agents"),
    ],
)
def test_a_right_import_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    assert wrong_imports(tmp_path) == []


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def test_everything_imported_is_a_declared_dependency():
    """Otherwise an installation works only as long as some other dependency happens to bring it."""
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    declared |= {"mujoco"}  # by gymnasium[mujoco]
    optional = {"botorch", "d4rl", "gpytorch", "linear_operator", "minari"}
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        f"{file.relative_to(ROOT)} imports {top}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for top in {name.partition(".")[0] for name in imports(file, ROOT)}
        if top not in sys.stdlib_module_names
        and top not in PACKAGES
        and top not in optional
        and not {canonicalize_name(name) for name in providers.get(top, [top])} & declared
    }
    assert not undeclared


def test_the_pinned_versions_are_within_the_declared_bounds():
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }
    for requirement in requirements():
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_for_their_users(package):
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()
