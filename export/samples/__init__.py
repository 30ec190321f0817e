"""Pictures and texts that ship with the package: for sealing bars, self-tests and first calibrations.

The photographs are free to share; README.md here names each one's author, source and licence. The texts are ours.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def pictures() -> list[Path]:
    return sorted(_HERE.glob("*.jpg"))


def texts() -> list[str]:
    return (_HERE / "texts.txt").read_text(encoding="utf-8").splitlines()
