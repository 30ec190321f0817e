"""The report of `tests.bench.rivals`: a table for each tower, a table of all towers, a chart, and their page.

The figures of a tower are ``key``, ``title``, ``note``, ``library`` (the library whose module the rivals export),
``macs`` of an item, ``peak`` (INT8 multiply-accumulates per second of one core; None without a kernel that measures
it), ``machine``, ``versions``, ``refused`` (engine -> reason) and ``engines``. ``engines`` maps a name to ``ms`` per
item by "THREADSxBATCH", ``cosine`` and ``memory_mb``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "calmclip INT8"
AVX2 = ", AVX2"  # the names of engines without AVX-512 end with it; they are compared with one another
NEAR = 0.99  # an engine counts if its mean cosine to float is at least this
FIRST = "1x1"
START, END = "<!-- rivals: written by tests/bench/rivals.py -->", "<!-- /rivals -->"
SUMMARY = {  # column of the table of all towers -> prefixes of engine names; the fastest of these engines counts
    "OpenVINO INT8": ("OpenVINO INT8",),
    "ONNX Runtime INT8": ("ONNX Runtime dynamic", "ONNX Runtime static"),
    "OpenVINO bf16": ("OpenVINO bf16",),
    "ONNX Runtime float": ("ONNX Runtime float",),
    "torch float": ("torch float",),
}
Figures = Mapping[str, Any]


def best(
    tower: Figures, run: str, names: Iterable[str] | None = None, cosine: float = NEAR, limited: bool = False
) -> tuple[str, float] | None:
    """The fastest rival whose cosine is at least ``cosine``, or None. ``names`` are prefixes; None means all rivals.

    ``limited``: among engines without AVX-512, else among the others.
    """
    rows = tower["engines"]
    chosen = {
        name: row
        for name, row in rows.items()
        if (names is None or name.startswith(tuple(names))) and name.endswith(AVX2) == limited
    }
    times = [
        (row["ms"][run], name)
        for name, row in chosen.items()
        if not name.startswith(OURS) and run in row["ms"] and row["cosine"] >= cosine
    ]
    return min(times)[::-1] if times else None


def table(tower: Figures) -> str:
    """Milliseconds per item, each with the speed relative to the best rival that counts."""
    runs = sorted({run for row in tower["engines"].values() for run in row["ms"]})
    head = ["engine", *map(_run_words, runs), "of the bound", "cosine", "memory, MB"]
    lines = [f"### {tower['title']}", "", _facts(tower), "", *_rule(head)]
    for name, row in tower["engines"].items():
        cells = [_cell(row["ms"].get(run), best(tower, run, limited=name.endswith(AVX2))) for run in runs]
        of_bound = _of_bound(tower, row["ms"].get(FIRST))
        lines.append(_line(f"**{name}**" if name.startswith(OURS) else name, *cells, of_bound, _cosine(row),
                           f"{row['memory_mb']:.0f}"))  # fmt: skip
    if tower["refused"]:
        by_reason: dict[str, list[str]] = {}
        for name, reason in tower["refused"].items():
            by_reason.setdefault(reason, []).append(name)
        reasons = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        lines += ["", f"Not measured: {'; '.join(reasons)}."]
    return "\n".join(lines) + "\n"


def summary(towers: Sequence[Figures]) -> str:
    """A row per tower at batch 1 on one thread: a rival's milliseconds, and how many times faster calmclip is."""
    head = ["one thread, batch 1, ms", "calmclip INT8", *SUMMARY, "calmclip and OpenVINO INT8 without AVX-512"]
    lines = _rule([*head, "of the bound", "cosine"])
    for tower in towers:
        ours = tower["engines"].get(OURS)
        if ours is None or FIRST not in ours["ms"]:
            continue
        ms = ours["ms"][FIRST]
        cells = []
        for names in SUMMARY.values():
            near = best(tower, FIRST, names)
            rival, far = (near, "") if near else (best(tower, FIRST, names, -1.0), ", too far to count")
            cells.append(f"{_ms(rival[1])} ({rival[1] / ms:.2f}x{far})" if rival else "-")
        limited, rival = (
            tower["engines"].get(OURS + AVX2, {}).get("ms", {}).get(FIRST),
            best(tower, FIRST, limited=True),
        )
        cells.append(f"{_ms(limited)}, {_ms(rival[1])} ({rival[1] / limited:.2f}x)" if limited and rival else "-")
        lines.append(_line(tower["title"], f"**{_ms(ms)}**", *cells, _of_bound(tower, ms), _cosine(ours)))
    return "\n".join(lines) + "\n"


