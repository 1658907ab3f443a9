# `make demo` and `make test` set up everything on a fresh machine: they create .venv and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= outputs/demo
.PHONY: demo test lint format clean

demo: $(VENV)/installed
	$(BIN)/opensora-fast demo --out $(OUT)

# One thread per worker: two workers share two cores, and results do not depend on the number of threads.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dali,demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
