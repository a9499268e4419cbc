# The first use of a target makes a virtual environment from constraints.txt; later uses share it.
#   CONSTRAINTS=F   another file instead of constraints.txt, for another VENV
#   ARGS="..."      arguments of the program that a target runs: make test ARGS="-k routing", make demo ARGS=--quick
#   VENV=system     uses $(PYTHON) directly, for a machine that already has torch and cannot download;
#                   make gpu does so by itself if there is no .venv and torch, triton, transformers, pytest are installed
#   VENV_LATEST=DIR environment of make test-latest; another PYTHON needs another one
#   BUDGET=SECONDS  time limit of make gpu, instead of the limits of its parts
#   WORKERS=N       test processes, one torch thread each
#   VENV_GPU=DIR    environment of make gpu-artifacts: with the Python, torch and triton of the GPU's machine

PYTHON ?= python3
# a GPU machine often has all packages of `make gpu`, and cannot download
CARRIES := import importlib.util as u; print(all(map(u.find_spec, ("torch", "triton", "transformers", "pytest"))))
ifeq ($(MAKECMDGOALS)$(wildcard .venv/.installed),gpu)
ifeq ($(shell $(PYTHON) -c '$(CARRIES)' 2>/dev/null),True)
VENV ?= system
endif
endif
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
VENV_LATEST ?= .venv-latest
VENV_GPU ?= .venv-gpu
WORKERS ?= 2
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-ci test-latest latest lint format bench peers gpu gpu-artifacts clean
.DEFAULT_GOAL := help

ifeq ($(VENV),system)
PY := $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
EXTRAS := demo,train,test,dev
# CuTe's headers and what they include, for tests/kernels/test_cute.py; the package's Python dependencies are large and not used
HEADERS := "nvidia-cutlass; sys_platform == 'linux'" "nvidia-cuda-cccl; sys_platform == 'linux'"
# with CUMO_BUILD=0, nothing to build and no stamp for a later make
# a build fits only one torch version: another version has another stamp
BUILT := $(if $(filter 0,$(CUMO_BUILD)),,build/.extension-$(shell sed -n 's/^torch==//p' $(CONSTRAINTS)))
READY := $(INSTALLED) $(BUILT)
LOG := $(VENV)/setup.log

# pip's own log goes to $(LOG); only large downloads are printed, to show progress on a slow connection
define install
$(PY) -m pip install --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) $(1) 2>&1 | tee -a $(LOG) \
  | sed -unE -e 's/^ *(Downloading|Using cached) (.+)-([^-]+)-[^-]+-[^-]+-[^-]+\.whl.*\(([0-9]{2,}\.[0-9]+ MB)\)$$/  \2 \3 (\4)/p' \
    -e 's/^Installing collected packages:.* torch,.*/  unpacking/p' \
  || { tail -n 25 $(LOG); echo "setup failed; all of pip's output is in $(LOG)"; exit 1; }
endef

help:
	@echo "make demo     train, upcycle and compare two small CuMos on this CPU   (ARGS=--quick for a short run)"
	@echo "make test     the tests; ARGS go to pytest                             (but those that download something)"
	@echo "make test-all the same and the sweeps: every row of the kernels in Triton's interpreter and csrc's emulation"
	@echo "make test-latest  the tests with the newest torch, Triton and transformers, in an environment of its own"
	@echo "make latest   write constraints-latest.txt, what those are today"
	@echo "make lint     ruff check and ruff format --check                       (make format repairs)"
	@echo "make bench    speed on this machine, each row behind a correctness gate"
	@echo "make peers    fetch other implementations to compare with, for make bench on a GPU"
	@echo "make gpu      prove and measure on this machine's CUDA device, 440 seconds    (ARGS=\"--part tune\": then tune, 320;"
	@echo "              ARGS=--rehearse: all of it on a CPU)"
	@echo "make gpu-artifacts PYTHON=python3.12   what make gpu would compile there, built here for its Python and sm_90a"
	@echo "make setup    only the virtual environment $(VENV)"
	@echo "make clean    remove what was built; the virtual environment stays"

setup: $(READY)

