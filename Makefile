# `make help` lists the targets. All but `gpu` use the virtual environment .venv, made on first need.

PYTHON ?= python3
BIN := .venv/bin
# Worker processes of the tests, empty for none. One thread each: with more they fight for the cores and
# take longer than a single process would.
WORKERS ?= 2
# How long `make gpu` takes, and the folder that it fills.
BUDGET ?= 9m
OUT ?= gpu-results
GPU_ARGS ?=
GPU_TEST_ARGS ?= -n 8
PYTEST_ARGS ?=
PYTEST = $(if $(WORKERS),OMP_NUM_THREADS=1 )$(BIN)/pytest$(if $(WORKERS), -n $(WORKERS))

READY := .venv/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: help test test-full test-oldest-triton lint lint-ruff lint-mypy lint-clang-format docs sanitize gpu gpu-package gpu-rehearsal gpu-sanitize gpu-test demo clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

# Torch first, so that the C++ extension is built against it (hence --no-build-isolation, and the PATH: ninja).
# torchvision, timm and open_clip without their dependencies: torchvision's compiled part is made for one build
# of torch and does not load beside a CPU-only one, and only its Python part is needed. So that they can be
# imported all the same, as README does, the environment gets a start-up file, which says how.
STARTUP := torchvision_beside_cpu_torch
$(READY): pyproject.toml setup.py constraints.txt tests/environment/$(STARTUP).py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch ninja setuptools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
	  -e '.[test,lint,demo,docs]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchvision timm open_clip_torch
	site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	  cp tests/environment/$(STARTUP).py "$$site" && echo "import $(STARTUP)" > "$$site/$(STARTUP).pth"
	@$(BIN)/python -c "import importlib.util as u; print('C++ extension:', \
	  'built' if u.find_spec('vitfast._C') else 'not built; pip install -v says why')"
	@touch $@

test: $(READY) ## run the tests, the long ones left out
	$(PYTEST) $(PYTEST_ARGS)

test-full: $(READY) ## run all tests
	$(PYTEST) -m "full or not full" $(PYTEST_ARGS)

# One target for each hook of .pre-commit-config.yaml.
# The oldest Triton of pyproject.toml in a folder of its own, which stands before the environment's on the path.
OLDEST_TRITON := 3.6.0
test-oldest-triton: $(READY) ## compile and execute the kernels for Hopper with the oldest Triton that vitfast takes
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/triton triton==$(OLDEST_TRITON)
	VITFAST_OLDEST_TRITON="$(CURDIR)/build/triton" $(PYTEST) -m full -k oldest_triton tests/diagnostics \
	  tests/kernels/test_executed.py $(PYTEST_ARGS)

lint: lint-ruff lint-mypy lint-clang-format ## check style and types

lint-ruff: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-mypy: $(READY)
	$(BIN)/mypy

