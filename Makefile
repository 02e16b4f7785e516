# make demo       the main job: sets everything up, trains a GPT on our kernels, compares it with torch's
# make test       the tests; make test-all adds the long ones
#
# Everything lives in .venv. TORCH_INDEX=<url> names an extra package index for torch (an index of CPU builds on a
# machine without a GPU, where the default index would bring gigabytes of CUDA). PYTHON=<interpreter> uses that
# interpreter and what it has installed, and installs nothing.

PY ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV := .venv
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py

ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif
NATIVE := build/native
# Most tests keep one core busy, interpreted kernels above all: a process for each of two cores.
SPREAD := -n 2 --dist loadgroup
INTERPRETED := tests/ops/test_conformance.py tests/ops/test_decode.py tests/ops/test_rotary.py tests/flash_attn/test_kvcache.py tests/flash_attn/test_dense.py tests/flash_attn/test_varlen.py tests/flash_attn/test_rotary.py tests/ops/test_bad_inference.py tests/gpu tests/bench/gpu

.PHONY: setup demo test test-all test-slow test-slow-interpreted test-forced gate test-torch-oldest test-triton-oldest test-transformers-oldest neon lint format bench clean
setup: $(READY) $(NATIVE)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PY) -m venv $(VENV)
	$(PYTHON) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel cmake ninja "pybind11>=2.13"
	FASTATTN_BUILD=skip $(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# The compiled kernels beside the sources. A failed build is an error here; for people who only install, it is not.
$(NATIVE): $(SOURCES) $(READY)
	PATH="$(abspath $(dir $(PYTHON))):$$PATH" FASTATTN_BUILD=require $(PYTHON) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

demo: setup
	$(PYTHON) -m fastattn demo --out runs/demo

# The second run is of the kernels for GPUs, in Triton's interpreter, which is a mode of the whole process.
test: setup
	$(PYTHON) -m pytest -m "not slow" $(SPREAD)
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -m "not slow" $(SPREAD) $(INTERPRETED)

test-all: lint test test-slow test-slow-interpreted test-forced test-torch-oldest test-triton-oldest test-transformers-oldest

# timm has its torchvision where people have it: a torchvision of another torch would replace torch.
test-slow: setup
	$(if $(READY),FASTATTN_BUILD=skip $(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[ecosystem]")
	$(PYTHON) -m pytest -m slow

# All cases of the kernels for GPUs in the interpreter, in all dtypes: hours.
test-slow-interpreted: setup
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -m slow --timeout 900 $(SPREAD) $(INTERPRETED)

# Models and their training with nothing left to another backend.
test-forced: setup
	FASTATTN_BACKEND=cpu $(PYTHON) -m pytest -m "not slow" tests/models tests/train

# Every GPU kernel, compiled for every GPU that it is for, held to laws and to the committed table (docs/gpu.md): half an
# hour, and what has been compiled before is not compiled again. GATE=--update writes the table.
gate: setup
	$(PYTHON) -m fastattn.testing.compiled $(GATE)

# The same binary under the oldest torch that it supports, in an environment of its own.
test-torch-oldest: setup
	$(PY) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "torch==2.10.0" numpy pytest pytest-timeout pytest-benchmark expecttest hypothesis
	.venv-oldest/bin/python -m pytest tests/ops/test_conformance.py tests/test_isa.py tests/test_dispatch.py tests/nn tests/flash_attn tests/integrations --ignore tests/integrations/transformers --ignore tests/integrations/test_transformers.py --ignore tests/integrations/test_libraries.py -m "not slow"

# The kernels for GPUs in the interpreter of the oldest triton that they support.
test-triton-oldest: setup
	$(PY) -m venv .venv-triton-oldest
	.venv-triton-oldest/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" triton==3.6.0 numpy pytest pytest-timeout pytest-xdist pytest-benchmark expecttest hypothesis
	TRITON_INTERPRET=1 .venv-triton-oldest/bin/python -m pytest -m "not slow" $(SPREAD) $(INTERPRETED)

# Models of the oldest Transformers that asks for masks through an interface; TRANSFORMERS=4.57.6 is the last of 4.x.
TRANSFORMERS ?= 4.53.3
test-transformers-oldest: setup
	$(PY) -m venv .venv-transformers-oldest
	.venv-transformers-oldest/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" "transformers==$(TRANSFORMERS)" accelerate numpy pytest pytest-timeout pytest-benchmark expecttest
	.venv-transformers-oldest/bin/python -m pytest tests/integrations/test_transformers.py tests/integrations/transformers

# The NEON kernels, cross-compiled, against the conformance cases in emulation: about half an hour (Debian, Ubuntu).
neon: $(READY)
	PYTHON=$(PYTHON) .ci/neon

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' | xargs $(dir $(PYTHON))clang-format --dry-run --Werror

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' | xargs $(dir $(PYTHON))clang-format -i

bench: setup
	$(PYTHON) -m fastattn bench attention --quick

clean:
	rm -rf build fastattn/_C*.so fastattn/_native_build.txt
