"""Pictures and texts -> features of the built-in model's frozen encoders, for training its heads."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export.nets.mini.backbone import frozen
from calmclip.export.nets.mini.facts import CONTEXT, PIXELS, WIDTH32
from calmclip.export.nets.mini.minilm import from_state
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.weights import BACKBONE, backbone_state, minilm_state, tokenizer_json
from calmclip.models.errors import InputError
from calmclip.models.preprocess.image import ImagePreparer, decode

VIEWS = ("upright", "mirrored")


def of_pictures(paths: Sequence[Path], cache: Path | None = None, *, quiet: bool = False) -> Tensor:
    """-> float32 [N, 2, 1280], upright and mirrored. About 50 ms a picture on one core.

    ``cache``: a folder for the features; the file's name depends on the pictures and the backbone. Values are rounded
    to float16 with and without a cache. Raises `InputError` with the file that is no picture.
    """
    file = cache / f"features-{_digest(paths)}.npy" if cache else None
    if file and file.is_file():
        return torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float32))
    backbone = frozen(tensors(backbone_state()))
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    preparer = ImagePreparer(PIXELS)
    features = torch.empty(len(paths), len(VIEWS), WIDTH32, dtype=torch.float16)
    with torch.inference_mode():
        for row, path in zip(features, tqdm(paths, "pictures", unit="", disable=quiet), strict=True):
            for slot, view in zip(row, _views(_picture(path)), strict=True):
                pixels = torch.from_numpy(preparer.prepare(view)[0]).to(memory_format=torch.channels_last)
                slot.copy_(backbone(pixels)[1].mean((2, 3))[0])
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".features-", dir=file.parent) as folder:
            np.save(complete := Path(folder) / file.name, features.numpy())
            complete.replace(file)  # so no reader sees a part of it
    return features.float()


def of_texts(texts: Sequence[str], *, batch: int = 64, quiet: bool = False) -> Tensor:
    """-> float32 [N, 384] unit rows. Texts over the context are truncated. A batch has texts of similar length."""
    encoder = from_state(tensors(minilm_state()))
    tokenizer = Tokenizer.from_str(tokenizer_json().decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(CONTEXT)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return of_rows(encoder, rows, batch=batch, quiet=quiet)


def of_rows(
    encoder: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Sequence[int]],
    *,
    pad: int = 0,
    batch: int = 64,
    quiet: bool | None = None,
) -> Tensor:
    """ids of texts -> float32 [N, D] unit rows of ``encoder(ids, mask)``. A batch has rows of similar length, filled
    with ``pad``. ``quiet`` None: no bar if the output is no terminal."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    features: list[Tensor] = [torch.empty(0)] * len(rows)
    with torch.inference_mode(), tqdm(total=len(rows), desc="texts", unit="", disable=quiet) as bar:
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            ids = torch.full((len(group), len(rows[group[-1]])), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for line, index in enumerate(group):
                ids[line, : len(rows[index])] = torch.tensor(rows[index])
                mask[line, : len(rows[index])] = 1
            for index, row in zip(group, F.normalize(encoder(ids, mask), dim=-1), strict=True):
                features[index] = row
            bar.update(len(group))
    return torch.stack(features) if features else torch.empty(0, 0)


def _picture(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def _views(picture: Image.Image) -> Iterator[Image.Image]:
    yield picture
    yield ImageOps.mirror(picture)


def _digest(paths: Sequence[Path]) -> str:
    lines = [BACKBONE.sha256, *(f"{path.name} {path.stat().st_size}" for path in paths)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
