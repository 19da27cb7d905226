PYTHON ?= python3
# One more than the smallest machine has cores: many tests wait.
WORKERS ?= 3
VENV := .venv
INSTALLED := $(VENV)/installed
# Without an NVIDIA driver: the torch that the tests use. With one: whatever pip finds newest.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),,--constraint tests/constraints.txt)

.PHONY: help quickstart test lint format benchmark clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(INSTALLED)  ## the whole way on real images, in minutes
	$(VENV)/bin/python launch/quickstart.py

test: $(INSTALLED)  ## every test, on the CPU
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## ruff, its formatter, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED)  ## put the code in its form
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(INSTALLED): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	touch $@

benchmark: .venv-benchmark/installed  ## a training step beside timm's and transformers'
	.venv-benchmark/bin/python benchmarks/train_step.py

# timm imports torchvision, which must fit torch: an environment of its own.
.venv-benchmark/installed: pyproject.toml benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-benchmark
	.venv-benchmark/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/requirements.txt --editable .
	touch $@

clean:  ## remove the environments and the quickstart's runs
	rm -rf $(VENV) .venv-benchmark runs/quickstart runs/quickstart-*
