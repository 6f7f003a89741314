"""The bundled data keeps to its own rules."""

import json
from collections import Counter

import pytest

from speed_utils.parsing import parse_example, parse_tasks, slot_violations
from speed_utils.records import KIND_KEYS, KINDS, STS_TASK, Example, Prompted
from speed_utils.settings import ROOT_DIR
from speed_utils.teacher import BRAINSTORMED_KINDS, kind_counts
from speed_utils.topics import read_topic_paths, truncate_path

DATA_DIR = ROOT_DIR / "data"
TABLE_7 = (
    "Society/Crime/Criminals/Outlaws/Bonnie_and_Clyde",
    "Sports/Baseball/People/Players/E/Estes,_Shawn",
    "Arts/Movies/Titles/3/36_Hours_-_1964/Cast_and_Crew",
    "Science/Technology/Structural_Engineering/Bridge/History/People/Beedy,_Daniel",
    "Health/Medicine/Medical_Specialties/Ophthalmology/Refractive_Correction/LASIK",
    "Arts",
)


def rows(name):
    path = DATA_DIR / "teacher" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_there_are_enough_topics_in_all_categories():
    paths = list(read_topic_paths(DATA_DIR / "odp" / "topics.tsv"))
    categories = Counter(path.split("/")[0] for path in paths)
    assert len(paths) == len(set(paths)) >= 1500
    assert len(categories) == 15 and min(categories.values()) >= 90
    assert set(TABLE_7) <= set(paths)


def test_every_recorded_topic_can_be_sampled():
    truncated = {truncate_path(p) for p in read_topic_paths(DATA_DIR / "odp" / "topics.tsv")}
    topics = {row["topic"] for row in rows("brainstorm")}
    assert topics <= truncated and len(topics) >= 45
    assert len({topic.split("/")[0] for topic in topics}) == 15


def test_each_topic_has_five_distinct_tasks_of_each_brainstormed_kind():
    seen = Counter((row["topic"], row["kind"]) for row in rows("brainstorm"))
    assert set(seen.values()) == {1}
    topics = {topic for topic, _ in seen}
    assert set(seen) == {(topic, kind) for topic in topics for kind in BRAINSTORMED_KINDS}
    for row in rows("brainstorm"):
        assert len(set(parse_tasks(json.dumps(row["tasks"])))) == 5


def test_seed_answers_are_valid_and_keep_to_their_slots():
    tasks = {(r["topic"], r["kind"]): r["tasks"] for r in rows("brainstorm")}
    seen = set()
    for row in rows("seed"):
        fields = {name: row[name] for name in Prompted.model_fields}
        text = json.dumps(row["answer"], ensure_ascii=False)
        example = parse_example(text, Prompted(**fields), "teacher", stage="seed")
        assert isinstance(example, Example), f"{row['id']}: {example}"
        assert tuple(row["answer"]) == KIND_KEYS[row["kind"]]
        assert slot_violations(example) == [], row["id"]
        known = [STS_TASK] if row["kind"] == "sts" else tasks[row["topic"], row["kind"]]
        assert row["task"] in known, row["id"]
        assert (example.query, example.positive) not in seen
        seen.add((example.query, example.positive))


def test_the_seed_mixture_is_near_the_papers():
    counts = Counter(row["kind"] for row in rows("seed"))
    wanted = kind_counts(sum(counts.values()))
    assert set(counts) == set(KINDS)
    assert all(abs(counts[kind] - wanted[kind]) <= 8 for kind in KINDS)


def test_judgements_point_into_their_lists_and_give_a_reason():
    n_decided = 0
    for row in rows("preferences"):
        answer = row["answer"]
        assert len(row["texts"]) == 5
        assert {answer["best"], answer["worst"]} <= set(range(5))
        assert len(answer["reason"].split()) >= 5
        n_decided += answer["best"] != answer["worst"]
    assert len(rows("preferences")) >= 250 and n_decided >= 200


def test_revisions_are_valid_and_some_leave_the_root_alone():
    n_same = 0
    for row in rows("revisions"):
        fields = {name: row[name] for name in Prompted.model_fields}
        revision = json.dumps(row["answer"]["revision"], ensure_ascii=False)
        for text in (row["root"], revision):
            example = parse_example(text, Prompted(**fields), "teacher", stage="x")
            assert isinstance(example, Example), f"{row['id']}: {example}"
        n_same += row["root"] == revision
    assert 0 < n_same < 0.5 * len(rows("revisions"))


@pytest.mark.parametrize("name", ["brainstorm", "seed", "preferences", "revisions"])
def test_datasets_loads_the_teacher_folder(name, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(
        str(DATA_DIR / "teacher"), name, split="train", cache_dir=str(tmp_path)
    ).to_list()
    expected = rows(name)
    assert [row["topic"] for row in loaded] == [row["topic"] for row in expected]


@pytest.mark.parametrize("word", ["lorem ipsum", "as an ai", "[insert", "xxx"])
def test_no_placeholder_text(word):
    for name in ("brainstorm", "seed", "revisions"):
        assert word not in (DATA_DIR / "teacher" / f"{name}.jsonl").read_text().lower()


def test_the_benchmark_avoids_the_subjects_of_the_teacher():
    text = (DATA_DIR / "teacher" / "seed.jsonl").read_text().lower()
    subjects = ("beekeep", "railway signal", "sourdough", "volcano", "compost heap", "telescope")
    topics = " ".join(row["topic"].lower() for row in rows("brainstorm"))
    assert not any(subject in topics for subject in subjects)
    assert sum(text.count(subject) for subject in subjects) <= 5
