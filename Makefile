# numa_lab. `make` alone lists what there is to make; each target sets up what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# What is printed can be typed where `make` was typed: `make -C FOLDER` prints whole paths.
ifneq ($(PWD),$(CURDIR))
HERE := $(CURDIR)/
endif
BIN := .venv/bin
RUN_ID := $(or $(RUN_ID),$(shell date +%Y%m%dT%H%M%S))
RUN_DIR := $(HERE)data/runs/$(RUN_ID)
SWEEP_ARGS ?= --profile quick
PYTEST_ARGS ?=
LAB_ARGS ?=
STRESS_ARGS ?= --count 3000
BENCH_ARGS ?=
STRIP := --keep-id --extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill"

export PYTHON # for tools/need.sh
ACTIVATE := source $(if $(HERE),'$(HERE).venv/bin/activate',.venv/bin/activate)

# papermill and JupyterLab find the kernel of .venv before any that the user has registered.
export JUPYTER_PREFER_ENV_PATH := 1

# Installs wait for each other, and what measures must run alone.
.NOTPARALLEL:
.PHONY: help setup report test test-oldest test-multinode test-arm test-multinode-arm stress-interrupts lab figures bench lint format clean constraints

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Benchmarks of one question each: make $(BENCHES)"
	@echo "Settings: PYTHON=python3.12  SWEEP_ARGS='--profile quick'  PYTEST_ARGS='-k topology'  LAB_ARGS=--port=8890  STRESS_ARGS='--count 300 --only cache-attend'"
	@[[ ! -e .venv/installed ]] || echo "Before the commands of README.md type: $(ACTIVATE)"

setup: .venv/installed ## make .venv and install numa_lab with the tested versions
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "make: .venv is ready; before the commands of README.md type: $(ACTIVATE)")

report: system-numactl .venv/installed ## measure attention under every binding and write data/runs/RUN_ID/report.html
	@status=0; "$(HERE)$(BIN)/numa-lab" sweep $(SWEEP_ARGS) --out "$(RUN_DIR)" || status=$$?; \
	if (( status > 1 )) || [[ ! -d "$(RUN_DIR)" ]]; then exit $$status; fi; \
	tools/waiting.sh "$(HERE)$(BIN)/numa-lab" report "$(RUN_DIR)"; echo "make: before the commands of README.md type: $(ACTIVATE)"; \
	exit $$status  # 1: some executions failed, and the report lists them

test: system-numactl-chromium-libomp .venv/installed-dev ## run the tests
	@mkdir -p build
	$(BIN)/python -m pytest --junitxml=build/junit.xml $(PYTEST_ARGS)

# The oldest Numba and llvmlite that pyproject.toml allows, and the newest numpy that they take, in front of what .venv has.
OLDEST := llvmlite==0.45.0 numba==0.62.0 numpy==2.3.5
OLDEST_TESTS ?= $(addprefix tests/attention/test_,compiler.py decode.py vectors.py)

test-oldest: system-numactl .venv/installed-dev ## run the tests of the decode kernel with the oldest Numba that pyproject.toml allows
	@rm -rf build/oldest && $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/oldest $(OLDEST)
	PYTHONPATH="$(CURDIR)/build/oldest" $(BIN)/python -m pytest --junitxml=build/junit-oldest.xml $(OLDEST_TESTS) $(PYTEST_ARGS)

# Besides the guests' own tests, those of what pins and places: they run in the guest of four nodes.
MULTINODE_TESTS ?= tests/multinode tests/placement/test_pinned_team.py \
  $(addprefix tests/nodes/test_,node_threads.py seats.py one_node.py thread_pool.py)

test-multinode: system-numactl-qemu-xz .venv/installed-dev ## run the tests of placement in emulated guests with several NUMA nodes (Debian, x86-64)
	@mkdir -p build
	PYTHONPATH=tests $(BIN)/python -m pytest -p multinode.plugin --junitxml=build/junit-multinode.xml $(MULTINODE_TESTS) $(PYTEST_ARGS)

# By qemu-user: attention on NEON, and what reads the machine. The first time 300 MB are fetched. What compiled kernels do on disk
# depends on no processor, and takes most of a minute for each.
ARM_TESTS ?= tests/attention/test_decode.py tests/attention/test_gqa.py \
  $(addprefix tests/,machine/test_topology.py machine/test_doctor.py placement/test_memory.py placement/test_openmp.py) \
  --deselect tests/attention/test_decode.py::test_what_was_compiled_is_loaded_from_disk_and_made_anew_where_damaged

test-arm: system-numactl-qemu_user .venv/installed-dev ## run the tests of attention and of the machine on 64-bit Arm, by emulation (Debian, x86-64)
	@mkdir -p build
	PYTHONPATH=tests $(BIN)/python -m arm64 run python3 -m pytest -p no:cacheprovider --junitxml=build/junit-arm.xml $(ARM_TESTS) $(PYTEST_ARGS)

