# `make help` lists the targets. Each sets up .venv by itself, once.

PYTHON ?= $(shell if python3.11 -c '' 2>/dev/null; then echo python3.11; else echo python3; fi)

JSON ?= benchmarks/results/cpu.json

# `make peer-accuracy PRESETS='hqdit minmax'`; without it, those that the script wants and that exist.
PRESETS ?=

# `make reproduce QUICK=1` takes minutes instead of an hour.
EXPERIMENTS ?= all
REPRODUCED ?= reproduced

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# At a fixed path, where `hqdit bench` looks for it.
PEERS_VENV := .venv-peers
PEERS := benchmarks/peers/requirements.txt
# The oldest diffusers that works, as pyproject.toml says, with the newest of what goes with it.
OLDEST_VENV := .venv-oldest
OLDEST_DIFFUSERS := $(shell sed -n 's/.*"diffusers>=\(.*\)".*/\1/p' pyproject.toml)
UNPINNED := diffusers|huggingface_hub|httpx2|httpcore2|accelerate|peft|transformers|tokenizers
# What the native kernels are compiled from: a change installs them anew.
NATIVE := CMakeLists.txt $(wildcard native/include/hqdit/*.h native/src/*)

# The isolated builds of the package use the pinned versions too (newer releases of pip read the second).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-oldest native-test bench bench-peers lint soak soak-records estimates reproduce train-digits train-shapes train-classifier train-shapes-classifier check-digits check-shapes stress peer-accuracy group-sizes records readme support-matrix package clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)$$/\1|\2/p' Makefile | awk -F'|' '{printf "  %-25s%s\n", $$1, $$2}'

demo: $(VENV)/.stamp-run ## quantize the bundled model, compare and write demo/
	$(BIN)/hqdit demo --out demo --overwrite

# Tests are many small ones, in which a second process gains more than a second thread.
test: $(VENV)/.stamp-dev ## run the test suite, a process for each core (at most 4)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-oldest: $(OLDEST_VENV)/.stamp ## run the tests of the diffusers backend with the oldest diffusers that it works with
	$(OLDEST_VENV)/bin/python -m pytest tests/integrations

lint: $(VENV)/.stamp-dev ## check style, formatting, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

native-test: $(VENV)/.stamp-dev ## build and run the C++ tests: release, sanitizers, valgrind, instruction sets
	PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/run

bench: $(VENV)/.stamp-run bench-peers ## measure speed and memory against other libraries; JSON=FILE
	$(BIN)/hqdit bench --json $(JSON)

bench-peers: $(PEERS_VENV)/.stamp ## install what hqdit bench compares with, in an environment of its own

soak: $(VENV)/.stamp-fuzz ## run the tests that take minutes
	$(BIN)/python -m pytest -m soak

soak-records: $(VENV)/.stamp-fuzz ## fuzz every reader, damage every bit of a checkpoint, and keep the records
	$(BIN)/python tests/fuzz/coverage_guided.py --executions 50000 --record docs/records/fuzz.json
	$(BIN)/python benchmarks/damage_soak.py --json docs/records/damage_soak.json

estimates: $(VENV)/.stamp-dev ## compare the estimates of memory and disk with what commands take, and keep the record
	$(BIN)/python benchmarks/estimate_accuracy.py --json docs/records/estimates.json

reproduce: $(VENV)/.stamp-train ## repeat the paper's experiments and open questions; QUICK=1, EXPERIMENTS=NAME...
	$(BIN)/hqdit reproduce $(EXPERIMENTS) --out $(REPRODUCED) $(if $(QUICK),--quick)

train-shapes: $(VENV)/.stamp-train ## train the bundled shapes model again
	$(BIN)/python training/train_shapes_model.py \
		--out src/hqdit/data/shapes --record training/shapes_model_record.json

train-digits: $(VENV)/.stamp-train ## train the bundled digits model again
	$(BIN)/python training/train_digits_model.py \
		--out src/hqdit/data/digits --record training/digits_model_record.json

train-classifier: $(VENV)/.stamp-train ## train the bundled digits classifier again
	$(BIN)/python training/train_digits_classifier.py \
		--out src/hqdit/data/digits_evaluation --record training/digits_classifier_record.json

train-shapes-classifier: $(VENV)/.stamp-train ## train the bundled shapes classifier again
	$(BIN)/python training/train_shapes_classifier.py \
		--out src/hqdit/data/shapes_evaluation --record training/shapes_classifier_record.json

check-digits: $(VENV)/.stamp-train ## measure the bundled digits model: classes asked for, nearest training images
	$(BIN)/python training/check_model.py --model digits --record training/digits_model_check.json

check-shapes: $(VENV)/.stamp-train ## measure the bundled shapes model in the same way
	$(BIN)/python training/check_model.py --model shapes --record training/shapes_model_check.json

stress: $(VENV)/.stamp-run ## measure what activation outliers cost (c = 1, 10, 30, 100) and write the record
	$(BIN)/python benchmarks/outlier_stress.py --json docs/records/outlier_stress.json

# Without the peers' environment every peer is recorded as absent.
peer-accuracy: $(VENV)/.stamp-run ## measure the accuracy of presets beside other libraries; PRESETS='NAME...'
	-$(MAKE) bench-peers
	$(BIN)/python benchmarks/peer_accuracy.py --out docs/records/peer_accuracy $(if $(PRESETS),--presets $(PRESETS))

group-sizes: $(VENV)/.stamp-run ## measure what groups of hqdit-plus cost in time and gain in accuracy, and keep the record
	$(BIN)/python benchmarks/group_sizes.py --json benchmarks/results/group_sizes.json

records: demo stress ## run demo and stress, keep their records and picture, and write README's tables from them
	cp demo/record.json docs/records/demo.json
	cp demo/samples.png docs/images/samples.png
	$(MAKE) readme

readme: $(VENV)/.stamp-run ## write README's tables from docs/records
	$(BIN)/python benchmarks/update_readme.py

support-matrix: $(VENV)/.stamp-run ## write docs/support.md for the installed diffusers
	$(BIN)/python benchmarks/update_support.py

package: $(VENV)/.stamp-dev ## build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean: ## remove .venv, caches and everything that make wrote
	rm -rf $(VENV) $(OLDEST_VENV) $(PEERS_VENV) build demo dist $(REPRODUCED) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests training -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'hqdit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml constraints.txt $(NATIVE)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-train: $(VENV)/.stamp-venv pyproject.toml constraints.txt $(NATIVE)
	$(PIP) install -c constraints.txt -e '.[train]'
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml constraints.txt $(NATIVE)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.stamp-run $(VENV)/.stamp-train $@

# A wheel of atheris exists for Linux; elsewhere the test that needs it is skipped.
$(VENV)/.stamp-fuzz: $(VENV)/.stamp-dev
	-$(PIP) install --only-binary atheris -c constraints.txt atheris
	@touch $@

$(PEERS_VENV)/.stamp: $(PEERS) constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'hqdit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install -c constraints.txt -r $(PEERS)
	@touch $@

$(OLDEST_VENV)/.stamp: pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'hqdit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(OLDEST_VENV)
	grep -vE '^($(UNPINNED))==' constraints.txt >$(OLDEST_VENV)/constraints.txt
	PIP_CONSTRAINT=$(OLDEST_VENV)/constraints.txt PIP_BUILD_CONSTRAINT=$(OLDEST_VENV)/constraints.txt \
		$(OLDEST_VENV)/bin/python -m pip install 'diffusers==$(OLDEST_DIFFUSERS).*' -e '.[dev]'
	@touch $@
