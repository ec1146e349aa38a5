# Everything needs only Python 3.11 or newer, make and a package index. `make help` lists the targets.

PYTHON ?= python3
# `make PYTHON=python3.12 …` gets an environment of its own, so that two lanes do not disturb each other.
ifeq ($(origin PYTHON), file)
VENV := .venv
else
VENV := .venv-$(notdir $(PYTHON))
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
VERSION := import sys; print('%d.%d' % sys.version_info[:2])
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Nothing is compiled at the installation but what is imported, once: the tests start a hundred processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test test-quick docs docs-serve screenshots notebooks slow fuzz fuzzrest sdks cookbook sglang ray laboratory accelerators gpu tpu rlve methods lint format bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything that the demo and the tests need

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Tinsmith needs Python 3.11 or newer; '$(PYTHON)' is missing or older. Say which one: make PYTHON=python3.12"; exit 1; }
	@echo "==> $(VENV) from $$($(PYTHON) --version)"
	@$(BIN)/python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$($(PYTHON) -c "$(VERSION)")')" \
	  2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "==> $$(grep -c == requirements.lock) pinned packages (a minute or so)"
	@$(PIP) install -qq --no-compile --no-deps -r requirements.lock & locked=$$!; torch=; \
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  echo "==> torch for the CPU (the tests compare with it; Tinsmith itself never imports it)"; \
	  $(PIP) install -qq --no-compile --no-deps $(TORCH) && torch=$(TORCH) \
	    || echo "==> No $(TORCH) here: the tests that compare with torch will be skipped"; \
	else \
	  echo "==> No torch for this Python: the tests that compare with it will be skipped"; \
	fi; \
	wait $$locked || exit 1; \
	[ -z "$$torch" ] || $(PIP) install -qq --no-compile $$torch
	@echo "==> tinsmith, editable"
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@
	@echo "==> Installed."

demo: $(STAMP) ## train SmolLM2-135M through the Tinker SDK and see it change (under 5 minutes)
	@$(BIN)/python demo/sft.py

test: $(STAMP) ## lint, types, import arrows, and all tests but the slow ones
	@$(MAKE) --no-print-directory -j 3 lint sglang laboratory rlve docs
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations 20

# What starts no server and compiles little.
QUICK := tests/server tests/losses tests/ckpt $(addprefix tests/engine/test_, scheduler.py packing.py validation.py \
  stop.py slots.py) $(addprefix tests/model/test_, rope.py token_sampling.py)
SLOWEST := tests/server/test_rlve.py tests/ckpt/test_smollm2.py
test-quick: $(STAMP) ## lint, types, import arrows, and the tests that need no server (two minutes)
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(QUICK) $(addprefix --ignore=, $(SLOWEST))

DOCS := .cache/docs/venv
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs
docs: $(STAMP) $(DOCS)/.installed ## write the generated pages, and build the site into .cache/docs/site
	$(BIN)/python docs/generate.py
	$(MKDOCS) build --strict --quiet

screenshots: $(STAMP) ## take the console's pictures in docs/images again (minutes; needs Chromium)
	$(BIN)/python docs/screenshots.py

notebooks: $(STAMP) ## run the notebooks with their real model and store the outputs (half an hour)
	$(BIN)/python notebooks/run.py

docs-serve: docs ## the site on http://127.0.0.1:8001
	$(MKDOCS) serve --dev-addr 127.0.0.1:8001

$(DOCS)/.installed: docs/requirements.txt
	@echo "==> mkdocs in $(DOCS)"
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps -r $<
	@touch $@

CASES ?= 1000000
fuzz: $(STAMP) ## damaged input for every decoder, a million cases or CASES=...
	TINSMITH_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -x -v -n 2 tests/fuzz

REST_CASES ?= 20000
fuzzrest: $(STAMP) ## requests made of the OpenAPI document, 20,000 or REST_CASES=...
	TINSMITH_REST_CASES=$(REST_CASES) $(BIN)/python -m pytest -x -q tests/rest/test_fuzz.py tests/rest/test_number_edges.py

slow: $(STAMP) ## the tests that are too slow for every time, the older SDKs among them
	$(BIN)/python -m pytest -v -m slow

sdks: $(STAMP) ## one program with each of five older Tinker SDKs, which pip fetches
	$(BIN)/python -m pytest -v -m slow tests/conformance/test_old_sdks.py

COOKBOOK := .cache/cookbook/venv
cookbook: $(STAMP) $(COOKBOOK)/.installed ## tinker-cookbook's programs as they are, on a server (an hour)
	$(BIN)/python -m pytest -v -m slow tests/cookbook

$(COOKBOOK)/.installed: tests/cookbook/requirements.txt
	$(PYTHON) -m venv --clear $(COOKBOOK)
	$(COOKBOOK)/bin/python -m pip --disable-pip-version-check install -qq --no-compile $(TORCH)
	$(COOKBOOK)/bin/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps -r $<
	@touch $@

