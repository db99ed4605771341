# make demo: classify digits on every backend this machine can run. make test: the whole suite.
# Each target installs what it needs into .venv, once; nothing is installed twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
# what the editable install is built from
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: setup demo test lint wheel clean

setup: $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.created
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info pvt_fast/_C*.so demo.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and pinned: an unpinned one may bring gigabytes of CUDA libraries
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) torch
	touch $@

$(VENV)/.demo: $(SOURCES) $(VENV)/.torch
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test: $(SOURCES) $(VENV)/.torch
	$(PIP_INSTALL) setuptools pybind11
	$(PIP_INSTALL) -e '.[demo,test]'
	touch $@ $(VENV)/.demo
