# Two commands for a newcomer: `make bringup` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup bringup test check bench docs format clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*##/\t/'

setup: $(STAMP)  ## make .venv and install tpctl with its tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tpctl needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

bringup: setup  ## run the default bring-up matrix on this machine
	$(BIN)/tpctl bringup

test: setup  ## run the tests
	$(BIN)/python -m pytest

check: setup  ## format, lint, types, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: setup  ## print the ratios of benchmarks/ and write benchmarks/results.json
	$(BIN)/python -m benchmarks

.PHONY: verify
verify:  ## check the models of the protocol with spin: no hang, nothing stale, no double advance
	$(PYTHON) tests/verify/run.py

docs: setup  ## write the generated pages of docs/
	$(BIN)/python -m tests.docs.generate

format: setup  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove everything that make made
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
