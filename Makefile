# `make demo` and `make test` set up everything they need, once; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs check notebook clean

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

# Processes of one thread each, as many as there are cores.
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

# The pages of docs/, into site/; fails at a link that leads nowhere.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet

check: lint test

# Runs all of it and writes its outputs into it; fails where the text says something else than the numbers.
notebook: $(INSTALLED)
	$(BIN)/jupyter execute --inplace --timeout=600 examples/tutorial.ipynb

# torch first: what is installed after it then keeps to it, and does not choose another build.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps 'sae-bench>=0.6,<0.7' 'circuit-tracer>=0.5,<0.6'
	touch $@

clean:
	rm -rf $(VENV) quickstart_output
