# Every target that needs the environment sets it up first: virtual environment, pinned packages,
# compiled extension. Each step is done once, and again when what it depends on changes.
#
#   PYTHON=python3.12       interpreter for the virtual environment, 3.10 or newer
#   VENV=.venv              where it goes
#   TORCH_INDEX=URL         a further package index for torch, preferred where it has a local build of
#                           the pinned version (CPU-only on Linux: the `whl/cpu` index of pytorch.org)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
TESTS := $(BIN)/python -m pytest

# Stamps. A rule removes its stamp first, so that a failure leaves none that looks good.
CREATED := $(VENV)/.created
PINNED := $(VENV)/.pinned
INSTALLED := $(VENV)/.installed

.PHONY: help setup demo test test-long test-gpu lint type format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(INSTALLED)  ## set up the environment only

demo: $(INSTALLED)  ## the whole flow on a small encoder, offline once set up
	$(BIN)/dynabert demo

test: $(INSTALLED)  ## the fast test suite
	$(TESTS) -m "not slow and not gpu"

test-long: $(INSTALLED)  ## every test that needs no GPU
	$(TESTS) -m "not gpu"

test-gpu: $(INSTALLED)  ## the tests that need a GPU
	$(TESTS) -m gpu

lint: $(INSTALLED)  ## ruff, clang-format and the project's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(TESTS) -q tests/test_layering.py

type: $(INSTALLED)  ## mypy --strict on both packages
	$(BIN)/python -m mypy

format: $(INSTALLED)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:  ## remove build products and caches; the virtual environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f dynabert_kernels/_C.*.so dynabert_kernels/_build_record.json $(INSTALLED)

$(CREATED):
	rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: PYTHON=$(PYTHON) is missing or older than 3.10. Set PYTHON=python3.12, say." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(PINNED): requirements/torch.txt requirements/dev.txt requirements/demo.txt $(CREATED)
	rm -f $@
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements/dev.txt \
	  -r requirements/torch.txt
	$(PIP) install -c requirements/torch.txt -r requirements/dev.txt
	$(PIP) install --no-deps --require-hashes -r requirements/demo.txt
	touch $@

$(INSTALLED): setup.py pyproject.toml $(CSRC) $(PINNED)
	rm -f $@
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@
