# `make demo` and `make test` install everything they need on the first call only.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs check notebook clean

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

# One process of one thread per core.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/deptry .
	$(BIN)/lint-imports --no-cache
	$(MAKE) docs

# Builds docs/ into site/; broken links are errors.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

check: lint test

# Runs the tutorial and stores its outputs in it; a test then fails if the text does not match the numbers.
notebook: $(INSTALLED)
	$(BIN)/jupyter execute --inplace --timeout=600 examples/tutorial.ipynb

# torch first, so that later installs keep it and do not choose another build.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps 'sae-bench>=0.6,<0.7' 'circuit-tracer>=0.5,<0.6'
	touch $@

clean:
	rm -rf $(VENV) quickstart_output
