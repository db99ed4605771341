# make demo: classify digits on every backend this machine can run. make test: the whole suite.
# Each target installs what it needs into .venv, once; nothing is installed twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
# what the editable install is built from
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: setup demo test test-all test-peers lint style wheel cpp-test sanitize fuzz soak avx512-test neon-test cross-tools \
	baseline-test bench-cpu bench-busy bench-train gpu gpu-gates gpu-gates-update gpu-gates-all instructions instructions-update clean

setup: $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# test-all: with the whole product of cases, instruction sets and dtypes. A file is one worker's: its fixtures, some of
# which compile for a minute, are made once
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.test
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.test
	$(PYTEST) --full $(PYTEST_ARGS)

# with libraries that fine-tune and quantize, which are not needed for the rest
test-peers: $(VENV)/.test-peers
	$(PYTEST) tests/accelerate/test_adapters.py $(PYTEST_ARGS)

# style first: it needs nothing built and fails within seconds
lint: style $(VENV)/.test
	$(BIN)/mypy

style: $(VENV)/.style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h,$(SOURCES)) $(wildcard benchmarks/*/*.cpp)

# the kernels without Python: every op on every ISA that this CPU runs, against loops in double. An object per source,
# in a folder for each set of flags; the compiler tells what it was made from
CXXFLAGS := -std=c++17 -ffp-contract=fast -fno-math-errno -fopenmp -Wall -Wextra \
	-Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -Icsrc
KERNELS := $(filter-out csrc/tests/%,$(wildcard csrc/*/*.cpp))
# for GCC's time, most of which goes into few huge functions where all is inlined: -g1 is enough for the lines of a report,
# -g follows every variable, and points-to analysis takes a quarter of the rest
SANITIZED := -O1 -g1 -fno-tree-pta -fsanitize=address,undefined -fno-sanitize-recover=undefined
# threads of the test's own, see csrc/runtime/parallel.cpp
THREAD_SANITIZED := -O1 -g1 -fno-tree-pta -fsanitize=thread
# of the ISAs those that this CPU runs: the others would take most of the time, and nothing of them is executed
NATIVE := $(shell $(CXX) -march=native -dM -E -x c++ /dev/null | cut -d' ' -f2)
NEEDED_BY_avx2 := __AVX2__
NEEDED_BY_avx512 := __AVX512DQ__
NEEDED_BY_avx512_bf16 := __AVX512BF16__
NEEDED_BY_amx := __AMX_BF16__
is_idle = $(filter-out $(NATIVE),$(NEEDED_BY_$(basename $(notdir $(1)))))
SANITIZED_KERNELS := $(foreach source,$(KERNELS),$(if $(call is_idle,$(source)),,$(source)))

# the AVX-512 and AMX kernels on a CPU that has AVX2 alone: narrower target regions, the rest in plain C++
EMULATED_ISAS := avx512 avx512_bf16 amx
EMULATED := -DPVT_EMULATED -include csrc/tests/emulated.h
CROSS_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64-static -L /usr/aarch64-linux-gnu
# an x86-64 CPU without AVX
BASELINE_QEMU ?= qemu-x86_64-static -cpu Nehalem

compile = mkdir -p $(@D) && $(1) $(CXXFLAGS) $(2) -MMD -MP -c $< -o $@
objects = $(patsubst %.cpp,build/$(1)/%.o,$(2))
# objects in parallel, whatever -j this make was given
BUILD := +$(MAKE) --no-print-directory -j $(shell nproc)

build/optimised/%.o: %.cpp Makefile
	$(call compile,$(CXX),-O3)

build/sanitized/%.o: %.cpp Makefile
	$(call compile,$(CXX),$(SANITIZED))

build/threads/%.o: %.cpp Makefile
	$(call compile,$(CXX),$(THREAD_SANITIZED))

