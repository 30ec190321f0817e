"""The curves of `resilience inject` as a picture and as a page. matplotlib is in the extra `export`."""

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from calmclip.export.resilience.inject import ALL
from calmclip.export.resilience.report import notes, tables
from calmclip.models.evals.samples import write
from calmclip.models.extras import missing

_PANELS = (("agreement", "pictures with the same answer, %", 100.0), ("cosine", "cosine with the clean vector", 1.0))
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto }
"""


def require() -> None:
    """Raises `ExtraMissing` without matplotlib; called before the measurement."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise missing("calmclip resilience inject --plot or --html", "matplotlib", "export") from None


def draw(value: Mapping[str, Any], file: Path) -> None:
    """Write a PNG, atomically. Raises OSError."""
    content = _figure(value, "png")
    write(file, lambda out: out.write(content))


def page(value: Mapping[str, Any], file: Path) -> None:
    """Write tables, notes and curves as one HTML file, atomically. Raises OSError."""
    drawn = _figure(value, "svg").decode()
    title = "Bit flips: " + ", ".join(bundle["name"] for bundle in value["bundles"])
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<figure>{drawn[drawn.index('<svg') :]}",
        "<figcaption>Mean over the repetitions and its 95 % interval.</figcaption></figure>",
    ]
    for table in tables(value):
        rows = [_row(table.head, "th"), *(_row(row, "td") for row in table.rows)]
        parts += [f"<table>\n<caption>{escape(table.title)}</caption>", *rows, "</table>"]
    parts += [f"<p>{escape(line)}</p>" for line in notes(value)]
    content = "\n".join([*parts, "</body>\n</html>\n"]).encode()
    write(file, lambda out: out.write(content))


def _row(cells: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(value: Mapping[str, Any], form: str) -> bytes:
    """Agreement and cosine over the rate, a line for each bundle with its interval as a band; rate 0 is left out."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "calmclip", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (name, says, unit) in zip(figure.subplots(1, 2), _PANELS, strict=True):
            for curve in (curve for curve in value["curves"] if curve["part"] == ALL):
                points = [point for point in curve["points"] if point["rate"] > 0]
                rates = [point["rate"] for point in points]
                middle, lower, upper = (
                    [unit * point[name][side] for point in points] for side in ("value", "lower", "upper")
                )
                (line,) = axes.plot(rates, middle, "o-", markersize=3, label=curve["bundle"])
                axes.fill_between(rates, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.set(xscale="log", xlabel="flipped bits per stored bit", ylabel=says)
            axes.set_ylim(-0.03 * unit, 1.03 * unit)
            axes.grid(linewidth=0.4)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(value["bundles"]))
        file = io.BytesIO()
        figure.savefig(file, format=form, dpi=90, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()