lint-clang-format: $(READY)
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(wildcard tests/emulation/*.* tests/emulation/ptx/*.*)

docs: $(READY) ## build the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A second build of the extension beside the first, in a folder that has all else of the package as links.
# The sanitizers' runtime must be loaded before Python; leaks are not looked for, the interpreter has its own.
# With -s, so that pytest does not swallow the report of a crash.
SANITIZED := build/sanitize
CXX_LIBRARY = $(shell $(CXX) -print-file-name=$(1))
sanitize: $(READY) ## test the C++ extension under the address and undefined-behaviour sanitizers
	mkdir -p $(SANITIZED)/vitfast
	ln -sfn $(addprefix $(CURDIR)/,$(filter-out vitfast/_C%,$(wildcard vitfast/*))) $(SANITIZED)/vitfast
	VITFAST_BUILD=1 VITFAST_SANITIZE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext \
	  --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	LD_PRELOAD="$(call CXX_LIBRARY,libasan.so) $(call CXX_LIBRARY,libubsan.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  OMP_NUM_THREADS=2 $(BIN)/pytest -s -k native -o pythonpath=$(SANITIZED) $(wildcard tests/csrc/test_native*.py) \
	  tests/kernels/test_linear.py $(PYTEST_ARGS)

demo: $(READY) ## embed sample photos and find the ones alike
	$(BIN)/python examples/demo.py

# On a GPU machine, with the Python, torch and triton found there: no environment, no network, no install. All that is
# measured and tested stands in OUT as soon as it is known, in at most six files; a second call goes on where the first
# one stopped. docs/benchmarking.md says how to read it.
ON_GPU = PYTHONPATH="$(CURDIR):$(CURDIR)/tests$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)

gpu: ## measure and test a GPU for BUDGET, with $(PYTHON) as it is; results in OUT
	$(ON_GPU) -m vitfast bench all --budget $(BUDGET) --out $(OUT) --extension $(PACKAGE) $(GPU_ARGS)

gpu-sanitize: ## launch every kernel once under compute-sanitizer's memcheck and racecheck
	$(ON_GPU) -m vitfast bench all --sanitize --budget $(BUDGET) --out $(OUT)-sanitize

# The C++ extension for a GPU machine that has no time to build it: made here, where there need be no GPU, against the
# torch and for the Python found there, with the nvcc of that torch's CUDA. $(PACKAGE) is the folder to carry; `make gpu`
# takes it from there.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_CUDA ?= 13.0
GPU_ARCHS ?= 80;90
GPU := build/gpu
PACKAGE := $(GPU)/package
NVCC_WHEELS := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl
gpu-package: ## build the C++ extension for a GPU machine into build/gpu/package (minutes; needs no GPU)
	test -x $(GPU)/venv/bin/python || $(GPU_PYTHON) -m venv $(GPU)/venv
	$(GPU)/venv/bin/python -m pip install -q torch==$(GPU_TORCH) numpy ninja 'setuptools>=77.0.3' \
	  $(addsuffix ==$(GPU_CUDA).*,$(NVCC_WHEELS))
	set -e; cuda=$$($(GPU)/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia/cu13; \
	  mkdir -p $(GPU)/cuda/lib64; ln -sfn $$cuda/bin $$cuda/include $$cuda/nvvm $(GPU)/cuda/; \
	  ln -sfn $$cuda/lib/libcudart.so.13 $(GPU)/cuda/lib64/libcudart.so
	rm -rf $(PACKAGE)
	CUDA_HOME="$(CURDIR)/$(GPU)/cuda" VITFAST_BUILD=1 VITFAST_CUDA_ARCHS="$(GPU_ARCHS)" \
	  PATH="$(CURDIR)/$(GPU)/cuda/bin:$(CURDIR)/$(GPU)/venv/bin:$$PATH" \
	  $(GPU)/venv/bin/python setup.py -q build_ext --build-lib $(PACKAGE) --build-temp $(GPU)/temp
	strip --strip-unneeded $(PACKAGE)/vitfast/_C*.so
	$(GPU)/venv/bin/python benchmarks/carried.py $(PACKAGE)

# `make gpu` in a bare copy of the checkout, on a stand-in for the GPU, with an empty compile cache: its timeline. BUDGET is
# larger than a GPU's, for here are fewer cores; then the tests that plant faults.
gpu-rehearsal: BUDGET := 60m
gpu-rehearsal: OUT := build/rehearsal
gpu-rehearsal: $(READY) ## what a GPU would be given, on a stand-in for one, with its timeline, then with planted faults
	rm -rf $(OUT)
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" $(BIN)/python -m helpers.rehearsal --budget $(BUDGET) --out $(OUT)
	$(BIN)/pytest -m "full or not full" --durations 0 tests/benchmarks/test_campaign.py tests/benchmarks/test_standin.py

gpu-test: ## the tests for a GPU, as `make gpu` runs them
	$(ON_GPU) -m pytest -m device -p helpers.report $(GPU_TEST_ARGS) $(PYTEST_ARGS) \
	  $$(grep -rl --include='test_*.py' mark.device tests)

clean: ## remove the environment and all that was built
	rm -rf .venv build dist demo site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache vitfast/_C*.so
	find vitfast kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
