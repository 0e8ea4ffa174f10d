# Every target makes its own environment (.venv) when there is none. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# The environment's torch and the Triton release that goes with it. Any torch >= 2.11 works: make TORCH=torch==2.11.0 TRITON=triton==3.6.0
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
# A second release, for the test that one wheel serves both.
OTHER_TORCH ?= torch==2.14.1
# Other people's JEPA code for tests/integrations, without dependencies: those would bring torchvision and another torch.
PEERS ?= cc-vjepa2==0.0.3 vjepa==0.1.2
# Needs a torchvision; one that does not fit this torch would break transformers, so it lives apart and only its own tests see it.
APART ?= lightly==1.6.0 torchvision==0.28.0 timm==1.0.31
READY := $(VENV)/.ready
# A hang is a failure; through the environment, so that the suite also runs where the plugin is absent.
export PYTEST_TIMEOUT ?= 300
PYTEST := $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: docs help dev bench test quick conformance test-rounding test-nightly test-interpret test-simt reliability test-gpu wheel-test gpu gpu-check gpu-time gpu-test gpu-dry gpu-records bench-ops wheels hf-kernel lint format golden clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(READY): pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 to 3.14: make PYTHON=/path/to/python3.11"; exit 1; }
	@command -v g++ >/dev/null || { echo "needs g++ (for example: apt-get install g++)"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel pybind11 ninja numpy
	@# Without the native libraries: the next target builds them where ninja keeps their objects.
	JEPA_KERNELS_NATIVE=0 $(PY) -m pip install --quiet --no-build-isolation --editable '.[dev,integrations]'
	$(PY) -m pip install --quiet --no-deps $(PEERS)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(VENV)/apart $(APART)
	touch $@

# The native libraries follow their sources; ninja compiles only what changed.
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
$(VENV)/.built: $(READY) $(NATIVE_SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

dev: $(VENV)/.built ## the development environment, with the native libraries built in place

# More flags for the main job, such as BENCH="--budget 120" for a shorter one.
BENCH ?=
bench: dev ## the main job: throughput of every variant against frame resolution, the op table, and a report to open
	$(PY) -m benchmarks.sweep --main-job $(BENCH)

# A process for each part, so that compiled graphs, process groups and patched peers of one do not reach another. Longest first.
PARTS := jepa ops gates interpret simt integrations conformance benchmarks reliability core native
JOBS ?= 2
# Parts side by side share the cores: a thread that waits must sleep, or small parallel regions take forty times as long.
test quick bench bench-ops: export OMP_WAIT_POLICY ?= passive
test: dev ## everything that needs no GPU (under 12 minutes on 2 cores)
	@echo "parts, $(JOBS) at a time, each printed when it is done: $(PARTS)"
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --keep-going --output-sync=target $(PARTS:%=part-%)

part-core: dev
	$(PYTEST) tests/test_*.py tests/abi tests/nn tests/packaging
part-interpret: test-interpret ;
part-conformance: conformance ;
part-%: dev
	$(PYTEST) tests/$*

quick: dev ## the core of the suite, under 2 minutes
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=target quick-rollout quick-others

quick-rollout: dev
	$(PYTEST) tests/ops/test_latent_rollout.py -m "not slow" -x
quick-others: dev
	$(PYTEST) tests/ops tests/test_backend.py tests/test_import.py --ignore tests/ops/test_latent_rollout.py -m "not slow" -x

conformance: dev ## the published arithmetic, every file of the golden folder that is there
	@if [ -d ../shared/golden ]; then $(PY) -m jepa.conformance ../shared/golden; \
	elif [ -n "$$CI" ]; then echo "the shared folder with golden numbers is not beside the checkout (CI must have it)"; exit 1; \
	else $(PY) -m jepa.conformance tests/golden/published; fi

# More flags, such as ROUNDING="--setting avx2" or the short one of CI: ROUNDING="--turn --quick".
ROUNDING ?=
test-rounding: dev ## the numeric parts under the rounding of other processors, four settings one after another
	$(PY) -m tests.rounding $(ROUNDING)

test-interpret: dev ## the Triton kernels under Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret

test-simt: dev ## the CUDA kernels on the CPU, with sanitizers and the race check
	$(PYTEST) tests/simt tests/gates

reliability: dev ## 200,000 damaged files and 1,000 kills of runs (nightly; about half an hour); writes benchmarks/results/reliability.json
	OMP_WAIT_POLICY=passive $(PY) -m tests.reliability

test-nightly: dev ## training that takes minutes: what the small recipe and the supervised ceilings reach
	$(PYTEST) tests -m nightly

test-gpu: dev ## the tests that need a CUDA device
	$(PYTEST) tests/ops -m gpu

wheel-test: dev ## one wheel, a second environment without a compiler and with another torch; every way of installing
	$(PY) -m tests.packaging.check_wheel --torch "$(OTHER_TORCH)"

# More flags, such as WHEELS="--python 3.12 --torch torch==2.13.0".
WHEELS ?=
wheels: dev ## a wheel for every Python from 3.11 to 3.14 that is here, in dist; checked by auditwheel and tried without a compiler
	$(PY) -m release.wheels $(WHEELS)

hf-kernel: dev ## a folder for Hugging Face's kernels package, in dist/jepa-kernels, and a test that it loads
	$(PY) -m release.hf_kernel
	$(PYTEST) tests/packaging/test_hf_kernel.py

# A rented machine's own python3 serves: torch, triton, numpy, pybind11, ninja, pytest, hypothesis. Output: $$OUT, or runs/gpu.
GPU_PYTHON ?= python3
gpu: ## everything to ask of a GPU, in three resumable commands of at most 200 s each
	@$(MAKE) --no-print-directory --keep-going gpu-check gpu-time gpu-test

gpu-check: ## (1) build, and every op x backend x dtype x direction against float64
	$(GPU_PYTHON) -m benchmarks.gpu_run check
gpu-time: ## (2) seconds under CUDA-graph replay, ours and everyone else's
	$(GPU_PYTHON) -m benchmarks.gpu_run time
gpu-test: ## (3) device tests, sanitizers, whole training steps
	$(GPU_PYTHON) -m benchmarks.gpu_run test

gpu-dry: dev ## the same commands on a CPU, killed at random moments and gone on with
	$(PY) -m benchmarks.gpu_dry

OUT ?= runs/gpu
gpu-records: dev ## what a GPU run brought back under $$OUT, as committed records, a page and preferences
	$(PY) -m benchmarks.gpu_records $(OUT)

bench-ops: dev ## every op against its baselines; appends records under benchmarks/results
	for f in benchmarks/bench_*.py; do $(PY) -m benchmarks.$$(basename $$f .py) || exit 1; done

# What the site is built of is installed here, so that `make dev` stays small.
$(VENV)/.docs: pyproject.toml $(READY)
	@$(PY) -c "import mkdocstrings, material" 2>/dev/null || \
	  JEPA_KERNELS_NATIVE=0 $(PY) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs ## the documentation as a site in build/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: dev ## ruff, mypy, the layers of the packages, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: dev ## apply ruff's and clang-format's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

golden: dev ## regenerate tests/golden/*.json from their NumPy scripts
	for f in tests/golden/make_*.py; do $(PY) $$f || exit 1; done

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info jepa_kernels/*.so
