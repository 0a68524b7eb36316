# Every command of a developer; CI calls these targets and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Three files at a time, one thread each: for two cores, as tests wait for half of their time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all faults lint type bench constraints

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# pip would compile on one core; some packages hold templates that are no Python.
setup: $(INSTALLED)  ## make the virtual environment that all other targets use; they do it themselves

$(INSTALLED): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: $(INSTALLED)  ## encode the documentation of Python's standard library and rerank from it, offline
	$(BIN)/kalm demo

test: $(INSTALLED)  ## run the tests (about 10 minutes on two cores)
	$(PYTEST) -m 'not slow'

test-all: $(INSTALLED)  ## run all tests, the long ones too, with more examples for each property
	$(PYTEST) --hypothesis-profile thorough

faults: $(INSTALLED)  ## inject hundreds of faults into real jobs (35 minutes); fail if a row is wrong
	$(BIN)/python -m tests.faults

lint: $(INSTALLED)  ## check the style and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(INSTALLED)  ## check the types strictly
	$(BIN)/mypy

bench: $(INSTALLED)  ## measure speed and memory against peers (30 minutes; SHORT=1: 5 minutes)
	$(BIN)/python -m tests.bench.run $(if $(SHORT),--short)

# torch keeps its version, of which there is a build without CUDA; what a build with CUDA needs is
# left to torch. uv resolves in seconds what takes pip many minutes.
constraints: $(INSTALLED)  ## resolve all other dependencies anew and write constraints.txt
	grep ^torch== constraints.txt > $(VENV)/torch.txt
	$(BIN)/pip install -q uv
	echo '# Made by "make constraints": the versions that this project is tested with.' > constraints.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra dev -c $(VENV)/torch.txt --no-annotate --no-header \
	  | sed -E '/^(cuda|nvidia|triton)/d; s/[+]cpu$$//' >> constraints.txt
