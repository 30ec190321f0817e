"""`hf:owner/name` or `hf:owner/name@revision` -> a directory: tensors and texts of a repository of Hugging Face's hub.

A revision is resolved to a commit, which names the directory and stands in the manifest. Only files of `SUFFIXES` and
the card are fetched, from the top of the repository, and only the weights that would be read: no program, no pickle.
If the hub cannot be reached, a copy from an earlier call is used.
"""

import glob
import json
import re
from pathlib import Path
from typing import Any

from calmclip.export.checkpoints.files import require_package
from calmclip.export.checkpoints.locate import NAMES
from calmclip.models.errors import UnknownCheckpoint

PREFIX = "hf:"
SUFFIXES = (".safetensors", ".json", ".txt", ".model")
CARD = "README.md"  # states the licence
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)[\w./-]+))?")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def locate(checkpoint: str, *, cache: Path | None = None, endpoint: str | None = None) -> Path:
    """The local directory of a checkpoint on the hub, fetched if it is absent. Any other argument is a path.

    ``cache``, ``endpoint``: by default those of huggingface_hub (HF_HOME, HF_ENDPOINT). Raises `UnknownCheckpoint` for
    an unknown name or revision, a missing permission, a repository without safetensors, or if neither the hub nor a
    copy is available; `ExtraMissing` without huggingface_hub.
    """
    if not checkpoint.startswith(PREFIX):
        return Path(checkpoint)
    bad_name = UnknownCheckpoint(f"{checkpoint!r} is no name on the hub; expected hf:owner/name[@revision]")
    match = _NAME.fullmatch(checkpoint)
    if match is None:
        raise bad_name
    repo, revision = match["repo"], match["revision"] or "main"
    hub = require_package("huggingface_hub", f"{checkpoint}, from the hub,")
    api = hub.HfApi(endpoint=endpoint)
    options = {"cache_dir": cache, "endpoint": endpoint}
    errors = hub.errors
    try:
        info = api.model_info(repo, revision=revision)
    except errors.HFValidationError:
        raise bad_name from None
    except errors.GatedRepoError:
        raise UnknownCheckpoint(
            f"{checkpoint} is gated: accept its terms on the hub, then log in ('hf auth login'), and try again"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownCheckpoint(f"{checkpoint}: {repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UnknownCheckpoint(
            f"{checkpoint} is not on the hub, or is private; for a private repository log in ('hf auth login')"
        ) from None
    except Exception as error:  # no network, offline mode, an error of the hub: the kinds differ between releases
        return _cached(hub, checkpoint, repo, revision, options, error)
    files = _select(checkpoint, [sibling.rfilename for sibling in info.siblings or ()])
    try:
        path = hub.snapshot_download(repo, revision=revision, allow_patterns=[*map(glob.escape, files)], **options)
        if index := next((name for name in files if name.endswith(".safetensors.index.json")), None):
            shards = _shards(Path(path) / index)
            path = hub.snapshot_download(repo, revision=Path(path).name, allow_patterns=shards, **options)
    except Exception as error:
        raise UnknownCheckpoint(f"{checkpoint} could not be fetched: {_clause(error)}") from None
    return Path(path)


def name(path: Path) -> str:
    """owner/name@commit for a directory in the hub's cache, the last part for any other path."""
    path = path.resolve()
    match = _cache(path)
    return f"{match['owner']}/{match['name']}@{path.name}" if match else path.name


def short(path: Path) -> str:
    """`name` without owner and commit."""
    match = _cache(path.resolve())
    return match["name"] if match else path.resolve().name


def _cache(path: Path) -> re.Match[str] | None:
    return _CACHED.fullmatch(path.parent.parent.name) if path.parent.name == "snapshots" else None


def _select(checkpoint: str, files: list[str]) -> list[str]:
    """The files at the top of a repository that are fetched. Shards of weights follow later, from their index."""
    top = [file for file in files if "/" not in file]
    tensors = [file for file in top if file.endswith(".safetensors")]
    if not tensors:
        pickles = [file for file in top if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        others = f", only {', '.join(pickles)}, which is not fetched" if pickles else ""
        raise UnknownCheckpoint(
            f"{checkpoint} holds no safetensors{others}; ask its owner for safetensors, or convert a copy"
        )
    known = [name for name in NAMES if name in top and "safetensors" in name]
    if known:
        tensors = [known[0]] if known[0] in tensors else []
    indices = {name for name in top if name.endswith(".index.json")} - set(known[:1])
    texts = [file for file in top if file.endswith(SUFFIXES[1:]) and file not in indices]
    return [*tensors, *texts, *(file for file in top if file == CARD)]


def _shards(index: Path) -> list[str]:
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [glob.escape(name) for name in sorted(names) if name.endswith(".safetensors")]


def _cached(hub: Any, checkpoint: str, repo: str, revision: str, options: dict[str, Any], error: Exception) -> Path:
    """The copy of an earlier call. It may be incomplete; its reader then says what is missing."""
    try:
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[], **options))
    except Exception:
        raise UnknownCheckpoint(
            f"{checkpoint}: the hub cannot be reached and no copy is here ({_clause(error)}); "
            "give a directory, or try again online"
        ) from None


def _clause(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
