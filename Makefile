# Two commands that do everything on a fresh machine; the rest is for those who develop.

PYTHON ?= python3
PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: mnist gpt test test-all parity lint docs package clean

mnist: $(VENV)/launch  ## train MNIST on two DDP processes
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) launch/mnist_ddp.py $(ARGS)

gpt: $(VENV)/launch  ## pretrain a small GPT under FSDP2 on two processes, ten minutes
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) launch/gpt_fsdp2.py --minutes 10 $(ARGS)

test: $(VENV)/test  ## the suite, without what takes minutes
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

test-all: $(VENV)/test  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

parity: $(VENV)/test  ## the golden runs, pairs of options too, with each set of instructions that this processor has
	$(BIN)/python tests/golden/processors.py -n 2 $(ARGS)

lint: $(VENV)/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/mkdocs build --strict --quiet

package: $(VENV)/dev  ## sdist and wheel, built, checked, installed into an empty folder and tried
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/packaged.py dist

# A stamp for each set of extras: installed once, and again when what to install has changed. Python compiles what it
# imports; pip would compile everything, for minutes.
$(VENV)/launch $(VENV)/test $(VENV)/docs $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) runs dist build
