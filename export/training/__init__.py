"""`calmclip train`: a small training loop for nets that will be quantized, from new weights or from a checkpoint.

settings.py     the settings: a net's size, its attention, an objective, the schedule
data.py         rows of tokens, pictures of classes, pictures with captions
start.py        the net to train: new, or a checkpoint with the attention of the settings
objectives.py   the tasks: mlm, clm, classes, contrastive
loop.py         steps, a log, states to resume from
write.py        a Hugging Face directory, with the names that export reads
demonstration.py    vanilla, clipped and gated nets, trained and quantized: the paper's table at a small size
distillation.py    `calmclip distil`: a text tower towards the vectors of another bundle
corpus.py  students.py    its texts and pictures; the towers that it trains
"""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"  # of `calmclip demonstrate`


def shipped() -> list[str]:
    """The names of the recipes; help reads them, so that it loads nothing."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))
