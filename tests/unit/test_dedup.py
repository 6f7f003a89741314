import random

import pytest

from speed_utils.dedup import (
    closest_pair,
    dataset_statistics,
    deduplicate,
    duplicate_text,
    jaccard,
    shingles,
)


def many_examples(make_example, n=120, seed=0):
    """Random texts, every third a variation of an earlier one with some words changed."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(4000)]
    texts = []
    for i in range(n):
        if i % 3 == 2:
            text = rng.choice(texts).split()
            for _ in range(rng.randrange(0, 12)):
                text[rng.randrange(len(text))] = rng.choice(words)
        else:
            text = rng.choices(words, k=60)
        texts.append(" ".join(text))
    return [
        make_example(id=f"id{i:04d}", query=f"q{i}", positive=text, negative=None)
        for i, text in enumerate(texts)
    ]


def brute_force(examples, threshold):
    """The definition: in order of id, remove what is near an earlier kept one."""
    kept = []
    for example in sorted(examples, key=lambda e: e.id):
        own = shingles(duplicate_text(example))
        if all(jaccard(own, shingles(duplicate_text(k))) < threshold for k in kept):
            kept.append(example)
    return {example.id for example in kept}


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_it_agrees_with_brute_force_on_clear_duplicates(make_example, threshold):
    examples = many_examples(make_example)
    result = deduplicate(examples, threshold=threshold)
    expected = brute_force(examples, threshold)
    kept = {example.id for example in result.kept}
    assert expected <= kept  # exact verification: nothing is removed wrongly
    assert len(kept - expected) <= 1  # LSH may miss a pair at the very threshold
    assert len(result.removed) >= 10


def test_each_removal_names_a_kept_original_and_its_true_similarity(make_example):
    examples = many_examples(make_example)
    result = deduplicate(examples, threshold=0.6)
    kept = {example.id: example for example in result.kept}
    by_id = {example.id: example for example in examples}
    for removal in result.removed:
        original = kept[removal.duplicate_of]
        similarity = jaccard(
            shingles(duplicate_text(by_id[removal.id])), shingles(duplicate_text(original))
        )
        assert removal.jaccard == pytest.approx(similarity, abs=1e-4) and similarity >= 0.6
        assert original.id < removal.id


def test_the_order_of_the_input_does_not_matter(make_example):
    examples = many_examples(make_example)
    shuffled = random.Random(3).sample(examples, len(examples))
    kept = {example.id for example in deduplicate(examples).kept}
    assert kept == {example.id for example in deduplicate(shuffled).kept}


def test_kinds_never_match_each_other(make_example):
    pair = [make_example(id="a"), make_example(id="b", kind="sts"), make_example(id="c")]
    result = deduplicate(pair)
    assert [(r.id, r.duplicate_of, r.jaccard) for r in result.removed] == [("c", "a", 1.0)]


def test_the_task_does_not_decide_and_bad_input_is_refused(make_example):
    example = make_example()
    assert example.task not in duplicate_text(example)
    with pytest.raises(ValueError, match="threshold"):
        deduplicate([example], threshold=0)
    with pytest.raises(ValueError, match="distinct"):
        deduplicate([example, example])


def test_shingles_of_short_and_long_texts():
    assert shingles("One two") == {"one two"}
    assert shingles("a b c d e f") == {"a b c d e", "b c d e f"}
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5


def test_statistics_have_a_row_per_kind_and_a_total(make_example):
    raw = [make_example(id="a"), make_example(id="b"), make_example(id="c", kind="sts")]
    rows = {row["kind"]: row for row in dataset_statistics(raw, raw[1:])}
    assert rows["retrieval"]["removed_share"] == 0.5
    assert rows["all"] | {"query_words": 4.0, "raw": 3, "kept": 2} == rows["all"]
    assert rows["classification"]["query_words"] is None


def test_the_closest_pair_is_found_within_a_kind(make_example):
    examples = [
        make_example(
            id="a", query="q", positive="one two three four five six seven", negative=None
        ),
        make_example(
            id="b", query="q", positive="one two three four five six eight", negative=None
        ),
        make_example(
            id="c", query="q", positive="nothing of all this is alike here", negative=None
        ),
        make_example(
            id="d",
            kind="matching_short",
            query="q",
            positive="one two three four five six seven",
            negative=None,
        ),
    ]
    left, right, similarity = closest_pair(examples)
    assert (left, right) == ("a", "b")
    assert 0 < similarity < 1
    with pytest.raises(ValueError, match="no two examples of one kind"):
        closest_pair(examples[2:])
