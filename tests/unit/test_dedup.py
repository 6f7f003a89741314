import json
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from itertools import combinations
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_utils import dedup_blocks, dedup_join, minhash
from speed_utils.dedup import (
    DedupPlan,
    closest_pair,
    deduplicate_file,
    duplicate_text,
    jaccard,
    near_duplicates,
    read_removals,
    shingles,
)
from speed_utils.records import Example, RecordError, read_records, write_records


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
        make_example(id=f"{rng.getrandbits(48):012x}", query="q", positive=text, negative=None)
        for text in texts
    ]


def brute_force(examples, threshold):
    """The definition: in order of id, remove what is near an earlier kept one."""
    kept = []
    for example in sorted(examples, key=lambda e: e.id):
        own = shingles(duplicate_text(example))
        if all(jaccard(own, shingles(duplicate_text(k))) < threshold for k in kept):
            kept.append(example)
    return {example.id for example in kept}


def deduplicated(folder, examples, plan=None, mapper=None):
    """(kept ids, removals as dicts, result) of a run over a file."""
    raw = folder / "raw.jsonl"
    write_records(raw, examples)
    result = deduplicate_file(
        raw,
        folder / "kept.jsonl",
        folder / "removed.jsonl",
        plan or DedupPlan(),
        mapper=mapper,
    )
    kept = [example.id for example in read_records(folder / "kept.jsonl", Example)]
    return kept, [asdict(r) for r in read_removals(folder / "removed.jsonl")], result


SIGNS = st.sampled_from("abAB é\u00a0\n\t .,") | st.characters(exclude_categories=["Cs"])
ASCII = st.characters(max_codepoint=127)
TEXTS = st.text(SIGNS, max_size=60) | st.text(ASCII, max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_signatures_equal_those_of_datasketch(texts):
    for text, own in zip(texts, minhash.signatures(pa.array(texts)), strict=True):
        theirs = MinHash(
            num_perm=minhash.N_PERMUTATIONS,
            seed=minhash.MINHASH_SEED,
            hashfunc=lambda shingle: minhash.shingle_hash(shingle) & 0xFFFFFFFF,
        )
        theirs.update_batch([shingle.encode() for shingle in shingles(text)])
        assert (own == theirs.hashvalues).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=8))
def test_compiled_jaccard_and_word_counts_equal_the_definition(texts):
    array = pa.array(texts)
    hashes, offsets = minhash.shingle_sets(array)
    pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts))]
    left, right = (minhash.np.array(side) for side in zip(*pairs, strict=True))
    computed = minhash.jaccards(hashes, offsets, left, right)
    for (i, j), value in zip(pairs, computed, strict=True):
        assert value == jaccard(shingles(texts[i]), shingles(texts[j]))
    assert minhash.count_words(array).tolist() == [len(t.encode().split()) for t in texts]


def test_texts_longer_than_any_buffer_are_read_whole():
    words = [f"word{i}" for i in range(20_000)]
    array = pa.array([" ".join(words), " ".join([*words[:-1], "other"])])
    hashes, offsets = minhash.shingle_sets(array)
    assert offsets.tolist() == [0, 19_996, 2 * 19_996]
    value = minhash.jaccards(hashes, offsets, minhash.np.array([0]), minhash.np.array([1]))
    assert value[0] == 19_995 / 19_997


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_it_agrees_with_brute_force_on_clear_duplicates(make_example, tmp_path, threshold):
    examples = many_examples(make_example)
    kept, removals, result = deduplicated(tmp_path, examples, DedupPlan(threshold))
    expected = brute_force(examples, threshold)
    assert expected <= set(kept)  # exact verification: nothing is removed wrongly
    assert len(set(kept) - expected) <= 1  # LSH may miss a pair at the very threshold
    assert len(removals) >= 10
    assert (result.n_raw, result.n_kept) == (len(examples), len(kept))
    assert kept == [e.id for e in examples if e.id in set(kept)]  # in the order of the file


def test_each_removal_names_a_kept_original_and_its_true_similarity(make_example, tmp_path):
    examples = many_examples(make_example)
    kept, removals, _ = deduplicated(tmp_path, examples, DedupPlan(0.6))
    by_id = {example.id: example for example in examples}
    for removal in removals:
        assert removal["duplicate_of"] in set(kept)
        pair = [by_id[removal[key]] for key in ("id", "duplicate_of")]
        similarity = jaccard(*(shingles(duplicate_text(example)) for example in pair))
        assert removal["jaccard"] == pytest.approx(similarity, abs=1e-4) and similarity >= 0.6
        assert removal["duplicate_of"] < removal["id"]


