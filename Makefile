# Everything here sets up what it needs: Python 3.10 or newer, a C++17 compiler and a network to PyPI are enough.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# No bytecode: of most of what is installed, nothing is ever imported.
INSTALL := $(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt
TEST_TIMEOUT ?= 600
# Ranks wait for each other a third of their time: three processes keep two cores busy.
TEST_PROCESSES ?= 3

FUZZ_SECONDS ?= 60

# A package of its own beside the installed one. What the sanitizers need in every process comes first, and the library
# of C++ with it, so that they see exceptions being thrown.
SANITIZED := build/sanitize
SANITIZERS = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))
SANITIZED_TESTS := tests/csrc/test_partition.py tests/csrc/test_fill_buckets.py tests/csrc/test_owners.py tests/csrc/cpu tests/ops \
	tests/optim tests/gradients/test_counting.py tests/fuzz

PYTHON_FILES := zeroopt tests bench examples recipes wheels docs/hooks
RECIPES := $(sort $(patsubst recipes/%/__main__.py,%,$(wildcard recipes/*/__main__.py)))
CPP_FILES := $(shell find csrc tests/support/cuda_on_cpu tests/support/on_arm tests/pretend_cuda -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu")
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt constraints.txt requirements-dev.txt \
	$(wildcard cmake/*.cmake) $(shell find csrc -type f)

# Hundreds of processes import the package: each would compile it anew.
unexport PYTHONDONTWRITEBYTECODE
# More threads than cores: those that wait for others would keep the cores busy.
bench-smoke test test-quick: export OMP_WAIT_POLICY := PASSIVE

.PHONY: help venv demo recipes bench bench-smoke gpu test test-quick fuzz fuzz-coverage sanitize soak matrix docs wheels lint types format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

venv: $(READY) ## Build the package and install it with its tools into .venv

demo: $(READY) ## Train a GPT with DDP and with zeroopt, and compare (about 3 minutes)
	$(VENV)/bin/python -m bench.demo

recipes: $(READY) ## Train each recipe small, with DDP and with zeroopt (under 10 minutes); docs/recipes/ says more
	set -e; for recipe in $(RECIPES); do $(VENV)/bin/python -m recipes.$$recipe; done

bench: $(READY) ## Compare with DDP, FSDP, ZeroRedundancyOptimizer and what else is installed (needs an idle machine)
	$(VENV)/bin/python -m bench.compare

bench-smoke: $(READY) ## Run every benchmark with next to nothing to do, to see that they work (about 2 minutes)
	$(VENV)/bin/python -m bench.smoke

gpu: ## Build, test and measure on the GPU at hand, with what is installed (some 8 minutes; needs no network)
	$(or $(wildcard $(VENV)/bin/python),$(PYTHON)) -m bench.gpu

test: $(READY) ## Run the tests
	$(VENV)/bin/python -m pytest tests --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder --timeout=$(TEST_TIMEOUT) --durations=5

test-quick: $(READY) ## Run the tests that take one process and little time (about a minute and a half)
	$(VENV)/bin/python -m pytest tests -m "not ranks and not slow" --timeout=$(TEST_TIMEOUT) --quiet

fuzz: $(READY) ## Read thousands of files that were damaged at random, and plan as many models (9 minutes of CPU time)
	$(VENV)/bin/python -m pytest tests/checkpoint/test_damage.py tests/csrc/test_partition.py tests/csrc/test_fill_buckets.py tests/csrc/test_owners.py --hypothesis-profile=deep --timeout=3600

fuzz-coverage: $(READY) ## Let a coverage-guided fuzzer attack readers, checks and the planner (12 times FUZZ_SECONDS; installs atheris)
	$(INSTALL) atheris
	$(VENV)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

sanitize: $(READY) ## Run the kernels and the planner under ASan and UBSan, and the board of the shared memory under TSan
	rm -rf $(SANITIZED)
	CMAKE_ARGS="-DZEROOPT_CUDA=off -DZEROOPT_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Debug" \
		$(VENV)/bin/python -m pip install --quiet --no-deps --target $(SANITIZED) .
	cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(VENV))/bin/python -m pytest $(SANITIZED_TESTS) -m "not slow" --timeout=$(TEST_TIMEOUT)
	$(VENV)/bin/python -m pytest tests/csrc/cpu/test_shm_board.py -k race --timeout=$(TEST_TIMEOUT)

soak: $(READY) ## Train, save, load and lose ranks for half an hour, without growing
	$(VENV)/bin/python -m bench.soak --minutes 30

matrix: $(READY) ## Run a quick suite with each torch and each Python that is tried (over an hour; 15 GB of room; installs uv and CMake)
	$(INSTALL) uv cmake ninja
	$(VENV)/bin/python -m tests.matrix

docs: $(VENV)/.docs ## Build the documentation's site into site/; a link or a name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

wheels: $(READY) $(VENV)/.wheels ## Build wheels into dist/ for every Python at hand, and try each (WHEELS="--pythons 3.11 --flavours cpu"; see docs/install.md)
	$(VENV)/bin/python -m wheels $(WHEELS)

lint: $(READY) ## Check style and types
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)
	$(VENV)/bin/mypy zeroopt bench examples recipes wheels tests/typed

types: $(READY) ## Check users' scripts by pyright, too, and that it knows the types of all names (installs pyright)
	$(INSTALL) pyright
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python --project tests/typed
	$(VENV)/bin/python -m tests.typed.completeness

format: $(READY) ## Rewrite the sources in the project's style
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES)
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info zeroopt/_C*.so runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# Editable, so that a changed Python file needs no installation; a changed C++ file is rebuilt by the next target. While that is compiled,
# other packages come over the network, those that zeroopt itself needs among them. They come behind `&`, where an interrupt is not heard
# of, and are ended; a compiler would go on beside the one that the next make starts.
$(READY): $(BUILD_FILES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements-dev.txt & others=$$!; trap "kill $$others" INT TERM; \
	$(INSTALL) --no-deps --editable .; built=$$?; \
	wait $$others && exit $$built
	touch $@

# Names are read out of the sources, not imported: the site needs no build of the package.
$(VENV)/.docs: requirements-docs.txt constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements-docs.txt
	touch $@

$(VENV)/.wheels: requirements-wheels.txt constraints.txt $(READY)
	$(INSTALL) --requirement requirements-wheels.txt
	touch $@
