# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything, the virtual environment included; `make help` lists the rest.

VENV := .venv
COVERED_BY := tests/format tests/plugin tests/offline tests/hf tests/architecture tests/simulated_cuda
TRITON_TESTS := tests/kernel_tools/binary tests/kernel_tools/emulator
VPY := $(VENV)/bin/python
ARGS ?=
PYTEST := $(VPY) -m pytest
# Most tests use one core at most: all of them run on two workers of a thread each, unless there is a GPU, whose memory
# an engine takes for itself. What ARGS select runs on one.
ifeq ($(ARGS)$(shell command -v nvidia-smi 2>/dev/null),)
PYTEST := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses=logical --maxprocesses=2 --dist=loadfile --no-loadscope-reorder
endif

# The first of these that runs makes the environment; setup_env.py then checks its version.
find_python = $(or $(PYTHON),$(shell for p in $(VPY) python3.11 python3.12 python3.13 python3; do \
	if $$p -c '' 2>/dev/null; then echo $$p; break; fi; done))
define setup_env
	@python="$(find_python)"; \
	if ! "$$python" -c '' 2>/dev/null; then \
		echo "No Python was found ($${python:-tried python3.11, python3.12, python3.13 and python3}): install Python 3.11," \
			"3.12 or 3.13, or say where it is: make $@ PYTHON=/path/to/python3.13" >&2; exit 1; \
	fi; \
	"$$python" .ci/setup_env.py $(1)
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test coverage test-triton36 setup setup-cuda lock lint types docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'ARGS="..." adds arguments to demo, test and docs; PYTHON=... names the Python (3.11 to 3.13) that makes $(VENV).'

demo: setup ## quantise, check and compare a small model on this machine
	@$(VPY) -m svsk_eval.demo $(ARGS)

test: setup ## run the tests
	@HF_HUB_OFFLINE=1 $(PYTEST) $(ARGS)
	$(if $(ARGS),,@TRITON_INTERPRET=1 $(PYTEST) tests/interpreter)

# The three packages whose faults would give wrong answers unnoticed.
coverage: setup ## run their tests, and fail where less than 90% of the lines of format, plugin or offline tool run
	@rm -f .coverage .coverage.*
	@HF_HUB_OFFLINE=1 $(PYTEST) --cov --cov-report= $(or $(ARGS),$(COVERED_BY))
	@for part in svsk_vllm/format svsk_vllm/plugin offline/svsk_offline; do \
		$(VPY) -m coverage report --skip-covered --fail-under=90 --include="$$part/*" || exit 1; done

# Triton's own cache is kept out of it: each run compiles afresh.
test-triton36: ## run the Triton kernels' tests with the oldest supported Triton, in .venv-triton36
	$(call setup_env,triton36)
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
	TRITON_CACHE_DIR="$$cache" $(VENV)-triton36/bin/python -m pytest --confcutdir=tests/kernel_tools $(TRITON_TESTS) $(ARGS)
	$(if $(ARGS),,@TRITON_INTERPRET=1 $(VENV)-triton36/bin/python -m pytest --confcutdir=tests/interpreter tests/interpreter)

setup: ## make .venv for a CPU from the pinned packages (Linux x86-64, Python 3.11 to 3.13)
	$(call setup_env,cpu)

setup-cuda: ## make .venv with vLLM for CUDA instead
	$(call setup_env,cuda)

lock: ## write the list of pinned packages anew from pyproject.toml with uv; ARGS="--upgrade" takes newer ones
	@python3 .ci/lock.py $(ARGS)

lint: setup ## check style, format and the direction of imports
	@$(VPY) -m ruff check .
	@$(VPY) -m ruff format --check .
	@$(VENV)/bin/lint-imports

types: setup ## check types
	@$(VPY) -m mypy
	@MYPYPATH=.ci $(VPY) -m mypy .ci/setup_env.py .ci/lock.py .ci/versions.py .ci/vllm_architectures.py \
		.ci/messages_page.py .ci/messages_read.py .ci/site_links.py

docs: setup ## build the pages of docs/ as a site in site/, links checked
	@NO_MKDOCS_2_WARNING=1 $(VPY) -m mkdocs build --strict $(ARGS)

clean: ## remove the environments, caches and build output
	rm -rf $(VENV) $(VENV)-triton36 $(VENV)-py3* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* site
	find . '(' -name .git -o -name '.venv*' ')' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
