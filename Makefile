# Every target sets up what it needs: a virtual environment in .venv, PostgREST and supabase-js in node_modules. No root.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
# Files side by side, the tests of a file one after the other.
PARALLEL := --numprocesses auto --dist loadfile
# What must hold on every version of Postgres.
SQL_TESTS := $(addprefix tests/test_,$(addsuffix .py,session_rules convergence state_machine concurrency security \
  advisor life_of_data optional_sql apply_summary))

.PHONY: help setup demo test test-versions test-long chaos chaos-short chaos-stops lint format bench lock clean

help:  ## What there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/installed node_modules/.package-lock.json  ## The virtual environment and PostgREST

.venv/installed: requirements.lock pyproject.toml
	@echo "setting up .venv, which takes half a minute"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

node_modules/.package-lock.json: package.json package-lock.json
	npm ci --silent --include=dev

demo: setup  ## The main job from beginning to end, on real servers
	$(BIN)/python -m worker.demo

test: setup  ## All tests, on real servers: a stack for each core
	$(BIN)/python -m pytest $(PARALLEL)

test-versions: setup  ## The SQL's tests on Postgres 16, and on 15 where Debian's is installed
	INTERVIEW_TEST_POSTGRES=16 $(BIN)/python -m pytest $(PARALLEL) $(SQL_TESTS)
	test ! -d /usr/lib/postgresql/15/bin || INTERVIEW_TEST_POSTGRES=15 $(BIN)/python -m pytest $(PARALLEL) $(SQL_TESTS)

test-long: setup  ## The property tests, races and packs, ten times and more as long
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_convergence.py tests/test_state_machine.py \
	  tests/test_concurrency.py

chaos: setup  ## Faults under load, 200 kills among them, and what they cost
	$(BIN)/python -m tests.chaos

chaos-short: setup  ## Each fault at least once, in a minute or two
	$(BIN)/python -m tests.chaos --kills 10 --faults 20

chaos-stops: setup  ## 120 SIGTERMs under load, and 20 worker starts in one outage
	$(BIN)/python -m tests.chaos.stops

lint: setup  ## ruff, mypy --strict, and the imports' direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup  ## Let ruff lay out the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## Our worker beside naive tasks, in twenty minutes; with AGAINST=REV beside another commit
	$(BIN)/python -m tests.bench $(if $(AGAINST),--against '$(AGAINST)',--chart tests/bench/chart.svg)

lock: setup  ## Pin the newest versions that pyproject.toml allows, by name, version and hash
	$(BIN)/pip-compile --quiet --upgrade --extra worker --extra otel --extra embedded --extra dev --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --no-annotate \
	  --allow-unsafe --strip-extras -o requirements.lock pyproject.toml

clean:  ## Remove what the other targets made
	for folder in .bench/*/; do test ! -d "$$folder" || git worktree remove --force "$$folder"; done
	rm -rf .bench .venv node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
