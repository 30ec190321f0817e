"""A table and plots as one self-contained HTML file. matplotlib, of the extra `eval`, draws the plots as SVG."""

import io
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from calmclip.models.evals import EVALS
from calmclip.models.evals.figures import Plot
from calmclip.models.evals.measure import rescored
from calmclip.models.evals.samples import Samples
from calmclip.models.evals.tables import Table, cells, heading, remarks
from calmclip.models.extras import missing

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2), th.group { text-align: left }
figure { margin: 1.5rem 0 } figcaption, .small { color: #555; font-size: .9rem } svg { max-width: 100%; height: auto }
"""


def require() -> None:
    """Raises `ExtraMissing` without matplotlib; called before the measurement."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise missing("calmclip eval --html", "matplotlib", "eval") from None


def html(table: Table, sides: Sequence[Samples], params: Mapping[str, Any] | None = None) -> str:
    """``sides`` and ``params``: the input of ``table``, for the plots. Raises `ExtraMissing`."""
    require()
    measured = EVALS.get(table.eval)
    named = {side.name: samples for side, samples in zip(table.sides, sides, strict=True)}
    plots = measured.plots(named, rescored(sides[0], params or {})) if measured.plots else []
    title = escape(f"{table.eval}: {' beside '.join(named)}")
    about = (sys.modules[measured.predict.__module__].__doc__ or "").strip()
    paragraphs = [f"<p>{escape(part)}</p>" for part in about.split("\n\n")]
    figures = [
        f"<figure>{_svg(plot, number)}<figcaption>{escape(plot.says)}</figcaption></figure>"
        for number, plot in enumerate(plots)
    ]
    bundles = [
        f"<li>{escape(side.name)}: digest <code>{side.digest}</code>; params "
        f"<code>{escape(', '.join(f'{k} = {v!r}' for k, v in side.params.items()) or 'none')}</code></li>"
        for side in table.sides
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
            *paragraphs, _table(table), *(f'<p class="small">{escape(line)}</p>' for line in remarks(table)),
            *figures, "<h2>Bundles</h2>\n<ul>", *bundles,
            f"</ul>\n<p>Data set <code>{table.data}</code></p>\n</body>\n</html>\n",
        ]
    )  # fmt: skip


def _table(table: Table) -> str:
    head, groups = cells(table)
    lines = [f"<table>\n<caption>{escape(heading(table))}</caption>\n{_row(head, 'th')}"]
    for group, rows in groups:
        if group:
            lines.append(f'<tr><th class="group" colspan="{len(head)}">{escape(group)}</th></tr>')
        lines += [_row(row, "td") for row in rows]
    return "\n".join([*lines, "</table>"])


def _row(row: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"


def _svg(plot: Plot, number: int) -> str:
    """Text stays text; ids are different in each plot and the same in each run."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": f"calmclip {number}", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw(axes, plot)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]


def _draw(axes: Any, plot: Plot) -> None:
    for number, line in enumerate(plot.lines):
        colour = f"C{number}"
        if line.kind == "bars":
            width = (line.x[1] - line.x[0] if len(line.x) > 1 else 1.0) * 0.9
            axes.bar(line.x, line.y, width=width, alpha=0.4, color=colour, label=line.label)
        else:
            axes.plot(line.x, line.y, "o" if line.kind == "points" else "-", color=colour, label=line.label)
        if len(line.lower):
            axes.vlines(line.x, line.lower, line.upper, color=colour, linewidth=1.5)
    if plot.diagonal:
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle="--")
    if plot.names:
        axes.margins(y=0.2)  # for the legend, above the intervals
        axes.set_xticks(range(len(plot.names)), plot.names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(linewidth=0.4)
    axes.legend()
