import json

import pytest

from speed_utils.records import (
    KIND_KEYS,
    Example,
    Preference,
    RecordError,
    example_text,
    read_records,
    record_id,
    write_records,
)


def test_examples_survive_a_round_trip(tmp_path, make_example):
    examples = [
        make_example(),
        make_example(id="e2", query='a "quoted"\nline – ünï', negative=None),
    ]
    path = tmp_path / "a" / "examples.jsonl"
    assert write_records(path, examples) == 2
    assert read_records(path, Example) == examples
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"surprise": 1}, "surprise"),
        ({"kind": "poem"}, "kind"),
        ({"query": ""}, "query"),
        ({"positive": 3}, "positive"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_field(tmp_path, make_example, change, field):
    path = tmp_path / "examples.jsonl"
    good = make_example().model_dump()
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    with pytest.raises(RecordError, match=rf"examples.jsonl:2: {field}"):
        read_records(path, Example)


def test_a_missing_file_says_to_run_the_stage(tmp_path):
    with pytest.raises(RecordError, match="run the stage"):
        read_records(tmp_path / "none.jsonl", Example)


def test_a_preference_outside_its_list_is_refused():
    fields = {"id": "p", "kind": "sts", "topic": "t", "task": "x", "slots": {}, "reason": "r"}
    with pytest.raises(ValueError, match="2 texts"):
        Preference(**fields, texts=["a", "b"], best=2, worst=0)


def test_example_text_has_the_keys_of_its_kind_in_order(make_example):
    for kind, keys in KIND_KEYS.items():
        negative = "n" if len(keys) == 3 else None
        text = example_text(make_example(kind=kind, query="q", positive="p", negative=negative))
        assert tuple(json.loads(text)) == keys
        assert text == json.dumps(json.loads(text))  # default separators


def test_record_id_depends_on_every_part():
    assert record_id("a", 1) != record_id("a", 2) != record_id("a|2")
    assert record_id("a", {"x": 1, "y": 2}) == record_id("a", {"y": 2, "x": 1})
