"""What `tests.bench.rivals` says: a table for each tower, one table of them all, a chart; and where they stand.

A tower's figures: ``key``, ``title``, ``note``, ``library`` (whose module the rivals exported), ``macs`` of an item,
``peak`` (MAC/s of one core in INT8, None where there is no kernel to measure it), ``machine``, ``versions``,
``refused`` (engine -> why), ``engines``: name -> ``ms`` an item by "THREADSxBATCH", ``cosine``, ``memory_mb``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "calmclip INT8"
NEAR = 0.99  # least mean cosine to float of an engine whose speed counts
FIRST = "1x1"
START, END = "<!-- rivals: written by tests/bench/rivals.py -->", "<!-- /rivals -->"
SUMMARY = {  # column of the one table of all towers -> how the engines' names begin, of which the fastest counts
    "OpenVINO INT8": ("OpenVINO INT8",),
    "ONNX Runtime INT8": ("ONNX Runtime dynamic", "ONNX Runtime static"),
    "OpenVINO bf16": ("OpenVINO bf16",),
    "ONNX Runtime float": ("ONNX Runtime float",),
    "torch float": ("torch float",),
}
Figures = Mapping[str, Any]


def best(
    tower: Figures, run: str, names: Iterable[str] | None = None, cosine: float = NEAR
) -> tuple[str, float] | None:
    """The fastest rival, of ``names`` or of all, that is near enough to float; None where there is none."""
    rows = tower["engines"]
    chosen = rows if names is None else [name for name in rows if name.startswith(tuple(names))]
    found = [(row["ms"][run], name) for name, row in rows.items()
             if name in chosen and name != OURS and run in row["ms"] and row["cosine"] >= cosine]  # fmt: skip
    return min(found)[::-1] if found else None


def table(tower: Figures) -> str:
    """Milliseconds an item, and behind them the speed in that of the best rival."""
    runs = sorted({run for row in tower["engines"].values() for run in row["ms"]})
    head = ["engine", *map(_run_words, runs), "of the bound", "cosine", "memory, MB"]
    lines = [f"### {tower['title']}", "", _facts(tower), "", *_rule(head)]
    for name, row in tower["engines"].items():
        cells = [_cell(row["ms"].get(run), best(tower, run)) for run in runs]
        share = _share(tower, row["ms"].get(FIRST))
        lines.append(_line(f"**{name}**" if name == OURS else name, *cells, share, _cosine(row),
                           f"{row['memory_mb']:.0f}"))  # fmt: skip
    if tower["refused"]:
        why: dict[str, list[str]] = {}
        for name, reason in tower["refused"].items():
            why.setdefault(reason, []).append(name)
        reasons = [f"{', '.join(names)} ({reason})" for reason, names in why.items()]
        lines += ["", f"Not measured: {'; '.join(reasons)}."]
    return "\n".join(lines) + "\n"


def summary(towers: Sequence[Figures]) -> str:
    """One line a tower: batch 1, one thread; a rival's milliseconds, and how many times faster calmclip is."""
    lines = _rule(["one thread, batch 1, ms", "calmclip INT8", *SUMMARY, "of the bound", "cosine"])
    for tower in towers:
        own = tower["engines"].get(OURS)
        if own is None or FIRST not in own["ms"]:
            continue
        ms = own["ms"][FIRST]
        cells = []
        for names in SUMMARY.values():
            near = best(tower, FIRST, names)
            rival, far = (near, "") if near else (best(tower, FIRST, names, -1.0), ", too far to count")
            cells.append(f"{_ms(rival[1])} ({rival[1] / ms:.2f}x{far})" if rival else "-")
        lines.append(_line(tower["title"], f"**{_ms(ms)}**", *cells, _share(tower, ms), _cosine(own)))
    return "\n".join(lines) + "\n"


def page(towers: Sequence[Figures]) -> str:
    """docs/performance.md."""
    runs = dict.fromkeys(_run_on(tower) for tower in towers)  # towers may have been measured one at a time
    return "\n".join([
        "# calmclip beside other engines",
        "",
        f"Written by `python -m tests.bench.rivals --write-readme` (`make bench`). {'. '.join(runs)}.",
        "",
        "The same architecture with the same random weights (the built-in model's own), the same photographs and "
        "texts, engines taking turns in one run, medians. Milliseconds are of an item: a picture or a text. With one "
        "thread they are processor time of a process that stays on one core, with more they are time by the clock. In"
        f" brackets the speed in that of the best rival whose mean cosine to float is at least {NEAR}. *Of the bound*:"
        " the time that all multiply-accumulates of the tower would take at the INT8 peak of a core, measured in the "
        "same run, over the time taken, at batch 1 on one thread; calmclip works the last block of a transformer out "
        "for the pooled token alone (4.12 of ViT-B/32's 4.41 GMAC), which the bound counts whole. Cosine: to torch in"
        " float, mean over the inputs. Memory: what loading the model and running it once added to a process that had"
        " loaded the engine.",
        "",
        "calmclip's INT8 is what `calmclip export` makes of towers of convolutions, and with `--preset fast` of "
        "transformers: of these the default, `search`, may keep more in float and take longer. ONNX Runtime and "
        "OpenVINO run what their own converters make of the library's module; `static` is QDQ with unsigned "
        "activations and a scale for each output of a weight, OpenVINO's INT8 is nncf's (`MIXED`; `TRANSFORMER` where"
        " it is one), all calibrated on the same inputs as ours. faster-clip decodes a PNG of 224 x 224 pixels as "
        "well.",
        "",
        "![Milliseconds of an item by engine, a panel for each tower, one thread, batch 1](performance.png)",
        "",
        "\n".join(table(tower) for tower in towers),
    ])  # fmt: skip


