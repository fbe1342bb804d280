# Two commands for a newcomer: `make serve` and `make test`. Everything is installed into .venv, nothing twice.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Byte code is written when a module is first imported: for all of torch and transformers it takes pip two minutes.
INSTALL := $(PIP) install --no-compile -c $(VENV)/constraints.txt
PORT ?= 8080
MODEL ?=
ARGS ?=
PYTEST_ARGS ?=
MINUTES ?= 480

# What a process compiles of our modules the next one finds, also where the environment bids Python write nothing:
# a server is three processes, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

# The pinned CPU build unless the host has an NVIDIA driver; TORCH_SPEC= chooses another one.
ifeq ($(wildcard /dev/nvidiactl),)
TORCH_SPEC ?= torch==2.13.0
else
TORCH_SPEC ?= torch
endif

.PHONY: help install wheel serve test test-fast test-slow browser ray-test clients soak peers image image-test kernels-aot gpu-proof check check-types check-house configuration format demo-model demo-model-small lock clean

help:
	@echo 'make serve             serve the demo model on port 8080   (PORT=, MODEL= folder or Hub id, ARGS= launcher flags)'
	@echo 'make test-fast         the unit tests that are quick, in one to two minutes on 2 cores'
	@echo 'make test              all tests but the long ones, the proof for GPUs with toy sizes   (PYTEST_ARGS= only some tests)'
	@echo 'make test-slow         the long proofs: kills, fuzzing, memory, speed against transformers'
	@echo 'make ray-test          two replicas on Ray Serve: the wire, a kill, updates, scaling, what a token costs'
	@echo 'make clients           more clients than make test runs, on the demo model; installs them on first use (PYTEST_ARGS=)'
	@echo 'make soak              mixed load on the small demo model for 8 hours, judged   (MINUTES=, ARGS= flags of benchmarks/soak)'
	@echo 'make peers             speed against other engines; installs them on first use (ARGS= flags of benchmarks/peers)'
	@echo 'make kernels-aot       compile the GPU kernels for cards that are not there   (ARGS= flags of scripts/kernels_aot.py)'
	@echo 'make gpu-proof         check and measure everything on the GPU of this host   (ARGS= flags of benchmarks/gpu_proof)'
	@echo 'make image             build a container image   (TARGET= cuda, rocm, cpu or sagemaker, IMAGE= its name, ARGS= build arguments)'
	@echo 'make image-test        build the image for CPUs without a container engine, and run it; needs root, buildah, debootstrap'
	@echo 'make clean             take the environment, build/ and dist/ away, with runs of gpu-proof that are not kept'
	@echo 'make check             format, lint, types, import direction, house rules, generated documents'
	@echo 'make configuration     write docs/configuration.md from the table of flags'
	@echo 'make format            put the format right'
	@echo 'make install           only the environment                (TORCH_SPEC= another torch, PYTHON= another python)'
	@echo 'make wheel             write dist/pytgi-VERSION-py3-none-any.whl'
	@echo 'make demo-model        only the demo model; prints its folder'
	@echo 'make demo-model-small  only the small one'
	@echo 'make lock              write constraints.txt anew'

# torch first and by itself: asked for by another package it would be a CUDA build of several GB. It is not held to
# constraints.txt, so that TORCH_SPEC can choose. All output goes to stderr: `make demo-model` has its own on stdout.
$(VENV)/installed: pyproject.toml constraints.txt Makefile
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@echo 'Installing $(TORCH_SPEC) and what pytgi needs into $(VENV)' >&2
	@$(INSTALL) '$(TORCH_SPEC)' >&2
	@$(INSTALL) -e '.[dev]' >&2
	@touch $@

# Beside the checks, which do without (`.ci/run`).
$(VENV)/compiled: $(VENV)/installed
	@echo 'Compiling the CPU kernels' >&2
	@$(PY) -m engine.compile >&2
	@touch $@

install: $(VENV)/compiled

# 290 MB that only the proofs of the GPU's kernels need: `make serve` does without.
$(VENV)/interpreted: $(VENV)/installed
	@echo 'Installing Triton, whose interpreter runs the kernels of GPUs on the CPU' >&2
	@$(INSTALL) -e '.[interpreted]' >&2
	@touch $@

