"""`Settings`: one frozen object, read once from the environment and passed on.

A variable is ``CALMCLIP_`` and the field's name in capitals; a nested field joins with two underscores:
``CALMCLIP_BATCH__MAX_SIZE=16``. docs/operating.md lists them all; a test compares. `from_environment` refuses a
variable that it does not know: a misspelt CALMCLIP_KEYS must not open the service.
"""

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from calmclip.models.errors import BadRequest
from calmclip.models.extras import IMAGE
from calmclip.models.ops.library import Mode, checked_isas
from calmclip.models.preprocess.image import MAX_PIXELS
from calmclip.models.tasks.enhance import LEAST_PIXELS
from calmclip.models.tasks.explain import MAX_WORDS
from calmclip.service.scopes import VARIABLE as KEYS

MIB = 1 << 20
HOST = re.compile(r"([a-z0-9-]{1,63}\.)+[a-z][a-z0-9-]{0,62}")  # not an IP address: its last part begins with a digit
ADDRESS = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?")
ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")  # as a browser sends it: in small letters
PREFIX = "CALMCLIP_"
API_KEY = "CALMCLIP_API_KEY"  # of `calmclip index --url`
NO_SETTINGS = (API_KEY, IMAGE)  # variables that others read
# What Kubernetes sets in each pod for each Service of its namespace, here for those whose name begins with calmclip.
SERVICE_LINK = re.compile(r"CALMCLIP_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://.*")  # the value of its CALMCLIP_PORT
MAX_TEXTS = 10_000  # upper bound of `Limits.texts`; schemas refuse longer lists


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Batch(_Group):
    """How calls of several requests to one graph are merged."""

    max_size: int = Field(default=8, ge=1, le=1024, description="rows in one run of a graph")
    max_bytes: int = Field(default=7 * MIB // 2, ge=1, description="inputs in one run; one row always fits")
    max_wait_ms: float = Field(
        default=2.0, ge=0, le=1000, description="how long a call waits for calls of concurrent requests"
    )


class Queue(_Group):
    """Limits of the work in flight; beyond them the answer is 503 with `Retry-After`."""

    max_pending: int = Field(default=64, ge=1, description="requests in flight, and calls waiting for one graph")
    max_bytes: int = Field(default=256 * MIB, ge=1, description="bodies of all requests in flight")
    max_pixels: int = Field(default=160_000_000, ge=1, description="pictures of all requests in flight, as decoded")


class Limits(_Group):
    """Limits of one request; they are checked before any work."""

    body_bytes: int = Field(default=64 * MIB, ge=1024, description="a whole request body")
    image_bytes: int = Field(default=32 * MIB, ge=1, description="one picture, as a file")
    image_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        description="pixels that are decoded of one picture, read from its header; a JPEG may have four times as many",
    )
    pictures: int = Field(
        default=64, ge=1, le=MAX_TEXTS, description="`images` of one request; `texts` bounds those of embed and rank"
    )
    labels: int = Field(default=256, ge=1, description="labels in a request or classifier")
    templates: int = Field(
        default=32, ge=1, description="templates in a request or classifier, and descriptions of one label"
    )
    map_pixels: int = Field(
        default=1 << 20, ge=LEAST_PIXELS, description="pixels that the map of an enhanced picture is computed on"
    )
    mask_pixels: int = Field(
        default=640_000_000, ge=1, description="pixels of all masks that a segment request gets as PNG"
    )
    examples: int = Field(default=8, ge=1, description="example pictures in a detect request")
    texts: int = Field(default=256, ge=1, le=MAX_TEXTS, description="inputs of one embed request; items of one upload")
    top_k: int = Field(default=1000, ge=1, description="hits of one search; items of one page")
    collections: int = Field(default=1000, ge=1, description="collections in the store")
    fit_items: int = Field(default=20_000, ge=1, description="items of a collection that one fit reads")
    words: int = Field(default=5000, ge=1, description="words of a vocabulary in one request")
    caption_words: int = Field(default=64, ge=1, le=MAX_WORDS, description="words of a caption in one explain request")
    bank_bytes: int = Field(
        default=256 * MIB,
        ge=1024,
        description="ids, vectors and metadata of a bank over HTTP, unpacked",
    )
    long_characters: int = Field(
        default=200_000, ge=1, description="all texts of a request to compress, or to embed by compress or chunk"
    )
    meta_bytes: int = Field(default=16384, ge=2, description="one item's metadata, as JSON")