build/emulated/%.cpp: csrc/isa/%.cpp Makefile
	mkdir -p $(@D) && sed -E '/"avx512f/s/avx512[a-z0-9]*,|amx-[a-z0-9]+,|,prefer-vector-width=512//g' $< > $@

build/emulated/%.o: build/emulated/%.cpp
	$(call compile,$(CXX),-O2 $(EMULATED))

build/emulated/%_sanitized.o: build/emulated/%.cpp
	$(call compile,$(CXX),$(SANITIZED) $(EMULATED))

build/aarch64/%.o: %.cpp Makefile | cross-tools
	$(call compile,$(CROSS_CXX),-O3)

-include $(shell find build -name '*.d' 2>/dev/null)

build/test_kernels build/test_team: build/test_%: $(call objects,optimised,$(KERNELS)) build/optimised/csrc/tests/test_%.o
	$(CXX) -fopenmp $^ -o $@

build/test_kernels_sanitized: $(call objects,sanitized,$(SANITIZED_KERNELS) csrc/tests/test_kernels.cpp)
	$(CXX) -fopenmp $(SANITIZED) $^ -o $@

build/test_kernels_threads build/test_team_threads: build/test_%_threads: $(call objects,threads,$(SANITIZED_KERNELS)) build/threads/csrc/tests/test_%.o
	$(CXX) -fopenmp $(THREAD_SANITIZED) $^ -o $@

# with a stand-in for what shares work items out
ISOLATED := $(filter-out csrc/runtime/parallel.cpp,$(KERNELS)) csrc/tests/isolated_items.cpp csrc/tests/test_isolation.cpp

build/test_isolation: $(call objects,optimised,$(ISOLATED))
	$(CXX) -pthread $^ -o $@

emulated = $(filter-out $(EMULATED_ISAS:%=csrc/isa/%.cpp),$(1))

build/test_kernels_emulated: $(call objects,optimised,$(call emulated,$(KERNELS)) csrc/tests/test_kernels.cpp) $(EMULATED_ISAS:%=build/emulated/%.o)
	$(CXX) -fopenmp $^ -o $@

build/test_isolation_emulated: $(call objects,optimised,$(call emulated,$(ISOLATED))) $(EMULATED_ISAS:%=build/emulated/%.o)
	$(CXX) -pthread $^ -o $@

# of AMX alone, which has tiles of its own to be read past: the others take minutes to compile
build/test_kernels_emulated_sanitized: $(call objects,sanitized,$(call emulated,$(SANITIZED_KERNELS)) csrc/tests/test_kernels.cpp) build/emulated/amx_sanitized.o
	$(CXX) -fopenmp $(SANITIZED) $^ -o $@

build/test_kernels_aarch64: $(call objects,aarch64,$(KERNELS) csrc/tests/test_kernels.cpp)
	$(CROSS_CXX) -fopenmp $^ -o $@

build/instructions: $(call objects,optimised,$(KERNELS) benchmarks/counts/instructions.cpp)
	$(CXX) -fopenmp $^ -o $@

# drawn calls, damaged files, and other threads at any line; a part of it is in `make test`
fuzz: $(VENV)/.test
	PVT_FAST_FUZZ_SECONDS=600 PVT_FAST_POINTS=200 $(PYTEST) tests/checkpoints/test_fuzz_files.py tests/ops/test_fuzz_ops.py tests/test_threads.py $(PYTEST_ARGS)

SOAK_SECONDS ?= 600

soak: $(VENV)/.test
	$(BIN)/python benchmarks/soak.py --seconds $(SOAK_SECONDS)

cpp-test:
	$(BUILD) build/test_kernels build/test_isolation build/test_team
	build/test_kernels
	build/test_isolation
	build/test_team

sanitize:
	$(BUILD) build/test_kernels_sanitized build/test_kernels_threads build/test_team_threads
	build/test_kernels_sanitized
	OMP_NUM_THREADS=4 build/test_kernels_threads
	build/test_team_threads

