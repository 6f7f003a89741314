from collections import Counter

import pytest

from speed_utils import prompts
from speed_utils.prompts import (
    PromptError,
    answer_schema,
    brainstorm_prompt,
    example_prompt,
    sample_slots,
    words_bound,
)
from speed_utils.records import KIND_KEYS, KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_name_all_keys_and_leave_no_slot(kind):
    for seed in range(20):
        slots = sample_slots(kind, seed)
        text = example_prompt(kind, topic="Arts/Folk_Music", task="Find tunes.", slots=slots)
        assert all(f'"{key}"' in text for key in KIND_KEYS[kind])
        assert "$" not in text and "None" not in text
        assert "\n\n\n" not in text and "- .\n" not in text
        assert ("Folk Music" if kind == "sts" else "Find tunes.") in text


def test_the_same_seed_gives_the_same_prompt_and_others_differ():
    drawn = [tuple(sample_slots("retrieval", seed).items()) for seed in range(30)]
    assert drawn == [tuple(sample_slots("retrieval", seed).items()) for seed in range(30)]
    assert len(set(drawn)) > 20


def test_slots_are_drawn_with_the_published_weights():
    counts = Counter(sample_slots("retrieval", seed)["query_type"] for seed in range(4000))
    assert counts["extremely long-tail"] / 4000 == pytest.approx(0.4, abs=0.03)
    assert counts["common"] / 4000 == pytest.approx(0.1, abs=0.02)
    units = Counter(sample_slots("sts", seed)["unit"] for seed in range(4000))
    assert units["sentence"] / 4000 == pytest.approx(0.9, abs=0.02)


def test_rules_are_shuffled_for_retrieval_and_not_for_sts():
    def rules(kind, order):
        slots = {**sample_slots(kind, 1), "order": order}
        text = example_prompt(kind, topic="t", task="x", slots=slots)
        return [line for line in text.splitlines() if line.startswith("- ")]

    orders = [rules("retrieval", order) for order in range(5)]
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert rules("sts", 0) == rules("sts", 3)


def test_document_words_max_cuts_what_is_asked_for():
    for seed in range(50):
        assert sample_slots("retrieval", seed, 100)["num_words"] in (50, 100)
        assert words_bound(sample_slots("classification", seed, 50)["num_words"])[0] <= 50
        assert sample_slots("matching_long", seed, 80)["num_words"] == 80


def test_words_bound_reads_every_form():
    assert words_bound("less than 10") == (1, 9)
    assert words_bound("at least 50") == (50, None)
    assert words_bound(300) == (300, None)
    assert words_bound(None) == (0, None)


def test_a_slot_without_value_and_a_missing_template_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "PROMPTS_DIR", tmp_path)
    (tmp_path / "brainstorm_retrieval.txt").write_text("for $topic and $colour")
    with pytest.raises(PromptError, match="colour"):
        brainstorm_prompt("retrieval", "Arts")
    with pytest.raises(PromptError, match=r"brainstorm_sts\.txt"):
        brainstorm_prompt("sts", "Arts")


def test_schema_is_flat_and_closed():
    schema = answer_schema("classification", length_limit=200)
    assert list(schema["properties"]) == list(KIND_KEYS["classification"]) == schema["required"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["label"] == {"type": "string", "minLength": 1, "maxLength": 200}
