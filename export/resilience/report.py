"""The value that `resilience inject` prints as JSON -> tables, for text and for a page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calmclip.export.resilience.inject import ALL

Value = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(value: Value) -> Iterator[Table]:
    for bundle in value["bundles"]:
        whole, *parts = (curve for curve in value["curves"] if curve["bundle"] == bundle["name"])
        head = ("rate", "faults", "agreement %", "cosine", "accuracy %", "refused %", "s a trial")
        yield Table(_title(bundle, value), head, tuple(map(_row, whole["points"])))
        if parts:
            rows = zip(*(curve["points"] for curve in (whole, *parts)), strict=True)
            yield Table(
                f"{bundle['name']}: agreement % with the same faults, of one kind alone",
                ("rate", *(curve["part"] for curve in (whole, *parts))),
                tuple((f"{row[0]['rate']:g}", *(_share(point["agreement"]) for point in row)) for row in rows),
            )
    rates = [f"{rate:g}" for rate in value["settings"]["rates"]]
    for gain in value["gains"]:
        yield Table(
            f"{gain['bundle']} less {gain['other']}, faults at the same places",
            ("rate", "agreement, points"),
            tuple(zip(rates, map(_share, gain["agreement"]), strict=True)),
        )
    if "each_bit" in value:
        yield Table(
            "one flipped bit (bit 0 is the lowest)",
            ("bundle", "kind", "type", "bit", "stored", "agreement %", "1 - cosine", "changed %", "refused %"),
            tuple(map(_cell, value["each_bit"])),
        )


def notes(value: Value) -> Iterator[str]:
    for curve in value["curves"]:
        if curve["part"] == ALL:
            half = f"at {curve['half']:.2g} flipped bits per bit" if curve["half"] else "at none of these rates"
            yield f"{curve['bundle']}: the agreement falls below 50 % {half}"
    for gain in value["gains"]:
        if gain["at_half"] is not None:
            yield f"{gain['bundle']}: {gain['at_half']:.1%} at the rate where {gain['other']} has 50 %"
    times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in value["milliseconds"].items())
    yield f"graph image without faults, a picture: {times}"
    for bundle in value["bundles"]:
        if bundle["shared"]:
            others = ", ".join(f"{role} ({count})" for role, count in sorted(bundle["shared"].items()))
            yield f"{bundle['name']}: a fault in a shared tensor also reaches the graphs {others}"
    yield from (f"refused: {reason}" for reason in value["reasons"][:3])
    yield (
        "[…]: 95 % of the mean over the repetitions, by bootstrap. A vector with NaN or infinity disagrees, its cosine "
        "is 0; refused: the graph did not run, and all its answers count so"
    )


def text(value: Value) -> str:
    lines: list[str] = []
    for table in tables(value):
        widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
        lines += [table.title, *(_line(row, widths) for row in (table.head, *table.rows)), ""]
    return "\n".join([*lines, *notes(value)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _title(bundle: Value, value: Value) -> str:
    numbers = ", ".join(
        f"{kind} {' + '.join(f'{count:,} {dtype}' for dtype, count in of.items())}"
        for kind, of in bundle["numbers"].items()
    )
    settings = value["settings"]
    return (
        f"{bundle['name']}: {bundle['bits'] / 1e6:.1f} Mbit of {', '.join(settings['graphs'])} ({numbers}); "
        f"{value['pictures']} pictures, repetitions: {settings['repeats']}"
    )


def _row(point: Value) -> tuple[str, ...]:
    return (
        f"{point['rate']:g}", f"{point['faults']:g}", _share(point["agreement"]), _mean(point["cosine"]),
        _share(point["accuracy"]), f"{100 * point['refused']:.0f}", f"{point['seconds']:.2f}",
    )  # fmt: skip


def _cell(cell: Value) -> tuple[str, ...]:
    return (
        cell["bundle"], cell["kind"], cell["dtype"], str(cell["bit"]), f"{cell['stored']:,}",
        f"{100 * cell['agreement']['value']:.1f}", f"{1 - cell['cosine']['value']:.2g}", f"{100 * cell['hurt']:.0f}",
        f"{100 * cell['refused']:.0f}",
    )  # fmt: skip


def _share(mean: Value) -> str:
    return f"{100 * mean['value']:.1f} [{100 * mean['lower']:.1f}, {100 * mean['upper']:.1f}]"


def _mean(mean: Value) -> str:
    return f"{mean['value']:.3f} [{mean['lower']:.3f}, {mean['upper']:.3f}]"
