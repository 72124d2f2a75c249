# Two commands from a fresh clone: `make demo` and `make test`. Needs only Python ≥ 3.11.
PYTHON ?= python3
BIN := .venv/bin

# `make docs` builds the pages of docs/ into docs/_build.
.PHONY: demo test check format docs bench
demo: .venv/ready
	$(BIN)/cafe demo

test: .venv/ready
	$(BIN)/pytest -n 3  # what needs Ray in one process, the rest in the others; on two cores one always waits

bench: .venv/ready
	$(BIN)/python measurements/speed.py  # three minutes on a quiet machine; compares with measurements/speed.json

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder html docs docs/_build

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	@echo 'Installing into .venv: 7 GB, some minutes, and pip says nothing until it is done'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	# As pip does on one core, but for the packages' own tests; a file that this Python cannot read is nothing that is imported.
	$(BIN)/python -m compileall -q -q -j 0 -x '/tests?/' .venv/lib cafe pipeline jobs || true
	touch $@
