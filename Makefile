# make setup   the environment in .venv, with a Python that is found by itself
# make train   trains; ARGS="model=... topology=..." are passed on
# make test    the tests that prove it; make slow: those that take longer; make soak: more of the same
# make lint    style and types

VENV   ?= .venv
PYTHON ?=
ARGS   ?=
PYTEST_ARGS ?=
# Three workers on two cores, a file of tests to one of them: many tests wait for ranks and commands that they started.
# Which files come first says tests/conftest.py.
WORKERS ?= 3
IN_PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Called by absolute path, so that no activated environment of another project comes in between.
BIN    := $(abspath $(VENV))/bin
STAMP  := $(VENV)/.megaplug-installed

.DEFAULT_GOAL := help
.PHONY: help setup train plan test slow soak lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST)) | head -4

setup: $(STAMP)

# The stamp is written last: an installation that was broken off is begun again.
$(STAMP): pyproject.toml .ci/make-venv
	@.ci/make-venv "$(VENV)" "$(PYTHON)"
	@touch $@

train: setup
	@$(BIN)/python launch/train.py $(ARGS)

plan: setup
	@$(BIN)/python launch/plan.py $(ARGS)

test: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow and not soak" $(PYTEST_ARGS)

slow: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "slow and not soak" $(PYTEST_ARGS)

soak: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) -m soak $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs are never removed here: they hold checkpoints.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
