# Two commands do all the set-up: `make book` and `make test`.
# They need python3 (3.11 to 3.13) and make; another interpreter: make book PYTHON=python3.12

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes side by side; each takes up to two gigabytes. A file's tests stay in one process,
# which compiles what they share once, and files are begun in the order of tests/conftest.py.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help book test quick lint format lab pins clean

help:
	@echo "make book    build the book (the first run also sets up $(VENV)) and print the page to open"
	@echo "make test    run every test, the book and browser tests included"
	@echo "make quick   run the tests that need no training, book or browser"
	@echo "make lint    check style and types"
	@echo "make format  rewrite the code in the house's format"
	@echo "make lab     open the chapters as live notebooks in JupyterLab"
	@echo "make pins    resolve the pinned requirements anew (needs uv)"
	@echo "make clean   remove what was built, keeping $(VENV)"

$(STAMP): requirements.txt pyproject.toml
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "No $(PYTHON) found. amortlib needs Python 3.11, 3.12 or 3.13: make book PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "amortlib needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; \
	  echo "Name another one: make book PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { \
	  echo "$(PYTHON) could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade > /dev/null
	@echo "Installing the pinned requirements into $(VENV); this takes a minute or two."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

book: $(STAMP)
	@$(BIN)/python -m tools.build_book

test: $(STAMP)
	@$(PYTEST)

# Most of its programs run once: XLA is asked to compile them fast, and not to make them fast.
quick: export XLA_FLAGS := --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1
quick: $(STAMP)
	@$(PYTEST) -m "not slow"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m tools.format_chapters --check
	@$(BIN)/ty check amortlib

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python -m tools.format_chapters

# JupyterLab's settings for this book stay in $(VENV), apart from the user's own.
lab: export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/jupyter
lab: $(STAMP)
	@$(BIN)/jupytext-config set-default-viewer markdown
	@$(BIN)/jupyter lab book

pins: $(STAMP)
	@$(BIN)/python -m tools.pins

clean:
	rm -rf _build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
