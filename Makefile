# Two commands: `make quickstart` and `make test`. Both make the environment first (CPU torch unless one is there).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CONSTRAINTS ?= --constraint constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint unit constraints clean

quickstart: $(STAMP)
	$(BIN)/crosslift quickstart

test: lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three files at a time: much of a test that starts ranks is one process importing, of one on a cluster waiting.
unit: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 10

# torch goes first: otherwise the resolver may take one with several GB of CUDA packages. deepspeed comes as source and
# builds without its CUDA ops. All else in the versions of constraints.txt: those that the tests last passed with.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $(STAMP)

# Writes constraints.txt anew: the newest versions that pyproject.toml allows. `make test` then tells whether they do.
constraints:
	rm -rf $(VENV)
	$(MAKE) $(STAMP) CONSTRAINTS=
	$(BIN)/pip freeze --exclude-editable --exclude torch > constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
