# Each target does its own set-up; a second call finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RQD := .rqd

.PHONY: demo test test-long bench browser schedulers packages lint clean

# Paint the configs/demo.yaml landscape: one rank a GPU, or two ranks that share the cores.
demo: $(READY)
	@ranks=$$($(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)"); \
	threads=$$($(BIN)/python -c "import os; print(max(1, os.cpu_count() // $$ranks))"); \
	OMP_NUM_THREADS=$$threads $(BIN)/torchrun --nproc_per_node $$ranks \
	    -m engine.generate --config configs/demo.yaml

# Files of tests side by side, one a core: most of them wait for ranks to start, or to notice.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: $(READY)
	$(PYTEST) -m "not long"

# Whole ladders, on several ranks and at the sizes that are shipped.
test-long: $(READY)
	$(PYTEST) -m long

# Every benchmark in small, eleven minutes in all: benchmarks/results/REPORT.md.
bench: $(READY)
	$(BIN)/python -m benchmarks.report

# What tests/test_viewer.py looks at pages with, and is skipped without: on Debian, as root.
browser:
	command -v chromium && command -v chromedriver || \
	    { apt-get update -q && apt-get install -qy --no-install-recommends chromium chromium-driver; }
	npm install --silent --prefix .browser openseadragon@6.1

# What tests/test_slurm.py starts a cluster of, tests/test_opencue.py a render host of, and
# tests/test_namespaces.py two hosts: each is skipped without. `make -k` gets what there is to get.
schedulers: packages $(RQD)/.ready

# On Debian, as root.
packages:
	command -v slurmctld && command -v munged && command -v ip && command -v time || \
	    { apt-get update -q && \
	      apt-get install -qy --no-install-recommends slurm-wlm munge iproute2 time; }

# OpenCue's RQD wants another psutil than the engine, so it has an environment of its own. Without
# pynput, which watches keyboards and has to be compiled: only RQD's nimby, off here, imports it.
$(RQD)/.ready: Makefile
	$(PYTHON) -m venv $(RQD)
	$(RQD)/bin/pip install --quiet psutil==5.9.8 future==1.0.0 grpcio \
	    protobuf packaging PyYAML
	$(RQD)/bin/pip install --quiet --no-deps opencue-rqd==1.37.0 opencue-proto==1.37.0 \
	    opencue-pycue==1.37.0 opencue-pyoutline==1.37.0
	touch $@

lint: $(READY)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# torch first and by its exact version, so that no other package's range chooses another build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(RQD) .browser .mypy_cache .pytest_cache .ruff_cache .hypothesis outputs
