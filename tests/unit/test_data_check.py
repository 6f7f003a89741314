"""`data check` finds each class of fault, and finds none in the bundled data."""

import json
import shutil

import pytest

from speed_utils.__main__ import main
from speed_utils.data_check import check_data, overlap_faults, read_rows, teacher_counts
from speed_utils.records import STS_TASK
from speed_utils.teacher import TEACHER_DIR


@pytest.fixture
def teacher_dir(tmp_path):
    return shutil.copytree(TEACHER_DIR, tmp_path / "teacher")


def change(folder, name, kind, edit):
    """Apply ``edit`` to the first row of a kind, and return that row as it is afterwards."""
    rows = read_rows(folder / name)
    row = next(row for row in rows if row["kind"] == kind)
    edit(row)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (folder / name).write_text(text, encoding="utf8")
    return row


def test_the_bundled_data_has_no_fault(capsys):
    assert check_data() == []
    assert main(["data", "check"]) == 0
    assert "0 faults" in capsys.readouterr().out


def test_what_is_undecided_or_unchanged_is_counted_and_no_fault(teacher_dir):
    before = teacher_counts(teacher_dir)
    assert before["seed"] >= 1000 and before["brainstorm"] >= 800
    assert before["preferences"] >= 250 and before["revisions"] >= 400
    for best in (0, 2):  # decided, then undecided
        decided = teacher_counts(teacher_dir)["preferences_undecided"]
        change(
            teacher_dir,
            "preferences.jsonl",
            "sts",
            lambda r, best=best: r["answer"].update(best=best, worst=2),
        )
    change(
        teacher_dir,
        "revisions.jsonl",
        "sts",
        lambda r: r["answer"].update(revision=json.loads(r["root"])),
    )
    after = teacher_counts(teacher_dir)
    assert check_data(teacher_dir) == []
    assert after["preferences_undecided"] == decided + 1
    assert after["revisions_unchanged"] == before["revisions_unchanged"] + 1


@pytest.mark.parametrize(
    ("name", "kind", "edit", "what"),
    [
        (
            "seed.jsonl",
            "classification",
            lambda r: r["answer"].update(
                input_text=r["answer"]["input_text"] + " " + r["answer"]["label"]
            ),
            "label stands in the text",
        ),
        (
            "seed.jsonl",
            "retrieval",
            lambda r: r["answer"].update(positive_document="too short a text"),
            "words, at least",
        ),
        (
            "seed.jsonl",
            "retrieval",
            lambda r: (
                r["slots"].update(query_length="at least 10 words"),
                r["answer"].update(
                    user_query=" ".join(r["answer"]["positive_document"].split()[:12])
                ),
            ),
            "query and positive share",
        ),
        ("seed.jsonl", "sts", lambda r: r["answer"].pop("S3"), "wrong keys"),
        ("seed.jsonl", "sts", lambda r: r.update(task="Something else"), "not brainstormed"),
        ("brainstorm.jsonl", "retrieval", lambda r: r["tasks"].pop(), "4 distinct tasks"),
        ("preferences.jsonl", "sts", lambda r: r["answer"].update(best=7), "outside the list"),
        ("revisions.jsonl", "sts", lambda r: r["answer"]["revision"].pop("S1"), "revision:"),
        (  # unchanged, though its label stands in the text
            "revisions.jsonl",
            "classification",
            lambda r: r["answer"].update(revision=json.loads(r["root"])),
            "label stands in the text",
        ),
    ],
)
def test_a_planted_fault_is_found_and_named(teacher_dir, name, kind, edit, what):
    row = change(teacher_dir, name, kind, edit)
    faults = [f for f in check_data(teacher_dir) if f.file == name]
    record = row.get("id", f"{row.get('topic')} | {kind}")
    assert any(f.record == record and what in f.what for f in faults), faults


def test_repeated_examples_are_found(teacher_dir):
    rows = [row for row in read_rows(teacher_dir / "seed.jsonl") if row["kind"] == "sts"]
    copies = [{**rows[0], "id": f"copy{i}", "task": STS_TASK} for i in range(2)]
    with (teacher_dir / "seed.jsonl").open("a", encoding="utf8") as file:
        file.writelines(json.dumps(copy) + "\n" for copy in copies)
    found = " ".join(f.what for f in check_data(teacher_dir))
    assert "nearly repeats" in found and "2 at most" in found


def test_a_revision_that_repeats_a_seed_example_is_found(teacher_dir):
    seed = next(row for row in read_rows(teacher_dir / "seed.jsonl") if row["kind"] == "sts")
    change(
        teacher_dir, "revisions.jsonl", "sts", lambda r: r["answer"].update(revision=seed["answer"])
    )
    faults = [f for f in check_data(teacher_dir) if "nearly repeats" in f.what]
    assert [f.file for f in faults] == ["revisions.jsonl"] and seed["id"] in faults[0].what


def test_text_of_an_evaluation_is_found_whatever_its_case_and_commas():
    row = next(r for r in read_rows(TEACHER_DIR / "seed.jsonl") if r["kind"] == "retrieval")
    leaked = row["answer"]["positive_document"].upper().replace(",", " ;")
    faults = overlap_faults([leaked], "SomeTask")
    assert [f.record for f in faults] == [row["id"]] and "SomeTask" in faults[0].what
    assert (
        overlap_faults(["twelve words that stand nowhere else in all of the data at all"], "x")
        == []
    )
