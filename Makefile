# Main targets: `make quickstart` and `make test`. Both create the environment first (CPU torch unless it is installed).
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

# Four test files at a time: tests that start ranks mostly import, tests of a Slurm cluster mostly wait.
unit: $(STAMP)
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 10

# torch is installed first: otherwise the resolver may choose a build with several GB of CUDA packages. deepspeed comes as
# source and is built without its CUDA ops. Everything else has the versions of constraints.txt, which the tests last
# passed with.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $(STAMP)

# Rewrites constraints.txt with the newest versions that pyproject.toml allows; run `make test` afterwards.
constraints:
	rm -rf $(VENV)
	$(MAKE) $(STAMP) CONSTRAINTS=
	$(BIN)/pip freeze --exclude-editable --exclude torch > constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
