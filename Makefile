# Every target that needs the environment sets it up first: virtual environment, pinned packages,
# compiled extension. Each step is done once, and again when what it depends on changes.
#
#   PYTHON=python3.12       interpreter for the virtual environment, 3.10 or newer
#   VENV=.venv              where it goes
#   VENV_PEERS=.venv-peers  where the runtimes that `make bench-cpu` compares with go
#   BENCH="--cases ..."     options of `make bench-cpu`; see python -m benchmarks.bench_model --help
#   BENCH_GPU="--budget-s N" options of `make bench-gpu`; see python -m benchmarks.bench_gpu --help
#   TORCH_INDEX=URL         a further package index for torch, preferred where it has a local build of
#                           the pinned version (CPU-only on Linux: the `whl/cpu` index of pytorch.org)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
VENV_PEERS ?= .venv-peers
TORCH_INDEX ?=
BENCH ?=
BENCH_GPU ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
CUDA := $(shell find csrc -name '*.cu' -o -name '*.cuh')
TESTS := $(BIN)/python -m pytest
ASAN := build/asan
# The interpreter is not sanitised, so the libraries have to come first; and it never frees all.
ASAN_ENV = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)"

# Stamps. A rule removes its stamp first, so that a failure leaves none that looks good.
CREATED := $(VENV)/.created
PINNED := $(VENV)/.pinned
INSTALLED := $(VENV)/.installed
PEERS_PINNED := $(VENV_PEERS)/.pinned

.PHONY: help setup demo test test-long test-gpu sanitize-gpu asan bench-cpu bench-gpu bench-cuda lint type format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(INSTALLED)  ## set up the environment only

demo: $(INSTALLED)  ## the whole flow on a small encoder, offline once set up
	$(BIN)/dynabert demo

test: $(INSTALLED)  ## the fast test suite
	$(TESTS) -m "not slow and not gpu"

test-long: $(INSTALLED)  ## every test that needs no GPU
	$(TESTS) -m "not gpu"

# Records the paths that agree with the reference first. Compiling ahead of time is the one part of the
# Triton tests that a GPU changes nothing about.
test-gpu: $(INSTALLED)  ## the tests that need a GPU, and the Triton kernels' on it
	$(BIN)/python -m dynabert_kernels.prove
	$(TESTS) -m gpu
	$(TESTS) -m "not slow and not gpu" -k "triton or cuda" --ignore tests/kernels/test_triton_aot.py \
	  tests/kernels

# Needs neither torch nor the environment: nvcc, compute-sanitizer and a card.
sanitize-gpu:  ## the CUDA C++ kernels' test programs under compute-sanitizer, on a card: 9 minutes
	bash csrc/cuda/tests/sanitize.sh build/sanitize-gpu

# A build of its own, beside the environment's; python makes sure that it is loaded. A report ends the
# process, and -s lets it out.
asan: $(PINNED)  ## the kernel tests under the address and undefined-behaviour sanitizers
	rm -rf $(ASAN)/lib
	DYNABERT_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(ASAN)/temp \
	  --build-lib $(ASAN)/lib
	$(ASAN_ENV) $(BIN)/python -c "import sys; sys.path[0] = '$(ASAN)/lib'; import torch; \
	  from dynabert_kernels._C import build_info; assert '-fsanitize' in build_info()['flags']"
	$(ASAN_ENV) $(TESTS) -s -o pythonpath=$(ASAN)/lib -p no:cacheprovider -k "cpu or prepared or released or fork" \
	  --ignore tests/kernels/test_cpu_build.py tests/kernels

bench-cpu: $(INSTALLED) $(PEERS_PINNED)  ## CPU latency against other runtimes: hours, on a quiet machine
	$(BIN)/python -m benchmarks.bench_model --peers-python $(VENV_PEERS)/bin/python \
	  --work-dir build/bench-cpu $(BENCH)
	$(BIN)/python -m benchmarks.cpu_tables benchmarks/results/cpu_latency.jsonl \
	  --out benchmarks/results/cpu_latency.md --plot docs/images/cpu_latency.svg
	$(TESTS) -q benchmarks/bench_ops.py --benchmark-json build/bench-cpu/ops.json

bench-gpu: $(INSTALLED)  ## kernels, inference and training on a GPU against their peers: 6 minutes
	$(BIN)/python -m benchmarks.bench_gpu --out benchmarks/results/gpu.jsonl $(BENCH_GPU)

bench-cuda: $(INSTALLED)  ## the parts of the CUDA C++ kernels on a Hopper card: half a minute
	$(BIN)/python -m benchmarks.gpu_cuda

lint: $(INSTALLED)  ## ruff, clang-format and the project's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(CUDA)
	$(TESTS) -q tests/test_layering.py

type: $(INSTALLED)  ## mypy --strict on both packages
	$(BIN)/python -m mypy

format: $(INSTALLED)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) $(CUDA)

clean:  ## remove build products and caches; the virtual environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f dynabert_kernels/_C.*.so dynabert_kernels/_C_cuda.*.so dynabert_kernels/_build_record.json $(INSTALLED)

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

$(PEERS_PINNED): requirements/torch.txt requirements/dev.txt requirements/peers.txt
	rm -f $@
	$(PYTHON) -m venv $(VENV_PEERS)
	$(VENV_PEERS)/bin/python -m pip --disable-pip-version-check --quiet install \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements/dev.txt \
	  -r requirements/torch.txt
	$(VENV_PEERS)/bin/python -m pip --disable-pip-version-check --quiet install \
	  -c requirements/dev.txt -c requirements/torch.txt -r requirements/peers.txt
	touch $@

$(INSTALLED): setup.py pyproject.toml csrc/cuda/build_cuda.py $(CSRC) $(CUDA) $(PINNED)
	rm -f $@
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@