class Slo(_Group):
    """The objective: a share ``target`` of requests takes at most ``latency_ms``, which is always a bucket edge."""

    latency_ms: float = Field(default=250.0, gt=0)
    target: float = Field(default=0.99, gt=0, lt=1)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    bundles_dir: Path = Field(default=Path("models/bundles"), description="directory of the bundles")
    load: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="bundles to load, separated by commas; the first that serves a task is its default. Empty: all",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="intra-op threads per graph; 0: one per core")
    ops: Mode = Field(
        default="auto",
        description="the op library: used if present (auto), required, all (required, and no operator is left to ONNX "
        "Runtime), or off",
    )
    ops_without: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="instruction sets whose kernels do not run, separated by commas; empty: all run"
    )
    batch: Batch = Batch()
    queue: Queue = Queue()
    connections: int = Field(default=512, ge=1, description="open connections; one more closes an idle one")
    deadline_ms: float = Field(
        default=10_000, gt=0, le=86_400_000, description="a request that takes longer is answered 504; at most a day"
    )
    grace_s: float = Field(default=1.0, ge=0, description="after SIGTERM: requests are served, /readyz answers 503")
    idle_unload_s: float = Field(default=0, ge=0, description="a graph idle for so long leaves memory; 0: never")
    reload_s: float = Field(default=5.0, ge=0, description="how often bundles are checked for changes; 0: never")
    limits: Limits = Limits()
    text_cache: int = Field(default=16384, ge=0, description="cached vectors of sentences and labels")
    data_dir: Path = Field(default=Path("data"), description="directory of classifiers and, by default, of collections")
    store: str | None = Field(
        default=None,
        repr=False,  # it may hold a password
        description="store of collections, `lancedb:FOLDER` or `pgvector:postgresql://…`; else under data_dir",
    )
    keep_originals: bool = Field(
        default=False, description="new collections keep the texts and pictures that they embed, for `re-embed`"
    )
    copy_bytes: int = Field(
        default=1024 * MIB, ge=0, description="largest quantized copy of one collection's vectors in memory; 0: no copy"
    )
    min_relevance: float = Field(
        default=0.93, ge=0, le=1, description="hits of a search of less relevance are left out; 0: none"
    )
    url_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="hosts from which pictures may be fetched, separated by commas; empty: none"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="origins whose pages in a browser may read answers, separated by commas, or *; empty: none",
    )
    keys: Path | None = Field(default=None, description="file of `calmclip keys`; every route but health needs a key")
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="port of /metrics, instead of the service's own port"
    )
    probes_port: int | None = Field(
        default=None, ge=1, le=65535, description="one more port, of /healthz and /readyz, which no request can delay"
    )
    replicas: int = Field(
        default=1, ge=1, description="replicas that there should be at least; several need a store that is shared"
    )
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector for traces, by OTLP over HTTP; else none"
    )
    slo: Slo = Slo()
    log: Literal["text", "json"] = Field(default="text", description="format of the access log")

    @field_validator("load", "ops_without", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("url_hosts", "cors_origins", mode="before")
    @classmethod
    def _hosts(cls, value: object) -> object:
        return tuple(name.lower() for name in names) if isinstance(names := cls._names(value), tuple) else names

    @field_validator("ops_without")
    @classmethod
    def _are_isas(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return checked_isas(names)
        except BadRequest as error:  # pydantic reports a ValueError
            raise ValueError(str(error)) from None

    @field_validator("url_hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host):
                raise ValueError(f"{host!r} is not a host name; expected one such as images.example.org")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin == "*" and len(origins) == 1:
                continue
            if not ORIGIN.fullmatch(origin):
                expected = "one such as https://app.example.org or http://localhost:3000, without a path, or * alone"
                raise ValueError(f"{origin!r} is not an origin; expected {expected}")
        return origins

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        if address is not None and not ADDRESS.fullmatch(address):
            raise ValueError("expected a collector's address, such as http://collector:4318")
        return address

    @property
    def cores(self) -> int:
        """Threads per graph, and of the pool that decodes pictures."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def store_url(self) -> str:
        return self.store or f"lancedb:{self.data_dir / 'collections'}"


def from_environment(**flags: object) -> Settings:
    """The settings of the environment, overridden by ``flags`` that are not None. Raises `BadRequest`, which names what
    is wrong: an unknown variable, an empty CALMCLIP_KEYS, a value out of range."""
    _check_names(os.environ)
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = [
            f"{_variable(e['loc'])} is {e['input']!r}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        ]
        raise BadRequest("; ".join(wrong)) from None
    except SettingsError as error:  # a group, such as CALMCLIP_BATCH, that is not a JSON object
        raise BadRequest(f"a setting of the environment cannot be read: {error}") from None


def variables(model: type[BaseModel] = Settings, prefix: str = PREFIX) -> Iterator[str]:
    """The names of all settings. A group is one too, as a JSON object."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from variables(field.annotation, f"{prefix}{name.upper()}__")


def _check_names(environment: Mapping[str, str]) -> None:
    known = {*variables(), *NO_SETTINGS}
    for name in sorted(environment):
        if not name.upper().startswith(PREFIX) or name in known or _is_service_link(name, environment[name]):
            continue
        near = get_close_matches(name.upper().removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known], n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "docs/operating.md lists the settings."
        raise BadRequest(f"there is no setting {name}; {hint} Correct or unset it")
    if environment.get(KEYS) == "":
        raise BadRequest(f"{KEYS} is empty, which would open every route; name the file of keys, or unset the variable")


def _is_service_link(name: str, value: str) -> bool:
    return bool(SERVICE_LINK.fullmatch(name) or (name.endswith("PORT") and SERVICE_PORT.fullmatch(value)))


def _variable(place: tuple[int | str, ...]) -> str:
    return PREFIX + "__".join(str(part).upper() for part in place)
