"""What a reader sees: generated text must never act as HTML, as a formula or on the terminal."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from speed_utils.display import (
    plot_bars,
    plot_history,
    plot_lines,
    plot_scores,
    show_fields,
    show_side_by_side,
    show_stage_record,
    show_table,
    show_text,
)
from speed_utils.runs import NO_TEACHER

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> $5 or $6 \x1b[2Jgone"


@pytest.mark.parametrize(
    "shown",
    [
        show_table([{"text": HOSTILE, HOSTILE: 1}], title=HOSTILE),
        show_side_by_side({HOSTILE: HOSTILE, "other": "plain"}, title=HOSTILE),
    ],
)
def test_tables_show_hostile_text_and_never_run_it(shown):
    page = shown._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script" not in page and "<img" not in page and "\x1b" not in page
    assert "mathjax_ignore" in page  # or "$5 or $6" would be typeset as a formula


def test_a_table_needs_no_style_block_and_puts_numbers_on_the_right():
    rows = [{"text": "a\nb", "n": 1200, "mixed": 1}, {"text": "c", "n": None, "mixed": "x"}]
    for given in (rows, pd.DataFrame(rows)):
        page = show_table(given, title="t", digits=0)._repr_html_()
        assert "<style" not in page and "<caption>t</caption>" in page
        cells = re.findall(r'<t[hd] style="([^"]*)">([^<]*)</t[hd]>', page)
        styles = {text: style for style, text in cells}
        assert all("text-align: right" in styles[text] for text in ("n", "1,200", "–"))
        for text in ("text", "a\nb", "c", "mixed", "1", "x"):
            assert "text-align: left" in styles[text] and "pre-wrap" in styles[text]
    assert ">none<" in show_table([])._repr_html_()


def test_printed_text_has_no_terminal_escapes(capsys):
    show_text(HOSTILE, title=HOSTILE)
    show_fields({"name": HOSTILE}, title=HOSTILE)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b[2Jgone" in printed


def test_a_long_cell_is_cut_and_numbers_are_rounded():
    page = show_table([{"text": "x" * 500, "share": 0.12345, "none": None}])._repr_html_()
    assert "x" * 200 not in page and "…" in page
    assert "0.12" in page and "0.1234" not in page and "–" in page
    assert "x" * 200 in show_table([{"text": "x" * 200}], cell_chars=300)._repr_html_()


def test_a_stage_record_tells_equal_file_names_apart_and_an_unknown_price_from_zero():
    record = {
        "stage": "09_synthesize",
        "status": "done",
        "seconds": 507.84,
        "inputs": [
            {"path": f"outputs/runs/r/artifacts/{stage}/training/adapter", "rows": None}
            for stage in ("06_train_senior", "08_train_revisor")
        ],
        "outputs": [],
        "metrics": {"share": 0.12345, "loss": 3.68239, "rate": 1234.5, "n": 12345, "none": None},
        "teacher": {**NO_TEACHER, "calls": 3, "usd": None},
    }
    page = show_stage_record(record)._repr_html_()
    assert "06_train_senior/training/adapter" in page
    assert "08_train_revisor/training/adapter" in page
    assert "price unknown" in page
    for value in ("507.8", "0.123", "3.68", "1,234", "12,345", "–"):
        assert f">{value}<" in page


def test_the_loss_plot_shows_all_points():
    history = [{"step": 0, "eval_loss": 4.0}, {"step": 5, "loss": 3.0}, {"step": 9, "eval_loss": 2}]
    axes = plot_history(history, title="t").axes[0]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 4.0
    assert [list(line.get_xdata()) for line in axes.lines] == [[5], [0, 9]]
    low, high = plot_history(history, title="t", from_zero=False).axes[0].get_ylim()
    assert 0 < low < 2 and high > 4


def test_a_loss_that_hardly_moves_looks_so_and_steps_are_whole():
    history = [{"step": 1, "loss": 0.693, "reward": 0.0}, {"step": 2, "loss": 0.691, "reward": 0.1}]
    loss = plot_history(history, title="t", from_zero=False).axes[0]
    low, high = loss.get_ylim()
    assert high - low == pytest.approx(0.05) and low < 0.691 and high > 0.693
    reward = plot_lines(history, {"reward": "r"}, title="t", y_label="nats").axes[0]
    for axes in (loss, reward):
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize(
    ("values", "labels", "is_whole"),
    [
        ({"a stage of a long name": 128_400, "b": 9_999}, ["9,999", "128,400"], True),
        ({"a": 0.12345, "b": 1.0}, ["1", "0.123"], False),
        ({"a": 2, "b": 0}, ["0", "2"], True),
        ({"a": 0}, ["0"], True),
        ({}, [], True),
    ],
)
def test_bars_say_their_values_within_the_axes(values, labels, is_whole):
    figure = plot_bars(values, title="t", x_label="x")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == labels
    for text in axes.texts:
        assert text.get_window_extent().x1 <= axes.get_window_extent().x1
    ticks = axes.get_xticks()
    assert all(float(tick).is_integer() for tick in ticks) == is_whole
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert ("100,000" in shown) == (max(values.values(), default=0) > 100_000)


def test_scores_below_zero_are_seen_and_the_legend_hides_none():
    table = pd.DataFrame({"task": ["a", "b"], "base": [-14.5, 2.7], "trained": [48.0, 50.0]})
    figure = plot_scores(table, ["base", "trained"], title="t")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xlim() == (-19.5, 100)
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 0]]
    assert figure.legends[0].get_window_extent().y1 <= axes.get_window_extent().y0
