# `make` lists the commands: those below with a comment behind `##`, in the groups that `##@` names.
# Each command sets up what it needs: a virtual environment, the dependencies, the built extension.
# Another PyTorch: make test TORCH=torch==2.15.0 PYTHON=python3.13 VENV=.venv-2.15

.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
# A torch with CUDA, which nvcc's toolkit comes with: 5.5 GB.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
# The same torch, and the libraries that train with it: 7 GB.
INTEGRATIONS_VENV ?= .venv-integrations
# Pinned, since another version formats differently or finds something else.
LINTERS := ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1

PY := $(VENV)/bin/python
# A process for each processor, up to 8, since each takes 2 GB; a file's tests stay in one.
PYTEST := $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile
# Large downloads show how far they are, small ones only their names.
PIP := $(PY) -m pip --disable-pip-version-check install
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_TESTS := $(shell find tests tools -name '*.cpp' -o -name '*.h')
HAS_GPU = $(shell $(PY) -c "import torch; print('1' if torch.cuda.is_available() else '')")

.PHONY: help demo bench gpu-check build check test test-emulated lint format sanitize sanitize-cuda \
    mutants emulate cuda-check fuzz test-large test-matrix test-integrations docs capabilities dist clean

help:
	@awk -F ':.*## |##@ ' ' \
	    /^##@ / { printf "\n%s\n", $$2 } \
	    /^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

##@ For users

demo: build ## train on MNIST with fastnn and with PyTorch (ARGS="--loss cross_entropy")
	@echo "Training on MNIST ..."
	$(PY) examples/mnist.py $(ARGS)

bench: build ## time every operator against the alternatives (ARGS="--quick")
	$(PY) -m benchmarks $(ARGS)

# This uses the environment of PYTHON as it is, and fetches nothing. Its torch must have CUDA.
gpu-check: ## check and measure everything on a GPU: 10 minutes (ARGS="--only smoke")
	$(PYTHON) tools/gpu/check.py $(ARGS)

build: $(VENV)/.built ## build the extension and its environment

##@ For contributors

# The tests of what users call, each once. `make test` adds the emulated kernels, the compilers and
# exporters, the examples and the build.
QUICK := $(addprefix ops/test_,operators.py gradients.py accuracy.py errors.py backward_errors.py \
        dispatch.py opcheck.py tensor_classes.py autocast.py) \
    nn optim training transforms/test_transforms.py docs/test_docs.py \
    $(addprefix programs/test_,training.py saving.py tools.py) \
    $(addprefix project/test_,torch_names.py package.py makefile.py)
check: lint $(VENV)/.test_tools ## the quick lane, for each commit: lint, types, the main tests: 3 minutes
	$(PYTEST) $(QUICK:%=tests/%) $(ARGS)

test: $(VENV)/.test_tools ## run all tests, then again on emulated CUDA kernels (ARGS="-k cross_entropy")
	@echo "Tests on the CPU's kernels; a dot is a test that has passed."
	$(PYTEST) $(ARGS)
	$(MAKE) test-emulated
	$(if $(HAS_GPU),$(PY) -m pytest --device cuda $(ARGS))

# All tests run with the threads in one order, and the operators' tests in two other orders.
OR_NONE_CHOSEN := || [ $$? -eq 5 ]
EMULATED := FASTNN_TEST_CUDA_EMULATION=1 CXX="$(CXX)"
test-emulated: $(VENV)/.test_tools ## run the tests on CUDA kernels that the CPU emulates
	@echo "Tests on emulated CUDA kernels, in three orders of threads; compiling them takes minutes."
	$(EMULATED) FASTNN_EMULATION_ORDER=forward $(PYTEST) $(ARGS) $(OR_NONE_CHOSEN)
	$(EMULATED) FASTNN_EMULATION_ORDER=reverse $(PYTEST) --dist load tests/ops/test_operators.py $(ARGS) $(OR_NONE_CHOSEN)
	$(EMULATED) FASTNN_EMULATION_ORDER=shuffled $(PYTEST) --dist load tests/ops/test_operators.py $(ARGS) $(OR_NONE_CHOSEN)

# mypy reads the types of the installed torch.
lint: $(VENV)/.lint ## check the style and the static types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES) $(CXX_TESTS)
	$(PY) -m mypy

format: $(VENV)/.lint ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES) $(CXX_TESTS)

# This needs only a C++ compiler.
sanitize: ## run the CPU kernels under the compiler's sanitizers: 10 minutes
	CXX="$(CXX)" $(PYTHON) tests/kernels/run.py sanitize

# This needs torch's headers.
sanitize-cuda: $(VENV)/.torch ## run the emulated CUDA kernels under them: 10 minutes
	CXX="$(CXX)" $(PY) tools/cuda_emulation/run.py sanitize

mutants: $(VENV)/.torch ## plant faults in the CUDA kernels; the tests must find them: 10 minutes
	CXX="$(CXX)" $(PY) tools/cuda_emulation/mutants.py $(ARGS)

emulate: build ## run the CPU kernels on emulated processors: no AVX, AVX-512, ARM
	CXX="$(CXX)" $(PY) tests/kernels/run.py emulate

