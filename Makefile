# setup data train test test-fast check bench bench-guard docs report clean: each safe to repeat, and quick when nothing is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RANKS ?= 2
RECIPE ?= launch/recipes/alternating.toml
BACKEND ?= gloo
RUNS ?= runs/$(basename $(notdir $(RECIPE)))
# the cores shared out to the ranks, so that their threads do not fight
export OMP_NUM_THREADS ?= $(shell n=$$(( $$(nproc) / $(RANKS) )); echo $$(( n > 1 ? n : 1 )))

TEST_PROCESSES ?= 3

.PHONY: setup data train test test-fast check bench bench-guard docs report clean

setup: $(VENV)/.ready
data: data/FashionMNIST/.ready

$(VENV)/.ready: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

data/FashionMNIST/.ready: | $(VENV)/.ready
	$(BIN)/python -m trainer.data fashion_mnist --root data
	touch $@

train: setup data
	$(BIN)/torchrun --standalone --nproc-per-node=$(RANKS) -m trainer --recipe $(RECIPE) \
		--world.backend $(BACKEND) $(FLAGS)
	$(BIN)/python -m trainer.report $(RUNS)

# most of a test of several ranks is waiting, so more tests run at once than there are cores
test: setup data
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadgroup $(TESTS)

test-fast: setup
	$(BIN)/python -m pytest --numprocesses=2 -m "not ranks and not lab" $(TESTS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup data
	$(BIN)/python -m benchmarks.loop_overhead --quick
	$(BIN)/torchrun --standalone --nproc-per-node=$(RANKS) -m benchmarks.throughput --quick

# this checkout beside the commit it grew from, in at most five minutes
bench-guard: setup
	$(BIN)/python -m benchmarks.guard $(FLAGS)

docs: setup
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

report: setup
	$(BIN)/python -m trainer.report $(RUNS)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './data/*' -exec rm -rf {} +
