"""100,000 mutated model outputs: the parser never raises, and passes no invalid record."""

import json
import random

import pytest

from speed_utils.parsing import (
    ParseError,
    parse_example,
    parse_preference,
    parse_revision,
    parse_tasks,
)
from speed_utils.records import (
    KIND_KEYS,
    KINDS,
    Candidates,
    Example,
    Preference,
    Prompted,
    Rejection,
    Revision,
    example_text,
)

N_MUTANTS = 100_000
PIECES = [
    '"', "\\", "{", "}", "[", "]", ":", ",", "\n", "\x00", "\ud800", "\\ud800", "\\u0000", "null",
    "true", "1e999", "NaN", "-0", '""', "é", "😀", "```", "```json\n", "'", "\u2028", '{"a": ' * 50,
    "[" * 2000, '"label": "x", ', '"S1": "x", ', " ", "\t", "\x7f", "9" * 5000,
]  # fmt: skip


def valid_texts(rng):
    kind = rng.choice(KINDS)
    fields = {key: f"{key} says {rng.random()} “quoted” \n line" for key in KIND_KEYS[kind]}
    return kind, json.dumps(fields, ensure_ascii=rng.random() < 0.5)


def mutate(text, rng):
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        how = rng.randrange(6)
        if how == 0:
            text = text[:at]  # cut, as by a token limit
        elif how == 1:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif how == 2:
            text = text[:at] + text[min(to, at + 3) :]
        elif how == 3:
            text = text[:at] + text[at:to] * 2 + text[to:]
        elif how == 4:
            text = text[:at] + chr(rng.randrange(0x110000)) + text[at + 1 :]
        else:
            text = rng.choice(PIECES) + text + rng.choice(PIECES)
    return text


def assert_valid(example):
    again = parse_example(example_text(example), example, example.source, stage="fuzz")
    assert again == example
    fields = list(json.loads(example_text(example)).values())
    assert all(isinstance(field, str) and field.strip() and "\x00" not in field for field in fields)
    assert len({field.strip().casefold() for field in fields}) == len(fields)
    example_text(example).encode("utf8")
    example.model_dump_json()


def test_no_mutant_breaks_the_parser_of_examples():
    rng = random.Random(0)
    n_passed = n_refused = 0
    for _ in range(N_MUTANTS * 8 // 10):
        kind, text = valid_texts(rng)
        prompted = Prompted(id="x", kind=kind, topic="T", task="t", slots={})
        parsed = parse_example(mutate(text, rng), prompted, "senior", stage="fuzz")
        if isinstance(parsed, Example):
            n_passed += 1
            assert_valid(parsed)
        else:
            n_refused += 1
            assert isinstance(parsed, Rejection) and parsed.reason
    assert n_passed > 1000 and n_refused > 10_000  # the mutations are neither harmless nor hopeless


def test_no_mutant_breaks_the_parsers_of_signals():
    rng = random.Random(1)
    for _ in range(N_MUTANTS // 10):
        kind, text = valid_texts(rng)
        prompted = Prompted(id="x", kind=kind, topic="T", task="t", slots={})
        candidates = Candidates(**prompted.model_dump(), texts=["a", "b", "c"])
        judged = json.dumps({"reason": "it is", "best": rng.randrange(4), "worst": 1})
        parsed = parse_preference(mutate(judged, rng), candidates, stage="fuzz")
        if isinstance(parsed, Preference):
            assert parsed.best != parsed.worst and {parsed.best, parsed.worst} <= {0, 1, 2}
        wrapped = json.dumps({"reason": "r", "revision": text})
        parsed = parse_revision(mutate(wrapped, rng), prompted, text, stage="fuzz")
        if isinstance(parsed, Revision):
            inner = parse_example(parsed.revision, prompted, "teacher", stage="fuzz")
            assert_valid(inner)


def test_no_mutant_breaks_the_parser_of_tasks():
    rng = random.Random(2)
    for _ in range(N_MUTANTS // 10):
        text = mutate(str([f"task {rng.random()}", 'say "it"', "it's"]), rng)
        try:
            tasks = parse_tasks(text)
        except ParseError:
            continue
        assert tasks and all(task.strip() for task in tasks)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"S1": 1}', "[" * 10**5, "{" * 10**5])
def test_degenerate_outputs_are_rejections(text):
    prompted = Prompted(id="x", kind="sts", topic="T", task="t", slots={})
    assert isinstance(parse_example(text, prompted, "senior", stage="fuzz"), Rejection)
