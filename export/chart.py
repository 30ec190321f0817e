"""Pictures: outliers of a bundle's graphs; curves along the weights between two checkpoints, and a map of layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from calmclip.models.outliers import Outliers

Row = Sequence[float]
_GAUSSIAN = 3.0
_BAR, _MARGIN = 0.17, 0.9  # inches: the height of a tensor, and of a graph's title and axes


def draw(graphs: Mapping[str, Outliers], file: Path, title: str) -> None:
    """Write a PNG: a row for each graph, its tensors from top to bottom; infinity norms on the left and kurtosis on the
    right, on common log scales. Raises `OSError` if the file cannot be written."""
    heights = [_MARGIN + _BAR * len(graph.tensors) for graph in graphs.values()]
    figure = Figure(figsize=(12, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(f"{title}: outliers in float    (red: worst by kurtosis;  dashed: a Gaussian's)", fontsize=11)
    rows = figure.subplots(len(graphs), 2, squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for (left, right), (role, graph) in zip(rows, graphs.items(), strict=True):
        names = [*graph.tensors]
        colours = ["tab:red" if name in graph.worst else "tab:blue" for name in names]
        for place, axes, quantity in ((0, left, "infinity norm"), (1, right, "kurtosis")):
            values = [pair[place] for pair in graph.tensors.values()]
            axes.barh(range(len(names)), values, color=colours)
            axes.set_title(f"{role}: {quantity}, at most {max(values):.4g}", fontsize=10)
            axes.tick_params(labelsize=8, labelbottom=True)
            axes.grid(axis="x", linewidth=0.4)
        right.axvline(_GAUSSIAN, color="black", linewidth=0.8, linestyle="--")
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.4, -0.6)
    for place, axes in enumerate(rows[-1]):
        values = [pair[place] for graph in graphs.values() for pair in graph.tensors.values()]
        axes.set_xlim(min([1.0, *(0.8 * value for value in values if value > 0)]), 1.3 * max([10.0, *values]))
        axes.set_xscale("log")
    figure.savefig(file, format="png", dpi=100)


def curves(
    alphas: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], file: Path, title: str
) -> None:
    """Write a PNG: a panel for each quantity, with a line for each data set over ``alphas``. Raises `OSError`."""
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    (row,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, (quantity, lines) in zip(row, panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(alphas, values, "o-", markersize=3, label=name)
        axes.set(xlabel="alpha", ylabel=quantity)
        axes.grid(linewidth=0.4)
        axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=100)


def learning(
    logs: Mapping[str, Sequence[Mapping[str, float]]], quantities: Sequence[str], file: Path, title: str
) -> None:
    """Write a PNG: a panel for each quantity, with a line for each log over its steps, on log scales. Logs whose names
    differ in the number behind the last hyphen have one colour. Raises `OSError`."""
    figure = Figure(figsize=(4.6 * len(quantities), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    (row,) = figure.subplots(1, len(quantities), squeeze=False)
    nets = [*dict.fromkeys(name.rpartition("-")[0] for name in logs)]
    for axes, quantity in zip(row, quantities, strict=True):
        drawn: set[str] = set()
        for name, lines in logs.items():
            net = name.rpartition("-")[0]
            label = net if net not in drawn else None
            drawn.add(net)
            values = [line[quantity] for line in lines]
            axes.plot([line["step"] for line in lines], values, color=f"C{nets.index(net)}", linewidth=1, label=label)
        axes.set(xlabel="step", ylabel=quantity.replace("_", " "), yscale="log")
        axes.grid(linewidth=0.4)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(nets), fontsize=8)
    figure.savefig(file, format="png", dpi=100)


def layers(
    alphas: Sequence[float], rows: Mapping[str, Sequence[float]], marked: Sequence[str], file: Path, title: str
) -> None:
    """Write a PNG: a cell for each layer, from top to bottom, and alpha; the names of ``marked`` layers are red. Raises
    `OSError`."""
    figure = Figure(figsize=(2.4 + 0.55 * len(alphas) + 2.2, 1.3 + _BAR * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    image = axes.imshow([*rows.values()], aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas], fontsize=8)
    axes.set_yticks(range(len(rows)), [*rows], fontsize=7)
    for name, label in zip(rows, axes.get_yticklabels(), strict=True):
        label.set_color("tab:red" if name in marked else "black")
    axes.set_xlabel("alpha")
    figure.colorbar(image, ax=axes, label="growth of the loss, nats")
    figure.savefig(file, format="png", dpi=100)
