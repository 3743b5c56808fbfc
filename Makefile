# Every target sets itself up: it makes .venv with the versions in constraints.txt, and installs again when they change.
#   make quickstart   the whole InstructGPT loop on this machine, minutes on a laptop
#   make test         lint, then the tests;  PYTEST_ARGS="tests/config -k yaml" picks some,  WORKERS=2 runs them in parallel
#   make lint | bench | clean
PYTHON ?= python3
WORKERS ?= 0
PYTEST_ARGS ?=
OUT ?= runs/quickstart
# On Linux plain `torch` is the CUDA build, several GB; docs/quickstart.md has the line for the CPU build. That adds an
# index and replaces none: torch's own dependencies still come from PyPI in the versions of constraints.txt.
TORCH ?= torch

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := constraints.txt pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test lint bench clean
.DELETE_ON_ERROR:

quickstart: $(INSTALLED)
	$(BIN)/fastrlhf quickstart --out "$(OUT)"

# One thread a process: the tests start several processes, and threads would fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastrlhf

bench: $(INSTALLED)
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist fastrlhf.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f fastrlhf/_C_*.so
	find bench fastrlhf kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.10-3.12, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "make: fastrlhf needs Python 3.10-3.12, and $(PYTHON) is $$($(PYTHON) -V 2>&1); say make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# torch goes in first and alone, so that nothing else can pull another build of it; without build isolation, for the
# extensions in csrc are compiled against this very torch.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	@$(BIN)/python -c '$(SUPPORTED)' || { echo "make: $(VENV) holds $$($(BIN)/python -V 2>&1), and fastrlhf needs Python 3.10-3.12; make clean, then make PYTHON=python3.11" >&2; exit 1; }
	$(PIP) setuptools ninja numpy
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@