avx512-test:
	$(BUILD) build/test_kernels_emulated build/test_kernels_emulated_sanitized build/test_isolation_emulated
	build/test_kernels_emulated $(EMULATED_ISAS)
	build/test_kernels_emulated_sanitized amx
	build/test_isolation_emulated $(EMULATED_ISAS)

# the kernels for ARM, cross-compiled and emulated: on a CPU with everything, then on one without bf16 instructions,
# where every ISA that calls itself runnable must run
neon-test:
	$(BUILD) build/test_kernels_aarch64
	$(QEMU) -cpu max build/test_kernels_aarch64 neon_bf16 neon
	$(QEMU) -cpu cortex-a57 build/test_kernels_aarch64

# the kernels on an emulated x86-64 CPU without AVX: nothing that is compiled for another instruction set may run there,
# least of all while the library is loaded
baseline-test:
	@command -v $(firstword $(BASELINE_QEMU)) >/dev/null || { echo \
		"baseline-test: $(firstword $(BASELINE_QEMU)) must be installed (Debian: apt-get install qemu-user-static)"; exit 1; }
	$(BUILD) build/test_kernels
	$(BASELINE_QEMU) build/test_kernels

cross-tools:
	@for tool in $(CROSS_CXX) $(firstword $(QEMU)); do command -v $$tool >/dev/null || { echo \
		"neon-test: $$tool must be installed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"; exit 1; }; done

# the README's table, an hour or two; runs merge, so that it may be made in pieces
BENCH_CPU := $(BIN)/python benchmarks/cpu.py --rounds 10 --peers compile,onnxruntime,openvino --out benchmarks/results

bench-cpu: $(VENV)/.bench
	$(BENCH_CPU) --models b0,b1,b2,b2_li,b3,b4,b5
	$(BENCH_CPU) --models b2 --batch 8
	$(BENCH_CPU) --models b2_li --size 512
	$(BENCH_CPU) --models b2 --size 1024 --rounds 6 --seconds 1.5
	PVT_FAST_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 $(BENCH_CPU) --models b0,b2 --dtype fp32 --peers compile

# beside other processes, the README's second table; a quota of cores needs control groups (benchmarks/busy.py --quota)
bench-busy: $(VENV)/.bench
	$(BIN)/python benchmarks/busy.py

# the table of training steps; status 1 where plain torch is faster somewhere; fewer cases by TRAIN_ARGS, and runs merge
bench-train: $(VENV)/.bench
	$(BIN)/python benchmarks/train.py --out benchmarks/results $(TRAIN_ARGS)

# everything that wants a CUDA GPU, with the Python that has torch for it and what else is installed there; more options
# by GPU_ARGS, e.g. --dry-run, which needs no GPU
GPU_PYTHON ?= python3

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# every kernel compiled ahead of time for every GPU it is for, with no GPU: what the committed table lacks and a part of
# the rest; what the table lacks, to write it; everything, which takes half an hour
GATES := $(BIN)/python -m benchmarks.gates

gpu-gates: $(VENV)/.test
	$(GATES) $(GATES_ARGS)

gpu-gates-update: $(VENV)/.test
	$(GATES) --update $(GATES_ARGS)

gpu-gates-all: $(VENV)/.test
	$(GATES) --all $(GATES_ARGS)

# counts of executed instructions against the committed ones; wants valgrind, no Python package
instructions:
	$(BUILD) build/instructions
	$(PYTHON) benchmarks/counts/instructions.py build/instructions

instructions-update:
	$(BUILD) build/instructions
	$(PYTHON) benchmarks/counts/instructions.py build/instructions --update

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

# what the extra test-peers names: the extra itself would have the extension built again
$(VENV)/.test-peers: constraints.txt | $(VENV)/.test
	$(PIP_INSTALL) peft torchao
	touch $@

$(VENV)/.style: constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) ruff clang-format
	touch $@

$(VENV)/.bench: $(SOURCES) $(VENV)/.torch
	$(PIP_INSTALL) -e '.[bench]'
	touch $@
