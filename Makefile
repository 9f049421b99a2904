# Every command works in a fresh clone: it makes its own environment, .venv, from the tested versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# constraints.txt stands on every pip call: an unpinned torch would be another torch, gigabytes larger.
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := runs/demo
# Options of the benchmarks: make bench BENCH='--models resnet18 --sizes 8x128'
BENCH ?=
# Threads that wait by spinning take the cores from those that work: on a busy machine, several times slower. OpenMP reads
# this before Python starts, so it has to stand here.
export OMP_WAIT_POLICY ?= PASSIVE
LINTED := setup.py qbench tests $(wildcard docs/images references benchmarks)

.DEFAULT_GOAL := help
.PHONY: help bench demo zoo test test-all lint format install install-dev clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: install ## train ResNet-18 on real digits, deploy it to two runtimes, verify it, into runs/demo
	$(BIN)/qbench train --model resnet18 --data digits --target onnxruntime --out $(DEMO) --overwrite

zoo: install ## every torchvision model the whole way, one process each, hours; goes on where it stopped: docs/zoo.md
	OMP_NUM_THREADS=$(JOBS) $(BIN)/python -m benchmarks.zoo.run

bench: $(VENV)/.installed-peers ## training steps and all around them, timed beside the peers, hours; goes on where it stopped: docs/benchmarks.md
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.speed.run $(BENCH)  # timed on a quiet machine, as programs run there

test: lint ## lint, types, spelling and every test that is not slow
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: lint ## the same and the slow tests
	$(BIN)/python -m pytest -n $(JOBS)

lint: install-dev ## ruff, mypy, codespell
	$(BIN)/ruff check $(LINTED)
	$(BIN)/mypy
	$(BIN)/codespell

format: install-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix $(LINTED)

install: $(VENV)/.installed ## the environment with what the demo needs
install-dev: $(VENV)/.installed-dev ## the environment with what the tests need

# Stamps, not directories: an install that broke off leaves none and is done again.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[all,dev]'
	@touch $@

# Without what they depend on: that asks for an older setuptools than torch does, and is there already.
$(VENV)/.installed-peers: $(VENV)/.installed benchmarks/peers.txt
	$(PIP) install -q -c constraints.txt --no-deps -r benchmarks/peers.txt
	@touch $@

clean: ## remove the environment, the runs and every cache
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qbench tests -name __pycache__ -type d -exec rm -rf {} +