def test_a_chain_is_cut_where_its_middle_was_removed(make_example):
    words = [f"w{i}" for i in range(60)]
    texts = [words, [*words[:50], *"abcdefghij"], [*words[:40], *"klmnopqrst", *"abcdefghij"]]
    examples = [
        make_example(id=f"id{i}", query="q", positive=" ".join(text), negative=None)
        for i, text in enumerate(texts)
    ]
    removed = near_duplicates(examples, 0.5)
    # the third repeats the second, but the second is gone, and the first is another text
    assert [(r.id, r.duplicate_of) for r in removed] == [("id1", "id0")]


@pytest.mark.parametrize("is_verified", [True, False])
def test_neither_order_nor_blocks_nor_processes_matter(
    make_example, tmp_path, monkeypatch, is_verified
):
    monkeypatch.setattr(dedup_join, "FIRST_ROUND", 16)
    examples = many_examples(make_example, n=300)
    plan = DedupPlan(is_verified=is_verified)
    kept, removals, _ = deduplicated(tmp_path, examples, plan)
    assert len(removals) > 20 and (removals[0]["jaccard"] is not None or not is_verified)
    assert not is_verified or set(kept) >= brute_force(examples, plan.threshold)
    shuffled = random.Random(3).sample(examples, len(examples))
    little = DedupPlan(is_verified=is_verified, memory_gib=1e-4)  # many blocks, parts of few pairs
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        again, others, _ = deduplicated(tmp_path, shuffled, little, mapper=pool.map)
    assert set(again) == set(kept) and others == removals
    assert len(list(dedup_blocks.block_spans(tmp_path / "raw.jsonl", 13421))) > 10


def test_rounds_do_not_change_what_is_kept(make_example, tmp_path, monkeypatch):
    examples = many_examples(make_example, n=300)
    kept = deduplicated(tmp_path, examples)[0]
    for first_round in (1, 7, 64):
        monkeypatch.setattr(dedup_join, "FIRST_ROUND", first_round)
        again, removals, _ = deduplicated(tmp_path, examples)
        assert again == kept and {r["duplicate_of"] for r in removals} <= set(kept)


def test_thousands_of_near_copies_cost_no_square_of_pairs(make_example, tmp_path, monkeypatch):
    monkeypatch.setattr(dedup_join, "FIRST_ROUND", 16)
    rng = random.Random(1)
    words = [f"w{i}" for i in range(100)]
    examples = [
        make_example(
            id=f"{rng.getrandbits(48):012x}",
            query="q",
            positive=" ".join([*words[:50], f"x{i}", *words[51:]]),
            negative=None,
        )
        for i in range(2000)
    ]
    kept, removals, result = deduplicated(tmp_path, examples)
    assert len(kept) == 1 and len(removals) == 1999
    assert result.n_candidates < 3000  # all pairs would be two million


def test_copies_repeat_what_their_first_repeats(make_example, tmp_path):
    words = [f"w{i}" for i in range(60)]
    near = [*words[:58], "x", "y"]
    examples = [
        make_example(id=name, query="q", positive=" ".join(text), negative=None)
        for name, text in [("a", words), ("b", near), ("c", near), ("d", words)]
    ]
    kept, removals, result = deduplicated(tmp_path, examples)
    assert kept == ["a"] and {r["duplicate_of"] for r in removals} == {"a"}
    assert {r["id"]: r["jaccard"] for r in removals}["d"] == 1.0
    assert result.n_candidates == 1  # copies are not compared


