"""Tables, text viewers and plots for the notebooks. Generated text is never shown as HTML.

show_table(rows, title="Seed data by kind")
show_record(example)
plot_history(training.history, title="Junior")
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speed_utils.records import Record

if TYPE_CHECKING:
    import pandas as pd

WIDTH_CHARS = 96
CELL_CHARS = 110  # longer texts in table cells are cut
LOSS_SPAN_MIN = 0.05  # of a loss axis that does not begin at 0
PALETTE = {
    "base": "#9aa5b1",
    "trained": "#c2410c",
    "reference": "#1d4ed8",
    "train": "#c2410c",
    "heldout": "#1d4ed8",
}


def show_table(
    rows: Sequence[dict] | pd.DataFrame,
    *,
    title: str = "",
    digits: int = 2,
    cell_chars: int = CELL_CHARS,
) -> object:
    """Rows as a table; every text is escaped, so that generated text cannot act as HTML.

    Args:
        rows: dictionaries, mostly with the same keys, or a DataFrame.
        title: shown above.
        digits: of floating-point numbers.
        cell_chars: longer texts are cut.

    Returns:
        An HTML table for the notebook to display.
    """
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    rows = list(rows) or [{"": "none"}]
    columns = {
        str(name): [row.get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    shown = {
        name: [_cell(value, digits, cell_chars) for value in values]
        for name, values in columns.items()
    }
    numbers = {name for name, values in columns.items() if all(map(_is_number, values))}
    return _html_table(shown, title, numbers)


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
    return _html_table({name: [text] for name, text in texts.items()}, title)


def show_stage_record(record: dict) -> object:
    """A stage record as a table: what was read, written and measured."""
    rows = [{"what": "stage", "value": f"{record['stage']}: {record['status']}"}]
    rows += [{"what": "seconds", "value": f"{record['seconds']:,.1f}"}]
    for what in ("inputs", "outputs"):
        for item in record[what]:
            n_rows = f" ({item['rows']} rows)" if item["rows"] is not None else ""
            parts = Path(item["path"]).parts
            start = parts.index("artifacts") + 1 if "artifacts" in parts else -2
            rows.append({"what": what[:-1], "value": "/".join(parts[start:]) + n_rows})
    rows += [{"what": name, "value": _rounded(value)} for name, value in record["metrics"].items()]
    teacher = record["teacher"]
    if teacher["calls"]:
        n_tokens = teacher["prompt_tokens"] + teacher["completion_tokens"]
        paid = "price unknown" if teacher["usd"] is None else f"paid {teacher['usd']:.2f} USD"
        text = f"{teacher['calls']} calls ({teacher['cached']} cached), {n_tokens:,} tokens, {paid}"
        rows.append({"what": "teacher", "value": text})
    return show_table(rows, title="Stage record")


def plot_history(
    history: Sequence[dict], *, title: str, loss_label: str = "loss", from_zero: bool = True
) -> object:
    """The loss over optimizer steps; returns the matplotlib figure.

    Args:
        history: logged steps: step with loss, or with eval_loss of held-out data.
        title: above the plot.
        loss_label: of the vertical axis.
        from_zero: begin the vertical axis at 0; False for losses that hardly move, whose axis
            spans at least 0.05.
    """
    figure, axes = _step_figure(title, loss_label)
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
    known = [*losses, *(float(loss) for _, loss in evaluated)]
    if from_zero:
        axes.set_ylim(0, 1.1 * max(known))
    else:
        low, high = min(known), max(known)
        margin = max(0.05 * (high - low), (LOSS_SPAN_MIN - (high - low)) / 2)
        axes.set_ylim(low - margin, high + margin)
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
    figure, axes = _step_figure(title, y_label)
    for (key, label), color in zip(series.items(), ("#1d4ed8", "#c2410c", "#15803d"), strict=False):
        points = [(row["step"], float(row[key])) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def plot_bars(values: dict[str, float], *, title: str, x_label: str) -> object:
    """Horizontal bars with their values, one per name; returns the figure."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure, axes = new_figure(title, x_label, "")
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=PALETTE["reference"])
    labels = [_bar_label(values[name]) for name in names]
    axes.bar_label(bars, labels=labels, padding=3)
    longest = max(map(float, values.values()), default=0)
    room = 0.03 + 0.022 * max(map(len, labels), default=0)  # share of the axis a label takes
    axes.set_xlim(0, longest / (1 - room) or 1)
    if all(float(value).is_integer() for value in values.values()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if longest >= 1000:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
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
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(min(0, float(table[list(models)].min().min()) - 5), 100)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
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


def _step_figure(title: str, y_label: str) -> tuple:
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(title, "optimizer step", y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _html_table(columns: dict[str, list[str]], title: str, numbers: Collection[str] = ()) -> object:
    """Columns of texts, all escaped here, as HTML that displays.

    Styles stand in each cell, since JupyterLab drops the <style> of a notebook that it does not
    trust. The class keeps it from reading "$5 or $6" as a formula.
    """
    from IPython.display import HTML

    styles = {
        name: "text-align: right; vertical-align: top"
        if name in numbers
        else "text-align: left; white-space: pre-wrap; vertical-align: top"
        for name in columns
    }

    def row(tag: str, texts: Iterable[str]) -> str:
        cells = [
            f'<{tag} style="{style}">{html.escape(_printable(text))}</{tag}>'
            for style, text in zip(styles.values(), texts, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    caption = f"<caption>{html.escape(_printable(title))}</caption>" if title else ""
    body = "\n".join(row("td", texts) for texts in zip(*columns.values(), strict=True))
    return HTML(
        f'<table class="tex2jax_ignore mathjax_ignore">{caption}\n'
        f"<thead>{row('th', columns)}</thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def _is_number(value: object) -> bool:
    """Whether a cell's value stands on the right; what is missing fits on either side."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object, digits: int, cell_chars: int) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= cell_chars else text[: cell_chars - 1] + "…"


def _rounded(value: object) -> object:
    """A metric for reading: fewer digits the larger it is."""
    if not isinstance(value, float) or value != value:
        return value
    digits = 0 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _bar_label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


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
