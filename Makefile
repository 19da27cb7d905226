PYTHON ?= python3
# More workers than cores, because many tests spend their time waiting.
WORKERS ?= 3
# Where it is set, each of the many processes that tests start would compile the project again.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
INSTALLED := $(VENV)/installed
# Without an NVIDIA driver, install the torch that the tests use; with one, the newest that pip finds.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),,--constraint tests/constraints.txt)

.PHONY: help quickstart check test lint format benchmark gpu clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(INSTALLED)  ## pretrain, fine-tune and predict on real images, in minutes
	$(VENV)/bin/python launch/quickstart.py

check: $(INSTALLED)  ## lint, types and the quick tests that start no processes, in under a minute
	$(MAKE) --jobs 2 --output-sync=target lint quick-test

test: $(INSTALLED)  ## every test, on the CPU
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quick-test
quick-test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --quiet --numprocesses 2 --dist worksteal -m "not processes and not slow"

lint: $(INSTALLED)  ## ruff, its formatter and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED)  ## apply the formatter
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(INSTALLED): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	touch $@

benchmark: .venv-benchmark/installed  ## compare a training step with timm's and transformers'
	.venv-benchmark/bin/python benchmarks/train_step.py

# timm imports torchvision, which must match torch, so this needs its own environment.
.venv-benchmark/installed: pyproject.toml benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-benchmark
	.venv-benchmark/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/requirements.txt --editable .
	touch $@

gpu: has-gpu .venv-gpu/installed  ## prove an NVIDIA GPU in at most ten minutes; WHEELS=FOLDER needs no network
	.venv-gpu/bin/python -m benchmarks.gpu $(GPU_OPTIONS)

# An environment of its own, with timm to compare with and torchvision to decode JPEGs on the GPU.
.PHONY: has-gpu
has-gpu:
	@command -v nvidia-smi > /dev/null || { echo "make gpu: this machine has no NVIDIA driver; run it on one with an NVIDIA GPU" >&2; exit 2; }

.venv-gpu/installed: pyproject.toml benchmarks/gpu/requirements.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --disable-pip-version-check $(if $(WHEELS),--no-index --find-links $(WHEELS)) \
		--requirement benchmarks/gpu/requirements.txt --editable .
	touch $@

clean:  ## remove the environments and the quickstart's runs
	rm -rf $(VENV) .venv-benchmark .venv-gpu runs/quickstart runs/quickstart-*
