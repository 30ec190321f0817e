"""Retrieval by the built-in model in several languages, on photographs of the Flickr8k dev split.

    python -m tests.bench.languages --flickr8k FOLDER --out languages
    calmclip eval mini-multi-int8 retrieval --data languages --against mini-int8

The first command writes the data of the eval: 300 photographs with five captions each; of every third photograph one
caption, as the language en; and its translations, as de, fr, es and zh. `data/translated_captions.jsonl` holds the
translations alone. They derive from Flickr8k (research use; Hodosh, Young & Hockenmaier, JAIR 47, 2013). FOLDER has
captions.json {"file": [captions]} and images/.
"""

import argparse
import json
from pathlib import Path

from calmclip.models.datasets import read_captions

FILE = Path(__file__).with_name("data") / "translated_captions.jsonl"
TAGS = ("de", "fr", "es", "zh")


def write(flickr8k: Path, out: Path) -> None:
    captions = read_captions(flickr8k / "captions.json")
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    files = {"": captions, "en": {row["image"]: [captions[row["image"]][row["caption"]]] for row in rows}}
    files |= {tag: {row["image"]: [row[tag]] for row in rows} for tag in TAGS}
    out.mkdir(parents=True, exist_ok=True)
    for tag, pictures in files.items():
        name = f"captions.{tag}.json" if tag else "captions.json"
        (out / name).write_text(json.dumps(pictures, ensure_ascii=False), encoding="utf-8")
    if not (out / "images").exists():
        (out / "images").symlink_to((flickr8k / "images").resolve(), target_is_directory=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--flickr8k", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    write(arguments.flickr8k, arguments.out)


if __name__ == "__main__":
    main()
