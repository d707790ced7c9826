# Each target makes what it needs, the environment included (.venv; PYTHON=python3.12 chooses the interpreter).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-gpu train warm sweep eval generate bench lint format clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXP ?= quickstart
ARGS ?=
INSTALLED := $(VENV)/.installed

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo '  ARGS="KEY=VALUE ..." is passed on to quickstart, train, warm, sweep, eval, generate and bench; to pytest in test and test-gpu'

quickstart: $(INSTALLED) ## train the default task on the CPU, in minutes; resumes it if it was stopped
	$(BIN)/python -m grpo.train $$($(BIN)/python scripts/next_run.py $(ARGS)) $(ARGS)

test: $(INSTALLED) ## all quick tests that need no GPU, on all cores; those that ARGS name, slow ones too
	$(BIN)/python -m pytest $(if $(strip $(ARGS)),-m "not gpu" $(ARGS),-m "not gpu and not slow" -n auto --dist loadfile)

test-slow: $(INSTALLED) ## the slow tests that need no GPU: refused memory, streamed experts, rehearsals, audits of tasks
	$(BIN)/python -m pytest -m "slow and not gpu" $(if $(strip $(ARGS)),$(ARGS),-n auto --dist loadfile)

test-gpu: $(INSTALLED) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

train: $(INSTALLED) ## an experiment: make train EXP=gpt_oss_20b_lora ARGS="model.path=FOLDER"
	$(BIN)/python -m grpo.train +experiment=$(EXP) $(ARGS)

warm: EXP = gpt_oss_20b_lora
warm: $(INSTALLED) ## compile a run's kernels beforehand: make warm EXP=gpt_oss_20b_lora GPU=H100 (without GPU: the one here)
	$(BIN)/python -m grpo.warm $(if $(GPU),gpu=$(GPU)) $(if $(findstring +experiment=,$(ARGS)),,+experiment=$(EXP)) $(ARGS)

sweep: EXP = quickstart_sweep
sweep: $(INSTALLED) ## a sweep: make sweep EXP=quickstart_sweep
	$(BIN)/python -m grpo.train --multirun +experiment=$(EXP) $(ARGS)

eval: $(INSTALLED) ## accuracy of a run: make eval RUN=runs/NAME
	@test -n "$(RUN)" || { echo "which run? make eval RUN=runs/NAME" >&2; exit 2; }
	$(BIN)/python -m grpo.evaluate run="$(RUN)" $(ARGS)

generate: $(INSTALLED) ## chat with a run: make generate RUN=runs/NAME
	@test -n "$(RUN)" || { echo "which run? make generate RUN=runs/NAME" >&2; exit 2; }
	$(BIN)/python -m grpo.generate run="$(RUN)" $(ARGS)

bench: $(INSTALLED) ## every kernel on this GPU: make bench ARGS="--only attention,head"
	$(BIN)/python scripts/bench_kernels.py $(ARGS)

lint: $(INSTALLED) ## ruff's checks
	$(BIN)/ruff check .

format: $(INSTALLED) ## ruff's formatting, in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# The stamp makes the second call instant; a changed pyproject.toml or constraints.txt installs again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or later is needed; name one with PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
