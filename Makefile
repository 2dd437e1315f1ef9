# Two commands on a fresh machine, each doing all of its own set-up: make demo, make test.

PYTHON ?= python3
VENV   := .venv
TRTLLM := $(VENV)-trtllm
VLLM   := $(VENV)-vllm
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
DEMO   := out
export QIE_HOME ?= $(CURDIR)/$(DEMO)/home

# The versions that the checks ran with. Users are not bound to them.
CONSTRAINTS := --constraint .ci/constraints.txt

# What takes long under QIE_SOAK=1 or is marked with soak.
SOAK := tests/faults tests/parity/test_mutants.py tests/engines/cli/test_results.py tests/pocket/test_training.py \
	tests/compiler/backends/tensorrt/test_full_width.py tests/compiler/backends/tensorrt/test_memory.py \
	tests/compiler/planning/test_estimate.py tests/compiler/planning/test_memory.py tests/docs/test_ci.py \
	tests/compiler/quantization/test_sensitivity.py tests/engines/sessions/test_gpu_suite.py \
	tests/engines/serving/http/test_fuzz.py tests/engines/serving/http/test_leaving.py

.PHONY: demo test test-soak test-gpu test-gpu-trtllm test-vllm pocket check format clean FORCE

demo: $(VENV)/compile.stamp            ## Build the pocket model for the CPU and edit an image with it.
	$(BIN)/qie build pocket --gpu cpu --name pocket
	$(BIN)/qie run docs/images/cat.jpg "tint it purple" --bundle pocket --seed 1 --out $(DEMO)/cat-edited.png

test: $(VENV)/dev.stamp                ## Install everything for development and run checks and tests.
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-soak: $(VENV)/dev.stamp           ## Attack bundles, builds and edits as often as docs/bundles.md says; all faults and mutants; full widths.
	QIE_SOAK=1 $(BIN)/python -m pytest $(SOAK) --numprocesses 2 --dist worksteal

test-gpu: $(VENV)/gpu.stamp            ## Run what needs a GPU, with the packages for this machine's GPU and driver.
	$(BIN)/python -m pytest tests/gpu --require-gpu

test-gpu-trtllm: $(TRTLLM)/trtllm.stamp ## Run what needs a GPU and TensorRT-LLM, in an environment of its own.
	PATH="$(CURDIR)/$(TRTLLM)/bin:$$PATH" $(TRTLLM)/bin/python -m pytest tests/gpu/trtllm --require-gpu -W default

test-vllm: $(VLLM)/vllm.stamp           ## Compare the text encoder in vLLM with the graphs, in an environment of its own.
	$(VLLM)/bin/python -m pytest tests/vllm --require-vllm

pocket: $(VENV)/dev.stamp              ## Train the pocket model; resumes where it was stopped.
	$(BIN)/python -m pocket.training.vae $(DEMO)/pocket/vae
	$(BIN)/python -m pocket.training.text_encoder $(DEMO)/pocket
	$(BIN)/python -m pocket.training.transformer $(DEMO)/pocket
	$(BIN)/python -m pocket.checkpoint $(DEMO)/pocket recipes/pocket
	$(BIN)/python -m pocket.calibrate recipes/pocket --evidence docs/pocket-sensitivity.json
	$(BIN)/python -m pocket.cases recipes/pocket
	$(BIN)/qie golden pocket -o recipes/pocket/golden.safetensors

check: $(VENV)/dev.stamp               ## Lint, types, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd src && ../$(BIN)/mypy --package qie
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp              ## Rewrite the code as ruff wants it.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:                                 ## Remove everything that the commands above made.
	rm -rf $(VENV) $(TRTLLM) $(VLLM) $(DEMO) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python $(TRTLLM)/bin/python $(VLLM)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("qie needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/compile.stamp: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(PIP) install $(CONSTRAINTS) --editable '.[compile]'
	@touch $@

# torch comes first and by its exact version, so that a CPU build is taken wherever one is offered.
$(VENV)/dev.stamp: $(VENV)/compile.stamp .ci/constraints-cuda.txt
	$(PIP) install torch==2.13.0
	$(PIP) install $(CONSTRAINTS) --constraint .ci/constraints-cuda.txt --editable '.[dev,reference]'
	@rm -f $(VENV)/gpu.stamp
	@touch $@

# Neither torch nor any tool but pytest. The driver decides on the version of CUDA, the GPU on the backend.
$(VENV)/gpu.stamp: $(VENV)/gpu.txt pyproject.toml .ci/constraints.txt
	$(PIP) install $(CONSTRAINTS) --requirement $<
	@rm -f $(VENV)/dev.stamp
	@touch $@

$(VENV)/gpu.txt: $(VENV)/bin/python FORCE
	@$(BIN)/python tests/gpu/requirements.py > $@.new
	@cmp -s $@.new $@ || mv $@.new $@

# Neither a tool nor a constraint: TensorRT-LLM pins what it needs, numpy among it. mpi4py wants libopenmpi-dev.
$(TRTLLM)/trtllm.stamp: $(TRTLLM)/trtllm.txt pyproject.toml
	$(TRTLLM)/bin/python -m pip --quiet --disable-pip-version-check install --requirement $<
	$(TRTLLM)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --editable .
	@touch $@

$(TRTLLM)/trtllm.txt: $(TRTLLM)/bin/python FORCE
	@$(TRTLLM)/bin/python tests/gpu/trtllm/requirements.py > $@.new
	@cmp -s $@.new $@ || mv $@.new $@

# In this order: torch for CPUs where one is offered; then vLLM, whose audio packages do not load beside it and are not
# needed. Where torchvision does not load either, its operators are declared (tests/vllm/sitecustomize.py says why).
$(VLLM)/vllm.stamp: $(VLLM)/bin/python pyproject.toml tests/vllm/requirements.txt tests/vllm/sitecustomize.py
	$(VLLM)/bin/python -m pip --quiet --disable-pip-version-check install torch==2.13.0
	$(VLLM)/bin/python -m pip --quiet --disable-pip-version-check install --requirement tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip --quiet --disable-pip-version-check uninstall --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip --quiet --disable-pip-version-check install --editable '.[compile]' pytest
	$(VLLM)/bin/python -c 'import torchvision' 2> /dev/null || \
		cp tests/vllm/sitecustomize.py "$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

FORCE:
