# make setup | run | test | check | bench            (PYTHON=python3.12 make setup, for another interpreter)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test check bench clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job on its embedded default: no GPU, no downloads.
run: setup
	$(BIN)/python -m workers.demo demo/photos
	$(BIN)/statsvc run docker/plans/demo.yaml

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv demo
