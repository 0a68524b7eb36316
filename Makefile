# Every check of this project; CI calls these targets and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults lint type bench

help:  ## show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## make a virtual environment and install everything
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'

demo:  ## encode the standard library's documentation and rerank from it, offline
	$(BIN)/kalm demo

test:  ## run all tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

faults:  ## hundreds of faults against real jobs (about 20 minutes); exit 1 if a row is wrong
	$(BIN)/python -m tests.faults

lint:  ## style, and the layering of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type:  ## strict types of kalm_encoder and pipeline
	$(BIN)/mypy

bench:  ## speed and memory with Nano dimensions and random weights, against peers (about 30 minutes)
	$(BIN)/python -m tests.bench.run
