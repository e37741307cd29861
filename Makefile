# Everything runs in .venv, which the first target that needs it creates. No other tool is required.
# PyTorch's CPU build on Linux:  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-slow test-flower check format bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/installed  ## Create .venv and install anyrank with everything

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "anyrank needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: .venv/installed  ## Fine-tune a real model over 24 clients of three ranks
	$(BIN)/anyrank run

test: .venv/installed  ## The default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/installed  ## The long tests: kills and resumes, memory, every recipe; with ANYRANK_LONG=1 the whole demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-flower: .venv/installed  ## A federation of real processes on this machine: TLS, keys, kills and resumes
	$(BIN)/python -m pytest -m flower

check: .venv/installed  ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

bench: .venv/installed  ## All benchmarks, two hours on two idle cores; the peer that runs on Flower needs the extra anyrank[bench]
	for name in aggregate simulate scale depth deploy; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/tables.py

format: .venv/installed  ## Put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
