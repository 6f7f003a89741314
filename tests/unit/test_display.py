"""What a reader sees: generated text must never act as HTML, as a formula or on the terminal."""

from __future__ import annotations

import pytest

from speed_utils.display import (
    plot_history,
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


def test_a_stage_record_tells_equal_file_names_apart_and_an_unknown_price_from_zero():
    record = {
        "stage": "09_synthesize",
        "status": "done",
        "seconds": 1.0,
        "inputs": [
            {"path": f"outputs/runs/r/artifacts/{stage}/training/adapter", "rows": None}
            for stage in ("06_train_senior", "08_train_revisor")
        ],
        "outputs": [],
        "metrics": {"share": 0.5},
        "teacher": {**NO_TEACHER, "calls": 3, "usd": None},
    }
    page = show_stage_record(record)._repr_html_()
    assert "06_train_senior/training/adapter" in page
    assert "08_train_revisor/training/adapter" in page
    assert "price unknown" in page


def test_the_loss_plot_shows_all_points():
    history = [{"step": 0, "eval_loss": 4.0}, {"step": 5, "loss": 3.0}, {"step": 9, "eval_loss": 2}]
    axes = plot_history(history, title="t").axes[0]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 4.0
    assert [list(line.get_xdata()) for line in axes.lines] == [[5], [0, 9]]
    low, high = plot_history(history, title="t", from_zero=False).axes[0].get_ylim()
    assert 0 < low < 2 and high > 4
