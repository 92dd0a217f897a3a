# Remora. `make help` lists the targets; each may be run again at any time.
#
# Everything is installed into .venv and nothing outside the checkout is touched. The second
# `make setup` does nothing until pyproject.toml, constraints.txt, setup.py or a kernel changes.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
# For a machine whose pip would fetch torch with CUDA, say where PyTorch's CPU wheels are:
#   make setup TORCH_ARGS='--index-url <the CPU index of PyTorch>'
TORCH_ARGS ?=
# More flags for `remora serve`, `pytest` or a benchmark:  make serve ARGS='--port 8001'
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
ROOMS := kernels comm actors autoscale cluster manifests
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
DEPENDENCIES := $(VENV)/.dependencies
BUILT := $(VENV)/.built
BUILT_SOURCES := $(wildcard kernels/csrc/* comm/csrc/* comm/*.proto)

# Usage reports are off; tests reach no hub. Two OpenMP teams that spin collapse when anything else
# runs on these cores, so their waiting threads sleep.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export RAY_USAGE_STATS_ENABLED := 0
test unit sim: export HF_HUB_OFFLINE := 1
test unit sim: export TOKENIZERS_PARALLELISM := false
test unit sim: export OMP_NUM_THREADS := 2
test unit sim: export OMP_WAIT_POLICY := PASSIVE

# `make test` runs every test. CI has just run `make check`, which holds the tests that need no Ray
# cluster, and passes AFTER_CHECK=1 so that those are not run a second time; neither are the `long`
# ones then, for which CI's 25 minutes have no room.
AFTER_CHECK ?=
# Processes of `make check`, each with whole files of tests. Live tests start a dozen processes each,
# so they run one after the other.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --durations=10

.PHONY: help setup serve test check lint types unit sim clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(BUILT) ## create .venv with everything pinned, build the C++ extensions

serve: setup ## serve the bundled demo model on this machine (ARGS='--port 8001' ...)
	@$(BIN)/remora serve --preset tiny_cpu $(ARGS)

test: setup ## every test, real Ray clusters included
	$(PYTEST) $(if $(AFTER_CHECK),-m "not long" tests/live) $(ARGS)

check: lint types unit sim ## formatting, lint, types, tests without a Ray cluster, simulated histories

unit: setup ## tests without a Ray cluster, but for long ones
	$(PYTEST) -m "not live and not long" -n $(WORKERS) --dist loadfile $(ARGS)

sim: setup ## 2,000 simulated histories of deployments in which things go wrong
	$(BIN)/remora sim --jobs $(WORKERS)

lint: $(DEPENDENCIES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEPENDENCIES) ## mypy --strict, over links that give the rooms their installed names
	@mkdir -p build/typing/remora
	@for room in $(ROOMS); do ln -sfn "$(CURDIR)/$$room" "build/typing/remora/$$room"; done
	$(BIN)/mypy

bench-%: setup ## one benchmark, quick: make bench-parity runs benchmarks/parity.py --quick
	$(BIN)/python benchmarks/$*.py --quick $(ARGS)

clean: ## remove what was built and cached, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f kernels/_C*.so comm/_C*.so comm/*_pb2.py comm/*_pb2.pyi $(BUILT)

# torch goes first and alone: asked for by a dependency, pip may prefer a build of several GB. With it
# the extensions compile, beside pip: the install that follows finds their objects in build/objects.
$(DEPENDENCIES): pyproject.toml constraints.txt
	@test -n "$(TORCH)" || { echo "constraints.txt pins no torch==..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt setuptools
	@$(BIN)/python -c 'import pathlib, tomllib; \
	  project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]; \
	  print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")' \
	  > $(VENV)/requirements.txt
	@mkdir -p build
	$(BIN)/python setup.py -q build_ext -b build/ahead -t build/ahead > build/ahead.log 2>&1 & \
	  $(BIN)/pip install --quiet -c constraints.txt -r $(VENV)/requirements.txt; \
	  wait
	@touch $@

$(BUILT): $(DEPENDENCIES) setup.py $(BUILT_SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	@$(BIN)/python -P -c 'from remora.kernels.native import native_isa; print("kernels:", native_isa())'
	@touch $@
