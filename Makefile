# `make` lists the targets. Each target first makes what it needs: .venv, with the versions that
# constraints.txt pins. `make test ARGS="-k ties -x"` passes ARGS on to pytest (or to the demo).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
MINUTES ?= 10
PEERS ?=
DEVICE ?=
ARGS ?=

# Inductor takes $CXX, or g++ on Linux: where only another compiler is there, name it.
ifeq ($(origin CXX),default)
CXX := $(shell command -v g++ || command -v clang++ || command -v c++)
endif
export CXX

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
export PIP_NO_WARN_SCRIPT_LOCATION = 1
export PIP_ROOT_USER_ACTION = ignore

BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install -qq -c constraints.txt
# The benchmarks' venv: with PEERS=1 one of their own, which has what fcall is compared with.
PEERS_VENV = $(VENV)-peers
PERF_VENV = $(if $(PEERS),$(PEERS_VENV)/.installed,$(VENV)/.installed-perf)
# The device to measure on, or that which there is: see perf/bench.py.
PERF_DEVICE = $(if $(DEVICE),PERF_DEVICE=$(DEVICE))
PERF_PYTHON = $(if $(PEERS),$(PEERS_VENV),$(VENV))/bin/python
# One OpenMP thread a worker: more only make the workers wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST_PARALLEL = $(PYTEST) -n $(WORKERS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup demo perf perf-check test test-fast test-all test-cuda fuzz check format lint types expect clean distclean
.PHONY: need-python need-compiler

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

setup: $(VENV)/.installed-dev $(VENV)/.installed-test ## make .venv with all that the other targets use

demo: need-compiler $(VENV)/.installed-demo ## see the library at work
	$(BIN)/python -m demo $(ARGS)

perf: need-compiler $(PERF_VENV) ## the benchmarks: tables, JSON, plots; PEERS=1 for others, too
	$(PERF_DEVICE) OMP_NUM_THREADS=1 $(PERF_PYTHON) -W ignore -m perf $(if $(PEERS),--peers) $(ARGS)

perf-check: need-compiler $(VENV)/.installed-perf ## counts (no times) against perf/expected.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m perf.check $(ARGS)

test: need-compiler $(VENV)/.installed-test ## the tests, but for the slow ones
	$(PYTEST_PARALLEL) -m "not slow and not cuda" $(ARGS)

test-fast: $(VENV)/.installed-test ## the eager tests alone, nothing compiled
	$(PYTEST_PARALLEL) -m "not slow and not cuda and not inductor and not compiled" $(ARGS)

test-all: need-compiler $(VENV)/.installed-test ## the slow tests too
	$(PYTEST_PARALLEL) -m "not cuda" $(ARGS)

test-cuda: need-compiler $(VENV)/.installed-test ## the tests that need a GPU, on this machine's
	FCALL_MUST_RUN=cuda $(PYTEST) -m cuda $(ARGS)

fuzz: $(VENV)/.installed-test ## random calls beside an oracle: make fuzz MINUTES=30
	OMP_NUM_THREADS=1 $(BIN)/python -m compile_tests.fuzz --minutes $(MINUTES) $(ARGS)

check: lint types perf-check test ## lint, types, counts and tests: what CI runs

format: $(VENV)/.installed-dev ## format the code and sort its imports
	$(BIN)/ruff check --quiet --select I --fix
	$(BIN)/ruff format

lint: $(VENV)/.installed-dev ## is the code formatted, and does ruff find anything
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.installed-dev ## check the types of fcall/
	$(BIN)/mypy

expect: need-compiler $(VENV)/.installed-test ## write the expected graphs anew: read the diff afterwards
	EXPECTTEST_ACCEPT=1 $(PYTEST) compile_tests/test_graphs.py $(ARGS)

clean: ## remove caches and build products
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis torch_compile_debug
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV) $(PEERS_VENV)

# ------------------------------------------------------------------------------------------------
# What a fresh machine may lack. $(error) says it in one line and ends with a status that is not 0.

VENV_PYTHON = $(wildcard $(BIN)/python)
PYTHON_VERSION = import sys; print("%d.%d" % sys.version_info[:2])

need-python:
	$(if $(VENV_PYTHON),,$(if $(shell $(PYTHON) -c 'import sys; sys.version_info < (3, 10) or print("yes")' 2>/dev/null),,\
	  $(error Python 3.10 or newer is needed and "$(PYTHON)" is not that: install it, or name another one, as in: make PYTHON=python3.12)))
	$(if $(VENV_PYTHON),,$(if $(shell $(PYTHON) -c 'import ensurepip, venv; print("yes")' 2>/dev/null),,\
	  $(error Python's venv and pip are needed and "$(PYTHON)" comes without: install them (Debian, Ubuntu: apt install python3-venv))))
	$(if $(VENV_PYTHON),$(if $(filter file,$(origin PYTHON)),,$(if $(filter $(shell $(PYTHON) -c '$(PYTHON_VERSION)' 2>/dev/null),$(shell $(VENV_PYTHON) -c '$(PYTHON_VERSION)')),,\
	  $(error $(VENV) was made with another Python than "$(PYTHON)": run "make distclean" first, or give another folder, as in: make VENV=.venv-other PYTHON=$(PYTHON)))))
	@:

need-compiler: need-python
	$(if $(shell command -v $(firstword $(CXX) none) 2>/dev/null),,\
	  $(error A C++ compiler is needed to run compiled graphs and $(if $(CXX),"$(CXX)" is not there,none is there): install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), or set CXX))
	$(if $(shell $(or $(VENV_PYTHON),$(PYTHON)) -c 'import os, sysconfig; print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) and "yes" or "")' 2>/dev/null),,\
	  $(error Python's C headers are needed to run compiled graphs and Python.h is not there: install them (Debian, Ubuntu: apt install python3-dev)))
	@:

# ------------------------------------------------------------------------------------------------
# Set-up. A stamp file says that a set of pyproject.toml's extras is installed as constraints.txt
# has it now.

EXTRAS_demo = demo
EXTRAS_test = test,demo,perf
EXTRAS_perf = perf
EXTRAS_dev = dev

$(BIN)/python: | need-python
	@echo "fcall: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# The build backend is installed here so that it is pinned too: pip's isolated builds are not.
$(VENV)/.installed-base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "fcall: installing pip and the build backend"
	@$(PIP_INSTALL) --upgrade pip
	@$(PIP_INSTALL) setuptools
	@echo "fcall: installing torch (large: this can take minutes)"
	@$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-base pyproject.toml constraints.txt fcall/_passes.c fcall/_scoped.c fcall/_sequences.h
	@echo "fcall: installing fcall for editing, with what '$*' needs"
	@$(PIP_INSTALL) --no-build-isolation -e '.[$(EXTRAS_$*)]'
	@touch $@

# From the same pins, but for those of the packages that only the peers need.
$(PEERS_VENV)/.installed: pyproject.toml constraints.txt perf/peers.txt fcall/_passes.c fcall/_scoped.c fcall/_sequences.h | $(BIN)/python
	@echo "fcall: making $(PEERS_VENV), with torch, tensordict and JAX (large: this can take minutes)"
	@$(PYTHON) -m venv $(PEERS_VENV)
	@$(PEERS_VENV)/bin/python -m pip install -qq -c constraints.txt --upgrade pip
	@$(PEERS_VENV)/bin/python -m pip install -qq -c constraints.txt setuptools torch
	@$(PEERS_VENV)/bin/python -m pip install -qq -c constraints.txt -r perf/peers.txt
	@$(PEERS_VENV)/bin/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[perf]'
	@touch $@
