"""Check the bundled data: schemas, slots, repetition, leaks into the evaluation.

Reads data/teacher and data/benchmark, returns every fault with the record that has it.

    faults = check_data()
    faults += overlap_faults(mteb_texts(["STSBenchmark"]), "STSBenchmark")

Paper: not stated; ours. 13-word overlap is the common test for evaluation text in training data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from speed_utils.dedup import near_duplicates
from speed_utils.overlap import ngrams
from speed_utils.parsing import ParseError, parse_example, parse_tasks, slot_violations
from speed_utils.records import KIND_KEYS, STS_TASK, Example, Rejection
from speed_utils.settings import ROOT_DIR
from speed_utils.teacher import BRAINSTORMED_KINDS, TEACHER_DIR, recorded_prompt

BENCHMARK_DIR = ROOT_DIR / "data" / "benchmark"
COPY_WORDS = 8  # of a query that also stand in its positive document
NEAR_DUPLICATE = 0.5  # Jaccard of word 5-grams
PER_TOPIC_AND_KIND = 2  # seed examples


@dataclass(frozen=True)
class Fault:
    """What is wrong: the file, the record (id, or topic and kind), and how."""

    file: str
    record: str
    what: str


def check_data(teacher_dir: Path = TEACHER_DIR, benchmark_dir: Path = BENCHMARK_DIR) -> list[Fault]:
    """All faults of the recorded teacher, and what it shares with the bundled benchmark."""
    faults = []
    tasks: dict[tuple[str, str], list[str]] = {}
    for row in read_rows(teacher_dir / "brainstorm.jsonl"):
        tasks[row["topic"], row["kind"]] = row["tasks"]
        faults += _brainstorm_faults(row)
    seed: list[Example] = []
    for row in read_rows(teacher_dir / "seed.jsonl"):
        example = _parsed(row, json.dumps(row["answer"], ensure_ascii=False))
        if isinstance(example, Rejection):
            faults.append(Fault("seed.jsonl", row["id"], example.reason))
            continue
        seed.append(example)
        faults += [
            Fault("seed.jsonl", row["id"], what) for what in _seed_faults(example, row, tasks)
        ]
    faults += _crowded_faults(seed)
    for row in read_rows(teacher_dir / "preferences.jsonl"):
        faults += [Fault("preferences.jsonl", row["id"], w) for w in _preference_faults(row)]
    revised: list[Example] = []
    for row in read_rows(teacher_dir / "revisions.jsonl"):
        root = _parsed(row, row["root"])
        revision = _parsed(row, json.dumps(row["answer"]["revision"], ensure_ascii=False))
        faults += [Fault("revisions.jsonl", row["id"], w) for w in _revision_faults(root, revision)]
        revised += [revision] if isinstance(revision, Example) else []
    faults += _repetition_faults({"seed.jsonl": seed, "revisions.jsonl": revised})
    for name, texts in benchmark_texts(benchmark_dir).items():
        faults += overlap_faults(texts, name, teacher_dir)
    return faults


def teacher_counts(teacher_dir: Path = TEACHER_DIR) -> dict[str, int]:
    """How many records there are, judged lists without a decision, and revisions that change."""
    names = ("brainstorm", "seed", "preferences", "revisions")
    rows = {name: read_rows(teacher_dir / f"{name}.jsonl") for name in names}
    return {name: len(rows[name]) for name in names} | {
        "preferences_undecided": sum(not _is_decided(row) for row in rows["preferences"]),
        "revisions_unchanged": sum(not _is_changed(row) for row in rows["revisions"]),
    }


def overlap_faults(
    evaluation_texts: Iterable[str], name: str, teacher_dir: Path = TEACHER_DIR
) -> list[Fault]:
    """Records of the teacher that share OVERLAP_WORDS words in a row with an evaluation text."""
    known: set[str] = set()
    for text in evaluation_texts:
        known.update(ngrams(text))
    faults = []
    for filename in ("seed.jsonl", "revisions.jsonl"):
        for row in read_rows(teacher_dir / filename):
            shared = {gram for text in _strings(row["answer"]) for gram in ngrams(text)}
            faults += [
                Fault(filename, row["id"], f"shares with {name}: {gram!r}")
                for gram in sorted(shared & known)[:1]
            ]
    return faults


def benchmark_texts(benchmark_dir: Path = BENCHMARK_DIR) -> dict[str, list[str]]:
    """Every text of the bundled benchmark, by file."""
    return {
        path.name: [text for row in read_rows(path) for text in _strings(row)]
        for path in sorted(benchmark_dir.glob("*.jsonl"))
    }


def mteb_texts(task_names: Sequence[str]) -> Iterator[str]:
    """Every text of the test parts of MTEB tasks; needs a hub (HF_ENDPOINT).

    Raises:
        EvaluationError: no such task.
    """
    from speed_utils.evaluation import find_tasks

    for task in find_tasks(task_names):
        task.load_data()
        yield from _strings(_plain(task.dataset))


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines file.

    Raises:
        ValueError: a line is not JSON; names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def _brainstorm_faults(row: dict) -> list[Fault]:
    record = f"{row['topic']} | {row['kind']}"
    try:
        n_tasks = len(set(parse_tasks(json.dumps(row["tasks"]))))
    except ParseError as error:
        return [Fault("brainstorm.jsonl", record, str(error))]
    faults = [] if n_tasks == 5 else [f"{n_tasks} distinct tasks, 5 expected"]
    if row["kind"] not in BRAINSTORMED_KINDS:
        faults.append("no tasks are brainstormed for this kind")
    return [Fault("brainstorm.jsonl", record, what) for what in faults]


def _seed_faults(example: Example, row: dict, tasks: dict) -> list[str]:
    faults = slot_violations(example)
    if tuple(row["answer"]) != KIND_KEYS[example.kind]:
        faults.append(f"keys {list(row['answer'])}")
    known = [STS_TASK] if example.kind == "sts" else tasks.get((example.topic, example.kind), [])
    if example.task not in known:
        faults.append("its task was not brainstormed")
    if example.kind in ("retrieval", "matching_short", "matching_long"):
        copied = set(ngrams(example.query, COPY_WORDS)) & set(ngrams(example.positive, COPY_WORDS))
        faults += [f"query and positive share {gram!r}" for gram in sorted(copied)[:1]]
    return faults


def _crowded_faults(seed: list[Example]) -> list[Fault]:
    counts = Counter((example.topic, example.kind) for example in seed)
    return [
        Fault("seed.jsonl", f"{topic} | {kind}", f"{n} examples, {PER_TOPIC_AND_KIND} at most")
        for (topic, kind), n in counts.items()
        if n > PER_TOPIC_AND_KIND
    ]


def _repetition_faults(examples: dict[str, list[Example]]) -> list[Fault]:
    """Examples that repeat an earlier one, of their own file or of one before it."""
    file_of = {example.id: file for file, own in examples.items() for example in own}
    removed = near_duplicates([e for own in examples.values() for e in own], NEAR_DUPLICATE)
    return [
        Fault(file_of[r.id], r.id, f"nearly repeats {r.duplicate_of} ({r.jaccard:.2f})")
        for r in removed
    ]


def _preference_faults(row: dict) -> list[str]:
    answer, n_texts = row["answer"], len(row["texts"])
    faults = [] if n_texts == 5 else [f"{n_texts} texts"]
    if not {answer["best"], answer["worst"]} <= set(range(n_texts)):
        faults.append("best or worst points outside the list")
    elif _is_decided(row) and row["texts"][answer["best"]] == row["texts"][answer["worst"]]:
        faults.append("best and worst are the same text")
    if len(answer["reason"].split()) < 5:
        faults.append("no reason")
    return faults


def _is_decided(row: dict) -> bool:
    return row["answer"]["best"] != row["answer"]["worst"]


def _is_changed(row: dict) -> bool:
    return json.loads(row["root"]) != row["answer"]["revision"]


def _revision_faults(root: Example | Rejection, revision: Example | Rejection) -> list[str]:
    """A root may break its slots, which is what a revision mends; its revision may not."""
    parsed = {"root": root, "revision": revision}
    faults = [f"{name}: {p.reason}" for name, p in parsed.items() if isinstance(p, Rejection)]
    return faults + (slot_violations(revision) if isinstance(revision, Example) else [])


def _parsed(row: dict, text: str) -> Example | Rejection:
    return parse_example(text, recorded_prompt(row), "teacher", stage="check")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _plain(dataset: object) -> object:
    """A task's data set, whatever its form, as dicts and lists."""
    if hasattr(dataset, "to_list"):
        return dataset.to_list()
    if isinstance(dataset, dict):
        return {str(key): _plain(value) for key, value in dataset.items()}
    return dataset
