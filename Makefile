# make install    .venv with diffalign and its development tools, in the tested versions of constraints.txt
# make demo       install, then tune the embedded world's model and measure what it gained (minutes, no GPU)
# make test       install, then lint, the whole test suite and, beside it, types
# make test-slow   the tests that `make test` leaves out: small arenas, a demo, benchmarks, kernels compiled for GPUs
# make test-portable   the tests that compare numbers, under the kernels of older processors (AVX2, SSE4.1), of Intel's
#                 where the C compiler can ask for them, on two threads and in a shuffled order: a table, half an hour
# make coverage   the tests, and the share of lines that they execute, by package; TESTS=tests/data for some of them
# make lint       formatting, lint and types alone
# make docs       the documentation site, built strictly and offline into site/: a broken link is an error
# make docs-serve the same at http://127.0.0.1:8000, built again when a page changes
# make gpu-test   the tests that need a CUDA device
# make gpu-bench  speed and memory of a step on one, PEER=train_diffusion_dpo_sdxl.py beside it
# make clean      remove caches, site/ and runs/, keep .venv
#
# PYTHON=python3.12 make install     another interpreter (3.11 or later)
# CONSTRAINTS= make install          the newest versions that pyproject.toml allows
#
# For a CUDA build of torch, install it first and it stays, as long as it is the version in constraints.txt:
#   python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130
#   make install

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := $(VENV)/types.txt

# Python stores what it compiled, although some containers ask it not to: tests start many processes, and pip compiles
# nothing, because most modules of torch and transformers are never imported.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-slow test-portable coverage lint docs docs-serve gpu-test gpu-bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "diffalign needs Python 3.11 or later: PYTHON=/path/to/python make install"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/diffalign demo

# mypy works beside the tests; what it found comes after their results
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy >$(TYPES) 2>&1 & types=$$!; tests=0; \
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" || tests=$$?; \
	wait $$types; types=$$?; cat $(TYPES); exit $$(( tests ? tests : types ))

test-slow: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

test-portable: install
	WORKERS=$(WORKERS) $(BIN)/python -m tests.portable

coverage: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.covered -n $(WORKERS) $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

gpu-test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

# SDXL in its real size on random weights, in the order of docs/performance.md; results under benchmarks/results
RESULTS := benchmarks/results
STEP := HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.step --device cuda --model sdxl --mixed-precision bf16 --pairs 4
gpu-bench: install
	$(STEP) $(if $(PEER),--peer $(PEER)) --out $(RESULTS)/step_cuda_lora_1024
	$(STEP) --resolution 512 --pairs 8 $(if $(PEER),--peer $(PEER)) --out $(RESULTS)/step_cuda_lora_512
	$(STEP) --tuning full --ladder --out $(RESULTS)/ladder_cuda_full_1024
	$(STEP) --ladder --out $(RESULTS)/ladder_cuda_lora_1024
	-HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.launches --device cuda --model sdxl --out $(RESULTS)/launches_cuda
	$(BIN)/python -m benchmarks.kernels --device cuda --out $(RESULTS)/kernels_cuda
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.memory_run --device cuda --model sdxl --out $(RESULTS)/memory_run_cuda
	$(STEP) --growth --out $(RESULTS)/growth_cuda

clean:
	rm -rf runs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