# setuptools leaves what it has built in build/lib, and would put modules that are gone since into the next wheel.
wheel: install
	@rm -rf build/lib build/bdist.*
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . && ls dist/*.whl

serve: install
	@model="$(MODEL)"; test -n "$$model" || model=$$($(PY) scripts/demo_model.py | tail -n 1) && test -n "$$model" && \
	exec $(VENV)/bin/text-generation-launcher --model-id "$$model" --port $(PORT) $(ARGS)

demo-model: install
	@$(PY) scripts/demo_model.py

demo-model-small: install
	@$(PY) scripts/demo_model.py --small

# Three commands beside each other, for two cores: whoever starts a server, or measures a clock, waits much of its time.
# What the second and the third print comes when all have ended. Then status is 0, or that of one that failed.
beside = logs=$$(mktemp -d); { $(2); } > $$logs/2 2>&1 & second=$$!; { $(3); } > $$logs/3 2>&1 & third=$$!; $(1); status=$$?; \
	wait $$second || status=$$?; wait $$third || status=$$?; cat $$logs/2 $$logs/3; rm -r $$logs
TEST := $(PY) -m pytest -q

# Files of three minutes between them, which start processes, load large libraries or go through thousands of examples, and
# the rules of the house, which are for `make check`.
HOUSE := tests/unit/test_house.py tests/unit/test_imports.py
NOT_FAST := $(HOUSE) $(addprefix tests/unit/,test_args.py test_demo_model.py test_gpu_proof.py test_pytgi.py test_seams.py \
	test_tiers.py quant/test_packing.py \
	$(patsubst %,engine/test_%.py,full_step kernel_cache penalties scheduler_properties shares step_buffers) \
	$(patsubst %,server/test_%.py,adapters compatibility_beyond connections encoding forced_text grammar openai_errors \
	parameters private_logs response_format routes sampling_defaults special_marks structure template_process thoughts \
	tool_answers tool_choices tool_clients tool_prompts traces vllm_fields wild_schemas))
fast_server = $(filter-out $(NOT_FAST),$(wildcard tests/unit/server/test_$(1)*.py))
test-fast: install $(VENV)/interpreted
	@started=$$(date +%s); \
	$(call beside,$(TEST) tests/unit $(addprefix --ignore=,tests/unit/server $(NOT_FAST)) $(PYTEST_ARGS),\
	$(TEST) $(call fast_server,[a-o]) $(PYTEST_ARGS),$(TEST) $(call fast_server,[p-z]) $(PYTEST_ARGS)); \
	echo "make test-fast: $$(( $$(date +%s) - started )) s"; exit $$status

# The tests of the pages drive a Chromium that is on PATH. Debian's takes 20 s to install, once and only as root.
APT_GET := DEBIAN_FRONTEND=noninteractive apt-get -qq
browser:
	@for name in chromium chromium-browser google-chrome; do if command -v $$name >/dev/null; then exit 0; fi; done; \
	if test $$(id -u) = 0 && command -v apt-get >/dev/null; then \
	echo 'Installing Chromium, which the tests of the pages drive' >&2; \
	if $(APT_GET) update >&2 && $(APT_GET) install -y --no-install-recommends chromium >/dev/null; then exit 0; fi; fi; \
	echo 'The tests of the pages need Chromium on PATH: install it as root (Debian: apt-get install --no-install-recommends chromium)' >&2; \
	exit 1

# First all that measures no time, in three commands of equal length; then what does, with the machine for itself. The
# rules of the house are for `make check`. With PYTEST_ARGS only the tests that they choose.
e2e = $(patsubst %,tests/e2e/test_%.py,$(1))
TIMED := $(call e2e,abuse canary overload soak)
WITH_KERNELS := $(call e2e,bucket documents download examples flags real_clients recipes tool_loop)
WITH_SERVERS := $(patsubst %,tests/contract/test_%.py,adapter drafts)
test: install $(VENV)/interpreted browser
ifeq ($(PYTEST_ARGS),)
	@$(call beside,$(TEST) tests/unit tests/contract $(addprefix --ignore=,tests/contract/kernels $(HOUSE) $(WITH_SERVERS)),\
	$(TEST) tests/interpreted && $(PY) -m benchmarks.gpu_proof --device interpreted --toy --out build/gpu-proof-toy && \
	$(TEST) tests/contract/kernels $(WITH_KERNELS),\
	$(TEST) tests/e2e $(WITH_SERVERS) $(addprefix --ignore=,$(TIMED) $(WITH_KERNELS))); exit $$status
	@$(TEST) $(TIMED) tests/browser
else
	@$(PY) -m pytest $(PYTEST_ARGS)
endif

# With the cases of other tests that are marked as long, and the property tests once more, with ten times as many examples,
# and others each time.
test-slow: install $(VENV)/interpreted browser
ifneq ($(PYTEST_ARGS),)
	@$(PY) -m pytest $(PYTEST_ARGS)
else
	@$(TEST) tests/slow --ignore=tests/slow/interpreted; status=$$?; $(TEST) tests/slow/interpreted || status=$$?; \
	$(TEST) -m long tests/unit tests/contract tests/e2e || status=$$?; $(TEST) -m long tests/interpreted || status=$$?; \
	HYPOTHESIS_PROFILE=explore $(TEST) -m hypothesis tests/unit || status=$$?; exit $$status
endif

# Ray has an environment of its own, which sees .venv's packages: nothing that serves without replicas needs it.
RAY := build/ray
$(RAY)/installed: $(VENV)/installed
	@rm -rf $(RAY) && $(PYTHON) -m venv $(RAY)
	@$(PY) -c 'import site; print(site.getsitepackages()[0])' > $$($(RAY)/bin/python -c 'import site; print(site.getsitepackages()[0])')/pytgi.pth
	@$(RAY)/bin/python -m pip --disable-pip-version-check install -c $(VENV)/constraints.txt "$$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"])')" >&2
	@touch $@

ray-test: install $(RAY)/installed
	@PYTHONPATH="$(CURDIR)" $(RAY)/bin/python -m pytest -W ignore::DeprecationWarning tests/replicas $(PYTEST_ARGS)

# What CI does without: 3 GB of environments in ~/.cache/pytgi.
clients: install
	@$(PY) -m pytest tests/clients $(PYTEST_ARGS)

# The report goes to docs/soak from 30 minutes on, below that to build/soak.
soak: install
	@$(PY) -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

peers: install
	@$(PY) -m benchmarks.peers $(ARGS)

kernels-aot: install $(VENV)/interpreted
	@PYTHONPATH=. $(PY) scripts/kernels_aot.py $(ARGS)

# A host whose own python has CUDA builds of torch and Triton needs no .venv: `PYTHONPATH=. python3 -m benchmarks.gpu_proof`.
gpu-proof: install $(VENV)/interpreted
	@$(PY) -m benchmarks.gpu_proof $(ARGS)

# An engine is one that answers: the program docker alone builds nothing.
IMAGE ?= pytgi
TARGET ?= cuda
image:
	@sha=$$(git rev-parse HEAD 2>/dev/null || :); label=$${sha:+sha-$$(echo $$sha | cut -c1-7)}; \
	if docker info >/dev/null 2>&1; then build='docker build'; \
	elif podman info >/dev/null 2>&1; then build='podman build --format docker'; \
	elif buildah version >/dev/null 2>&1; then build='buildah build --format docker'; \
	else echo 'make image needs docker, podman or buildah (Debian: apt-get install buildah)' >&2; exit 1; fi; \
	exec $$build --target $(TARGET) --tag $(IMAGE) --build-arg GIT_SHA=$$sha --build-arg DOCKER_LABEL=$$label $(ARGS) .

image-test: install
	@$(PY) -m pytest -q -s tests/image $(PYTEST_ARGS)

check: check-house check-types

check-types: $(VENV)/installed
	@$(PY) -m mypy
	@$(PY) -m mypy scripts/demo_model.py scripts/demo_model_convert.py scripts/configuration.py scripts/compare_wire.py scripts/kernels_aot.py scripts/image/health.py
	@$(PY) -m mypy examples/openai_client.py examples/huggingface_client.py examples/text_generation_client.py

check-house: $(VENV)/installed
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) scripts/configuration.py --check
	@$(PY) benchmarks/gpu_results.py --check
	@$(TEST) $(HOUSE)

configuration: install
	@$(PY) scripts/configuration.py

format: install
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lock: install
	@$(PY) -m pip freeze --exclude-editable | sed -e 's/+cpu$$//' | grep -v '^-e ' > constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
