# make setup | run | test | check | bench | compose-test    (PYTHON=python3.12 make setup, for another interpreter)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test check bench compose-test clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job on its embedded default, no GPU, no downloads; then the service of its store, until Ctrl-C.
run: setup
	$(BIN)/python -m workers.demo demo/photos
	$(BIN)/statsvc run docker/plans/demo.yaml
	$(BIN)/statsvc serve --store demo/store

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.benchmarks

# The CPU containers for real, from the build to processes that are killed under them. Needs docker with compose.
compose-test: setup
	$(BIN)/python -m tests.compose

clean:
	rm -rf .venv demo
