# Each command sets up what it needs: a virtual environment, the dependencies, the built extension.
#   make demo [ARGS="--momentum 0.9"]     trains the MNIST MLP with fastnn and with stock PyTorch
#   make test [ARGS="-k cross_entropy"]   runs the tests, and again over emulated CUDA kernels
#   make test-matrix [ARGS=2.9.1]         builds and tests for several versions of PyTorch and Python
#   make test-large                       runs those of more than 2^31 elements, which take 24 GiB
#   make capabilities                     writes docs/capabilities.md from the tests that it names
#   make mutants                          plants faults in the CUDA kernels: do the tests see them?
#   make bench [ARGS="--quick"]           times every operator against what else there is
#   make sanitize                         runs the CPU kernels under the compiler's sanitizers
#   make sanitize-cuda                    runs the emulated CUDA kernels under them
#   make emulate                          runs the CPU kernels on emulated CPUs: no AVX, AVX-512, ARM
#   make gpu-check [ARGS="--only smoke"]  checks and measures it all on a GPU, in ten minutes
#   make cuda-check                       builds the CUDA part with nvcc and checks it; needs no GPU
#   make docs                             builds the documentation and runs its examples
#   make dist                             builds the sdist and the wheel, and tries them
#   make test-integrations                trains with torchvision, timm, fastai, Lightning and others
#   make lint / make format               checks / applies the code style
# On two cores mutants, sanitize and sanitize-cuda take about ten minutes each, cuda-check half an hour,
# test-large hours.
# Another torch: make test TORCH=torch==2.15.0 PYTHON=python3.13 VENV=.venv-2.15

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
# A torch with CUDA, for which nvcc's toolkit has to be there: 5.5 GB.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
# The same torch and what trains with it: 7 GB.
INTEGRATIONS_VENV ?= .venv-integrations
# Pinned: another version formats otherwise.
LINTERS := ruff==0.17.6 clang-format==23.1.5

PY := $(VENV)/bin/python
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_TESTS := $(shell find tests -name '*.cpp' -o -name '*.h')
HAS_GPU = $(shell $(PY) -c "import torch; print('1' if torch.cuda.is_available() else '')")

.PHONY: demo test test-emulated test-matrix test-large capabilities bench sanitize sanitize-cuda \
    mutants emulate cuda-check gpu-check docs dist test-integrations lint format build clean

demo: build
	$(PY) examples/mnist.py $(ARGS)

test: build
	$(PY) -m pytest $(ARGS)
	$(MAKE) test-emulated
	$(if $(HAS_GPU),$(PY) -m pytest --device cuda $(ARGS))

# The CUDA launchers and kernels on the CPU: all tests with the threads in one order, and those of
# the operators in the others.
OR_NONE_CHOSEN := || [ $$? -eq 5 ]
EMULATED := FASTNN_TEST_CUDA_EMULATION=1 CXX="$(CXX)"
test-emulated: build
	$(EMULATED) FASTNN_EMULATION_ORDER=forward $(PY) -m pytest $(ARGS) $(OR_NONE_CHOSEN)
	$(EMULATED) FASTNN_EMULATION_ORDER=reverse $(PY) -m pytest tests/test_operators.py $(ARGS) $(OR_NONE_CHOSEN)
	$(EMULATED) FASTNN_EMULATION_ORDER=shuffled $(PY) -m pytest tests/test_operators.py $(ARGS) $(OR_NONE_CHOSEN)

# In environments of their own, of 6 GB each where PyTorch comes with CUDA.
test-matrix:
	$(PYTHON) tests/matrix.py $(ARGS)

# -x: the tensors of a test that failed are kept, and leave the next one no room.
test-large: build
	$(PY) -m pytest --large -x tests/test_large.py $(ARGS)
	$(EMULATED) $(PY) -m pytest --large -x tests/test_large.py $(ARGS)

capabilities: build
	mkdir -p docs
	$(PY) -m pytest -m capability --capabilities=docs/capabilities.md

