PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
ROOT ?= data/demo

.PHONY: demo test test-all lint setup clean

demo: setup  ## the whole way on real pictures, and a report
	$(BIN)/python -m jobs demo --root $(ROOT)

test: setup lint  ## what every change must pass
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" tests

test-all: setup lint  ## with the slow and the GPU tests
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports

setup: $(READY)

# uv installs in half a minute what pip installs in two; where it cannot, pip does. Compiled at once: where Python is
# not allowed to write, every process would do it anew.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9 \
	  && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock \
	  || $(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.ready-*
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
