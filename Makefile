PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lightedit-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test cuda-check lint format slow bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv, install lightedit for development and build its C++ kernels

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.* csrc/*/*)
	@echo "installing into $(VENV) (minutes the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@# torch on its own: if a later package fails, its long download is not repeated
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt ninja setuptools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	@$(BIN)/python -c 'from lightedit.ops import NATIVE_STATUS as s; print("native extension:", s)'
	@touch $@

demo: setup ## edit facts in a small model and show what changed
	$(BIN)/lightedit demo

test: lint cuda-check ## lint, check types, compile the CUDA kernels and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

cuda-check: setup ## compile the CUDA kernels, without a GPU, where there is nvcc
	PYTHON=$(BIN)/python csrc/cuda/check.sh

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightedit

format: setup ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: setup ## run all tests, those with a real model included
	$(BIN)/python -m pytest --slow

bench: setup ## run the benchmarks
	$(BIN)/python -m benchmarks.run --quick

clean: ## remove caches and build products; the environment in .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache lightning_logs
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
