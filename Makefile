# Every target makes what it needs: a fresh machine needs only Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-long lint format docs bench serve clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python demo.py $(ARGS)

serve: setup
	$(BIN)/wardrobe serve $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two workers of one thread each are twice as fast as one of two threads on models this small.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not long and not gpu" $(ARGS)

test-long: setup
	$(BIN)/pytest -m "long" --timeout 3600 $(ARGS)

docs: setup
	$(BIN)/typer wardrobe utils docs --name wardrobe --title "The command line" --output docs/cli.md
	$(BIN)/python -m tests.peft_cases

bench: setup
	$(BIN)/python -m benchmarks.throughput $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
