# The few commands of this project. `make` prints them.

PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help install check lint types test docs site demo wheel ci

help:  ## print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## install the package in place with everything a developer needs
	$(PYTHON) -m pip install -e '.[dev]'

check: lint types test  ## everything that must be green before a commit

lint:  ## style: ruff's rules and its formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## pyright, strict
	$(PYTHON) -m pyright

test:  ## all tests
	$(PYTHON) -m pytest -q

docs:  ## rewrite what the documents take from the code
	$(PYTHON) docs/generate.py

site:  ## the documents as a site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

demo:  ## the short demo
	$(PYTHON) -m kfac_onnx demo --quick

wheel:  ## build the wheel into dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

ci:  ## what continuous integration runs, in fresh environments
	.ci/run