def test_what_was_signed_before_a_crash_is_not_signed_again(make_example, tmp_path, monkeypatch):
    examples = many_examples(make_example, n=60)
    monkeypatch.setattr(dedup_blocks, "BLOCK_BYTES_MAX", 2_000)
    expected = deduplicated(tmp_path, examples)[:2]  # by threads
    n_calls = []
    original = minhash.band_hashes

    def fails_at_third(*arguments, **options):
        n_calls.append(1)
        if len(n_calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(minhash, "band_hashes", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        deduplicated(tmp_path, examples, mapper=map)
    raw = tmp_path / "raw.jsonl"
    outputs = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
    deduplicate_file(raw, *outputs, mapper=map)
    n_blocks = len(list(dedup_blocks.block_spans(raw, 2_000)))
    assert len(n_calls) == n_blocks + 1 and n_blocks > 5
    assert [e.id for e in read_records(outputs[0], Example)] == expected[0]
    assert not list(tmp_path.glob(".kept*.blocks"))


def test_a_kill_while_it_tidies_up_does_not_block_the_next_run(make_example, tmp_path, monkeypatch):
    examples = many_examples(make_example, n=30)

    def dies_after_one(folder):
        sorted(folder.glob("*-bands.npy"))[0].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("speed_utils.dedup.shutil.rmtree", dies_after_one)
        with pytest.raises(KeyboardInterrupt):
            deduplicated(tmp_path, examples)
    outputs = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
    (tmp_path / ".kept.jsonl.swp").write_text("of an editor")
    result = deduplicate_file(tmp_path / "raw.jsonl", *outputs)
    assert result.n_raw == 30 and (tmp_path / ".kept.jsonl.swp").exists()


def test_kinds_never_match_each_other(make_example):
    pair = [make_example(id="a"), make_example(id="b", kind="sts"), make_example(id="c")]
    removed = near_duplicates(pair, 0.7)
    assert [(r.id, r.duplicate_of, r.jaccard) for r in removed] == [("c", "a", 1.0)]


def test_the_task_does_not_decide(make_example):
    example = make_example()
    assert example.task not in duplicate_text(example)
    other = make_example(id="b", task="quite another task")
    assert len(near_duplicates([make_example(id="a"), other], 0.7)) == 1


def test_bad_input_is_refused_by_name(make_example, tmp_path):
    with pytest.raises(ValueError, match="threshold"):
        DedupPlan(threshold=0)
    with pytest.raises(RecordError, match="twice"):
        deduplicated(tmp_path, [make_example(), make_example()])
    raw = tmp_path / "raw.jsonl"
    paths = raw, tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
    row = json.loads(make_example().to_json())
    for line, message in [
        ("{", "repair the file"),
        (json.dumps({**row, "kind": "odd"}), "unknown kind"),
        (json.dumps({**row, "positive": None}), "no 'positive'"),
        ("\n" + json.dumps(row), "empty lines"),
    ]:
        raw.write_text(line + "\n")
        with pytest.raises(RecordError, match=message):
            deduplicate_file(*paths)


def test_an_empty_file_and_a_file_without_a_last_newline(make_example, tmp_path):
    assert deduplicated(tmp_path, [])[0] == []
    raw = tmp_path / "raw.jsonl"
    raw.write_text(make_example(id="a").to_json() + "\n" + make_example(id="b").to_json())
    result = deduplicate_file(raw, tmp_path / "kept.jsonl", tmp_path / "removed.jsonl")
    assert (result.n_raw, result.n_kept) == (2, 1)


def test_shingles_of_short_and_long_texts():
    assert shingles("One two") == {"one two"}
    assert shingles("a b c d e f") == {"a b c d e", "b c d e f"}
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5


def test_statistics_have_a_row_per_kind_and_a_total(make_example, tmp_path):
    raw = [make_example(id="a"), make_example(id="b"), make_example(id="c", kind="sts")]
    rows = {row["kind"]: row for row in deduplicated(tmp_path, raw)[2].statistics}
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
    assert closest_pair(examples[2:]) is None


@pytest.mark.parametrize("start", [None, 0, 5, 10])
def test_pairs_of_a_bucket_have_equal_whole_hashes(start):
    hashes = np.array([8, 9, 8, 16, 9, 8], np.uint64)  # 8 and 9 differ in bits that sorting drops
    ranks = np.array([0, 2, 3, 5, 7, 9])
    expected = {
        (int(ranks[one]), int(ranks[two]))
        for one, two in combinations(range(6), 2)
        if hashes[one] == hashes[two] and (start is None or ranks[one] < start <= ranks[two])
    }
    pairs = dedup_join._bucket_pairs(hashes, ranks, start)
    found = list(zip(*(part.tolist() for part in dedup_join.split_pairs(pairs)), strict=True))
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize(
    ("data", "starts"),
    [(b"", [0]), (b"a", [0, 1]), (b"a\n", [0, 2]), (b"\n\na", [0, 1, 2, 3]), (b"\n", [0, 1])],
)
def test_lines_start_after_line_ends(data, starts):
    assert dedup_blocks.line_starts(data).tolist() == starts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40), st.booleans())
def test_lines_are_copied_by_threads_as_by_hand(tmp_path_factory, lines, has_last_newline):
    text = [b"x" * length + b"\n" for _, length in lines]
    if text and not has_last_newline:
        text[-1] = b"last"
    folder = tmp_path_factory.mktemp("lines")
    (folder / "all").write_bytes(b"".join(text))
    starts = np.cumsum([0, *map(len, text)])
    is_kept = np.array([kept for kept, _ in lines], bool)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as threads:
        patch.setattr(dedup_blocks, "COPY_BYTES", 16)
        dedup_blocks.copy_lines(
            folder / "all", folder / "kept", starts, is_kept, mapper=threads.map
        )
    expected = [line for line, kept in zip(text, is_kept, strict=True) if kept]
    assert (folder / "kept").read_bytes() == b"".join(expected)
