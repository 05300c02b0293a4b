BIN := .venv/bin
ROOT ?= data/demo
TOOLS := docs policy supply
LOCKS := requirements.lock infra/requirements-gpu.lock $(wildcard infra/tools/*.lock)
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header

# The GPU measurements run with any Python that has torch: that of the environment if there is one.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz gpu lint policy docs reference setup outdated lock audit sbom licenses clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target what; do \
	  printf '%-18s %s\n' "  $$target" "$$what"; done

demo: setup  ## run every stage on real images, and write a report
	$(BIN)/python -m jobs demo --root $(ROOT)
	@case :$$PATH: in *:"$(CURDIR)/$(BIN)":*) ;; *) echo 'to type rdm commands here: . $(BIN)/activate';; esac

test: setup lint  ## what every change must pass
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not fuzz" tests

test-all: setup lint  ## with the slow and the GPU tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not fuzz" tests

fuzz: setup  ## read damaged files of every format for ten minutes (FUZZ_SECONDS=...); to run every night
	$(BIN)/python -m pytest -m fuzz tests/fuzz

gpu:  ## measure everything on this machine's GPU, at most ten minutes; needs torch, but not make setup
	$(GPU_PYTHON) tests/bench/gpu.py $(GPU_OPTIONS)

lint: setup policy  ## style, layers and types, and policy
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

policy: setup  ## check the manifests and the Dockerfile with checkov
	"$$(PYTHON=$(BIN)/python infra/tools.sh policy)"/bin/python infra/policy.py

docs: setup  ## the site of the documents, into build/site; checks links, files, commands and examples first
	$(BIN)/python -m pytest tests/docs
	"$$(PYTHON=$(BIN)/python infra/tools.sh docs)"/bin/zensical build --strict

reference: setup  ## the pages of docs/reference/ that come from the code
	PYTHONPATH=. $(BIN)/python tests/docs/reference.py

setup:  ## .venv, with the first supported Python of: PYTHON=..., python3, the newest python3.X
	@PYTHON="$(PYTHON)" infra/setup.sh

outdated: setup  ## packages with a newer release than the locked one
	$(BIN)/uv pip list --outdated --exclude pip

# infra/requirements-gpu.lock has only what the gpu extra adds: faiss-gpu replaces faiss-cpu.
lock: setup  ## the newest versions that fit together, into all lock files
	{ sed '/^#/!d' requirements.lock; $(COMPILE) --upgrade pyproject.toml --extra autofaiss --extra dev; } >requirements.new
	mv requirements.new requirements.lock
	{ sed '/^#/!d' infra/requirements-gpu.lock; \
	  $(COMPILE) --upgrade pyproject.toml --extra gpu --constraints requirements.lock | grep -vxFf requirements.lock; \
	} >requirements.new
	mv requirements.new infra/requirements-gpu.lock
	for name in $(TOOLS); do \
	  { sed '/^#/!d' infra/tools/$$name.lock; $(COMPILE) --upgrade infra/tools/$$name.in; } >requirements.new && \
	  mv requirements.new infra/tools/$$name.lock || exit 1; done

# One environment for each: pip-audit and cyclonedx-bom are not among the packages of requirements.lock.
audit: setup  ## known vulnerabilities of all locked packages; needs a vulnerability service (AUDIT_OPTIONS=...)
	@tools=$$(PYTHON=$(BIN)/python infra/tools.sh supply) && status=0 && for lock in $(LOCKS); do \
	  echo "audit: $$lock" >&2; \
	  "$$tools/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner off $(AUDIT_OPTIONS) -r "$$lock" || status=1; \
	done; exit $$status

sbom: setup  ## CycloneDX lists of the locked packages, into build/sbom.json and build/sbom-gpu.json
	tools=$$(PYTHON=$(BIN)/python infra/tools.sh supply) && infra/sbom.sh "$$tools/bin/cyclonedx-py" build

licenses: setup  ## the licenses of the locked packages, into docs/reference/licenses.md
	$(BIN)/python infra/licenses.py

clean:  ## remove .venv and what was built
	rm -rf .venv build .cache *.egg-info
