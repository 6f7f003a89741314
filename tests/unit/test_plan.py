"""A plan says before a run what it will take, from the profile alone."""

import pytest

from speed_utils.__main__ import main
from speed_utils.ledger import load_price
from speed_utils.plan import PlanError, measured_flops, model_parameters, plan_rows
from speed_utils.settings import load_profile

FLOPS = {"generate": 1e12, "train": 1e12}


def rows_of(name, *overrides):
    return {row.stage: row for row in plan_rows(load_profile(name, list(overrides)), FLOPS)}


def test_the_papers_calls_and_tokens_come_out():
    rows = rows_of("paper")
    signals = [
        rows[s] for s in ("03_write_seed_data", "05_build_preferences", "07_write_revisions")
    ]
    assert sum(row.teacher_calls for row in signals) == 45_000  # Section 4.5
    assert 20e6 < sum(row.teacher_tokens for row in signals) < 60e6  # Table 5: 32 million
    assert rows["sum"].teacher_calls == 45_000 + 4 * 300_000


def test_money_follows_the_price_list_and_the_batch_discount():
    row = rows_of("paper")["03_write_seed_data"]
    price = load_price("gpt-4o-2024-05-13")
    least, most = (row.teacher_tokens * p / 1e6 for p in (price.prompt, price.completion))
    assert least < row.usd < most
    half = rows_of("paper", "shared.teacher=openai-batch:gpt-4o-2024-05-13")
    assert half["03_write_seed_data"].usd == pytest.approx(row.usd / 2)
    assert rows_of("laptop")["sum"].usd == 0
    unknown = rows_of("paper", "shared.teacher=openai:no-such-model")
    assert unknown["03_write_seed_data"].usd is None and unknown["sum"].usd is None


def test_hours_scale_with_work_and_are_unknown_without_a_throughput():
    one = rows_of("paper", "09_synthesize.n_examples=1000")["09_synthesize"]
    ten = rows_of("paper", "09_synthesize.n_examples=10000")["09_synthesize"]
    assert ten.hours == pytest.approx(10 * one.hours, rel=1e-6) and one.hours > 0
    assert plan_rows(load_profile("paper"))[-1].hours is None


def test_model_sizes_are_read_from_names():
    assert model_parameters("meta-llama/Meta-Llama-3-8B") == 8e9
    assert model_parameters("HuggingFaceTB/SmolLM2-135M-Instruct") == 135e6
    assert model_parameters("Qwen/Qwen2.5-1.5B") == 1.5e9
    with pytest.raises(PlanError, match="how many parameters"):
        model_parameters("gpt2")


def test_the_reference_run_gives_the_measured_throughput(tmp_path):
    flops = measured_flops()
    assert 1e9 < flops["generate"] < 1e13 and 1e9 < flops["train"] < 1e13
    assert measured_flops(tmp_path) is None


def test_the_command_prints_a_row_a_stage_and_spends_nothing(capsys):
    assert main(["plan", "--profile", "paper", "--tflops", "200"]) == 0
    out = capsys.readouterr().out
    assert "09_synthesize" in out and "sum" in out and "200 effective TFLOP/s" in out
    assert main(["plan", "--profile", "papper"]) == 2
