# The whole interface of a checkout. `make demo` and `make test` need nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FRESH ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-all check lint types format constraints clean

# Processes that begin again and again keep what they compiled of the package.
unexport PYTHONDONTWRITEBYTECODE

# How many tests at a time. A slow one starts a Ray of many processes: with more than two of those,
# a small machine has nothing that answers in time.
WORKERS ?= 4
SLOW_WORKERS ?= 2
FAST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) -m "not slow and not fault"
SLOW = $(BIN)/python -m pytest --numprocesses=$(SLOW_WORKERS) -m

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
# One run tells all that is broken: the second part runs whatever the first one found.
both = status=0; $(1) || status=1; $(2) || status=1; exit $$status

demo: $(VENV)/.installed  ## the whole system on real pictures, in about ten minutes (FRESH=1 starts over)
	$(BIN)/python -m tinyflux demo $(if $(FRESH),--fresh)

test: $(VENV)/.installed  ## the tests, but for the long ones that break things
	$(call both,$(FAST),$(SLOW) "slow and not fault")

test-faults: $(VENV)/.installed  ## only the long ones: kills, cut wires, lost nodes, a launched cluster
	TINYFLUX_LAUNCH=1 $(SLOW) "fault"

test-all: $(VENV)/.installed  ## every test: also kills, cut wires, lost nodes, a launched cluster
	$(call both,$(FAST),TINYFLUX_LAUNCH=1 $(SLOW) "slow or fault")

check: lint types  ## lint, types and the tests that take seconds
	$(FAST)

lint: $(VENV)/.installed  ## format, style and layering
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(VENV)/.installed  ## type checker
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite files in the house format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "error: TinyFlux needs Python 3.10, 3.11 or 3.12; name one, as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

LOCK := uv pip compile --universal --python-version 3.10 --no-annotate --no-header
constraints: ## resolve the tested set of packages again, and the part of it that nodes need (needs uv)
	{ sed -n '/^#/p' constraints.txt; \
	  $(LOCK) --extra dev pyproject.toml | grep -vE '^(nvidia-|cuda-|triton)'; } > constraints.tmp
	mv constraints.tmp constraints.txt
	{ sed -n '/^#/p' cluster/requirements.txt; \
	  $(LOCK) --extra cluster --extra report --constraint constraints.txt pyproject.toml \
	    | grep -vE '^(nvidia-|cuda-|triton)'; } > cluster/requirements.tmp
	mv cluster/requirements.tmp cluster/requirements.txt

clean:  ## remove the environment and what the demo made
	rm -rf $(VENV) runs
