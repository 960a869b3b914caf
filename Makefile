# Everything a newcomer needs; `make help` lists it.

PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
RUN := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow golden test-gpu lint reference bench app

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/installed ## install everything into .venv (a few GB, a minute or two)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	echo trackio > .venv/left-out.txt  # it wants an older Pillow than constraints.txt names
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(RUN) --constraint constraints.txt \
		--excludes .venv/left-out.txt -r pyproject.toml --all-extras
	touch $@

demo: setup ## the whole flow on synthetic images: pack, train twice, evaluate, predict (4 minutes)
	$(RUN) -m sharding demo $(DEMO)
	$(RUN) -m sharding build --raw $(DEMO)/raw --catalog $(DEMO)/catalog.toml --out $(DEMO)/shards
	$(RUN) train.py --recipe recipes/demo-phase1.toml --data $(DEMO)/shards --runs $(DEMO)/runs
	$(RUN) train.py --recipe recipes/demo-phase2.toml --data $(DEMO)/shards --runs $(DEMO)/runs
	$(RUN) evaluate.py --shards val --shards val-phase2 --shards evalgen --data $(DEMO)/shards \
		--checkpoint $(DEMO)/runs/demo-phase1 --out $(DEMO)/report-phase1
	$(RUN) evaluate.py --shards val --shards val-phase2 --shards evalgen --data $(DEMO)/shards \
		--checkpoint $(DEMO)/runs/demo-phase2 --out $(DEMO)/report-phase2
	$(RUN) predict.py $(DEMO)/raw/unseen/*/*/0000* --runs $(DEMO)/runs
	$(RUN) evaluate.py compare $(DEMO)/report-phase1/report.json $(DEMO)/report-phase2/report.json
	@echo "raw images: $(DEMO)/raw   shards: $(DEMO)/shards   checkpoints and curves: $(DEMO)/runs"

test: setup ## the tests that take at most 5 minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n 2 --dist loadfile  # two workers, two cores

test-slow: setup ## every test
	$(RUN) -m pytest

golden: setup ## write the golden values in tests/golden anew: `git diff` then shows what changed
	OMP_NUM_THREADS=1 $(RUN) -m pytest --write-golden tests/model/training tests/pipeline

test-gpu: ## the tests that need a GPU; without one this fails. RUN=python3 where nothing can be installed
	$(if $(filter $(BIN)/python,$(RUN)),$(MAKE) setup)
	REQUIRE_GPU=1 $(RUN) -m pytest -m gpu tests/pipeline

lint: setup ## ruff: style and format; mypy: types
	$(BIN)/ruff check . docs/reference.py
	$(BIN)/ruff format --check . docs/reference.py
	$(BIN)/mypy

reference: setup ## write docs/recipe-keys.md and docs/fields.md from the code
	$(RUN) -m docs.reference

bench: setup ## loader throughput of both backends against other loaders, one table
	$(RUN) -m benchmarks.loader

app: setup ## the web page, on this machine only
	$(BIN)/streamlit run app_server.py
