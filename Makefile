# Everything here sets up what it needs: Python 3.10 or newer, a C++17 compiler and a network to PyPI are enough.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TEST_TIMEOUT ?= 300

PYTHON_FILES := zeroopt tests bench examples
CPP_FILES := $(shell find csrc tests/cuda_on_cpu -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu")
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt constraints.txt requirements-dev.txt \
	$(wildcard cmake/*.cmake) $(shell find csrc -type f)

.PHONY: help venv demo test lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(READY) ## Build the package and install it with its tools into .venv

demo: $(READY) ## Train a GPT with DDP and with zeroopt, and compare (about 3 minutes)
	$(VENV)/bin/python -m bench.demo

test: $(READY) ## Run the tests
	$(VENV)/bin/python -m pytest tests --timeout=$(TEST_TIMEOUT) --durations=5

lint: $(READY) ## Check style and types
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)
	$(VENV)/bin/mypy zeroopt bench examples

format: $(READY) ## Rewrite the sources in the project's style
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES)
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info zeroopt/_C*.so runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# Editable, so that a changed Python file needs no installation; a changed C++ file is rebuilt by the next target.
$(READY): $(BUILD_FILES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt --editable .
	touch $@