bench: build
	$(PY) -m benchmarks $(ARGS)

# Needs a C++ compiler and no more.
sanitize:
	CXX="$(CXX)" $(PYTHON) tests/kernels/run.py sanitize

# Needs torch's headers.
sanitize-cuda: $(VENV)/.torch
	CXX="$(CXX)" $(PY) tests/cuda_emulation/run.py sanitize

mutants: $(VENV)/.torch
	CXX="$(CXX)" $(PY) tests/cuda_emulation/mutants.py $(ARGS)

emulate: build
	CXX="$(CXX)" $(PY) tests/kernels/run.py emulate

# In an environment of its own; ARGS go to pytest.
cuda-check:
	$(MAKE) VENV=$(CUDA_VENV) TORCH="$(CUDA_TORCH)" $(CUDA_VENV)/.cuda_tools
	$(CUDA_VENV)/bin/python tests/cuda_build.py $(ARGS)

# In the environment that PYTHON is of, whose torch has CUDA: nothing is set up, nothing fetched.
gpu-check:
	$(PYTHON) tests/gpu/check.py $(ARGS)

# A warning is an error, a name of ours that isn't there a warning.
SPHINX := $(PY) -m sphinx -q -W --keep-going -d docs/_build/doctrees
docs: $(VENV)/.docs
	$(SPHINX) -b html docs docs/_build/html
	$(SPHINX) -b doctest docs docs/_build/doctest
	@echo "Built docs/_build/html/index.html; its examples run."

dist: $(VENV)/.build_tool
	$(PY) tests/dist.py "$(TORCH)"

# In an environment of its own, too, and on the CPU. pytest by itself, which does not put the working
# tree before what is installed.
test-integrations:
	$(MAKE) VENV=$(INTEGRATIONS_VENV) TORCH="$(CUDA_TORCH)" $(INTEGRATIONS_VENV)/.stacks
	CUDA_VISIBLE_DEVICES= $(INTEGRATIONS_VENV)/bin/pytest tests/integrations $(ARGS)

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES) $(CXX_TESTS)

format: $(VENV)/.lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES) $(CXX_TESTS)

build: $(VENV)/.built

# Another environment's build has put its extension in the place of this one's.
ifneq ($(shell cmp fastnn/_build_info.json $(VENV)/.built 2>&1),)
.PHONY: $(VENV)/.built
endif

clean:
	rm -rf build dist docs/_build docs/_notebook $(VENV) fastnn/*.so fastnn/_build_info.json fastnn.egg-info

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: the build needs it, and its version decides which wheel is taken.
$(VENV)/.torch: | $(PY)
	$(PY) -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja numpy
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml csrc/cpu/simd/targets.py csrc/cuda/toolkit.py $(CXX_FILES)
	@echo "Building fastnn (about three minutes on two cores) ..."
	$(PY) -W ignore setup.py --quiet build_ext --inplace
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test]"
	cp fastnn/_build_info.json $@

$(VENV)/.cuda_tools: $(VENV)/.torch
	$(PY) -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

# fastnn itself is installed already: pip adds what the extra names.
$(VENV)/.docs: $(VENV)/.built
	$(PY) -m pip install --quiet "fastnn[docs]"
	touch $@

$(VENV)/.build_tool: $(VENV)/.torch
	$(PY) -m pip install --quiet build
	touch $@

# Not editable: the extension in the working tree is another torch's.
$(VENV)/.stacks: $(VENV)/.torch setup.py pyproject.toml $(CXX_FILES) $(wildcard fastnn/*.py) tests/integrations/requirements.txt
	@echo "Building fastnn (about three minutes on two cores) ..."
	FASTNN_CUDA=0 $(PY) -W ignore setup.py --quiet build_ext
	FASTNN_CUDA=0 $(PY) -m pip install --quiet --no-build-isolation . -r tests/integrations/requirements.txt
	touch $@

$(VENV)/.lint: Makefile | $(PY)
	$(PY) -m pip install --quiet $(LINTERS)
	touch $@
