"""Typed records that flow between stages, and reading and writing them as JSON Lines.

Reads and writes ``*.jsonl`` files, one record a line. A record with a missing, unknown or
mistyped field is refused with file, line and field.

    examples = read_records(path, Example)
    write_records(path, examples)

Paper: Section 3.1 (kinds and triplets), Appendix D.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Kind = Literal["classification", "sts", "retrieval", "matching_short", "matching_long"]
KINDS: tuple[Kind, ...] = ("classification", "sts", "retrieval", "matching_short", "matching_long")

# Keys of the JSON object that a generator writes, in the order it writes them:
# first the query, then the positive, then (where the kind has one) the hard negative.
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "classification": ("input_text", "label", "misleading_label"),
    "sts": ("S1", "S2", "S3"),
    "retrieval": ("user_query", "positive_document", "hard_negative_document"),
    "matching_short": ("input", "positive_document"),
    "matching_long": ("input", "positive_document"),
}

# The paper mixes classification : STS : retrieval : matching as 7:7:7:2 (Section 4.1); the two
# forms of matching come out about even in its Table 6, so the 2 is split in halves.
KIND_WEIGHTS: dict[str, float] = {
    "classification": 7,
    "sts": 7,
    "retrieval": 7,
    "matching_short": 1,
    "matching_long": 1,
}

STS_TASK = "Retrieve semantically similar text"  # fixed for STS: no brainstormed task (Section C.1)


class RecordError(ValueError):
    """A record or a record file does not have the form it should have."""


class Record(BaseModel):
    """Base of all records: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_json(self) -> str:
        """The record as one line of JSON, keys in declared order."""
        return json.dumps(self.model_dump(), ensure_ascii=False)


class Topic(Record):
    """A sampled ODP topic. ``path`` is truncated to depth four, ``raw_path`` is as in the dump."""

    id: str
    path: str = Field(min_length=1)
    raw_path: str
    category: str
    depth: int = Field(ge=1)  # of raw_path


class Task(Record):
    """A brainstormed task description ``t`` for one topic and kind (Section 3.2.1)."""

    id: str
    topic: str
    kind: Kind
    text: str = Field(min_length=1)


class Prompted(Record):
    """What every record made from a data prompt carries: the prompt's origin."""

    id: str
    kind: Kind
    topic: str
    task: str
    slots: dict[str, str | int | float | None]


class Example(Prompted):
    """One (query, positive, hard negative) triplet; matching kinds have no negative."""

    query: str = Field(min_length=1)
    positive: str = Field(min_length=1)
    negative: str | None = None
    source: str  # who wrote it: teacher, base, junior, senior or revisor


class Candidates(Prompted):
    """Root data: several answers of the junior to one prompt (Section 3.2.3)."""

    texts: list[str] = Field(min_length=2)


class Preference(Prompted):
    """The teacher's judgement of a candidate list: indices count from 0."""

    texts: list[str] = Field(min_length=2)
    reason: str = Field(min_length=1)
    best: int = Field(ge=0)
    worst: int = Field(ge=0)

    def model_post_init(self, _context: object) -> None:
        """Refuse indices outside the list."""
        if max(self.best, self.worst) >= len(self.texts):
            raise ValueError(f"best={self.best}, worst={self.worst} but {len(self.texts)} texts")


class Revision(Prompted):
    """The teacher's evaluation and revision of one root example (Section 3.2.4)."""

    root: str
    reason: str = Field(min_length=1)
    revision: str = Field(min_length=1)


class Rejection(Record):
    """Model output that did not become a record: the reason and the raw text are kept."""

    id: str
    stage: str
    reason: str
    raw: str


R = TypeVar("R", bound=Record)


def record_id(*parts: object) -> str:
    """A short stable id from any JSON-serialisable parts: 12 hex digits of their SHA-256."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_records(path: Path | str, model: type[R], limit: int | None = None) -> list[R]:
    """Read a JSON Lines file of one record type; with ``limit`` no more than its first records.

    Raises:
        RecordError: file missing, a line is not JSON, or a field is missing, unknown or mistyped.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path} does not exist; run the stage that writes it first")
    records = []
    with path.open(encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(records) >= limit:
                break
            if not line.strip():
                continue
            try:
                records.append(model.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"])) or "line"
                raise RecordError(f"{path}:{number}: {field}: {first['msg']}") from None
    return records


def find_records(path: Path | str, model: type[R], ids: Collection[str]) -> dict[str, R]:
    """Some records of a large file, by their ids, in the order of the file.

    Raises:
        RecordError: a record of one of these ids cannot be read.
    """
    marks = [json.dumps(identifier) for identifier in ids]
    found = {}
    with Path(path).open(encoding="utf8") as lines:
        for line in lines:
            if any(mark in line for mark in marks):
                try:
                    record = model.model_validate_json(line)
                except ValidationError as error:
                    raise RecordError(f"{path}: {error}") from None
                if record.id in ids:
                    found[record.id] = record
    return found


def write_records(path: Path | str, records: Iterable[Record]) -> int:
    """Write records as JSON Lines, atomically; return how many."""
    lines = [record.to_json() for record in records]
    write_text(path, "".join(line + "\n" for line in lines))
    return len(lines)


def write_text(path: Path | str, text: str) -> None:
    """Replace a text file in one step; see replace_file."""
    replace_file(path, lambda file: file.write(text.encode()))


def replace_file(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file in one step: a reader sees the old file or the new one, never a part.

    Args:
        path: of the file; its folder is made.
        write: receives the open file and writes all of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def example_text(example: Example) -> str:
    """The example as the JSON text a generator is trained to write.

    ``json.dumps`` default separators, keys in schema order: the same serialisation that
    constrained decoding allows, so that training text and generated text never differ in form.
    """
    values = (example.query, example.positive, example.negative)
    keys = KIND_KEYS[example.kind]
    return json.dumps(dict(zip(keys, values, strict=False)), ensure_ascii=False)
