# Everything happens in .venv, made here; nothing else of the machine is touched.
# The first of these that is a Python 3.10 to 3.13; or your choice: make demo PYTHON=/path/to/python3.12
SUITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done),python3)

# Pinned and first: pyproject.toml's range would take the newest torch. PyPI's build for Linux brings gigabytes of CUDA;
# without them: TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# Processes that share the tests; each computes with one thread.
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
# Quiet unless it fails; PIP_QUIET= shows what it does.
PIP_QUIET ?= --quiet
PIP := $(PY) -m pip --disable-pip-version-check $(PIP_QUIET)
# Stamps: an installation is repeated when its stamp is missing or older than pyproject.toml.
TORCH_DONE := $(VENV)/torch.installed
RUN_DONE := $(VENV)/run.installed
DEV_DONE := $(VENV)/dev.installed
BOOK_DONE := $(VENV)/book.installed
BENCH_DONE := $(VENV)/bench.installed

TUNED := outputs/demo
UNTUNED := outputs/demo-untuned

.PHONY: help demo shell test lint bench faults clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    fine-tune SmolLM2-135M on the embedded entries; a table of before and after (minutes)'
	@echo 'make shell   a shell in which python is the one of .venv; exit leaves it'
	@echo 'make test    all tests'
	@echo 'make lint    ruff, mypy and import-linter (which folder may import which)'
	@echo 'make bench   speed and memory beside other libraries; BENCH="training --rounds 1" picks'
	@echo 'make faults  kills, full disks, damaged files, lying servers, two owners; FAULTS="kills --count 20" picks'
	@echo 'make clean   delete .venv and the tools'\'' caches; outputs/ and downloads stay'
	@echo
	@echo 'The first of them makes .venv and installs into it. Variables: PYTHON (3.10 to 3.13), TORCH.'

# The three steps are files, so an interrupted demo goes on where it stopped and a finished one is only shown.
# Data, prompt and generation settings of the first are those of conf/experiment/demo.yaml.
demo: $(TUNED)/evaluation/test/summary.json
	@echo
	@$(PY) -m instruct_lm.report untuned=$(UNTUNED) tuned=$(TUNED)
	@echo
	@echo 'Curves and answers: $(VENV)/bin/tensorboard --logdir $(TUNED). To start anew: rm -r $(UNTUNED) $(TUNED)'

$(UNTUNED)/summary.json: | $(RUN_DONE)
	$(PY) evaluate.py model=smollm2-135m data=sample generation.max_new_tokens=64 output_dir=$(UNTUNED)

$(TUNED)/summary.json: | $(RUN_DONE) $(UNTUNED)/summary.json
	@if [ -f $(TUNED)/.hydra/config.yaml ]; then \
		set -x; $(PY) train.py resume=$(TUNED); \
	else \
		set -x; $(PY) train.py experiment=demo output_dir=$(TUNED); \
	fi

$(TUNED)/evaluation/test/summary.json: $(TUNED)/summary.json | $(RUN_DONE)
	$(PY) evaluate.py run=$(TUNED)

shell: | $(RUN_DONE)
	@echo 'python is $(CURDIR)/$(PY) here; exit leaves.'
	@VIRTUAL_ENV='$(CURDIR)/$(VENV)' PATH='$(CURDIR)/$(VENV)/bin':"$$PATH" "$${SHELL:-sh}" || true

test: $(DEV_DONE) $(BOOK_DONE)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: $(DEV_DONE)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

bench: $(BENCH_DONE) $(BOOK_DONE)
	$(PY) -m benchmarks $(BENCH)

faults: $(RUN_DONE)
	$(PY) -m faults $(FAULTS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TORCH_DONE):
	@command -v $(PYTHON) >/dev/null || { echo 'make: $(PYTHON) is not there. Install Python 3.10 to 3.13, or name' \
		'one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c '$(SUITS)' || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), Python 3.10 to 3.13 is needed." \
		'Install one, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'make: $(PYTHON) lacks the venv module; on Debian and' \
		'Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

$(RUN_DONE): pyproject.toml $(TORCH_DONE)
	$(PIP) install -e .
	@touch $@

$(DEV_DONE): pyproject.toml $(TORCH_DONE)
	$(PIP) install -e '.[dev]'
	@touch $@ $(RUN_DONE)

# Peers, for the benchmark only.
$(BENCH_DONE): pyproject.toml $(DEV_DONE)
	$(PIP) install 'trl>=1,<2' 'peft>=0.17,<1'
	@touch $@

# The book's own code, a reference for the tests; its declared dependencies are a notebook's and are not needed.
$(BOOK_DONE): $(DEV_DONE)
	@$(PIP) install --no-deps llms-from-scratch==1.0.19 && touch $@ || echo 'make: tests against the book'\''s code will be skipped.'
