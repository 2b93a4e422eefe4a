"""One self-contained HTML page that tells what the main job found."""

import base64
import datetime
import html
import os
import platform
from pathlib import Path
from typing import Any

import flax
import jax
import optax

import jopt

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fafaf8;
       max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; }
h2 { margin-top: 2.4rem; }
.lead { color: #555; margin-top: 0; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { flex: 1 1 15rem; background: #fff; border: 1px solid #e6e4df;
        border-radius: 10px; padding: 1rem 1.2rem; }
.card b { font-size: 1.6rem; display: block; }
.card.bad b { color: #b2182b; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: #fff; font-size: .93rem; }
th, td { padding: .5rem .6rem; text-align: right; border-bottom: 1px solid #eceae5;
         white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
th { color: #555; font-weight: 600; }
tbody tr:first-child td { background: #f4f2ec; }
img { width: 100%; border: 1px solid #e6e4df; border-radius: 10px; background: #fff; }
pre { background: #f1efe9; padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; }
small, .note { color: #666; }
"""


def counted(number: int, noun: str) -> str:
    """Put a number before its noun.

    >>> counted(1, "seed"), counted(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def percent(row: dict[str, Any], key: str, digits: int) -> str:
    """Write a mean in percent, and its deviation over the seeds if there are some."""
    spread = row[f"{key}_std"]
    text = f"{100 * row[key]:.{digits}f}"
    return text if spread is None else f"{text} ±{100 * spread:.{digits}f}"


def environment() -> dict[str, Any]:
    """Describe where the results were made."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "jopt": jopt.__version__,
    }


def findings(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """Put the results in words: (headline, sentence, is it good)."""
    dense = rows[0]
    by_name = {row["name"]: row for row in rows}

    def points(row: dict[str, Any]) -> float:
        return 100 * (row["accuracy"] - dense["accuracy"])

    found = []
    for row in rows:
        if row["is_harmless"]:
            loss = points(row)
            found.append(
                (
                    f"{loss:+.2f} points",
                    f"{row['label']} against dense, at "
                    f"{dense['bytes'] / row['bytes']:.1f} times fewer bytes on disk.",
                    loss >= -1.0,
                )
            )
    fit = [row for row in rows[1:] if points(row) >= -1.0]
    if fit:
        least = min(fit, key=lambda row: row["bytes"])
        found.append(
            (
                f"{dense['bytes'] / least['bytes']:.1f}x smaller",
                f"{least['label']} is the smallest file within one point of dense: "
                f"{least['bytes'] / 1000:,.0f} kB.",
                True,
            )
        )
    if {"distilled", "student"} <= by_name.keys():
        taught = points(by_name["distilled"]) - points(by_name["student"])
        found.append(
            (
                f"{taught:+.2f} points",
                "is what the teacher brings to a student of a quarter of the "
                "parameters.",
                taught >= 0,
            )
        )
    return found


def _table(rows: list[dict[str, Any]], kind: str) -> str:
    dense = rows[0]
    heads = ["variant", "accuracy %", "macro recall %", "macro F1 %"]
    heads += ["bits per character"] if kind == "text" else []
    heads += ["parameters", "non-zero", "bytes on disk", "smaller"]
    heads += ["MFLOP", "ms per batch", "train s"]
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in rows:
        cells = [html.escape(row["label"])]
        cells += [percent(row, key, 2) for key in ("accuracy", "recall", "f1")]
        cells += [f"{row['bits_per_character']:.3f}"] if kind == "text" else []
        cells += [
            f"{row['num_params']:,.0f}",
            f"{row['nonzero_params']:,.0f}",
            f"{row['bytes']:,.0f}",
            f"{dense['bytes'] / row['bytes']:.1f}×",
            f"{row['flops'] / 1e6:.2f}",
            f"{row['milliseconds']:.2f}",
            f"{row['seconds']:.1f}",
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head, *body = lines
    return (
        f"<div class=scroll><table><thead>{head}</thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _picture(file: Path, text: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def write(
    file: Path, summary: dict[str, Any], pictures: dict[str, Path], arguments: list[str]
) -> None:
    """Write the page."""
    rows, where = summary["rows"], summary["environment"]
    cards = "".join(
        f'<div class="card{"" if good else " bad"}"><b>{head}</b>'
        f"{html.escape(text)}</div>"
        for head, text, good in findings(rows)
    )
    command = html.escape(" ".join(["python -m experiments.compress", *arguments]))
    facts = " · ".join(f"{key} {value}" for key, value in where.items())
    size = summary["model"]
    model = (
        f"a GPT of {counted(size['depth'], 'layer')} and {size['width']} features"
        if size["kind"] == "gpt"
        else f"a ResNet of 3 x {counted(size['depth'], 'block')}, {size['width']} "
        f"channels at first, {size['connections']} connections"
    )
    seeds = counted(summary["seeds"], "seed")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One model, compressed nine ways</title><style>{STYLE}</style></head><body>
<h1>One model, compressed nine ways</h1>
<p class="lead">{html.escape(summary["data"])}, {html.escape(model)},
{summary["steps"]:,} steps, {seeds}. All variants of a seed start from the same
parameters and see the same batches.</p>
<div class="cards">{cards}</div>
<h2>Accuracy against size</h2>
{_picture(pictures["accuracy_bytes"], "accuracy against bytes on disk")}
<p class="note">Every point is a file: it was saved, read back and evaluated. Sparse
weights are stored as they are and shrink by compression; quantized ones are packed.</p>
<h2>All numbers</h2>
{_table(rows, summary["kind"])}
<p class="note">Mean ± standard deviation over {seeds} on
{summary["test_examples"]:,} test examples; sizes and times are medians, and the time of
a seed that compiles includes it. Operations are those of one example; the time of a
batch is that of the deployed program, of which weight-only variants have the dense one:
the int8 x int8 variants multiply integers.</p>
<h2>On the way</h2>
{_picture(pictures["sparsity"], "sparsity against step")}
<p></p>
{_picture(pictures["loss"], "training loss against step")}
<h2>Do it again</h2>
<pre>{command}</pre>
<p><small>{html.escape(facts)}</small></p>
</body></html>
"""
    draft = file.with_name(file.name + ".draft")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, file)