RAY := .cache/ray/venv
ray: $(STAMP) $(RAY)/.installed ## a server as a job of a real Ray (fetches 80 MB)
	$(BIN)/python -m pytest -v -m slow tests/deploy/test_ray.py

$(RAY)/.installed:
	$(PYTHON) -m venv --clear $(RAY)
	$(RAY)/bin/python -m pip --disable-pip-version-check install -qq "ray[default]==2.60.0"
	@touch $@

SGLANG := .cache/sglang/venv
SGLANG_PYTHON ?= python3.11
sglang: ## an environment with SGLang on the CPU, which the tests of sampling on it need (a minute, once)
	@if ! command -v $(SGLANG_PYTHON) > /dev/null; then \
	  echo "==> No $(SGLANG_PYTHON) here: the tests with a real SGLang will be skipped"; \
	elif ! $(MAKE) --no-print-directory $(SGLANG)/.installed; then \
	  echo "==> SGLang could not be installed here: the tests with a real one will be skipped"; \
	fi

$(SGLANG)/.installed: tests/sglang/requirements.txt
	@echo "==> SGLang on the CPU in $(SGLANG)"
	@$(SGLANG_PYTHON) -m venv --clear $(SGLANG)
	@$(SGLANG)/bin/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps $(TORCH) -r $<
	@touch $@

LABORATORY := .cache/accelerators/venv
LABORATORY_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
laboratory: ## the compilers of GPUs and TPUs, which need no device, for tests/accelerators (a minute, once; 2 GB)
	@if ! $(LABORATORY_PYTHON) -c '' 2> /dev/null; then \
	  echo "==> No python3.12 here: the tests that compile for accelerators will be skipped"; \
	elif ! $(MAKE) --no-print-directory $(LABORATORY)/.installed; then \
	  echo "==> The compilers of accelerators cannot be installed here: the tests with them will be skipped"; \
	fi

$(LABORATORY)/.installed: tests/accelerators/requirements.txt
	@echo "==> Compilers of accelerators in $(LABORATORY)"
	@$(LABORATORY_PYTHON) -m venv --clear $(LABORATORY)
	@$(LABORATORY)/bin/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps -r $<
	@ln -sfn $(CURDIR) $(LABORATORY)/lib/python3.12/site-packages/tinsmith
	@touch $@

accelerators: laboratory ## compile the real shapes for absent GPUs and TPUs, and write docs/accelerators.md (an hour)
	$(LABORATORY)/bin/python tests/accelerators/write_page.py

tpu: gpu ## the same

gpu: $(STAMP) ## on a machine with a GPU or a TPU: tests and benchmarks on it, and its page in docs/devices (an hour)
	$(BIN)/python bench/device.py

methods: $(STAMP) ## write docs/compatibility.md's table of the SDK's methods from the tests that call them
	TINSMITH_WRITE_METHODS=1 $(BIN)/python -m pytest -q -m "not slow" tests/conformance/test_sdk_*.py

lint: $(STAMP) ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy wants the package under its own name: the repository's root, whatever its folder is called
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/tinsmith
	cd .cache/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## training speed beside transformers + PEFT on torch
	$(BIN)/python bench/train.py

RLVE := $(VENV)/.rlve
rlve: $(STAMP) ## reasoning-gym, which the tests of rlve_config need (a minute, once, and a C compiler)
	@$(MAKE) --no-print-directory $(RLVE) \
	  || echo "==> No reasoning-gym here: the tests that need it will be skipped"

$(RLVE): requirements-rlve.lock $(STAMP)
	@echo "==> reasoning-gym"
	@$(PIP) install -qq --no-compile --no-deps -r $<
	@touch $@

# Not the accelerators' extras, which are installed beside the locked packages, nor wandb; rlve has a file of its own.
LOCKED := demo notebooks reference postgresql otel dev
lock: ## pin the newest packages that fit pyproject.toml (needs uv)
	echo "torch ; sys_platform == 'never'" | uv pip compile pyproject.toml --universal $(addprefix --extra ,$(LOCKED)) --upgrade \
	  --python-version 3.11 --override /dev/stdin --no-header --no-annotate --no-emit-index-url --quiet \
	  | grep -v "sys_platform == 'never'" > requirements.lock.new
	mv requirements.lock.new requirements.lock
	uv pip compile pyproject.toml --universal --extra rlve --constraint requirements.lock --python-version 3.11 --upgrade \
	  --no-header --no-annotate --no-emit-index-url --quiet | grep -vxFf requirements.lock > requirements-rlve.lock

clean: ## remove environments and caches (downloaded models stay in ~/.cache/tinsmith)
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
