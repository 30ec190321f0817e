"""Which tokens of a BERT have outliers: `python -m tests.bench.outlier_tokens CHECKPOINT… --texts FILE`.

For the output of each block's MLP whose mean kurtosis is over 20: the kurtosis, the largest number (both a mean over
rows), and at which tokens the numbers over half of the row's largest lie. Rows are lines of the file.
"""

from argparse import ArgumentParser
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calmclip.export.nets import NETS
from calmclip.export.towers.transformer import Block
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.datasets import lines

MANY = 20.0  # kurtosis; a Gaussian has 3
Outputs = dict[str, list[Tensor]]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, required=True, help="one row a line")
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        print(checkpoint.name)
        for name, kurtosis, largest, tokens in measure(checkpoint, lines(args.texts)[: args.rows]):
            shares = ", ".join(f"{token} {share:.0%}" for token, share in tokens)
            print(f"  {name}.mlp: kurtosis {kurtosis:.0f}, largest {largest:.1f}, at {shares}")


def measure(checkpoint: Path, texts: list[str]) -> list[tuple[str, float, float, list[tuple[str, float]]]]:
    """-> name of the block, kurtosis, largest number, and up to four tokens with their share of the large numbers."""
    tower = NETS.get("bert").load(str(checkpoint)).towers["mlm"]
    assert isinstance(tower.preprocess, TextPreprocess)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows = [row.ids for row in tokenizer.encode_batch(texts) if len(row.ids) <= tower.preprocess.context]
    outputs: Outputs = {}
    for name, block in tower.module.named_modules():
        if isinstance(block, Block):
            block.mlp.register_forward_hook(partial(_keep, outputs, name))
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            tower.module(ids, torch.ones_like(ids))
    figures = []
    for name, parts in outputs.items():
        kurtosis = sum(map(_kurtosis, parts)) / len(parts)
        if kurtosis > MANY:
            counts: Counter[str | None] = Counter()
            for row, values in zip(rows, parts, strict=True):
                large = (values.abs() > values.abs().max() / 2).sum(dim=1).tolist()
                counts.update({tokenizer.id_to_token(row[place]): count for place, count in enumerate(large) if count})
            largest = sum(float(values.abs().max()) for values in parts) / len(parts)
            shares = [(str(token), count / counts.total()) for token, count in counts.most_common(4)]
            figures.append((name, kurtosis, largest, shares))
    return figures


def _keep(outputs: Outputs, name: str, mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    outputs.setdefault(name, []).append(output[0])


def _kurtosis(values: Tensor) -> float:
    centred = values.double() - values.double().mean()
    return float((centred**4).mean() / (centred.std() ** 4 + 1e-6))


if __name__ == "__main__":
    main()
