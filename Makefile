# setup: .venv from the lock   study: the offline study   test: all tests   lab: JupyterLab   lint: style checks
PYTHON ?= python3
STUDY ?= offline
BIN := .venv/bin

.PHONY: setup study test lab lint format

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or later is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

study: setup
	$(BIN)/hfprune study run $(STUDY)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lab: setup
	$(BIN)/jupyter lab --notebook-dir=notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hfprune_nb tests
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format hfprune_nb tests
