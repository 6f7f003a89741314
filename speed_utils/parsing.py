"""Model text to records: a parsed value, or a Rejection with the reason.

Nothing is repaired: text that is not exactly the asked JSON object is rejected, because repaired
records would hide how often a generator fails.

    result = parse_example(text, prompted, "senior", stage="09_synthesize")

Paper: Section 3.2 (only parsable answers are kept; the post-filter is described in E5_mistral).
"""

from __future__ import annotations

import ast
import json
import re

from speed_utils.engines import Completion
from speed_utils.prompts import words_bound
from speed_utils.records import (
    KIND_KEYS,
    Candidates,
    Example,
    Preference,
    Prompted,
    Rejection,
    Revision,
    example_text,
)


class ParseError(ValueError):
    """Why a text did not become a record; the message starts with a short stable reason."""


def parse_object(text: str, keys: tuple[str, ...]) -> dict:
    """Parse a JSON object that has exactly these keys.

    A Markdown fence around the object is accepted (teachers like to write one).

    Raises:
        ParseError: "not json", "not an object", "duplicate key" or "wrong keys", with detail.
    """
    body = _FENCE.sub(r"\1", text.strip())
    try:
        value = json.loads(body, object_pairs_hook=_refuse_duplicates)
    except ParseError:
        raise
    except (ValueError, RecursionError) as error:
        raise ParseError(f"not json: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise ParseError(f"not an object: {type(value).__name__}")
    if set(value) != set(keys):
        raise ParseError(f"wrong keys: {', '.join(map(str, value))[:80]}")
    return value


def parse_fields(text: str, kind: str) -> tuple[str, str, str | None]:
    """Parse an answer of one kind into (query, positive, negative or None).

    Raises:
        ParseError: as parse_object, or "not a string", "empty field", "same texts",
            "unprintable text".
    """
    fields = _fields(text, kind)
    if len({field.strip().casefold() for field in fields}) < len(fields):
        raise ParseError("same texts: two fields are equal")
    query, positive, *rest = fields
    return query, positive, rest[0] if rest else None


def unusable(answer: Completion, identifier: str, *, stage: str) -> Rejection | None:
    """The rejection of a record whose answer never came, or was cut by the token limit; else None.

    A cut answer is rejected also where its text would parse.
    """
    if answer.finish_reason == "error":
        return Rejection(id=identifier, stage=stage, reason=answer.text, raw="")
    if answer.finish_reason == "length":
        reason = f"cut by length: {answer.completion_tokens} tokens"
        return Rejection(id=identifier, stage=stage, reason=reason, raw=answer.text)
    return None


def parse_example(text: str, prompted: Prompted, source: str, *, stage: str) -> Example | Rejection:
    """Parse a generator's answer to the prompt of ``prompted``; keeps its id, task and slots."""
    try:
        query, positive, negative = parse_fields(text, prompted.kind)
    except ParseError as error:
        return Rejection(id=prompted.id, stage=stage, reason=str(error), raw=text)
    return Example(
        **prompt_fields(prompted),
        query=query,
        positive=positive,
        negative=negative,
        source=source,
    )


def parse_tasks(text: str) -> list[str]:
    """Parse the brainstormed Python (or JSON) list of task strings.

    Raises:
        ParseError: "not a list", "empty list" or "not a string".
    """
    body = _FENCE.sub(r"\1", text.strip())
    start, end = body.find("["), body.rfind("]")
    if start < 0 or end < start:
        raise ParseError("not a list: no brackets")
    try:
        value = ast.literal_eval(body[start : end + 1])
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ParseError(f"not a list: {str(error)[:80]}") from None
    if not isinstance(value, list) or not value:
        raise ParseError("empty list")
    if not all(isinstance(item, str) and item.strip() for item in value):
        raise ParseError("not a string: a task is not text")
    return [item.strip() for item in value]


def parse_preference(text: str, candidates: Candidates, *, stage: str) -> Preference | Rejection:
    """Parse the teacher's judgement; the same index for both is a rejection, undecided."""
    try:
        value = parse_object(text, ("reason", "best", "worst"))
        reason = _text(value, "reason")
        indices = (value["best"], value["worst"])
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
            raise ParseError(f"not an index: {indices}")
        if not all(0 <= i < len(candidates.texts) for i in indices):
            raise ParseError(f"index outside the list: {indices}")
        if indices[0] == indices[1]:
            raise ParseError("undecided: best equals worst")
    except ParseError as error:
        return Rejection(id=candidates.id, stage=stage, reason=str(error), raw=text)
    return Preference(
        **prompt_fields(candidates),
        texts=candidates.texts,
        reason=reason,
        best=value["best"],
        worst=value["worst"],
    )


def parse_revision(text: str, prompted: Prompted, root: str, *, stage: str) -> Revision | Rejection:
    """Parse the teacher's evaluation; the revision may be an object or a string of one.

    The revision is stored as the canonical JSON text of a valid example.
    """
    try:
        value = parse_object(text, ("reason", "revision"))
        reason = _text(value, "reason")
        revision = value["revision"]
        revision = revision if isinstance(revision, str) else json.dumps(revision)
        parsed = parse_example(revision, prompted, "teacher", stage=stage)
        if isinstance(parsed, Rejection):
            raise ParseError(f"revision {parsed.reason}")
    except ParseError as error:
        return Rejection(id=prompted.id, stage=stage, reason=str(error), raw=text)
    return Revision(
        **prompt_fields(prompted),
        root=root,
        reason=reason,
        revision=example_text(parsed),
    )


def has_valid_json(text: str, kind: str) -> bool:
    """Whether a text is a JSON object with this kind's keys, all of them text."""
    try:
        _fields(text, kind)
    except ParseError:
        return False
    return True


def is_valid_answer(text: str, kind: str) -> bool:
    """Whether a text is an acceptable answer of this kind, as it stands."""
    try:
        parse_fields(text, kind)
    except ParseError:
        return False
    return True


def slot_violations(example: Example) -> list[str]:
    """Which countable rules of its prompt an example breaks: word counts and a leaked label."""
    broken = []
    least, most = words_bound(example.slots.get("num_words"))
    checked = {
        "classification": {"query": example.query},
        "retrieval": {"positive": example.positive, "negative": example.negative or ""},
        "matching_long": {"query": example.query, "positive": example.positive},
    }.get(example.kind, {})
    for name, text in checked.items():
        n_words = len(text.split())
        if n_words < least or (most is not None and n_words > most):
            asked = f"at most {most}" if most is not None else f"at least {least}"
            broken.append(f"{name} has {n_words} words, {asked} asked")
    if example.kind == "retrieval":
        broken += _query_length_violation(example)
    if example.kind == "classification":
        label = example.positive.strip().casefold()
        if re.search(rf"\b{re.escape(label)}\b", example.query.casefold()):
            broken.append("label stands in the text")
    return broken


def prompt_fields(prompted: Prompted) -> dict:
    """The fields that every record made from a data prompt shares."""
    return {name: getattr(prompted, name) for name in Prompted.model_fields}


def _fields(text: str, kind: str) -> list[str]:
    """The texts of an answer's keys, in their order; raises ParseError."""
    keys = KIND_KEYS[kind]
    value = parse_object(text, keys)
    return [_text(value, key) for key in keys]


def _text(value: dict, key: str) -> str:
    """A field that must be text; raises ParseError."""
    field = value[key]
    if not isinstance(field, str):
        raise ParseError(f"not a string: {key} is {type(field).__name__}")
    if not field.strip():
        raise ParseError(f"empty field: {key}")
    try:
        field.encode("utf8")
    except UnicodeEncodeError:
        raise ParseError(f"unprintable text: {key}") from None
    if "\x00" in field:
        raise ParseError(f"unprintable text: {key}")
    return field


_FENCE = re.compile(r"^```[a-zA-Z]*\s*\n(.*?)\n?```$", re.DOTALL)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ParseError("duplicate key")
    return value


def _query_length_violation(example: Example) -> list[str]:
    n_words = len(example.query.split())
    ranges = {
        "less than 5 words": (1, 4),
        "5 to 15 words": (5, 15),
        "at least 10 words": (10, 10**6),
    }
    least, most = ranges.get(str(example.slots.get("query_length")), (1, 10**6))
    if least <= n_words <= most:
        return []
    return [f"query has {n_words} words, {example.slots['query_length']} asked"]
