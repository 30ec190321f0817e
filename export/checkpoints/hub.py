"""`hf:owner/name` or `hf:owner/name@revision` -> a directory: tensors and texts of a repository on the hub.

The hub is Hugging Face's. A revision is resolved to a commit, whose name the directory bears and a manifest gives. Only
files of `SUFFIXES` and the card are fetched, from the top of the repository, and of the weights only those that would
be read: no program, no pickle. What was fetched once is read again where the hub cannot be reached.
"""

import glob
import json
import re
from pathlib import Path
from typing import Any

from calmclip.export.checkpoints.files import require_package
from calmclip.export.checkpoints.weights import NAMES
from calmclip.models.errors import UnknownCheckpoint

PREFIX = "hf:"
SUFFIXES = (".safetensors", ".json", ".txt", ".model")
CARD = "README.md"  # says the licence
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)[\w./-]+))?")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def locate(checkpoint: str, *, cache: Path | None = None, endpoint: str | None = None) -> Path:
    """The directory of a checkpoint of the hub, fetched where it is not there; any other argument as it is.

    ``cache``, ``endpoint``: else huggingface_hub's own (HF_HOME, HF_ENDPOINT). Raises `UnknownCheckpoint`: no such
    name, revision or permission, no safetensors, or neither hub nor copy; `ExtraMissing` without huggingface_hub.
    """
    if not checkpoint.startswith(PREFIX):
        return Path(checkpoint)
    no_name = UnknownCheckpoint(f"{checkpoint!r} is no name on the hub; expected hf:owner/name[@revision]")
    match = _NAME.fullmatch(checkpoint)
    if match is None:
        raise no_name
    repo, revision = match["repo"], match["revision"] or "main"
    hub = require_package("huggingface_hub", f"{checkpoint}, from the hub,")
    api = hub.HfApi(endpoint=endpoint)
    copy = {"cache_dir": cache, "endpoint": endpoint}
    errors = hub.errors
    try:
        found = api.model_info(repo, revision=revision)
    except errors.HFValidationError:
        raise no_name from None
    except errors.GatedRepoError:
        raise UnknownCheckpoint(
            f"{checkpoint} is gated: accept its terms on the hub, then log in ('hf auth login'), and try again"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownCheckpoint(f"{checkpoint}: {repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UnknownCheckpoint(f"{checkpoint} is not on the hub, or private: then log in ('hf auth login')") from None
    except Exception as error:  # no network, offline by setting, a hub in trouble: each release raises others
        return _cached(hub, checkpoint, repo, revision, copy, error)
    files = _wanted(checkpoint, [one.rfilename for one in found.siblings or ()])
    try:
        path = hub.snapshot_download(repo, revision=revision, allow_patterns=[*map(glob.escape, files)], **copy)
        if index := next((name for name in files if name.endswith(".safetensors.index.json")), None):
            shards = _shards(Path(path) / index)
            path = hub.snapshot_download(repo, revision=Path(path).name, allow_patterns=shards, **copy)
    except Exception as error:
        raise UnknownCheckpoint(f"{checkpoint} could not be fetched: {_clause(error)}") from None
    return Path(path)


def name(path: Path) -> str:
    """owner/name@commit of a directory in the hub's cache; of any other path its last part."""
    path = path.resolve()
    match = _cache(path)
    return f"{match['owner']}/{match['name']}@{path.name}" if match else path.name


def short(path: Path) -> str:
    """The same without owner and commit."""
    match = _cache(path.resolve())
    return match["name"] if match else path.resolve().name


def _cache(path: Path) -> re.Match[str] | None:
    return _CACHED.fullmatch(path.parent.parent.name) if path.parent.name == "snapshots" else None


def _wanted(checkpoint: str, files: list[str]) -> list[str]:
    """Of the files at the top of a repository those to fetch; shards of weights come later, by their index."""
    top = [file for file in files if "/" not in file]
    tensors = [file for file in top if file.endswith(".safetensors")]
    if not tensors:
        pickles = [file for file in top if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        there = f", only {', '.join(pickles)}, which is not fetched" if pickles else ""
        raise UnknownCheckpoint(f"{checkpoint} holds no safetensors{there}; ask its owner for them, or convert a copy")
    known = [name for name in NAMES if name in top and "safetensors" in name]
    if known:
        tensors = [known[0]] if known[0] in tensors else []
    indices = {name for name in top if name.endswith(".index.json")} - set(known[:1])
    texts = [file for file in top if file.endswith(SUFFIXES[1:]) and file not in indices]
    return [*tensors, *texts, *(file for file in top if file == CARD)]


def _shards(index: Path) -> list[str]:
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [glob.escape(name) for name in sorted(names) if name.endswith(".safetensors")]


def _cached(hub: Any, checkpoint: str, repo: str, revision: str, copy: dict[str, Any], error: Exception) -> Path:
    """What was fetched before, whole or not: whoever reads it says what is missing."""
    try:
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[], **copy))
    except Exception:
        raise UnknownCheckpoint(
            f"{checkpoint}: the hub cannot be reached and no copy is here ({_clause(error)}); "
            "give a directory, or try again online"
        ) from None


def _clause(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
