# `make test` and `make demo` do all the set-up they need: .venv, the package, off-screen OpenGL.
# Needed beforehand: Python >= 3.11 with venv, git, make.

VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/sh
ARGS ?=
MODELS ?= metaworld nano panda pusht

.DEFAULT_GOAL := help
.PHONY: help demo models test lint format types clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(VENV)/.installed ## plan a reach with the shipped model: video, plot and verdict in runs/
	@scripts/setup_gl.sh $(BIN)/python
	@out=runs/demo; n=1; while [ -e $$out ]; do n=$$((n + 1)); out=runs/demo-$$n; done; \
	set -x; $(BIN)/emu-embodied plan --env PandaReach-v0 --checkpoint nano --seed 2 --out $$out

models: $(VENV)/.installed ## make the shipped checkpoints from nothing, in runs/models (hours); MODELS=nano for some
	@scripts/setup_gl.sh $(BIN)/python
	scripts/models.sh $(BIN) $(MODELS)

test: $(VENV)/.installed-dev ## run all tests, two at a time; ARGS=tests/data for some
	@scripts/setup_gl.sh $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## mypy over the package and its outer rooms
	scripts/typecheck.sh $(BIN)/mypy

clean: ## remove the environment, caches and builds (keeps runs/)
	rm -rf $(VENV) .typecheck .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

$(VENV)/.installed: pyproject.toml scripts/install.sh
	scripts/install.sh $(VENV) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml scripts/install.sh
	scripts/install.sh $(VENV) '.[dev]'
	@touch $(VENV)/.installed $@
