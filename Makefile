# One word a chore, the same here and in CI; `make` alone lists them.

PYTHON ?= $(or $(shell command -v python3.11 2> /dev/null),python3)
FOLDER ?= demo
DEVICE ?= cpu
VENV := .venv
PY := $(VENV)/bin/python
TORCHRUN := $(VENV)/bin/torchrun --standalone --nproc-per-node 2

.PHONY: help demo test check bench proof venv clean

help:
	@awk -F ': .*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: venv ## train on real digits, sample 1,000 images, measure them; again: goes on where it stopped
	$(PY) -m data_prep.digits $(FOLDER)/shards
	$(TORCHRUN) train_dist.py --config configs/digits.yaml \
		run.folder=$(FOLDER)/run 'data.paths=[$(FOLDER)/shards/train]'
	$(TORCHRUN) sample_dist.py --config configs/digits_sample.yaml checkpoint=$(FOLDER)/run out=$(FOLDER)/samples \
		evaluate.train=$(FOLDER)/shards/train evaluate.held_out=$(FOLDER)/shards/test
	@printf '\npicture: %s\npage:    %s\nnumbers: %s\n' \
		$(FOLDER)/samples/grid.png $(FOLDER)/samples/report.html $(FOLDER)/samples/report.json

test: venv ## every test that needs minutes, not hours; what a test lacks on this machine is named at the end
	$(PY) -m pytest -q -n 2 --dist worksteal --durations=10

check: venv ## lint, format and types, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: venv ## registers of the kernels, launches of a block, speed of operators, step and loader; DEVICE=cuda on a GPU
	$(PY) -m drwkv.kernels.resources
	$(PY) -m drwkv.models.bench_block --device $(DEVICE) --threads 1
	$(PY) -m drwkv.kernels.bench --device $(DEVICE) --threads 1
	$(PY) -m drwkv.training.bench $(if $(filter cpu,$(DEVICE)),--tiny --threads 1)
	$(PY) -m data_prep.bench

proof: venv ## the long tests, marked `proof`, that `make test` leaves out
	$(PY) -m pytest -q --durations=10 -m proof

venv: $(VENV)/installed ## .venv with everything installed; pip's own settings choose the index and the torch build

clean: ## remove the venv, the caches and the folder demo
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Small models run best with one thread a process.
demo test proof: export OMP_NUM_THREADS = 1

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "drwkv needs Python 3.11 or newer, $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
