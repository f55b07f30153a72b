# make setup | run | check | bench | bench-gpu | experiment | scale    (PYTHON=python3.12 make setup, for another interpreter)
# make test        a few minutes: what a contributor runs
# make test-all    everything but faults; on Python 3.13, too
# make fault-test, make compose-test
PYTHON ?= python3
PYTHON313 ?= $(firstword $(shell for each in python3.13 $$HOME/.pyenv/versions/3.13*/bin/python; do $$each -c 'print("'$$each'")' 2>/dev/null; done))
BIN := .venv/bin
# As many processes as cores; files stay together, since what they share is made once in each process.
PARALLEL ?= --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: setup run test test-all test-313 check fault-test compose-test bench bench-gpu experiment scale clean

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
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow'
	@echo "left out: tests marked slow and Python 3.13 (make test-all), faults (make fault-test), containers (make compose-test)"

test-all: setup .venv-teachers/installed test-313
	$(BIN)/python -m pytest $(PARALLEL)
	@echo "left out: faults (make fault-test), containers (make compose-test)"

# What needs no torch, on the newest numpy and zarr; it reads a store that .venv made with the pinned ones.
TORCH_FREE := $(addprefix tests/,core numerics storage store integrity api)

ifeq ($(PYTHON313),)
test-313:
	@echo "!!!!!!!!!! NOT TESTED on Python 3.13, of which there is none here: give one, make test-313 PYTHON313=... !!!!!!!!!!"
else
test-313: setup .venv-313/installed
	rm -rf .venv-313/finished
	$(BIN)/python -m tests.support.finished $(CURDIR)/.venv-313/finished
	TESTS_FINISHED=$(CURDIR)/.venv-313/finished .venv-313/bin/python -m pytest $(PARALLEL) -m 'not slow' $(TORCH_FREE)
endif

.venv-313/installed: pyproject.toml constraints.txt
	$(PYTHON313) -m venv --clear .venv-313
	grep -vE '^(numpy|zarr)==' constraints.txt > .venv-313/constraints.txt
	.venv-313/bin/pip install --quiet --constraint .venv-313/constraints.txt --editable '.[test]'
	touch $@

# timm and open_clip bring torchvision, which must not be where transformers is tested without it.
.venv-teachers/installed: .venv/installed tests/support/teachers-env.txt tests/support/teachers_env.py tests/support/torchvision_operators.py
	$(BIN)/python -m tests.support.teachers_env
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# Limits, peers and goals in one run; then the tables of README.md and their record. A quarter of an hour at most.
bench: setup .bench-peers/installed
	$(BIN)/python -m tests.benchmarks --json tests/benchmarks/records/cpu.json --readme README.md

# A folder that only the process sees which runs them; what cannot be installed is shown as not measured.
.bench-peers/installed: tests/benchmarks/peers.txt
	rm -rf .bench-peers
	-$(BIN)/pip install --quiet --no-deps --target .bench-peers --requirement tests/benchmarks/peers.txt && touch $@

# All checks and benchmarks of a machine with a CUDA device, in less than eight minutes.
bench-gpu: setup
	$(BIN)/python -m tests.benchmarks.gpu --json tests/benchmarks/records/gpu.json --readme README.md

# The paper's comparison of losses and normalizations, small: ten minutes on two cores.
experiment: setup
	$(BIN)/python -m tests.benchmarks.experiment --json tests/benchmarks/records/experiment.json --readme README.md

# 100,000 dataset shards in memory: what they cost the driver, readers and the service. 4 GB of files there; needs a machine with nothing else to do.
scale: setup
	$(BIN)/python -m tests.benchmarks.scale --json tests/benchmarks/records/scale.json --readme README.md

# The CPU containers for real, from the build to processes that are killed under them. Needs docker with compose.
compose-test: setup
	$(BIN)/python -m tests.compose

# Kills, full disks, clocks that jump, storage that fails, inputs that rot; ends with a table of what was survived.
# As root also what needs a mount; with FAULTS='--faults-readme README.md' the table goes there.
fault-test: setup
	$(BIN)/python -m pytest -o python_files='fault_*.py' tests/faults $(FAULTS)

clean:
	rm -rf .venv .venv-teachers .venv-313 .bench-peers demo
