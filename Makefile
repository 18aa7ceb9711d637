# Two commands: `make demo` and `make test`. Both need only Python and install everything else.
#
#   make test PYTHON=python3.13    with another interpreter, and the newest jax and flax

SHELL := /bin/bash
.DELETE_ON_ERROR:

# The first working interpreter of version 3.11 or newer; 3.11 first, because constraints.txt pins versions for it.
PYTHON ?= $(shell ./.ci/find_python.sh 3.11)
ifneq (,$(filter python3.%,$(PYTHON)))
# A name such as python3.13 may not be on PATH although the interpreter is installed: search its other locations.
series := $(PYTHON:python%=%)
override PYTHON := $(or $(shell ./.ci/find_python.sh $(series) $(series)),$(PYTHON))
endif
SERIES := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv$(if $(filter 3.11,$(SERIES)),,-$(SERIES))
BIN := $(VENV)/bin
# Exact versions on the oldest Python; the newest that pyproject.toml allows on others.
PINS := $(if $(filter 3.11,$(SERIES)),-c constraints.txt)
# Do not byte-compile on installation: it takes two fifths of the time, and most modules are never imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Fewer page faults: XLA's scratch memory in huge pages, if the C library supports it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Tests simulate devices on the CPU, and the demo is sized for one; JAX_PLATFORMS=cuda make demo uses a GPU.
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

# Processes of the tests would compile all that they import, every time.
unexport PYTHONDONTWRITEBYTECODE

DEMO ?= runs/demo
TESTS ?= tests
# Tests for a second interpreter: of the packages that depend most on jax and flax.
FAST := tests/model tests/objectives tests/generation tests/data_pipelines

.PHONY: demo test drills test-newest newest-installed install-dev fast check lint types contract format constraints clean help

help:
	@echo "make demo   pretrain a tiny mPLUG-2 on images, video and text, and show its predictions (3 to 6 minutes)"
	@echo "make test   lint, types, import contract and tests (8 to 12 minutes)"
	@echo "make drills long tests: whole runs, several processes, commands of the docs (25 to 40 minutes)"

demo: $(VENV)/.installed
	$(BIN)/mplug2 train --config configs/demo.py --workdir $(DEMO)

test: check
	$(BIN)/pytest $(TESTS) -m "not slow" -n 2 --dist loadfile

# The environment of test-newest.
newest-installed:
	@newest="$$(./.ci/find_python.sh 3.13 3.12 3.14)"; [ -z "$$newest" ] || \
	$(MAKE) --no-print-directory install-dev PYTHON="$$newest"

install-dev: $(VENV)/.installed-dev

# Whole runs, killed and resumed runs, the commands of the docs, programs for TPUs. Three workers, because many tests
# wait for processes. Without the type checks of make test, which take a quarter of the time.
drills: $(VENV)/.installed-dev
	CHECK_TYPES=0 $(BIN)/pytest $(TESTS) -m slow -n 3 --dist loadgroup --no-loadscope-reorder -rs

# A fast subset with the newest jax and flax, on an interpreter >= 3.12 if one is installed, with the rounding of x86
# processors without AVX and FMA: no test may depend on the processor.
test-newest:
	@newest="$$(./.ci/find_python.sh 3.13 3.12 3.14)"; if [ -z "$$newest" ]; then echo "no Python >= 3.12 found: skipped"; \
	else CHECK_TYPES=0 XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=SSE4_2" $(MAKE) --no-print-directory fast PYTHON="$$newest"; fi

fast: $(VENV)/.installed-dev
	$(BIN)/pytest $(FAST) -m "not slow" -n 2 --dist loadfile

check: lint types contract

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contract: $(VENV)/.installed-dev
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Update the exact versions, from a fresh environment of the oldest Python.
constraints:
	rm -rf .venv-constraints && $(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet -e '.[dev,tpu,torch]'
	{ sed -n '/^#/p' constraints.txt; .venv-constraints/bin/python -m pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)' | sed 's/+cpu$$//'; } > .constraints.new
	mv .constraints.new constraints.txt && rm -rf .venv-constraints

$(BIN)/python:
	@if [ -z "$(SERIES)" ]; then echo "no Python 3.11 or newer found: install it, or set its path: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) ..."
	$(PIP) $(PINS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) ..."
	$(PIP) $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
