# Every target does all of its own set-up, on a fresh machine too: a virtual environment, pinned packages, the build.
# Needs make, a C++17 compiler and Python >= 3.10; uses nvcc where there is one, and no GPU.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
OUT ?= gpu-results

IN_VENV := $(VENV)/bin/python
# Pins what is installed and, under build isolation, what it is built with; pip renamed the second in version 25.3.
PINNED_PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(IN_VENV) -m pip

# What a build depends on, by content: an edit there reinstalls, anything else (also `git checkout`) does not. The package's
# Python files are missing because the install is editable: tests, benchmarks and `python -m` then all see the source tree
# with the engines built into it, whichever directory is first on sys.path.
SOURCES := setup.py pyproject.toml constraints.txt $(sort $(wildcard csrc/*/*))
SETTINGS := CUDA=$(BGPO_KERNELS_CUDA) ARCHS=$(BGPO_KERNELS_ARCHS) CUDA_HOME=$(CUDA_HOME) CXX=$(CXX)
KEY := $(shell { cat $(SOURCES); command -v nvcc; echo '$(SETTINGS)'; } 2>/dev/null | cksum | tr -cd 0-9)
INSTALLED := $(VENV)/installed-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help memory-vs-mc gpu-suite test bench lint format install clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo
	@echo "variables: PYTHON=python3.12  VENV=.venv  ARGS='--help' (memory-vs-mc, gpu-suite)  OUT=DIR (gpu-suite)"
	@echo "           PYTEST_ARGS='-k masks' (test, bench)"
	@echo "           BGPO_KERNELS_CUDA=0|1|auto  BGPO_KERNELS_ARCHS='90a'"
	@echo "torch without its CUDA packages: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test"

memory-vs-mc: $(INSTALLED) ## the main job: memory and time of a policy update against n_mc
	$(IN_VENV) benchmarks/memory_vs_mc.py $(ARGS)

gpu-suite: $(INSTALLED) ## all that needs a GPU, verified and measured in under ten minutes, into OUT
	$(IN_VENV) benchmarks/gpu_suite.py --out $(OUT) $(ARGS)

test: $(INSTALLED) ## the tests
	$(IN_VENV) -m pytest $(PYTEST_ARGS)

bench: $(INSTALLED) ## the speed figures and their targets
	$(IN_VENV) -m pytest $(wildcard benchmarks/bench_*.py) $(PYTEST_ARGS)

lint: $(VENV)/bin/ruff ## ruff, its formatter and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/bin/ruff ## apply ruff's fixes and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

install: $(INSTALLED) ## only the set-up
	@$(IN_VENV) -m bgpo_kernels.info

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build bgpo_kernels.egg-info bgpo_kernels/_cpu.*.so bgpo_kernels/_cuda.*.so

$(IN_VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bgpo_kernels needs Python >= 3.10: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Engines of an earlier build go first, so that one which is no longer built is no longer there.
$(INSTALLED): | $(IN_VENV)
	rm -f $(VENV)/installed-* bgpo_kernels/_cpu.*.so bgpo_kernels/_cuda.*.so
	$(PINNED_PIP) install --editable ".[test]"
	@touch $@

$(VENV)/bin/ruff: $(INSTALLED)
	$(PINNED_PIP) install --quiet ruff mypy
	@touch $@
