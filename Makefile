# setup: .venv from the lock   study: the offline study   test, test-slow: all tests   lab: JupyterLab   lint: style checks
# gpu: the tests for a GPU, then what scoring and generation cost there; torch, transformers, lm-eval[hf] and pytest are enough
PYTHON ?= python3
STUDY ?= offline
BIN := .venv/bin
SHAPES ?= llama-3.2-1b llama-2-7b qwen2.5-7b
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
ELSEWHERE := not long and not serving and not snakemake and not slurm and not cuda and not browser
ANY_PYTHON = PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON))

.PHONY: setup study test test-slow gpu lab lint format

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
	$(TESTS) -m "not slow and $(ELSEWHERE)"

test-slow: setup
	$(TESTS) -m "slow and $(ELSEWHERE)"

gpu:
	$(ANY_PYTHON) -m pytest -m cuda
	for shape in $(SHAPES); do \
	  $(ANY_PYTHON) -m hfprune_nb cost --shape $$shape --device cuda --windows 16 --seq-len 1024 --new-tokens 256 \
	    --multiples 64 --float64-windows 0 --out cuda_cost_$$shape.json || exit; \
	done

lab: setup
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hfprune_nb tests
	$(BIN)/mypy
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format hfprune_nb tests
