# Everything runs in a virtual environment of its own; `make quickstart` and `make test` need nothing set up before.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/newest.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-oldest test-newest coverage style quality benchmarks clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Create .venv and install the package with everything that recipes and tests need.

$(INSTALLED): setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] >= (3, 10) else f"Python {v[0]}.{v[1]} is too old: take 3.11 or newer, as in make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[recipes,test]'
	@touch $@

quickstart: install  ## Federated fine-tuning of a real encoder on real text, offline; ARGS='--help' for its options.
	$(BIN)/python recipes/quickstart.py $(ARGS)

test: install  ## Run the tests, a process per core; ARGS='-k name' narrows them, WORKERS=0 keeps to one process.
	$(PYTEST) $(ARGS)

test-slow: install  ## Run the tests that take minutes.
	$(PYTEST) --dist loadgroup -m slow $(ARGS)

test-newest: test  ## Run the tests with the newest versions that setup.py admits: what `make test` does.

test-oldest:  ## Run the tests with the oldest versions that setup.py admits.
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=constraints/oldest.txt

coverage: install  ## Run the tests and fail under 90 % of the package's lines.
	$(PYTEST) --cov=fedex_hf --cov-report=term-missing --cov-fail-under=90 $(ARGS)

style: install  ## Format and mend what can be mended.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: install  ## Check format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmarks: install  ## Measure time, memory, exactness and traffic, side by side with the alternatives.
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	$(BIN)/python benchmarks/memory.py $(ARGS)
	$(BIN)/python benchmarks/aggregate.py $(ARGS)
	$(BIN)/python benchmarks/exactness.py $(ARGS)
	$(BIN)/python benchmarks/storage.py $(ARGS)
	$(BIN)/python benchmarks/aggregation.py $(ARGS)
	$(BIN)/python benchmarks/traffic.py $(ARGS)
	$(BIN)/python benchmarks/parallel_clients.py $(ARGS)
	$(BIN)/python benchmarks/swap.py $(ARGS)
	$(BIN)/python benchmarks/growth.py $(ARGS)
	$(BIN)/python benchmarks/scale.py $(ARGS)

clean:  ## Remove the virtual environments.
	rm -rf .venv .venv-oldest
