"""Tables, text viewers and plots for the notebooks. Generated text is never shown as HTML.

show_table(rows, title="Seed data by kind")
show_record(example)
plot_history(training.history, title="Junior")
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speed_utils.records import Record

if TYPE_CHECKING:
    import pandas as pd

WIDTH_CHARS = 96
CELL_CHARS = 110  # longer texts in table cells are cut
PALETTE = {
    "base": "#9aa5b1",
    "trained": "#c2410c",
    "reference": "#1d4ed8",
    "train": "#c2410c",
    "heldout": "#1d4ed8",
}


def show_table(rows: Sequence[dict] | pd.DataFrame, *, title: str = "", digits: int = 2) -> object:
    """Rows as a table; every text is escaped, so that generated text cannot act as HTML.

    Args:
        rows: dictionaries with the same keys, or a DataFrame.
        title: shown above.
        digits: of floating-point numbers.

    Returns:
        A styled table for the notebook to display.
    """
    import pandas as pd

    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if frame.empty:
        frame = pd.DataFrame([{"": "none"}])
    shown = frame.map(lambda value: _cell(value, digits))
    shown.columns = [html.escape(_printable(str(name))) for name in shown.columns]
    return _styled(shown, title)


def show_record(record: Record, *, title: str = "") -> None:
    """Print one record field by field, wrapped: plain text, nothing interpreted."""
    show_fields(record.model_dump(), title=title or type(record).__name__)


def show_fields(fields: dict, *, title: str = "") -> None:
    """Print named values, wrapped and aligned."""
    if title:
        print(f"-- {_printable(title)} " + "-" * max(0, WIDTH_CHARS - len(title) - 4))
    width = max(len(str(name)) for name in fields) + 2
    for name, value in fields.items():
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            label = str(name) if index == 0 else ""
            print(_wrapped(str(item), label, width))
    print()


def numbered(texts: Sequence[str]) -> dict[str, str]:
    """Texts under the numbers by which a judge speaks of them: [0], [1], ..."""
    return {f"[{index}]": text for index, text in enumerate(texts)}


def show_text(text: str, *, title: str = "") -> None:
    """Print a longer text, such as a prompt, wrapped and indented."""
    if title:
        print(f"-- {_printable(title)} " + "-" * max(0, WIDTH_CHARS - len(title) - 4))
    for line in _printable(text).splitlines() or [""]:
        print(textwrap.fill(line, WIDTH_CHARS, initial_indent="  ", subsequent_indent="  "))
    print()


def show_side_by_side(texts: dict[str, str], *, title: str = "") -> object:
    """A one-row table of texts under their names, for comparing generations or a removed pair."""
    import pandas as pd

    shown = pd.DataFrame([texts]).map(lambda text: html.escape(_printable(text)))
    shown.columns = [html.escape(_printable(name)) for name in shown.columns]
    return _styled(shown, title)


def show_stage_record(record: dict) -> object:
    """A stage record as a table: what was read, written and measured."""
    rows = [{"what": "stage", "value": f"{record['stage']}: {record['status']}"}]
    rows += [{"what": "seconds", "value": record["seconds"]}]
    for what in ("inputs", "outputs"):
        for item in record[what]:
            n_rows = f" ({item['rows']} rows)" if item["rows"] is not None else ""
            parts = Path(item["path"]).parts
            start = parts.index("artifacts") + 1 if "artifacts" in parts else -2
            rows.append({"what": what[:-1], "value": "/".join(parts[start:]) + n_rows})
    rows += [{"what": name, "value": value} for name, value in record["metrics"].items()]
    teacher = record["teacher"]
    if teacher["calls"]:
        n_tokens = teacher["prompt_tokens"] + teacher["completion_tokens"]
        paid = "price unknown" if teacher["usd"] is None else f"paid {teacher['usd']:.2f} USD"
        text = f"{teacher['calls']} calls ({teacher['cached']} cached), {n_tokens:,} tokens, {paid}"
        rows.append({"what": "teacher", "value": text})
    return show_table(rows, title="Stage record", digits=4)


def plot_history(
    history: Sequence[dict], *, title: str, loss_label: str = "loss", from_zero: bool = True
) -> object:
    """The loss over optimizer steps; returns the matplotlib figure.

    Args:
        history: logged steps: step with loss, or with eval_loss of held-out data.
        title: above the plot.
        loss_label: of the vertical axis.
        from_zero: begin the vertical axis at 0; False for losses that hardly move.
    """
    figure, axes = new_figure(title, "optimizer step", loss_label)
    steps = [row["step"] for row in history if "loss" in row]
    losses = [float(row["loss"]) for row in history if "loss" in row]
    axes.plot(steps, losses, color=PALETTE["train"], marker="o", label="training")
    evaluated = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if evaluated:
        axes.plot(
            *zip(*evaluated, strict=True),
            color=PALETTE["heldout"],
            marker="s",
            linestyle="--",
            label="held out",
        )
    if from_zero:
        axes.set_ylim(0, 1.1 * max([*losses, *(loss for _, loss in evaluated)]))
    axes.legend(frameon=False)
    return figure


def plot_lines(
    history: Sequence[dict], series: dict[str, str], *, title: str, y_label: str
) -> object:
    """Named series of logged values over optimizer steps; returns the figure.

    Args:
        history: logged steps, each with ``step`` and values that are numbers.
        series: key in the history -> label in the legend.
        title: above the plot.
        y_label: with the unit.
    """
    figure, axes = new_figure(title, "optimizer step", y_label)
    for (key, label), color in zip(series.items(), ("#1d4ed8", "#c2410c", "#15803d"), strict=False):
        points = [(row["step"], float(row[key])) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def _styled(shown: pd.DataFrame, title: str) -> object:
    """A table of escaped texts; its class keeps JupyterLab from reading "$5 or $6" as a formula."""
    styled = shown.style.hide(axis="index").set_caption(html.escape(_printable(title)))
    styled.set_table_attributes('class="tex2jax_ignore mathjax_ignore"')
    return styled.set_properties(
        **{"text-align": "left", "white-space": "pre-wrap", "vertical-align": "top"}
    )


def plot_bars(values: dict[str, float], *, title: str, x_label: str) -> object:
    """Horizontal bars with their values, one per name; returns the figure."""
    figure, axes = new_figure(title, x_label, "")
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=PALETTE["reference"])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.12)
    return figure


def plot_scores(table: pd.DataFrame, models: Sequence[str], *, title: str) -> object:
    """Grouped horizontal bars: a row per task, a bar per model; returns the figure.

    Args:
        table: a column ``task`` and one column of scores (0-100) per model.
        models: which columns.
        title: above the plot.
    """
    import numpy as np

    n_tasks = len(table)
    figure, axes = new_figure(title, "score (x100)", "", height=0.5 * n_tasks + 1.2)
    places = np.arange(n_tasks)[::-1]
    height = 0.8 / len(models)
    for index, model in enumerate(models):
        offset = (len(models) - 1) / 2 - index
        axes.barh(
            places + offset * height,
            table[model],
            height,
            label=model,
            color=PALETTE.get(model),
        )
    axes.set_yticks(places, table["task"])
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlim(min(0, float(table[list(models)].min().min())), 100)
    return figure


def plot_similarities(rows: Sequence[dict], *, title: str) -> object:
    """Distribution of query-positive and query-negative cosine similarities, one box per kind."""
    import pandas as pd
    import seaborn as sns

    long = [
        {"kind": row["kind"], "pair": f"query - {side}", "cosine": row[side]}
        for row in rows
        for side in ("positive", "negative")
        if row[side] is not None
    ]
    figure, axes = new_figure(title, "kind", "cosine similarity")
    colors = {"query - positive": PALETTE["reference"], "query - negative": PALETTE["trained"]}
    sns.boxplot(pd.DataFrame(long), x="kind", y="cosine", hue="pair", palette=colors, ax=axes)
    axes.legend(frameon=False, title="")
    return figure


def new_figure(title: str, x_label: str, y_label: str, *, height: float = 3.6) -> tuple:
    """A figure and its axes in the study's style."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, height), layout="constrained")
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25)
    axes.set_axisbelow(True)
    plt.close(figure)  # the notebook shows the returned figure once
    return figure, axes


def _cell(value: object, digits: int) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = _printable(str(value))
    return html.escape(text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…")


def _printable(text: str) -> str:
    """Control characters made visible: terminal escapes in generated text must not act either."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _wrapped(text: str, label: str, width: int) -> str:
    first = f"{label:<{width}}"
    lines = [
        textwrap.fill(
            line,
            WIDTH_CHARS,
            initial_indent=first if index == 0 else " " * width,
            subsequent_indent=" " * width,
        )
        for index, line in enumerate(_printable(text).splitlines() or [""])
    ]
    return "\n".join(
        line or (first.rstrip() if index == 0 else "") for index, line in enumerate(lines)
    )
