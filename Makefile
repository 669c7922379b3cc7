# make demo: compress the model in fixtures/. make test, make lint: the project's own checks. PYTHON=... overrides
# the interpreter, which otherwise is the first of python3.12, python3.11 and python3.10 that works.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CANDIDATES := $(or $(PYTHON),python3.12 python3.11 python3.10 python3)
RIGHT_VERSION := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	PATH="$(BIN):$$PATH" onnxneutrino compress fixtures/digits.onnx out.onnx --delta 1

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "$(VENV): installing onnxneutrino and what it needs"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "$(VENV): installing onnxneutrino, what it needs and the tools of its tests"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# An interpreter may be a shim that fails when run, or lack ensurepip: each one is tried until an environment with
# pip stands. pip is the last thing that venv writes, so a half-made environment is made again.
$(BIN)/pip:
	@right=""; \
	for python in $(CANDIDATES); do \
	  "$$python" -c '$(RIGHT_VERSION)' >/dev/null 2>&1 || continue; \
	  right="$$right $$python"; \
	  if "$$python" -m venv --clear $(VENV) >/dev/null 2>&1; then \
	    echo "$(VENV): made with $$python ($$($(BIN)/python --version))"; exit 0; \
	  fi; \
	  rm -rf $(VENV); \
	done; \
	if [ -n "$$right" ]; then \
	  echo "$(VENV) cannot be made:$$right found, but without venv and ensurepip;" \
	    "install them (apt-get install python3-venv) or name another interpreter with PYTHON=..." >&2; \
	else \
	  echo "Python 3.10, 3.11 or 3.12 is missing (tried: $(CANDIDATES));" \
	    "install one or name it with PYTHON=..." >&2; \
	fi; \
	exit 1
