# Verbs for people who use and carry on vidbatch; `make help` lists them.
PYTHON ?= python3
PY := .venv/bin/python
# The lock resolves torch to whatever build of the pinned version the machine offers; for the CPU
# build of the index of PyTorch itself: make setup PIP_ARGS="--extra-index-url <its cpu index>"
PIP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-exhaustive check bench bench-daft bench-decode bench-gpu bench-scale soak fuzz chaos engines engines-current

help: ## what each verb does
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: .venv/.done ## makes .venv from requirements.lock

.venv/.done: requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet $(PIP_ARGS) -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup ## makes a small archive, runs the whole job on local Ray, asks two questions
	.venv/bin/vidbatch demo

test: setup ## the whole suite (the S3 tests use a real server where ceph is installed)
	$(PY) -m pytest $(TEST_ARGS)

test-exhaustive: setup ## every real video at every rule and clip length (a quarter of an hour)
	VIDBATCH_EXHAUSTIVE=1 $(PY) -m pytest tests/contracts/test_decoding.py --timeout 1800

fuzz: setup ## 20,000 mutated videos through the isolated decoder
	$(PY) -m tests.chaos.mutations $(FUZZ_ARGS)

check: setup ## ruff and mypy --strict
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup ## ratios side by side: decode floor, vidbatch, Ray Data (needs decord), Daft with --daft
	$(PY) -m pip install --quiet decord==0.6.0
	$(PY) -m tests.bench.job $(BENCH_ARGS)

DAFT := build/daft

bench-daft: setup $(DAFT)/.done ## the same beside Daft, in an environment of its own
	$(PY) -m tests.bench.job --daft --no-ray-data $(BENCH_ARGS)

$(DAFT)/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) daft==0.7.26 av==18.1.0 numpy==2.4.6 pyarrow==25.0.1 pillow==13.0.0
	touch $@

bench-gpu: setup ## what needs a GPU: its tests, which fail without one, then models in each precision
	FAIL_WITHOUT_GPU=1 $(PY) -m pytest -m gpu $(TEST_ARGS)
	$(PY) -m tests.bench.gpu $(BENCH_ARGS)

soak: setup ## a long run whose processes must not grow: SOAK_ARGS="--minutes 60"
	$(PY) -m tests.bench.soak $(SOAK_ARGS)

bench-decode: setup ## what sampling costs as a share of a full decode; beside other decoders
	test -d build/bench-decode/rivals || $(PY) -m pip install --quiet --no-deps --target build/bench-decode/rivals torchcodec==0.13.0 decord==0.6.0
	$(PY) -m tests.bench.decode $(BENCH_ARGS)

bench-scale: setup ## a million clips through driver, plan log and ledger (needs 2 GB in /dev/shm)
	$(PY) -m tests.bench.scale $(BENCH_ARGS)

chaos: setup ## the whole chaos suite: CHAOS_ARGS="--seed 2"
	$(PY) -m tests.chaos.run $(CHAOS_ARGS)

WRITER := $(wildcard vidbatch/tables/*.py) tests/engine_readers.py $(wildcard tests/engines_env/*.py tests/engines_env/*.txt)
ENGINES_SEEN := tests/engines_env/seen.sha256
ENGINES := build/engines

engines: setup $(ENGINES)/spark-3.5/.done $(ENGINES)/spark-newest/.done ## reads every table with two Spark versions (needs Java 17; installs below build/)
	ENGINES_DIR=$(CURDIR)/$(ENGINES) $(PY) -m pytest -m engines tests/test_engines.py
	sha256sum $(WRITER) > $(ENGINES_SEEN)

engines-current: # whether the Sparks have read what the writer writes now
	@sha256sum --check --status $(ENGINES_SEEN)

$(ENGINES)/%/.done: tests/engines_env/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) -r $<
	touch $@
