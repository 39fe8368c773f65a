# `make` lists the targets. Everything runs in .venv, which the targets make and keep up to date.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
WORKERS ?= 2
ARGS ?=

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(BIN)/.dev ## Install what development needs into .venv

$(BIN)/python:
	@$(PYTHON) -m venv .venv

$(BIN)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing into .venv ..."
	@$(PIP) install --editable '.[dev]'
	@touch $@

# The demo alone needs less; a development environment has it all.
$(BIN)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing the demo into .venv ..."
	@$(PIP) install --editable '.[demo]'
	@touch $@

.PHONY: lint
lint: venv ## Check style, types and the layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: venv ## Let ruff lay out the code and sort the imports
	@$(BIN)/ruff check --select I --fix --quiet
	@$(BIN)/ruff format

.PHONY: test
test: lint ## Lint, then run all tests on real servers (ARGS="-k relay" narrows them)
	@$(BIN)/pytest -n $(WORKERS) $(or $(ARGS),tests)

.PHONY: test-unit
test-unit: venv ## Run the tests that need no server
	@$(BIN)/pytest -n $(WORKERS) tests/unit tests/simulation $(ARGS)

.PHONY: test-images
test-images: ## Make the Docker images that the tests run on, where none can be pulled (root)
	@tools/test-images

.PHONY: demo
demo: ## Run the order saga on embedded servers (ARGS="--help" for its options)
	@[ $(BIN)/.dev -nt pyproject.toml ] || $(MAKE) $(BIN)/.demo
	@$(BIN)/python -m examples.order_saga.demo $(ARGS)

.PHONY: bench
bench: venv ## Measure throughput and latency (ARGS="--help" for its options)
	@$(BIN)/python -m bench $(ARGS)
