# Everything starts here. A fresh machine needs Python 3.11 or newer and GNU make.
.PHONY: help demo up test test-faults check clean

# The first that really runs and is new enough; the name alone says little where shims stand in for versions.
PYTHON := $(shell for python in "$${PYTHON:-python3.11}" python3.12 python3.13 python3.14 python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && \
	{ command -v "$$python"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# By the environment, so that any character may be in it.
export IMAGES
# Some hundred processes of the tests would each compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo                a first run on sample images, then the dashboard"
	@echo "make demo IMAGES=path    the same with your own folder or archive"
	@echo "make up                  the service on http://127.0.0.1:8000 (another port: KINDRED_PORT=8001 make up)"
	@echo "make test                the whole test suite"
	@echo "make test-faults         every promise under faults in full; prints a table"
	@echo "make check               format, lint, types, import contract, fast tests"
	@echo "make clean               remove the environment (your data in var/ stays)"

demo: $(VENV)/.installed
	@images="$$IMAGES"; case "$$images" in "~/"*) images="$$HOME/$${images#??}";; esac; \
	exec $(BIN)/kindred demo $${images:+--images "$$images"}

up: $(VENV)/.installed
	@$(BIN)/kindred up

# One stack for the tests that share one (`xdist_group`), the rest on whichever process is free. Each process has one
# core: threads of one that wait for each other while the other computes take several times as long as one thread.
PYTEST := $(BIN)/python -m pytest
IN_TWO := OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(PYTEST) -n 2 --dist loadgroup

test: $(VENV)/.installed-dev
	$(IN_TWO)

# What `make test` does a few times, as often as docs/faults.md says.
test-faults: $(VENV)/.installed-dev
	KINDRED_FAULTS=full $(PYTEST) tests/faults --timeout=1800

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(IN_TWO) -m "not slow"

clean:
	rm -rf $(VENV) build ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Stamps: while pyproject.toml stays as it is, nothing is installed a second time.
# An environment that somebody made by hand is kept; one without pip, left by a failed start, is made anew.
$(VENV)/.created:
	@[ -n "$(PYTHON)" ] || { \
		echo "error: Kindred needs Python 3.11 or newer; found: $$(command -v python3 >/dev/null && python3 --version 2>&1 || echo none)." >&2; \
		echo "Install one, or name it: PYTHON=/path/to/python3.11 make …" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)." >&2; \
		exit 1; }
	@touch $@

# On a terminal pip shows how far it is; a log needs no bars.
$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing Kindred into $(VENV): PyTorch and what it needs are several GB, so the first time takes minutes."
	@[ -t 1 ] || quiet=--quiet; $(INSTALL) $$quiet --editable '.[train,embedded,demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and checks need."
	@[ -t 1 ] || quiet=--quiet; $(INSTALL) $$quiet --editable '.[train,embedded,demo,dev]'
	@touch $@