def section(towers: Sequence[Figures]) -> str:
    """The part of docs/performance.md between `START` and `END`."""
    runs = dict.fromkeys(_run_on(tower) for tower in towers)  # a tower may come from another machine or day
    return "\n".join([
        "Command: `python -m tests.bench.rivals --write-docs` (`make bench` runs it without writing). Machines and "
        "versions:",
        "",
        *(f"* {run}" for run in runs),
        "",
        "All engines of a tower use the same architecture, the same random weights (MiniLM and mini use their own), "
        "and the same photographs and texts. The engines take turns in one run. Figures are medians of milliseconds "
        "per item; an item is a picture or a text. With one thread, a figure is the processor time of a process that "
        "stays on one core. With more threads, a figure is wall-clock time.",
        "",
        "| column | meaning |",
        "| --- | --- |",
        "| in brackets | table of all towers: how many times faster calmclip is. Table of a tower: the speed "
        f"relative to the best rival whose mean cosine to float is at least {NEAR} |",
        "| of the bound | the time that all multiply-accumulates of the tower take at the INT8 peak of a core, divided "
        "by the time taken at batch 1 on one thread; the peak is measured in the same run. calmclip computes the last "
        "block of a transformer for the pooled token alone (4.12 of ViT-B/32's 4.41 GMAC); the bound counts the whole "
        "block |",
        "| cosine | to torch in float, mean over the inputs |",
        "| memory | the memory that loading and running the model once adds to a process that has loaded the engine |",
        "",
        "calmclip's INT8 is the result of `calmclip export` for convolutional towers, and of `calmclip export --preset "
        "fast` for transformers. The default, `search`, may keep more of a transformer in float and take longer. ONNX "
        "Runtime and OpenVINO run the graphs that their own converters make of the library's module. `static` is QDQ "
        "with unsigned activations and a scale per output channel. OpenVINO's INT8 is nncf's (`MIXED`; `TRANSFORMER` "
        "for transformers). In rows that end with `AVX2`, calmclip (`CALMCLIP_OPS_WITHOUT`) and OpenVINO "
        "(`ONEDNN_MAX_CPU_ISA`) use no instructions after AVX2; their factors compare them with one "
        "another. All are calibrated on the same inputs. faster-clip's time includes decoding a PNG of 224 x "
        "224 pixels.",
        "",
        "![Milliseconds per item by engine, a panel per tower, one thread, batch 1](performance.png)",
        "",
        "### All towers",
        "",
        "A tower's bound counts every multiply-accumulate of the rivals' graph, at 77 tokens if that graph has a fixed "
        "length.",
        "",
        summary(towers),
        "\n".join(table(tower) for tower in towers),
    ])  # fmt: skip


def chart(towers: Sequence[Figures], path: Path) -> None:
    """A panel per tower with a bar per engine, at one thread and batch 1."""
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
    figure.suptitle(
        "ms per item, one thread, batch 1; dotted: all multiply-accumulates of the tower at the INT8 peak", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def write(towers: Sequence[Figures], out: Path, docs: Path | None) -> None:
    """Write section and chart into ``out``, and into the pages of ``docs`` unless it is None."""
    text = section(towers)
    (out / "performance.md").write_text(text, encoding="utf-8")
    chart(towers, out / "performance.png")
    print(summary(towers))
    if docs:
        (docs / "performance.png").write_bytes((out / "performance.png").read_bytes())
        page = docs / "performance.md"
        page.write_text(placed(page.read_text(encoding="utf-8"), text), encoding="utf-8")


def placed(page: str, section: str) -> str:
    """``page`` with ``section`` between the marks `START` and `END`. Raises `ValueError` without both marks."""
    before, start, remainder = page.partition(START)
    _, end, after = remainder.partition(END)
    if not (start and end):
        raise ValueError(f"the page lacks {START} … {END}; put both marks around the generated section")
    return f"{before}{start}\n\n{section}\n{end}{after}"


def _run_on(tower: Figures) -> str:
    return f"{tower['machine']}; {', '.join(f'{name} {version}' for name, version in tower['versions'].items())}"


def _facts(tower: Figures) -> str:
    bound = "the INT8 peak of a core is unknown"
    if tower["peak"]:
        least = 1000 * tower["macs"] / tower["peak"]
        bound = f"{_ms(least)} ms at the INT8 peak of a core, {tower['peak'] / 1e9:.0f} GMAC/s"
    facts = f"{tower['macs'] / 1e9:.2f} GMAC; {bound}. ONNX Runtime and OpenVINO run the module of {tower['library']}."
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


def _of_bound(tower: Figures, ms: float | None) -> str:
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
