# Needs Python 3.10 or newer (with its venv module) and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
# Tests use one thread each; those of a file share what it has made, and a process.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all lint docs clean

demo: .venv/installed
	$(BIN)/python examples/demo.py $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, into site/; warnings are errors. What its examples print is checked by the tests.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

clean:
	rm -rf .venv site

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The stamps are newer than pyproject.toml once what it asks for is installed.
.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev,frameworks]"
	touch $@

# The extra "docs" alone: sources are read for the site, not imported, so that it needs no torch.
.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(shell sed -n 's/", "/" "/g; s/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml)
	touch $@
