from dataclasses import replace

import numpy as np
import pytest

from speed_utils.cost import per_thousand, stage_costs
from speed_utils.engines import Completion
from speed_utils.ledger import Price, PriceError, ledger, load_price
from speed_utils.quality import (
    cut_share,
    distinct_n,
    pair_similarities,
    rejection_reasons,
    slot_obedience,
    topic_coverage,
)
from speed_utils.records import Rejection


def test_distinct_n_counts_grams():
    assert distinct_n(["a b a b"], 1) == 0.5
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a"], 2) is None


def test_a_negative_nearer_than_the_positive_is_a_suspect(make_example):
    vectors = {"q": [1, 0], "far": [0, 1], "near": [0.8, 0.6]}
    examples = [
        make_example(id="good", query="q", positive="near", negative="far"),
        make_example(id="bad", query="q", positive="far", negative="near"),
        make_example(id="pair", kind="matching_short", query="q", positive="near", negative=None),
    ]
    rows = pair_similarities(examples, lambda texts: np.array([vectors[t] for t in texts]))
    assert [row["is_suspect"] for row in rows] == [False, True, False]
    assert rows[0]["positive"] == pytest.approx(0.8) and rows[2]["negative"] is None


def test_texts_that_the_length_limit_cut_are_counted(make_example):
    slots = {"num_words": "less than 10"}  # at most 20 words of 6 characters
    whole = make_example(kind="classification", query="short", positive="a", slots=slots)
    cut = make_example(kind="classification", query="x" * 120, positive="a", slots=slots)
    assert cut_share([whole, cut]) == 0.5
    assert cut_share([]) is None


def test_coverage_obedience_and_reasons(make_example):
    example = make_example(slots={"num_words": 3})
    assert topic_coverage([example], ["Arts/Movies", "Home"]) == 0.5
    assert slot_obedience([example, make_example(slots={"num_words": 99})]) == 0.5
    rejections = [Rejection(id="a", stage="s", reason=r, raw="") for r in ("x: 1", "x: 2", "y")]
    assert rejection_reasons(rejections) == {"x": 2, "y": 1}


RECORDS = [
    {
        "stage": "02_brainstorm_tasks",
        "teacher": {
            "calls": 9,
            "cached": 9,
            "prompt_tokens": 10,
            "completion_tokens": 10,
            "usd": 0.0,
        },
    },
    {
        "stage": "03_write_seed_data",
        "teacher": {
            "calls": 2,
            "cached": 0,
            "prompt_tokens": 600_000,
            "completion_tokens": 200_000,
            "usd": 6.0,
        },
    },
    {
        "stage": "04_train_junior",
        "teacher": {
            "calls": 0,
            "cached": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "usd": 0.0,
        },
    },
]


PRICE = Price(prompt=5.0, completion=15.0, cached_prompt=2.5, batch_discount=0.5, as_of="2024")


def test_costs_are_per_stage_and_leave_brainstorming_out_of_the_comparison():
    rows = stage_costs(RECORDS, PRICE)
    assert [row["stage"] for row in rows] == ["02_brainstorm_tasks", "03_write_seed_data"]
    assert rows[1]["list_price_usd"] == pytest.approx(6.0)
    own = per_thousand(rows, 500)[-1]
    assert (own["calls"], own["calls_per_1000"], own["tokens_per_1000"]) == (2, 4.0, 1_600_000)


def test_table_5_per_thousand_examples():
    e5, speed, _ = per_thousand([], 10)
    assert e5["calls_per_1000"] == 1000
    assert speed["calls_per_1000"] == pytest.approx(48.9, abs=0.1)


def test_an_unknown_price_is_none_and_a_broken_file_is_named(tmp_path):
    assert load_price("no-such-model") is None
    known = load_price("gpt-4o-2024-05-13")
    assert (known.prompt, known.completion, known.as_of) == (5.0, 15.0, "2024-05-13")
    assert stage_costs(RECORDS, None)[1]["list_price_usd"] is None
    (tmp_path / "prices.toml").write_text('[m]\nprompt = "free"\ncompletion = 1\n')
    with pytest.raises(PriceError, match=r"prices\.toml"):
        load_price("m", tmp_path / "prices.toml")


def test_the_users_prices_come_first(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text('["m"]\nprompt = 3\ncompletion = 4\nas_of = 2026-01-01\n')
    monkeypatch.setenv("SPEED_PRICES", str(path))
    assert load_price("m").usd(1_000_000, 500_000) == 5.0
    assert load_price("gpt-4o-2024-05-13").completion == 15.0


def test_the_ledger_counts_all_and_bills_what_was_not_cached(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(
        '["ledger-m"]\nprompt = 5\ncached_prompt = 1\ncompletion = 15\nbatch_discount = 0.5\n'
    )
    monkeypatch.setenv("SPEED_PRICES", str(path))
    paid = Completion("k", "i", "t", "stop", 1000, 200, model="ledger-m", cached_prompt_tokens=500)
    cached = Completion("k2", "i2", "t", "stop", 500, 100, cached=True, model="ledger-m")
    counted = ledger([paid, cached])
    assert counted.pop("models") == {"ledger-m": counted}
    assert counted == {
        "calls": 2,
        "cached": 1,
        "prompt_tokens": 1500,
        "cached_prompt_tokens": 500,
        "completion_tokens": 300,
        "reasoning_tokens": 0,
        "usd": 0.006,
    }
    assert ledger([replace(paid, is_batch=True)])["usd"] == 0.003
    assert ledger([replace(paid, model="no-such-model")])["usd"] is None
    assert ledger([replace(cached, model="no-such-model")])["usd"] == 0.0
