# The front door. GNU make 3.81 (macOS) is enough.
PYTHON ?= python3
VENV ?= .venv
PKG ?=
QUICK ?=
AGAIN ?=
UV ?= 1
export UV

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
# Installed commands (a package's, ruff, uv) come before those of the machine.
export PATH := $(abspath $(VENV)/bin):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup prove test lint bench dist docs clean

help:
	@echo "make setup                    make $(VENV) and install every package, editable; nothing when nothing changed"
	@echo "make prove [PKG=x] [QUICK=1]  run the proofs on real data; writes runs/report.html"
	@echo "           [AGAIN=1]          ... each twice: their numbers must be the same, but for times"
	@echo "make test  [PKG=x]            run the tests of shared/, tools/ and all packages"
	@echo "make lint                     ruff, basedpyright, deptry"
	@echo "make bench [PKG=x]            measure against what a user would pick instead; writes runs/bench.html"
	@echo "make dist  [PKG=x|all]        build every wheel, install one package (or each) by name in a fresh environment"
	@echo "make docs                     build the documentation, without installing any package; writes runs/docs"
	@echo "make clean                    remove $(VENV), $(VENV)-docs, .cache, dist, runs"
	@echo
	@echo "PKG=x names one package. PYTHON=python3.12 and VENV=.venv-3.12 make another environment."
	@echo "UV_TORCH_BACKEND=cpu picks CPU-only torch. UV=0 installs with plain pip."

setup: $(STAMP)

$(STAMP): tools/setup.sh tools/uv-env.sh pyproject.toml constraints.txt embedded.txt \
          $(wildcard shared/pyproject.toml packages/*/pyproject.toml)
	@sh tools/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

prove: setup
	@$(RUN) -m tools.prove $(if $(PKG),--package $(PKG)) $(if $(filter-out 0,$(QUICK)),--quick) \
		$(if $(filter-out 0,$(AGAIN)),--again)

test: setup
	@$(RUN) -m tools.suite $(if $(PKG),--package $(PKG))

lint: setup
	@$(RUN) -m tools.lint

bench: setup
	@$(RUN) -m tools.bench $(if $(PKG),--package $(PKG))

dist: setup
	@sh tools/dist.sh "$(RUN)" "$(PKG)"

docs:
	@sh tools/docs.sh "$(PYTHON)" "$(VENV)-docs"

clean:
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@if [ -f "$(VENV)-docs/pyvenv.cfg" ]; then rm -rf "$(VENV)-docs"; fi
	rm -rf .cache dist runs .pytest_cache .ruff_cache .hypothesis
