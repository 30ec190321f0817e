"""`embedding_digest`: one hash of all that decides a bundle's vectors.

Vectors are compared only with vectors of the same digest. So the digest holds what embeds and nothing else: a new name,
date, report, detector or classifier leaves stored vectors valid. "What embeds" in models/README.md is normative.
"""

import hashlib
import json
from typing import Any

from calmclip.models.bundle.manifest import REPORT, Manifest, TextPreprocess
from calmclip.models.tasks import embedding

ROLES = ("image", "text")


def embedding_digest(manifest: Manifest) -> str | None:
    """sha256 (hex) of what embeds in a sealed bundle; None if it does not serve `embed`.

    It is the hash of JSON with sorted keys, without spaces, in ASCII:

    graphs   role -> ``file``: sha256 of the ONNX file; ``output``: the name of the vectors; ``preprocess``: the keys
             that differ from their defaults, with the tokenizer by the sha256 of its file, not by its path
    weights  path -> sha256 of each file that no key of the manifest names: tensors of these graphs may be in it

    Only ONNX knows which graph reads a file of weights, so each of them counts. A file that `image` shares with
    `regions` holds the tensors of both, which a change of the box network alone leaves as they are. A default is left
    out so that a key that a later calmclip adds does not change the digest of older bundles.
    """
    if "embed" not in manifest.tasks:
        return None
    facts = {
        "graphs": {role: _graph(manifest, role) for role in ROLES if role in manifest.graphs},
        "weights": {
            path: file.sha256
            for path, file in manifest.files.items()
            if path != REPORT and path not in manifest.named_files()
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _graph(manifest: Manifest, role: str) -> dict[str, Any]:
    graph = manifest.graphs[role]
    assert graph.preprocess is not None  # the task embed requires it
    preprocess = graph.preprocess.model_dump(mode="json", exclude_defaults=True)
    if isinstance(graph.preprocess, TextPreprocess):
        preprocess["tokenizer"] = manifest.files[graph.preprocess.tokenizer].sha256
    return {
        "file": manifest.files[graph.file].sha256,
        "output": embedding(role, graph)[0],
        "preprocess": preprocess,
    }
