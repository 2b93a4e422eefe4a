"""The pictures of the main job: accuracy and bytes, sparsity and loss by step."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.train import read_metrics

COLORS = {
    "dense": "#222222",
    "sparse90": "#1b7837",
    "sparse24": "#7fbf7b",
    "int8": "#2166ac",
    "int4": "#67a9cf",
    "sparse80_int8": "#762a83",
    "w8a8": "#01665e",
    "w8a8_trained": "#35978f",
    "student": "#fdae61",
    "distilled": "#d73027",
}


def clean(axis: Any, title: str) -> None:
    """Give a panel its title and take away what no one reads."""
    axis.set_title(title, loc="left", fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def accuracy_against_bytes(rows: list[dict[str, Any]]) -> plt.Figure:
    """Draw one point per variant; up and to the left is better."""
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for row in rows:
        axis.errorbar(
            row["bytes"] / 1000,
            100 * row["accuracy"],
            yerr=100 * (row["accuracy_std"] or 0),
            fmt="o",
            markersize=9,
            capsize=3,
            color=COLORS[row["name"]],
            label=row["label"],
        )
    axis.axhline(
        100 * rows[0]["accuracy"] - 1, color="#999999", linestyle=":", zorder=0
    )
    axis.annotate(
        "one point below dense",
        (1, 100 * rows[0]["accuracy"] - 1),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top",
        color="#777777",
        fontsize=8,
    )
    axis.set_xscale("log")
    ticks = axis.xaxis
    ticks.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ticks.set_minor_formatter(
        matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.8), labelOnlyBase=False)
    )
    axis.set_xlabel("kilobytes on disk (log scale)")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    clean(axis, "Accuracy against size")
    return figure


def curves(out: Path, variants: list[Any], key: str, title: str) -> plt.Figure:
    """Draw a metric of the first seed against the step, one line per variant."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for variant in variants:
        log = read_metrics(out / "runs" / variant.name / "seed_0" / "metrics.jsonl")
        points = [(row["step"], row[key]) for row in log if key in row]
        if points and (key != "sparsity" or max(y for _, y in points) > 0.05):
            axis.plot(
                *zip(*points, strict=True),
                label=variant.label,
                color=COLORS[variant.name],
                linewidth=1.8,
            )
    if key == "loss":
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(key)
    if axis.lines:  # no curve of zeros where nothing is pruned
        axis.legend(
            frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    clean(axis, title)
    return figure


def draw_all(
    out: Path, rows: list[dict[str, Any]], variants: list[Any]
) -> dict[str, Path]:
    """Write the PNG files and return them by name."""
    figures = {
        "accuracy_bytes": accuracy_against_bytes(rows),
        "sparsity": curves(
            out, variants, "sparsity", "Zeros among the weights, seed 0"
        ),
        "loss": curves(out, variants, "loss", "Training loss, seed 0"),
    }
    files = {}
    for name, figure in figures.items():
        files[name] = out / f"{name}.png"
        figure.savefig(files[name], dpi=120)
        plt.close(figure)
    return files
