# Every target makes its own environment on first use, from this project's files alone.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
HINTS_VENV ?= .venv-hints
HINTS_STAMP := $(HINTS_VENV)/.installed

# Small models and two cores: processes beat threads.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-hints lint bench publish-dry-run

demo: $(STAMP)  ## sample the embedded model with every sampler; pictures and report in outputs/quickstart
	$(VENV)/bin/diffx quickstart

test: $(STAMP)  ## everything but the slow tests
	$(VENV)/bin/python -m pytest -n 2

test-slow: $(STAMP)  ## the slow tests alone
	$(VENV)/bin/python -m pytest -n 2 -m slow

test-hints: $(HINTS_STAMP)  ## control images in an environment of their own, with controlnet-aux and OpenCV: 6 GB
	$(HINTS_VENV)/bin/python -m pytest -W ignore tests/test_controlnet_aux.py tests/test_hints.py

lint: $(STAMP)  ## style, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(STAMP)  ## ours beside Diffusers': the cost of one step, and every pipeline with every solver
	$(VENV)/bin/python benchmarks/step_cost.py
	$(VENV)/bin/python benchmarks/pipeline_matrix.py

publish-dry-run: $(STAMP)  ## push schedulers/ and pipelines/ to a Hub on this machine, and load all back from it
	$(VENV)/bin/python benchmarks/publish_dry_run.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[train,test,dev]'
	touch $@

$(HINTS_STAMP): pyproject.toml constraints-hints.txt
	$(PYTHON) -m venv $(HINTS_VENV)
	$(HINTS_VENV)/bin/python -m pip install -c constraints-hints.txt -e '.[hints]' torchvision pytest
	touch $@
