# Two commands matter: `make demo` and `make test`. Each creates .venv and installs on its own.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu check format schema wheel clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

install: .venv/.installed  ## Create .venv with everything.

demo: .venv/.installed  ## Run the embedded default audit to a finished report.
	$(BIN)/rbx audit --out runs/demo --no-resume

test: .venv/.installed  ## Run the tests (CPU, under ten minutes on two cores).
	$(BIN)/python -m pytest -n 2 -q

test-slow: .venv/.installed  ## Run the tests that take minutes.
	$(BIN)/python -m pytest -q -m slow

test-gpu: .venv/.installed  ## Run the tests that need a CUDA device.
	$(BIN)/python -m pytest -q -m gpu

check: .venv/.installed  ## Lint, format check, types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed  ## Format and fix what can be fixed.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: .venv/.installed  ## Write the JSON Schema of report.json again.
	$(BIN)/python -c 'import json; from robustbench_x.result import json_schema; print(json.dumps(json_schema(), indent=2))' > robustbench_x/schema/report-1.json

wheel: .venv/.installed  ## Build sdist and wheel into dist/.
	$(BIN)/pip wheel --quiet --no-deps -w dist .

clean:  ## Remove the environment and every cache.
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache
