import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_utils import dedup_blocks, minhash, overlap
from speed_utils.overlap import known_ngrams, ngrams, remove_overlap
from speed_utils.records import Example, RecordError, read_records, write_records

EVALUATION = "It was the best of times, it was the worst of times: so he wrote, at least, that day."


def removed(folder, examples, texts):
    """(kept ids, report rows, result)."""
    raw, kept, report = (folder / name for name in ("raw.jsonl", "kept.jsonl", "report.jsonl"))
    write_records(raw, examples)
    result = remove_overlap(raw, kept, report, known_ngrams(texts))
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    return [e.id for e in read_records(kept, Example)], rows, result


def test_thirteen_shared_words_are_found_whatever_their_punctuation_and_case(
    make_example, tmp_path
):
    words = [
        "best",
        "of",
        "times",
        "it",
        "was",
        "the",
        "worst",
        "of",
        "times",
        "so",
        "he",
        "wrote",
        "at",
    ]
    assert len(words) == 13
    copied = 'They said: the BEST of times... it was (the) worst of times – so he wrote "at" noon'
    examples = [
        make_example(id="a", positive=copied),
        make_example(id="b", positive=" ".join(words[:12]) + " night"),
        make_example(id="c", negative="It was the best of times. " + EVALUATION),
    ]
    texts = {
        "first": ["an unrelated text of more than thirteen words " * 3],
        "second": [EVALUATION],
    }
    kept, rows, result = removed(tmp_path, examples, texts)
    assert kept == ["b"]
    assert {row["id"]: row["source"] for row in rows} == {"a": "second", "c": "second"}
    assert rows[0]["words"] in ngrams(EVALUATION) and result.by_source == {"second": 2}
    assert (result.n_raw, result.n_removed) == (3, 2)


def test_blocks_do_not_matter(make_example, tmp_path, monkeypatch):
    examples = [
        make_example(id=f"{i:03d}", positive=EVALUATION if i % 7 == 0 else f"number {i}")
        for i in range(50)
    ]
    monkeypatch.setattr(dedup_blocks, "BLOCK_BYTES_MAX", 700)
    monkeypatch.setattr(dedup_blocks.os, "cpu_count", lambda: 4)
    kept, rows, _ = removed(tmp_path, examples, {"e": [EVALUATION]})
    assert kept == [e.id for i, e in enumerate(examples) if i % 7]
    assert [row["id"] for row in rows] == [e.id for i, e in enumerate(examples) if i % 7 == 0]


def test_nothing_is_removed_without_evaluation_texts(make_example, tmp_path):
    examples = [make_example(id="a")]
    for texts in ({"e": ["short", ""]}, {}):
        kept, rows, result = removed(tmp_path, examples, texts)
        assert (kept, rows, result.n_removed) == (["a"], [], 0)


@pytest.mark.parametrize("sign", ["\u00a0", " \u200b", " «", "\u2011", "_", "... "])
def test_no_sign_hides_a_copy(make_example, tmp_path, sign):
    copied = EVALUATION.replace(" best", f"{sign}best").replace(" so", f"{sign}so")
    assert removed(tmp_path, [make_example(id="a", positive=copied)], {"e": [EVALUATION]})[0] == []


def test_an_empty_line_is_refused_before_anything_is_mixed_up(make_example, tmp_path):
    raw = tmp_path / "raw.jsonl"
    rows = [make_example(id=name).to_json() for name in "ab"]
    raw.write_text("\n\n".join(rows) + "\n")
    with pytest.raises(RecordError, match="empty lines"):
        remove_overlap(raw, tmp_path / "k", tmp_path / "r", known_ngrams({"e": [EVALUATION]}))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.sampled_from("abAB é’.-\n\t "), max_size=120), min_size=1, max_size=5))
def test_compiled_ngrams_equal_the_definition(texts):
    hashes, owners = overlap._hashes(pa.array(texts))
    for number, text in enumerate(texts):
        expected = {minhash.shingle_hash(gram.encode()) for gram in ngrams(text)}
        assert set(hashes[owners == number].tolist()) == expected
