# Each command sets up what it needs: a virtual environment, the dependencies, the built extension.
#   make demo [ARGS="--momentum 0.9"]     trains the MNIST MLP with fastnn and with stock PyTorch
#   make test [ARGS="-k cross_entropy"]   runs the tests
#   make bench [ARGS="--quick"]           times every operator against what else there is
#   make sanitize                         runs the CPU kernels under the compiler's sanitizers
#   make emulate                          runs them on a CPU without AVX and on aarch64, with QEMU
#   make lint / make format               checks / applies the code style
# Another torch: make test TORCH=torch==2.14.1 VENV=.venv-2.14

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
# Pinned: another version formats otherwise.
LINTERS := ruff==0.17.6 clang-format==23.1.5

PY := $(VENV)/bin/python
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_TESTS := $(shell find tests -name '*.cpp' -o -name '*.h')

.PHONY: demo test bench sanitize emulate lint format build clean

demo: build
	$(PY) examples/mnist.py $(ARGS)

test: build
	$(PY) -m pytest $(ARGS)

bench: build
	$(PY) -m benchmarks $(ARGS)

# Needs a C++ compiler and no more.
sanitize:
	CXX="$(CXX)" $(PYTHON) tests/kernels/run.py sanitize

emulate: build
	CXX="$(CXX)" $(PY) tests/kernels/run.py emulate

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES) $(CXX_TESTS)

format: $(VENV)/.lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES) $(CXX_TESTS)

build: $(VENV)/.built

clean:
	rm -rf build dist $(VENV) fastnn/*.so fastnn/_build_info.json fastnn.egg-info

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: the build needs it, and its version decides which wheel is taken.
$(VENV)/.torch: | $(PY)
	$(PY) -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml csrc/cpu/simd/targets.py $(CXX_FILES)
	@echo "Building fastnn (about three minutes on two cores) ..."
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/.lint: Makefile | $(PY)
	$(PY) -m pip install --quiet $(LINTERS)
	touch $@
