# Everything runs in the project's own .venv; nothing but Python >= 3.11 is needed.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
STAMP := .venv/.installed
# A file of tests stays in one process, so that what it makes once is made once.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo demo-quick test test-all check docs format clean

help:  ## Show the targets
	@echo "make demo        install and run the main job on real data: make demo && open runs/demo/report.html"
	@echo "make demo-quick  the same in 60 seconds, with fewer steps and users"
	@echo "make test        the fast tests"
	@echo "make test-all    all tests"
	@echo "make check       formatting, lint, types, architecture, documentation"
	@echo "make docs        the documentation: make docs && open site/index.html"
	@echo "make format      format the code"
	@echo "make install     create .venv and install"
	@echo "make clean       remove .venv and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wanted Python 3.11 or newer, got %d.%d; run: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/triewise demo

demo-quick: $(STAMP)
	$(BIN)/triewise demo --quick

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,ray]"
	$(BIN)/python -m pytest $(PARALLEL)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/python -m pytest tests/test_architecture.py --doctest-modules src/triewise
	@$(MAKE) --no-print-directory docs

docs: $(STAMP)  ## Only what changed is built again; after a warning everything is, so that it is not forgotten
	$(BIN)/python docs/pages.py build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --conf-dir docs -d build/doctrees build/docs site || (rm -rf build/doctrees; exit 1)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build site