# One guest, that of four nodes: what qemu-user can't do, it has none of the kernel's NUMA calls.
MULTINODE_ARM_TESTS ?= 'tests/multinode/test_layouts.py::test_the_machine_is_read_as_it_was_made[two-sockets]' \
  tests/multinode/test_placement.py tests/placement/test_memory.py \
  $(addprefix tests/machine/test_doctor.py::test_,trying_the_calls_leaves_the_policy_of_the_thread calls_refused_by_a_real_seccomp_filter)

test-multinode-arm: system-numactl-qemu_user-qemu_arm-xz .venv/installed-dev ## run tests of pages and threads in an emulated guest of 64-bit Arm with four nodes
	@mkdir -p build
	PYTHONPATH=tests $(BIN)/python -m pytest -p multinode.plugin --architecture=aarch64 --junitxml=build/junit-multinode-arm.xml \
	  $(MULTINODE_ARM_TESTS) $(PYTEST_ARGS)

# It takes most of an hour; `make test` aims few alarms at the calls that are short.
stress-interrupts: system-numactl .venv/installed-dev ## aim thousands of alarms, as Ctrl-C, at every public call, and see what they leave behind
	PYTHONPATH=tests $(BIN)/python -m interrupts $(STRESS_ARGS)

lab: .venv/installed ## open the notebooks in JupyterLab on this machine (127.0.0.1)
	@$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)/notebooks" \
	  $(if $(DISPLAY)$(WAYLAND_DISPLAY),,--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

figures: .venv/installed ## draw the README's figure anew from data/sample
	@mkdir -p figures
	tools/waiting.sh $(BIN)/python -c "from pathlib import Path; from numa_lab import load_run; from numa_lab.report import figures; \
	  Path('figures/readme-limit-share.png').write_bytes(figures.limit_share(load_run('data/sample')).png())"

bench: .venv/installed ## decode attention beside what memory and vector units allow, and beside others; draws the README's figure
	@tools/waiting.sh $(BIN)/python bench/decode.py --out figures/readme-decode $(BENCH_ARGS)

# One question each; the first lines of bench/*.py say which.
BENCHES := $(addprefix bench-,dispatch enter huge-pages model prefill read-limit seats sharded short-context)
.PHONY: $(BENCHES)
bench-model: system-llvm
$(BENCHES): bench-%: .venv/installed
	@tools/waiting.sh $(BIN)/python bench/$(subst -,_,$*).py $(BENCH_ARGS)

lint: .venv/installed-dev ## check style, types, imports between modules, and that notebooks hold no output
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@tools/waiting.sh $(BIN)/mypy
	@tools/waiting.sh $(BIN)/lint-imports
	$(BIN)/nbstripout --verify $(STRIP) notebooks/*.ipynb

format: .venv/installed-dev ## give code and notebooks the form that lint asks for
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	$(BIN)/nbstripout $(STRIP) notebooks/*.ipynb

clean: ## remove .venv, build output and caches; data/runs stays
	rm -rf .venv build *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

constraints: ## write constraints.txt anew: the newest versions that pyproject.toml and its lowest Python allow
	@python=$$(tools/need.sh python) && rm -rf build/newest && "$$python" -m venv build/newest
	@build/newest/bin/python -m pip install -q packaging
	@build/newest/bin/python tools/newest.py

# system-numactl-qemu: all system tools that are missing are installed, or named, at once.
system-%:
	@tools/need.sh $(subst -, ,$*) $(if $(filter .venv/made-in,$(ANEW)),python >/dev/null)

# Scripts in .venv hold its absolute path: a moved folder, like a Python that has gone, makes it anew. So does another PYTHON.
WHICH := -c 'import sys; print(sys.base_prefix, sys.version)'
ifneq ($(shell $(BIN)/python -c 'import pip; print(open(".venv/made-in").read())' 2>/dev/null),$(CURDIR))
ANEW := .venv/made-in
else ifneq ($(if $(PYTHON),$(shell "$(PYTHON)" $(WHICH) 2>&1)),$(if $(PYTHON),$(shell $(BIN)/python $(WHICH))))
ANEW := .venv/made-in
endif
.PHONY: $(ANEW)
.venv/made-in:
	@python=$$(tools/need.sh python) && echo "make: .venv from $$python" && \
	rm -rf .venv && "$$python" -m venv .venv && printf %s "$(CURDIR)" > $@

# The stamps are written last, so an install that failed or was stopped is made again. What tests need includes what a report needs.
.venv/installed .venv/installed-dev: .venv/made-in pyproject.toml constraints.txt tools/install.py
	@rm -f .venv/installed .venv/installed-dev
	@$(BIN)/python tools/install.py $(if $(filter %-dev,$@),dev)
	@$(BIN)/jupyter labextension disable --log-level=ERROR --level=sys_prefix @jupyterlab/apputils-extension:announcements
	@touch .venv/installed $@
