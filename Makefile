# The commands of a checkout; `make help` lists them.

BIN := .venv/bin
OLD := sys.version_info < (3, 11)
# The Python of an environment that is there, else python3.
PYTHON ?= $(shell $(BIN)/python -c 'import sys; sys.exit($(OLD))' 2>/dev/null && echo $(BIN)/python || echo python3)
DEMO ?= demo
RUN := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow golden test-gpu lint reference bench app

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/installed ## install everything into .venv (a few GB, a minute or two)

CHECK = import sys; $(OLD) and sys.exit("Error: $(PYTHON) is Python %d.%d, expected 3.11 or newer; \
type: make setup PYTHON=python3.12" % sys.version_info[:2])
VERSION := -c 'import sys; print(sys.version_info[:2])'

# Without --clear, `venv` keeps the Python that it finds in the folder: an older one, or one that is gone.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(CHECK)'
	$(PYTHON) -m venv $$([ "$$($(PYTHON) $(VERSION))" = "$$($(RUN) $(VERSION) 2>&1)" ] || echo --clear) .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(RUN) --constraint constraints.txt \
		-r pyproject.toml --all-extras
	touch $@

demo: setup ## pack, train twice, evaluate and predict on synthetic images (2 to 6 minutes)
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

test: setup ## run the tests that are not slow (7 minutes on two slow cores)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## run every test
	$(RUN) -m pytest

golden: setup ## rewrite the golden values in tests/golden; `git diff` shows the changes
	OMP_NUM_THREADS=1 $(RUN) -m pytest --write-golden tests/model/training tests/pipeline

test-gpu: $(if $(filter file,$(origin RUN)),setup) ## run the tests that need a GPU and are not slow; fails without one. RUN=PYTHON runs them without setup
	REQUIRE_GPU=1 $(RUN) -m pytest -m "gpu and not slow" tests/pipeline tests/model/training/test_step_waits.py

lint: setup ## check style and format (ruff) and types (mypy)
	$(BIN)/ruff check . docs/reference.py
	$(BIN)/ruff format --check . docs/reference.py
	$(BIN)/mypy

reference: setup ## write docs/recipe-keys.md, catalog-keys.md and fields.md from the code
	$(RUN) -m docs.reference

bench: setup ## measure both loading backends against other loaders
	$(RUN) -m benchmarks.loader

app: setup ## start the web page, for this machine only
	$(BIN)/streamlit run app_server.py
