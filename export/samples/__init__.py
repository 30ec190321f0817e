"""Pictures and texts that ship with the package. Two sets share no content:

* `pictures` and `texts`: the certificate. Export measures INT8 beside float on them; nothing is fitted to them.
* `calibration_pictures` and `calibration_texts`: for ranges, and for a search that holds some of them out.

The photographs are free to share; README.md here names each one's author, source and licence. The texts are ours, and
`leaves` draws the other pictures.
"""

from pathlib import Path

_HERE = Path(__file__).parent
_CALIBRATION = _HERE / "calibration"


def pictures() -> list[Path]:
    return sorted(_HERE.glob("*.jpg"))


def texts() -> list[str]:
    return _lines(_HERE)


def calibration_pictures() -> list[Path]:
    return sorted(_CALIBRATION.glob("*.jpg"))


def calibration_texts() -> list[str]:
    return _lines(_CALIBRATION)


def _lines(folder: Path) -> list[str]:
    return (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