# In its own environment. ARGS go to pytest.
cuda-check: ## build the CUDA part with nvcc and run its PTX, without a GPU: 45 minutes
	$(MAKE) VENV=$(CUDA_VENV) TORCH="$(CUDA_TORCH)" $(CUDA_VENV)/.cuda_tools
	$(CUDA_VENV)/bin/python tools/cuda_build.py $(ARGS)

fuzz: $(VENV)/.test_tools ## run random programs with fastnn and with PyTorch, and compare (ARGS="--minutes 5")
	PYTHONPATH=tests:tools $(PY) -m fuzz $(ARGS)

# -x: a failed test keeps its tensors, which leaves the next one no memory.
test-large: $(VENV)/.test_tools ## test tensors of more than 2^31 elements: hours, 24 GiB of memory
	$(PY) -m pytest --large -x tests/ops/test_large.py $(ARGS)
	$(EMULATED) $(PY) -m pytest --large -x tests/ops/test_large.py $(ARGS)

# In environments of their own, each of 6 GB where PyTorch comes with CUDA.
test-matrix: ## build and test with several versions of PyTorch and Python (ARGS=2.9.1)
	$(PYTHON) tools/matrix.py $(ARGS)

# In its own environment, and on the CPU. `python -m pytest` would import the working tree's fastnn
# instead of the installed one; `pytest` does not.
test-integrations: ## train with torchvision, timm, fastai, Lightning and others
	$(MAKE) VENV=$(INTEGRATIONS_VENV) TORCH="$(CUDA_TORCH)" $(INTEGRATIONS_VENV)/.stacks
	CUDA_VISIBLE_DEVICES= $(INTEGRATIONS_VENV)/bin/pytest tests/programs/integrations $(ARGS)

# Warnings are errors. A name of ours that does not exist is a warning.
SPHINX := $(PY) -m sphinx -q -W --keep-going -d docs/_build/doctrees
docs: $(VENV)/.docs ## build the documentation and run its examples (Python 3.11 or newer)
	$(SPHINX) -b html docs docs/_build/html
	$(SPHINX) -b doctest docs docs/_build/doctest
	@echo "Built docs/_build/html/index.html; its examples run."

clean: ## remove the environment and everything that was built
	rm -rf build dist docs/_build docs/_notebook $(VENV) fastnn/*.so fastnn/_build_info.json fastnn.egg-info

##@ For releases

capabilities: $(VENV)/.test_tools ## write docs/capabilities.md from the tests that it names
	mkdir -p docs
	$(PY) -m pytest -m capability --capabilities=docs/capabilities.md

dist: $(VENV)/.build_tool ## build the source distribution and the wheel, and try the wheel
	$(PY) tools/dist.py "$(TORCH)"

# ---- what the commands set up --------------------------------------------------------------------

# The build of another environment has replaced the extension of this one.
ifneq ($(shell cmp fastnn/_build_info.json $(VENV)/.built 2>&1),)
.PHONY: $(VENV)/.built
endif

$(PY):
	@echo "Creating the environment $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: the build needs it, and its version decides which wheels pip takes.
$(VENV)/.torch: | $(PY)
	@echo "Installing $(TORCH) and what the build needs ..."
	$(PIP) "$(TORCH)" "setuptools>=77" ninja numpy
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(wildcard build_support/*.py) $(CXX_FILES)
	@echo "Building fastnn (about three minutes on two cores) ..."
	$(PY) -W ignore setup.py --quiet build_ext --inplace
	@echo "Installing fastnn, and what its demo needs ..."
	$(PIP) --no-build-isolation --editable ".[examples]"
	cp fastnn/_build_info.json $@

$(VENV)/.cuda_tools: $(VENV)/.torch
	@echo "Installing the tools that read CUDA's machine code ..."
	$(PIP) --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

# fastnn itself is already installed, so pip adds only the packages of the extra.
$(VENV)/.test_tools: $(VENV)/.built
	@echo "Installing what the tests need ..."
	$(PIP) --quiet "fastnn[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.built
	@echo "Installing Sphinx ..."
	$(PIP) --quiet "fastnn[docs]"
	touch $@

$(VENV)/.build_tool: $(VENV)/.torch
	$(PIP) --quiet build
	touch $@

# Not editable, since the extension in the working tree is built for another torch.
$(VENV)/.stacks: $(VENV)/.torch setup.py pyproject.toml $(wildcard build_support/*.py) $(CXX_FILES) $(wildcard fastnn/*.py) tests/programs/integrations/requirements.txt
	@echo "Building fastnn (about three minutes on two cores) ..."
	FASTNN_CUDA=0 $(PY) -W ignore setup.py --quiet build_ext
	@echo "Installing fastnn, torchvision, timm, fastai, Lightning, transformers, skorch ..."
	FASTNN_CUDA=0 $(PIP) --no-build-isolation . -r tests/programs/integrations/requirements.txt
	touch $@

# After torch, whose types mypy reads.
$(VENV)/.lint: Makefile $(VENV)/.torch
	@echo "Installing $(LINTERS) ..."
	$(PIP) --quiet $(LINTERS)
	touch $@
