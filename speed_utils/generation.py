"""Requests to completions through a store: asked once, never again.

A crash, a Ctrl-C or a restart loses at most the batch in flight, and nothing that is in the store
is asked twice.

    completions = generate(requests, engine, stage.output("completions.jsonl"))

Paper: not stated; ours, because teacher calls cost money and generation costs hours.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from speed_utils.engines import Completion, Engine, Request
from speed_utils.prompts import object_schema, words_bound
from speed_utils.records import KIND_KEYS, Example, Prompted, example_text
from speed_utils.shards import shard_files
from speed_utils.store import Store, read_completions

CHARS_PER_WORD = 6  # of English, the blank included
TOKENS_PER_WORD = 1.8  # generous for English with small vocabularies, punctuation included
DEFAULT_FIELD_WORDS = 40  # for fields whose length the prompt does not bound


def generate(
    requests: Sequence[Request],
    engine: Engine,
    store_path: Path | str,
    *,
    title: str = "generate",
    blocks: Mapping[str, int] | None = None,
) -> list[Completion]:
    """Answer all requests, from the store where they are done; in the order of the requests.

    Completions that were in the store, or in those that shards of the stage left beside it, come
    back with ``cached=True``.

    Args:
        requests: what to ask.
        engine: who answers.
        store_path: a JSON Lines file; see speed_utils.store.
        title: of the progress bar.
        blocks: request id to block number; requests of two blocks never share a batch, so that a
            shard (some of the blocks) batches as the whole does. None for one block.

    Raises:
        ValueError: two requests are the same in every respect (give each another seed or id).
        StoreError: the store cannot be written.
    """
    keys = [request.key(engine.name) for request in requests]
    if len(set(keys)) < len(keys):
        raise ValueError("two requests are identical; give each its own id or seed")
    key_of = dict(zip(map(id, requests), keys, strict=True))
    failed: dict[str, Completion] = {}
    with Store(store_path) as store, _gentle_interrupt(engine):
        _take_over(store, Path(store_path), set(keys))
        known = {key for key in keys if store.get(key) is not None}
        done = set(known)
        # smoothing 0: a whole batch is reported at once, and a moving average would run away
        with tqdm(
            total=len(requests), initial=len(known), desc=title, unit="req", smoothing=0
        ) as bar:
            for batch in _batches(requests, engine, blocks):
                missing = [request for request in batch if key_of[id(request)] not in done]
                if not missing:
                    continue
                store.require_space()
                if getattr(engine, "is_stopped", False):
                    break
                # Where an answer depends on its batch in the last digits, redo the batch whole: an
                # interrupted run then ends with the same texts as an undisturbed one.
                asked = batch if engine.atomic_batches else missing
                with closing(engine.complete(asked)) as stream:
                    parts = [list(stream)] if engine.atomic_batches else ([c] for c in stream)
                    for part in parts:
                        answered = [c for c in part if c.finish_reason != "error"]
                        store.add(answered)
                        failed |= {c.key: c for c in part if c.finish_reason == "error"}
                        fresh = {completion.key for completion in answered} - done
                        done |= fresh
                        n_new, n_asked = len(done - known), len(keys) - len(known)
                        bar.set_postfix_str(engine.progress(n_new, n_asked), refresh=False)
                        bar.update(len(fresh))
        if getattr(engine, "is_stopped", False):
            raise KeyboardInterrupt  # all that was answered is stored
        store.arrange(keys)
        answers = [store.get(key) or failed[key] for key in keys]
    return [replace(c, cached=c.cached or c.key in known) for c in answers]


@contextmanager
def _gentle_interrupt(engine: Engine) -> Iterator[None]:
    """Let the first Ctrl-C stop an engine that pays per request only after what is under way."""
    stop = getattr(engine, "stop", None)
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop_once(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    engine.is_stopped = False
    before = signal.signal(signal.SIGINT, stop_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(
    requests: Sequence[Request], engine: Engine, blocks: Mapping[str, int] | None
) -> Iterator[list[Request]]:
    by_block: dict[int, list[Request]] = {}
    for request in requests:
        by_block.setdefault(blocks[request.id] if blocks else 0, []).append(request)
    for block in sorted(by_block):
        yield from engine.batches(by_block[block])


def _take_over(store: Store, path: Path, keys: set[str]) -> None:
    """Copy the answers that shards have, and the store does not."""
    for file in shard_files(path):
        found = (c for c in read_completions(file) if c.key in keys)
        store.add([c for c in found if store.get(c.key) is None])


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
