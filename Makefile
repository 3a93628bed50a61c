# `make demo` and `make test` make the virtual environment themselves, and update it when pyproject.toml or the
# pinned versions change. Another place: make test VENV=/somewhere/venv. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.offsweep-installed
PACKAGES := orchestrator agents envs sweeps

# Ray starts a process per worker and helpers that never write byte code, so code that is not compiled beforehand
# is compiled anew in each of them, which doubles every start.
COMPILE := env -u PYTHONDONTWRITEBYTECODE $(PY) -m compileall -q -j 0

.PHONY: demo test test-slow bench lint venv

demo: venv
	$(PY) -m orchestrator demo

# two processes: many tests wait for Ray, and each process has a Ray of its own
test: lint
	$(PY) -m pytest -n 2 --dist loadfile

test-slow: venv
	$(PY) -m pytest -m slow

bench: venv
	$(PY) -m benchmarks.run

lint: venv
	$(PY) -m ruff check .
	$(PY) -m mypy

venv: $(STAMP)
	@$(COMPILE) $(PACKAGES)

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("offsweep needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": say make PYTHON=/path/to/python3.11")'
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile -c .ci/constraints.txt -e '.[dev]'
	@# torch and others ship files in the syntax of a later Python, which cannot be compiled and are not used
	@$(COMPILE) $(VENV)/lib > $(VENV)/compile.log 2>&1 || true
	@touch $(STAMP)
