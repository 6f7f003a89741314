import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_utils.parsing import (
    ParseError,
    parse_example,
    parse_preference,
    parse_revision,
    parse_tasks,
    slot_violations,
)
from speed_utils.records import KIND_KEYS, KINDS, Candidates, Example, Prompted, Rejection

PROMPT = Prompted(id="p1", kind="retrieval", topic="t", task="x", slots={})
GOOD = {"user_query": "q", "positive_document": "p", "hard_negative_document": "n"}


def parse(text, prompted=PROMPT):
    return parse_example(text, prompted, "senior", stage="09_synthesize")


def test_a_valid_answer_becomes_an_example_also_in_a_fence():
    for text in (json.dumps(GOOD), f"```json\n{json.dumps(GOOD)}\n```", json.dumps(GOOD, indent=2)):
        example = parse(text)
        assert (example.query, example.positive, example.negative) == ("q", "p", "n")
        assert (example.id, example.source) == ("p1", "senior")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not json"),
        ('{"user_query": "q", ', "not json"),
        ("Sure! " + json.dumps(GOOD), "not json"),
        ("[1]", "not an object"),
        (json.dumps({**GOOD, "note": "x"}), "wrong keys"),
        (json.dumps({"user_query": "q", "positive_document": "p"}), "wrong keys"),
        (json.dumps({**GOOD, "user_query": ["q"]}), "not a string"),
        (json.dumps({**GOOD, "user_query": "  "}), "empty field"),
        (json.dumps({**GOOD, "user_query": "N"}), "same texts"),
        (json.dumps({**GOOD, "user_query": "\ud800"}), "unprintable text"),
        ('{"user_query": "a", "user_query": "b"}', "duplicate key"),
        ("[" * 100_000, "not json"),
    ],
)
def test_each_fault_has_its_reason_and_keeps_the_raw_text(text, reason):
    rejection = parse(text)
    assert isinstance(rejection, Rejection)
    assert rejection.reason.startswith(reason)
    assert rejection.raw == text


@given(st.text(max_size=200), st.sampled_from(KINDS))
def test_arbitrary_text_never_raises(text, kind):
    assert isinstance(parse(text, PROMPT.model_copy(update={"kind": kind})), Example | Rejection)


@given(st.randoms(use_true_random=False), st.sampled_from(KINDS))
def test_mutated_answers_are_valid_records_or_rejections(rng: random.Random, kind):
    text = list(json.dumps({key: f"some {key} text" for key in KIND_KEYS[kind]}))
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(text))
        text[place : place + rng.randrange(3)] = rng.choice(['"', "{", "}", "\\", "x", "\x00", ""])
    result = parse("".join(text), PROMPT.model_copy(update={"kind": kind}))
    if isinstance(result, Example):
        fields = [f for f in (result.query, result.positive, result.negative) if f is not None]
        assert len(fields) == len(KIND_KEYS[kind])
        assert all(field.strip() for field in fields)


def test_brainstormed_lists_are_read_and_other_text_is_refused():
    assert parse_tasks("['a task', \"another's\"]") == ["a task", "another's"]
    assert parse_tasks('Here you are:\n```python\n["one"]\n```') == ["one"]
    for text, reason in [("none", "not a list"), ("[]", "empty"), ("[1]", "not a string")]:
        with pytest.raises(ParseError, match=reason):
            parse_tasks(text)


LIST = Candidates(id="c", kind="sts", topic="t", task="x", slots={}, texts=["a", "b", "c"])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"reason": "r", "best": 1, "worst": 1}, "undecided"),
        ({"reason": "r", "best": 3, "worst": 1}, "index outside"),
        ({"reason": "r", "best": -1, "worst": 1}, "index outside"),
        ({"reason": "r", "best": True, "worst": 0}, "not an index"),
        ({"reason": "", "best": 1, "worst": 0}, "empty field"),
        ({"best": 1, "worst": 0}, "wrong keys"),
    ],
)
def test_judgements_that_decide_nothing_are_rejected(answer, reason):
    assert parse_preference(json.dumps(answer), LIST, stage="05").reason.startswith(reason)


def test_a_judgement_counts_from_zero():
    answer = json.dumps({"reason": "clear", "best": 0, "worst": 2})
    preference = parse_preference(answer, LIST, stage="05")
    assert (preference.texts[preference.best], preference.texts[preference.worst]) == ("a", "c")


def test_a_revision_may_be_an_object_or_a_string():
    for revision in (GOOD, json.dumps(GOOD)):
        answer = json.dumps({"reason": "fine", "revision": revision})
        parsed = parse_revision(answer, PROMPT, "root", stage="07")
        assert json.loads(parsed.revision) == GOOD
    broken = json.dumps({"reason": "fine", "revision": "{}"})
    assert parse_revision(broken, PROMPT, "root", stage="07").reason.startswith(
        "revision wrong keys"
    )


def test_countable_rules_are_checked(make_example):
    example = make_example(
        slots={"num_words": 5, "query_length": "less than 5 words"},
        query="one two three four five",
        positive="a b c d e",
        negative="a b c",
    )
    assert slot_violations(example) == [
        "negative has 3 words, at least 5 asked",
        "query has 5 words, less than 5 words asked",
    ]
    leaked = make_example(kind="classification", query="A Refund request.", positive="refund")
    assert slot_violations(leaked) == ["label stands in the text"]
    hidden = make_example(kind="classification", query="Refunded twice", positive="refund")
    assert slot_violations(hidden) == []