$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS)
	@echo "setup: $(VENV); the first time brings about 3 GB, nearly all of it torch and its CUDA libraries"
	@$(PY) -m pip -V >/dev/null 2>&1 || $(PYTHON) -m venv --clear '$(VENV)'
	@: > $(LOG)
	@$(call install,setuptools wheel)
	@export CUMO_BUILD=0; $(call install,--no-build-isolation -e ".[$(EXTRAS)]")
	@$(call install,--no-deps --upgrade --target $(VENV)/mistral-common mistral-common)
	@$(call install,--no-deps $(HEADERS))
	@echo "setup: done"
	@touch $@

build/.extension-%: setup.py cumo_kernels/extension.py $(wildcard csrc/*) | $(INSTALLED)
	@mkdir -p $(@D)
	@$(PY) setup.py -q build_ext --inplace --force
	@rm -f build/.extension*
	@touch $@

demo: $(READY)
	@$(PY) -m cumo_model demo $(ARGS)

PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: $(READY)
	@$(PYTEST) -m "not network and not sweep" $(ARGS)

# with ARGS not all tests may run, so nothing is recorded
test-all: $(READY)
	@before=$$($(PY) -m tests.swept --print); $(PYTEST) -m "not network" $(ARGS); \
	  $(if $(ARGS),true,$(PY) -m tests.swept --record $$before)

# for CI: all tests if the kernels have changed since the last sweep
test-ci: $(READY)
	@if $(PY) -m tests.swept; then $(MAKE) test; else $(PYTEST) -m "not network"; fi

latest: $(INSTALLED)
	@$(PY) -m tests.latest

# in a copy of the tree, because a build in place fits only one torch; only the build stays there for the next time
LATEST := build/latest
test-latest:
	@git rev-parse --is-inside-work-tree >/dev/null || { echo "make test-latest copies what git lists: clone the repository"; exit 1; }
	@! test -x '$(VENV_LATEST)/bin/python' || test '$(origin PYTHON)' = file \
	  || test "$$('$(VENV_LATEST)/bin/python' -V)" = "$$($(PYTHON) -V)" \
	  || { echo "$(VENV_LATEST) has $$('$(VENV_LATEST)/bin/python' -V): give another VENV_LATEST with PYTHON=$(PYTHON)"; exit 1; }
	@mkdir -p $(LATEST) && find $(LATEST) -type f -not -path '$(LATEST)/build/*' -not -name '*.so' -delete
	@git ls-files -z --cached --others --exclude-standard | tar -c --null -T - --ignore-failed-read | tar -x -C $(LATEST)
	@$(MAKE) --no-print-directory -C $(LATEST) test CONSTRAINTS=constraints-latest.txt \
	  VENV='$(if $(filter /%,$(VENV_LATEST)),,../../)$(VENV_LATEST)' ARGS='$(subst ','\'',$(ARGS))'

lint: $(INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(INSTALLED)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(READY)
	@$(PY) -m benchmarks $(ARGS)

# third-party kernels, only for benchmarks, outside the environment; about 170 MB, most of it cutlass-dsl
peers: $(INSTALLED)
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target .peers -r benchmarks/peers/wheels.txt
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps --ignore-requires-python --upgrade \
		--target .peers/sources -r benchmarks/peers/sources.txt

# it builds the extension itself, as one of its steps
gpu: $(INSTALLED)
	@$(if $(BUDGET),BUDGET=$(BUDGET) )$(PY) -m benchmarks.gpu $(ARGS)

# the environment is made once and not checked again; unchanged code is not compiled again
gpu-artifacts: PY := $(VENV_GPU)/bin/python
gpu-artifacts: LOG := $(VENV_GPU)/setup.log
gpu-artifacts:
	@test -x $(PY) || $(PYTHON) -m venv $(VENV_GPU)
	@$(PY) -c 'import torch, triton, ninja, numpy, setuptools' 2>/dev/null || { \
	  echo "setup: $(VENV_GPU); the first time brings about 3 GB"; $(call install,torch numpy ninja setuptools wheel); }
	@PATH="$(abspath $(VENV_GPU))/bin:$$PATH" $(PY) -m benchmarks.gpu.artifacts build $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis cumo_kernels/_C*.so
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
