# Everything here bootstraps itself: a machine with make and python3 >= 3.10 needs nothing else.
#
#   make demo     train a small GPT for a minute, compress its checkpoint, resume from both, compare; installs torch,
#                 the library and matplotlib, 1 GB on disk (TORCH='torch --index-url URL' chooses a build of torch)
#   make test     the tests
#   make check    linters, types, import contracts, and the tests: what CI runs
#   make format   let ruff rewrite the sources
#   make campaign the long versions of the tests that damage files and kill writers, and all tests with new examples
#   make sm90     compile every Triton kernel for A100, H100 and B200 under the oldest and the newest triton: needs no GPU
#   make oldest   the tests of kernels, optimizers, codecs and verbs under the oldest supported torch and its triton; fetches
#                 7 GB into .torch, less with TORCH='torch --index-url URL'
#   make torchtitan  fetch torchtitan into .torchtitan, 300 MB, and train with it on CPUs (examples/torchtitan_train.py)
#   make gpu      with $(GPU_PYTHON), a Python that has a CUDA build of torch: the GPU tests, then the benchmarks, in
#                 less than eight minutes; make gpu-rehearsal does the same in small without a GPU, and make gpu-packages
#                 fetches into .gpu-packages what a GPU machine without a network may lack (for Python $(GPU_VERSION))
#   make serve    start the conversion service: prints a URL and, the first time, a token; another token is made with
#                 .venv/bin/statecodec-server token add NAME
#   make page     the service's page in a browser; keeps a picture of every state in build/artefacts/page
#   make faults   kill the service in 200 and more ways, compare, and rewrite the table in docs/service.md
#   make load     many large uploads, pollers and listeners at once
#   make docs     bring generated tables and figures up to date, and build the site in build/site
#   make wheel    build the wheel, install it into an empty environment, and compress something there

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LIBRARY := $(VENV)/.library-installed
TORCH  ?= torch
PIP     = $(BIN)/python -m pip install $(if $(CI),--quiet) --constraint constraints.txt
DEMO   ?= demo
WORKERS ?= 2
GPU_PYTHON ?= $(PYTHON)
GPU_VERSION ?= 3.12
GPU_EXTRAS ?= flashoptim
OLDEST_TRITON := .triton/3.6.0
OLDEST_TORCH := .torch/2.10.0

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint style types types-of-scripts contracts check format campaign sm90 oldest torchtitan gpu gpu-rehearsal gpu-packages serve page faults load docs site wheel clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

# torch goes first and alone: nothing that follows may pull in another build of it.
$(LIBRARY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is %d.%d" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "set-up 1/3: a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "set-up 2/3: torch, by far the largest part"
	@$(PIP) $(TORCH)
	@echo "set-up 3/3: statecodec with its command line, and matplotlib"
	@$(PIP) --editable '.[plot]'
	@touch $@

$(STAMP): $(LIBRARY)
	@echo "set-up: what the tests, the service and the documents need besides"
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(LIBRARY)
	@mkdir -p $(DEMO)
	@$(BIN)/statecodec demo --dir $(DEMO) --plot $(DEMO)/losses.svg --force
	@echo "The losses are drawn in $(DEMO)/losses.svg. To call statecodec by its name: . $(BIN)/activate"

# Where that triton cannot be had, the test that compiles with it is skipped, and says so.
test: $(STAMP)
	@$(MAKE) --no-print-directory $(OLDEST_TRITON) || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	@$(MAKE) --no-print-directory --jobs=2 style types types-of-scripts contracts

style:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types:
	$(BIN)/mypy

types-of-scripts:
	MYPYPATH=benchmarks:examples:tests/server:cli:server $(BIN)/mypy --config-file= --cache-dir .mypy_cache/scripts --python-version 3.11 \
	    --ignore-missing-imports --check-untyped-defs --explicit-package-bases benchmarks/*.py examples/*.py

contracts:
	$(BIN)/lint-imports

check: lint test

sm90: $(STAMP) $(OLDEST_TRITON)
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python tests/kernels/sm90.py
	$(BIN)/python tests/kernels/sm90.py

# The triton that the oldest supported torch (2.10) brings; alone it is enough to compile.
$(OLDEST_TRITON):
	@rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$(notdir $@)
	@mv $@.part $@

oldest: $(STAMP) $(OLDEST_TORCH)
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST_TORCH) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	    tests/kernels tests/optim tests/codecs tests/choose tests/format tests/verbs

# Beside the environment, which has the torch of constraints.txt.
$(OLDEST_TORCH):
	@rm -rf $@.part
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --target $@.part \
	    torch==$(notdir $@) $(wordlist 2,9,$(TORCH)) triton==$(notdir $(OLDEST_TRITON))
	@mv $@.part $@

torchtitan: $(STAMP) .torchtitan
	PYTHONPATH=$(CURDIR)/.torchtitan $(BIN)/python -m pytest tests/frameworks/test_torchtitan.py

# Beside the environment, and without what it asks for: the versions that it wants of some packages are not those of the tests.
.torchtitan:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ torchtitan==0.3.0 torchdata==0.11.0 datasets==4.7.0 \
	    torch_checkpointing==0.1.1 spmd_types==0.2.3 tyro==1.0.17 typeguard==4.6.1 docstring_parser==0.18.0 einops==0.8.2 \
	    tensorboard==2.21.0 absl-py==2.5.1 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py

gpu-rehearsal: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --rehearse

# bitsandbytes has no wheel that is small enough to travel everywhere; it is compared with where it is installed.
gpu-packages:
	$(PYTHON) -m pip install --quiet --upgrade --no-deps --only-binary=:all: --target .gpu-packages \
	    --implementation cp --python-version $(GPU_VERSION) --platform manylinux_2_28_x86_64 \
	    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	    -c constraints.txt zstandard zlib-ng safetensors $(GPU_EXTRAS)

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

campaign: $(STAMP)
	STATECODEC_FLIPS=20000 STATECODEC_KILLS=50 $(BIN)/python -m pytest --timeout=7200 tests/format -k "flips or kill"
	STATECODEC_RANDOM=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

docs: $(STAMP)
	$(BIN)/python -m statecodec_cli.reference docs/cli.md
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/figures.py
	@$(MAKE) --no-print-directory site
	@echo "build/site/index.html; searchable when served: $(BIN)/python -m http.server -d build/site"

# The documents as a site, from what is there.
site:
	rm -rf build/docs build/site
	mkdir -p build
	cp -r docs build/docs
	cp LICENSE CHANGELOG.md SECURITY.md build/docs
	for page in CONTRIBUTING README; do sed 's#](docs/#](#g' $$page.md > build/docs/$$page.md; done
	mv build/docs/README.md build/docs/index.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: $(LIBRARY)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls -t dist/*.whl | head -1)"
	cd build/wheel && bin/python -c 'import torch; torch.save({"model": {"w": torch.randn(99, 99)}}, "ckpt.pt")'
	cd build/wheel && bin/statecodec compress ckpt.pt --verify
	@ls -t dist/*.whl | head -1

serve: $(STAMP)
	$(BIN)/statecodec serve

page: $(STAMP)
	$(BIN)/python -m pytest tests/server/test_page.py tests/server/test_page_states.py
	@echo "pictures of every state: build/artefacts/page"

faults: $(STAMP)
	$(BIN)/python benchmarks/service_faults.py --write

load: $(STAMP)
	$(BIN)/python benchmarks/service_load.py

clean:
	rm -rf $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