def chart(towers: Sequence[Figures], path: Path) -> None:
    """A panel for each tower, a bar for each engine; one thread, batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [tower for tower in towers if any(FIRST in row["ms"] for row in tower["engines"].values())]
    columns = min(3, len(shown))
    down = -(-len(shown) // columns)
    figure, panels = pyplot.subplots(down, columns, figsize=(5.6 * columns, 3.1 * down), squeeze=False)
    for panel, tower in zip(panels.flat, shown, strict=False):
        rows = {name: row["ms"][FIRST] for name, row in tower["engines"].items() if FIRST in row["ms"]}
        names = list(rows)[::-1]
        bars = panel.barh(names, [rows[name] for name in names], color=[_colour(name) for name in names], height=0.75)
        panel.bar_label(bars, [_ms(rows[name]) for name in names], padding=3, fontsize=8)
        if tower["peak"]:
            panel.axvline(1000 * tower["macs"] / tower["peak"], color="#444444", linewidth=1, linestyle=":")
        panel.set_title(tower["title"], fontsize=10, loc="left")
        panel.tick_params(axis="y", labelsize=8, length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(shown) :]:
        panel.set_axis_off()
    figure.suptitle("ms an item, one thread, batch 1; dotted: every product of the tower at the INT8 peak", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def write(towers: Sequence[Figures], out: Path, root: Path | None) -> None:
    """Page and chart into ``out``; with ``root``, a checkout, into its docs and its README."""
    (out / "performance.md").write_text(page(towers), encoding="utf-8")
    chart(towers, out / "performance.png")
    print(summary(towers))
    if root:
        for file in ("performance.md", "performance.png"):
            (root / "docs" / file).write_bytes((out / file).read_bytes())
        readme = root / "README.md"
        readme.write_text(placed(readme.read_text(encoding="utf-8"), summary(towers)), encoding="utf-8")


def placed(text: str, what: str) -> str:
    """``text`` with ``what`` between the two comments that mark its place. Raises ValueError where they are missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page has no {START} … {END}; put both where the table is to stand")
    return f"{before}{start}\n\n{what}\n{end}{after}"


def _run_on(tower: Figures) -> str:
    return f"{tower['machine']}; {', '.join(f'{name} {version}' for name, version in tower['versions'].items())}"


def _facts(tower: Figures) -> str:
    bound = "the INT8 peak of a core unknown"
    if tower["peak"]:
        least = 1000 * tower["macs"] / tower["peak"]
        bound = f"{_ms(least)} ms at the {tower['peak'] / 1e9:.0f} GMAC/s that a core reached in INT8"
    facts = f"{tower['macs'] / 1e9:.2f} GMAC, {bound}. ONNX Runtime and OpenVINO run the module of {tower['library']}."
    return f"{facts} {tower['note']}".strip()


def _run_words(run: str) -> str:
    threads, batch = run.split("x")
    return f"{threads} thread{'s'[: threads != '1']}, batch {batch}"


def _cell(ms: float | None, rival: tuple[str, float] | None) -> str:
    if ms is None:
        return "-"
    return f"{_ms(ms)} ({rival[1] / ms:.2f}x)" if rival else _ms(ms)


def _cosine(row: Figures) -> str:
    return f"{row['cosine']:.4f}{'' if row['cosine'] >= NEAR else ' (too far to count)'}"


def _share(tower: Figures, ms: float | None) -> str:
    return f"{1000 * tower['macs'] / tower['peak'] / ms:.0%}" if tower["peak"] and ms else "unknown"


def _ms(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _colour(name: str) -> str:
    kinds = {OURS: "#c8553d", "INT8": "#3d5a80", "bf16": "#8fb0cc"}
    return next((colour for kind, colour in kinds.items() if kind in name), "#cfd8df")


def _rule(head: Sequence[str]) -> list[str]:
    return [_line(*head), "| --- " * len(head) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
