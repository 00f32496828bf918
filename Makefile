# Everything for users and developers. On a fresh machine with Python and a package index, `make demo` and `make test`
# need nothing else.

PYTHON ?= python3
VENV ?= .venv
# Arguments of the demo and of the benchmarks, and of pytest.
ARGS ?=
PYTEST_ARGS ?=
PIP_FLAGS ?= --quiet

TORCH := torch==2.13.0
# Only where torch does not bring its own: the kernel tests run Triton's interpreter on CPU builds of torch.
TRITON := triton==3.6.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_FLAGS)
# Two processes at most, one thread each: the tests are many and small.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 2 ] && n=2; echo $$n)
# One more for the tests outside tests/kernel, which wait a part of their time for processes that they start.
WAITING_JOBS ?= $(shell echo $$(($(JOBS) + 1)))
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# $(1) pytest and its options. Two processes, because tests/kernel runs Triton's interpreter on a machine without a GPU and
# the interpreter is chosen once per process; both always run, and either fails the target. $(2) is what runs afterwards.
define run_tests
	@status=0; \
	$(TEST_ENV) $(1) -n $(JOBS) tests/kernel $(PYTEST_ARGS) || status=1; \
	$(TEST_ENV) $(1) -n $(WAITING_JOBS) tests --ignore=tests/kernel $(PYTEST_ARGS) || status=1; \
	$(2) exit $$status
endef

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-slow test-all test-readers test-upstream test-gpu lint format docs bench wheel publish clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) ARGS=... PYTEST_ARGS=..."

setup: $(READY) ## Create $(VENV) with everything in it

$(READY): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found, need Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import platform, sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is Python " + platform.python_version() + ", need 3.11 or newer: make PYTHON=/path/to/python3")'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv or ensurepip module: install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV): $(TORCH), then the rest"
	@"$(PYTHON)" -m venv "$(VENV)"
	@# torch first and alone, so that nothing else decides which torch it is; then triton, which others want as well.
	@$(PIP) "$(TORCH)"
	@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then $(PIP) "$(TRITON)"; fi
	@$(PIP) "$(TORCH)" --editable '.[dev]'
	@touch "$@"

build: $(READY) ## Build the kernel into build/torch-*
	@$(BIN)/python scripts/build_kernel.py --quiet

demo: build ## Train, quantize, fine-tune and export a small Qwen3-MoE (the main job); ARGS are passed on
	@$(BIN)/python -m moe_fused.demo $(ARGS)

test: build ## Run the tests, but for the slow ones
	$(call run_tests,$(BIN)/python -m pytest --timeout 300 -m "not slow")

# bitsandbytes computes differently on processors with avx512_bf16 and without. Tests that meet its linear layers on a CPU
# run a second time as if the processor were of the other kind.
CPU_TESTS := $(addsuffix .py,$(addprefix tests/integration/test_,quantizer quantizer_checkpoints lora_4bit cli_models \
	convert_models finetune finetune_adapters finetune_preferences finetune_start demo examples) $(addprefix tests/benchmarks/test_bench_,experts_4bit experts_lora \
	loss_parity))

define OTHER_PROCESSOR
kind=$$($(BIN)/python -m tests.cpu_path.other) || exit 1; \
	echo "bitsandbytes' path for avx512_bf16 forced $$kind"; \
	MOE_FUSED_TEST_CPU_BF16=$$kind $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --timeout 300 -m "not slow" \
		$(CPU_TESTS) $(PYTEST_ARGS) || status=1;
endef

test-slow: build ## Run the slow tests, and those that depend on the processor as on one of the other kind
	$(call run_tests,$(BIN)/python -m pytest --timeout 600 -m slow,$(OTHER_PROCESSOR))

test-all: build ## Run what test and test-slow run
	$(call run_tests,$(BIN)/python -m pytest --timeout 600,$(OTHER_PROCESSOR))

test-upstream: build ## Apply the patches of docs/upstream to copies of the installed libraries, and run their tests and ours
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --timeout 600 -m upstream tests/upstream $(PYTEST_ARGS)

test-readers: build ## Install vLLM, SGLang and llama.cpp's converters in part, and let them read our adapters
	@$(TEST_ENV) $(BIN)/python -m pytest -m readers tests/readers $(PYTEST_ARGS)

# Most of the time on a GPU goes into compiling kernels, which spreads over the cores.
GPU_JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 12 ] && n=12; echo $$n)

# Installs nothing: PYTHON must have torch, triton, kernels, transformers, pytest and pytest-xdist.
test-gpu: ## Run all tests for which the device matters on the GPU of this machine with PYTHON as it is
	@"$(PYTHON)" -c 'import sys, torch; torch.accelerator.is_available() or sys.exit("error: torch " + torch.__version__ + " of $(PYTHON) finds no GPU; make test runs without one")'
	@"$(PYTHON)" scripts/build_kernel.py --quiet
	$(call run_tests,"$(PYTHON)" -m pytest -m "not host" -n $(GPU_JOBS) --dist worksteal)

lint: $(READY) ## Run ruff and mypy
	@status=0; \
	$(BIN)/python -m ruff check . || status=1; \
	$(BIN)/python -m ruff format --check . || status=1; \
	$(BIN)/python -m mypy || status=1; \
	exit $$status

format: $(READY) ## Format the code and fix what ruff can fix
	@$(BIN)/python -m ruff check --fix . ; $(BIN)/python -m ruff format .

docs: build ## Renew what Markdown takes from code and rows: API reference, memory plan, figures, benchmarks
	@$(BIN)/python scripts/docs.py && $(BIN)/python scripts/figures.py && $(BIN)/python scripts/speeds.py
	@for file in README.md docs/benchmarks.md; do $(BIN)/python -m benchmarks.table $$file || exit 1; done

BENCHMARKS ?= experts experts_4bit experts_lora

bench: ## Benchmark on the GPU with PYTHON as it is; ARGS are passed on, BENCHMARKS chooses
	@"$(PYTHON)" scripts/build_kernel.py --quiet
	@status=0; for benchmark in $(BENCHMARKS); do "$(PYTHON)" -m benchmarks.$$benchmark $(ARGS) || status=1; done; exit $$status

wheel: $(READY) ## Build dist/*.tar.gz, and dist/*.whl from it
	@$(BIN)/python -m build --outdir dist .

REPO ?=

publish: $(READY) ## Build, check and publish the kernel to the Hub, REPO=org/name; ARGS=--dry-run only shows it
	@$(BIN)/python scripts/publish.py $(if $(REPO),--repo $(REPO)) $(ARGS)

clean: ## Remove what this Makefile made, except dist and the demo's output
	@[ ! -f "$(VENV)/pyvenv.cfg" ] || rm -rf "$(VENV)"
	@rm -rf build .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
