# make demo: classify digits on every backend this machine can run. make test: the whole suite.
# Each target installs what it needs into .venv, once; nothing is installed twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
# what the editable install is built from
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: setup demo test lint wheel cpp-test sanitize amx-test neon-test cross-tools bench-cpu gpu gpu-gates instructions instructions-update \
	clean

setup: $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h,$(SOURCES)) $(wildcard benchmarks/*.cpp)
	$(BIN)/mypy

# the kernels without Python: every op on every ISA that this CPU runs, against loops in double
CXXFLAGS := -std=c++17 -ffp-contract=fast -fno-math-errno -fopenmp -Wall -Wextra \
	-Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -Icsrc
KERNELS := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp)) $(wildcard csrc/isa/*.cpp)

cpp-test: build/test_kernels
	build/test_kernels

sanitize: build/test_kernels_sanitized
	build/test_kernels_sanitized

build/test_kernels: $(SOURCES)
	mkdir -p build
	$(CXX) $(CXXFLAGS) -O3 $(KERNELS) csrc/tests/test_kernels.cpp -o $@

# the AMX kernels on a CPU that lacks the matrix unit (but has AVX-512 with BF16): its tiles in plain C++
amx-test: build/test_kernels_amx
	build/test_kernels_amx amx

build/test_kernels_amx: $(SOURCES)
	mkdir -p build
	$(CXX) $(CXXFLAGS) -O3 -DPVT_EMULATED_AMX -include csrc/tests/emulated_amx.h $(KERNELS) \
		csrc/tests/test_kernels.cpp -o $@

# the kernels for ARM, cross-compiled and emulated: on a CPU with everything, then on one without bf16 instructions,
# where every ISA that calls itself runnable must run
CROSS_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64-static -L /usr/aarch64-linux-gnu

neon-test: build/test_kernels_aarch64
	$(QEMU) -cpu max $< neon_bf16 neon
	$(QEMU) -cpu cortex-a57 $<

cross-tools:
	@for tool in $(CROSS_CXX) $(firstword $(QEMU)); do command -v $$tool >/dev/null || { echo \
		"neon-test: $$tool must be installed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"; exit 1; }; done

build/test_kernels_aarch64: $(SOURCES) | cross-tools
	mkdir -p build
	$(CROSS_CXX) $(CXXFLAGS) -O3 $(KERNELS) csrc/tests/test_kernels.cpp -o $@

build/test_kernels_sanitized: $(SOURCES)
	mkdir -p build
	$(CXX) $(CXXFLAGS) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined $(KERNELS) \
		csrc/tests/test_kernels.cpp -o $@

# the README's table, an hour or two; runs merge, so that it may be made in pieces
BENCH_CPU := $(BIN)/python benchmarks/cpu.py --rounds 10 --peers compile,onnxruntime,openvino --out benchmarks/results

bench-cpu: $(VENV)/.bench
	$(BENCH_CPU) --models b0,b1,b2,b2_li,b3,b4,b5
	$(BENCH_CPU) --models b2 --batch 8
	$(BENCH_CPU) --models b2_li --size 512
	$(BENCH_CPU) --models b2 --size 1024 --rounds 6 --seconds 1.5
	PVT_FAST_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 $(BENCH_CPU) --models b0,b2 --dtype fp32 --peers compile

# everything that wants a CUDA GPU, with the Python that has torch for it and what else is installed there; more options
# by GPU_ARGS, e.g. --dry-run, which needs no GPU
GPU_PYTHON ?= python3

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# every kernel compiled ahead of time for every GPU it is for; no GPU is needed, half an hour is
gpu-gates: $(VENV)/.test
	$(BIN)/python tests/gpu_gates.py $(GATES_ARGS)

# counts of executed instructions against the committed ones; wants valgrind, no Python package
instructions: build/instructions
	$(PYTHON) benchmarks/instructions.py $<

instructions-update: build/instructions
	$(PYTHON) benchmarks/instructions.py $< --update

build/instructions: $(SOURCES) benchmarks/instructions.cpp
	mkdir -p build
	$(CXX) $(CXXFLAGS) -O3 $(KERNELS) benchmarks/instructions.cpp -o $@

wheel: $(VENV)/.created
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info pvt_fast/_C*.so demo.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and pinned: an unpinned one may bring gigabytes of CUDA libraries
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) torch
	touch $@

$(VENV)/.demo: $(SOURCES) $(VENV)/.torch
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test: $(SOURCES) $(VENV)/.torch
	$(PIP_INSTALL) setuptools pybind11
	$(PIP_INSTALL) -e '.[demo,test]'
	touch $@ $(VENV)/.demo

$(VENV)/.bench: $(SOURCES) $(VENV)/.torch
	$(PIP_INSTALL) -e '.[bench]'
	touch $@
