# `make help` lists the targets. Each sets up .venv by itself the first time it needs it.
#   PYTHON        interpreter that .venv is made from, 3.11 or newer as the pinned numpy wants it
#   TORCH_SOURCE  extra pip arguments for torch, such as --index-url with an index of CPU builds
#   BENCHMARKS    scripts that `make bench` runs, all of them by default

PYTHON ?= python3
TORCH_SOURCE ?=
BENCHMARKS ?= $(sort $(shell grep -l __main__ benchmarks/*.py 2>/dev/null))

BIN := .venv/bin
# Touched last, so that an interrupted set-up starts again.
READY := .venv/ready

PINS := $(shell grep -o '^[a-z][^ ]*==[^ ]*' requirements/dev.txt)
TORCH := $(filter torch==%,$(PINS))
WITHOUT_DEPENDENCIES := $(filter galore-torch==% fira==% lightning==% gguf==%,$(PINS))
OTHERS := $(filter-out $(TORCH) $(WITHOUT_DEPENDENCIES),$(PINS))

# glibc gives every large freed tensor back to the system, so that each step waits for fresh zeroed
# pages. With these it keeps them for the next step; the weights and the losses do not change.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456

.DEFAULT_GOAL := help
.PHONY: help check test demo bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

check: $(READY) ## lint, format, types and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

test: $(READY) ## the whole test suite, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --max-worker-restart 0

demo: $(READY) ## train a small language model with AdamW and with AdaRankGrad, and compare
	$(BIN)/adarankgrad demo

bench: $(READY) ## run the benchmarks, one after the other
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script"; done

clean: ## remove .venv, caches and build outputs, and keep runs
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements/dev.txt pyproject.toml
	@echo "setting up .venv (once; a few minutes)"
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH_SOURCE) $(TORCH)
	$(BIN)/python -m pip install --quiet $(TORCH) $(OTHERS) --editable '.[finetune]'
	$(BIN)/python -m pip install --quiet --no-deps $(WITHOUT_DEPENDENCIES)
	@touch $@
