"""Requests to completions through a store: asked once, never again.

The store is a JSON Lines file of finished requests, named by their content hash. A crash, a Ctrl-C
or a restart loses at most the batch in flight, and nothing in the store is asked twice.

    completions = generate(requests, engine, stage.output("completions.jsonl"))

Paper: not stated; ours, because teacher calls cost money and generation costs hours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from speed_utils.engines import Completion, Engine, Request
from speed_utils.prompts import object_schema, words_bound
from speed_utils.records import KIND_KEYS, Example, Prompted, example_text

CHARS_PER_WORD = 6  # of English, the blank included
TOKENS_PER_WORD = 1.8  # generous for English with small vocabularies, punctuation included
DEFAULT_FIELD_WORDS = 40  # for fields whose length the prompt does not bound


class Store:
    """Finished completions on disk, one JSON object a line, appended and synced.

    A last line that a crash cut short is dropped on opening.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, Completion] = {}
        self._load()

    def get(self, key: str) -> Completion | None:
        """The stored completion of a request key, or None."""
        return self._done.get(key)

    def add(self, completions: Sequence[Completion]) -> None:
        """Append completions in one write, and wait until the disk has them."""
        text = "".join(json.dumps(asdict(c), ensure_ascii=True) + "\n" for c in completions)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._done.update({completion.key: completion for completion in completions})

    def __len__(self) -> int:
        return len(self._done)

    def _load(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self.path.open("r+b") as file:
                file.truncate(end)
        for line in data[:end].splitlines():
            try:
                completion = Completion(**json.loads(line))
            except (ValueError, TypeError):
                continue  # torn by a crash in the middle of the file: asked again
            self._done[completion.key] = completion


def generate(
    requests: Sequence[Request], engine: Engine, store_path: Path | str, *, title: str = "generate"
) -> list[Completion]:
    """Answer all requests, from the store where they are done; in the order of the requests.

    Completions that were in the store come back with ``cached=True``.

    Raises:
        ValueError: two requests are the same in every respect (give each another seed or id).
    """
    keys = [request.key(engine.name) for request in requests]
    if len(set(keys)) < len(keys):
        raise ValueError("two requests are identical; give each its own id or seed")
    store = Store(store_path)
    known = {key for key in keys if store.get(key) is not None}
    with tqdm(total=len(requests), initial=len(known), desc=title, unit="req") as bar:
        for batch in engine.batches(requests):
            missing = [request for request in batch if store.get(request.key(engine.name)) is None]
            if not missing:
                continue
            if engine.atomic_batches:
                # An answer depends on its batch in the last digits: redo it whole, so that an
                # interrupted run ends with the same texts as an undisturbed one.
                fresh = list(engine.complete(batch))
                store.add(fresh)
                bar.update(len(missing))
                continue
            for completion in engine.complete(missing):
                store.add([completion])
                bar.update(1)
    answers = [store.get(key) for key in keys]
    return [replace(c, cached=c.cached or c.key in known) for c in answers]


def field_words(prompted: Prompted) -> dict[str, int]:
    """Most words that each field of an answer may take, from the prompt's length slots.

    Half more words than are asked for, and never fewer than 20. A longer text is cut there, most
    often in mid-sentence: see fields_at_limit.
    """
    least, most = words_bound(prompted.slots.get("num_words"))
    short_field = DEFAULT_FIELD_WORDS // 2
    if most is None:
        long_field = max(round(1.5 * least), DEFAULT_FIELD_WORDS)
    else:
        long_field = max(round(1.5 * most), short_field)
    n_long = {"classification": 1, "retrieval": 2, "matching_long": 2, "sts": 3}
    keys = KIND_KEYS[prompted.kind]
    if prompted.kind == "retrieval":  # the query is the short one, and stands first
        lengths = [short_field, long_field, long_field]
    else:
        count = n_long.get(prompted.kind, 0)
        lengths = [long_field] * count + [short_field] * (len(keys) - count)
    return dict(zip(keys, lengths, strict=True))


def bounded_schema(prompted: Prompted) -> dict:
    """The kind's JSON schema with a length limit on each field.

    A small model that begins to repeat itself never stops; the limit ends the field instead of
    losing the answer. It is far above what the prompt asks for.
    """
    limits = field_words(prompted)
    return object_schema(
        {
            key: {"type": "string", "minLength": 1, "maxLength": words * CHARS_PER_WORD}
            for key, words in limits.items()
        }
    )


def fields_at_limit(example: Example) -> list[str]:
    """Fields that stopped at the schema's length limit: valid, but most often in mid-sentence."""
    values = json.loads(example_text(example))
    limits = field_words(example)
    return [key for key in limits if len(values[key]) >= limits[key] * CHARS_PER_WORD]


def answer_tokens(prompted: Prompted) -> int:
    """Most tokens that an answer to this data prompt may take, from its length slots."""
    n_words = sum(field_words(prompted).values())
    return int(n_words * TOKENS_PER_WORD) + 32  # 32: keys, quotes and separators of the JSON object
