"""The OpenAI Batch API as an engine: half the price, an answer within a day, nothing sent twice.

What is sent is on disk before it is sent, and a batch's id before it is polled. After a restart,
batches under way are polled further; one that was sent in the very moment of a crash is found again
by the mark in its metadata. Requests of expired, cancelled or partly failed batches that have no
answer are sent again, and only these.

    engine = OpenAIBatchEngine(model="gpt-4o-2024-08-06", state_path=run_dir / "batches.jsonl")

Paper: not stated. Limits of a batch as OpenAI documents them (2026): 50,000 requests, 200 MB.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from speed_utils.engine_openai import api_key, chat_body, completion_of, hide_key
from speed_utils.engines import Completion, EngineError, Request
from speed_utils.ledger import Budget, BudgetError
from speed_utils.records import record_id

REQUESTS_MAX = 50_000  # of one batch
BYTES_MAX = 200_000_000
ROUNDS_MAX = 3  # a request without an answer is sent again this often
POLL_SECONDS = (2.0, 60.0)  # first and longest pause between two looks
ENDED = ("completed", "expired", "cancelled", "failed")
MARK = "speed_batch"  # metadata key: the hash of the batch's requests and round


class OpenAIBatchEngine:
    """Engine over the Batch API of an OpenAI-compatible server.

    Args:
        model: as the server names it.
        base_url: of the server's API, with /v1; empty for OpenAI's own.
        state_path: JSON Lines file of what was sent; the same one after a restart.
        budget: calls and money that may still be spent; None for no limit.
        poll_seconds: first and longest pause between two looks.
    """

    atomic_batches = False

    def __init__(
        self,
        *,
        model: str,
        base_url: str = "",
        state_path: Path,
        budget: Budget | None = None,
        poll_seconds: tuple[float, float] = POLL_SECONDS,
    ):
        import openai

        self._key = api_key(base_url)
        self.model = model
        self.name = f"openai-batch|{base_url}|{model}"
        self._state = _State(state_path)
        self._budget = budget or Budget()
        self._poll_seconds = poll_seconds
        self._client = openai.OpenAI(api_key=self._key, base_url=base_url or None, max_retries=5)
        self._reserved: dict[str, float] = {}  # request key to its worst cost, while it is out
        self._status = ""

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """All at once: batches within the API's limits are cut, and sent, together."""
        return [list(requests)] if requests else []

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Answer all requests, through as many batches and rounds as it takes.

        Raises:
            EngineError: the server refuses, or the budget does not reach. What was sent stays on
                disk and is collected when the same requests come again.
        """
        import openai

        missing = {request.key(self.name): request for request in batch}
        errors: dict[str, str] = {}
        try:
            for mark in self._state.open_marks(set(missing)):
                yield from self._collect(mark, missing, errors)
            for n_round in range(1, ROUNDS_MAX + 1):
                marks = [self._send(chunk, n_round) for chunk in _chunks(missing, self.model)]
                for mark in marks:
                    yield from self._collect(mark, missing, errors)
        except (openai.OpenAIError, BudgetError) as error:
            text = hide_key(str(error), self._key)
            raise EngineError(f"{self.model}: {type(error).__name__}: {text[:300]}") from None
        for key, request in missing.items():
            why = errors.get(key, "the batch ended without it")
            text = f"no answer after {ROUNDS_MAX} batches: {why[:200]}"
            yield Completion(key, request.id, text, "error", 0, 0, calls=0)

    def progress(self, _n_done: int, _n_total: int) -> str:
        """The status of the batch that is waited for."""
        return self._status

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _send(self, chunk: dict[str, Request], n_round: int) -> str:
        """Write down, then send one batch; returns its mark."""
        for key, request in chunk.items():
            self._reserved[key] = self._budget.reserve(request)
        n_sent = self._state.times_sent(set(chunk))
        mark = record_id("batch", *sorted(chunk), n_round, n_sent)
        self._state.add({"event": "prepared", "mark": mark, "keys": list(chunk)})
        self._create(mark, chunk)
        return mark

    def _create(self, mark: str, chunk: dict[str, Request]) -> str:
        lines = (_line(key, request, self.model) for key, request in chunk.items())
        content = io.BytesIO("".join(lines).encode())
        file = self._client.files.create(file=(f"{mark}.jsonl", content), purpose="batch")
        # Never sent again by the client: a lost reply may belong to a batch that was made.
        batch = self._client.with_options(max_retries=0).batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={MARK: mark},
        )
        self._state.add({"event": "created", "mark": mark, "id": batch.id})
        return batch.id

    def _collect(
        self, mark: str, missing: dict[str, Request], errors: dict[str, str]
    ) -> Iterator[Completion]:
        """Wait for a batch and yield its answers to what is missing, which they leave."""
        wanted = [key for key in self._state.keys[mark] if key in missing]
        batch_id = self._state.ids.get(mark) or self._find(mark)
        if batch_id is None:  # prepared, and never sent
            if not wanted:
                return
            for key in wanted:
                if key not in self._reserved:
                    self._reserved[key] = self._budget.reserve(missing[key])
            batch_id = self._create(mark, {key: missing[key] for key in wanted})
        batch = self._wait(batch_id)
        if batch.status == "failed" and not batch.output_file_id:
            self._state.add({"event": "collected", "mark": mark, "keys": wanted})
            details = batch.errors.data if batch.errors else None
            why = "; ".join(e.message or e.code or "" for e in details or []) or "no reason given"
            raise EngineError(f"{self.model}: the server refused batch {batch_id}: {why[:300]}")
        for file_id in (batch.output_file_id, batch.error_file_id):
            if not file_id:
                continue
            for text in self._client.files.content(file_id).content.split(b"\n"):
                key, completion, error = self._read(text, missing)
                if completion is not None:
                    del missing[key]
                    self._settle(key, completion)
                    yield completion
                elif error:
                    errors[key] = error
        self._state.add({"event": "collected", "mark": mark, "keys": wanted})
        for key in self._state.keys[mark]:
            self._settle(key, None)

    def _settle(self, key: str, completion: Completion | None) -> None:
        reserved = self._reserved.pop(key, None)
        if reserved is not None:
            self._budget.settle(reserved, completion)
        elif completion is not None:  # of a batch that an earlier process sent
            self._budget.spend(completion)

    def _find(self, mark: str) -> str | None:
        """The id of a batch that was sent, but not noted before a crash."""
        for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get(MARK) == mark:
                self._state.add({"event": "created", "mark": mark, "id": batch.id})
                return batch.id
        return None

    def _wait(self, batch_id: str) -> object:
        pause, longest = self._poll_seconds
        import openai

        while True:
            try:
                batch = self._client.batches.retrieve(batch_id)
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                time.sleep(longest)  # the batch goes on without us
                continue
            counts = batch.request_counts
            done = f" {counts.completed}/{counts.total}" if counts else ""
            self._status = f"{batch.status}{done}"
            if batch.status in ENDED:
                return batch
            time.sleep(pause)
            pause = min(longest, 1.5 * pause)

    def _read(
        self, line: bytes, missing: dict[str, Request]
    ) -> tuple[str, Completion | None, str | None]:
        """One line of an output or error file: (key, its completion, or why there is none)."""
        try:
            row = json.loads(line)
            key = row["custom_id"]
        except (ValueError, KeyError, TypeError):
            return "", None, None  # damaged: its request stays missing
        request = missing.get(key)
        if request is None:
            return key, None, None
        try:
            response = row.get("response") or {}
            if response.get("status_code") != 200:
                detail = row.get("error") or (response.get("body") or {}).get("error") or {}
                return key, None, str(detail.get("message") or response.get("status_code"))
            body = response["body"]
            return key, completion_of(body, request, self.name, self.model, is_batch=True), None
        except (KeyError, IndexError, TypeError, AttributeError):
            return key, None, "an unreadable answer"


class _State:
    """What was prepared, created and collected: appended and synced, read on opening."""

    def __init__(self, path: Path):
        self._path = path
        self.keys: dict[str, list[str]] = {}
        self.ids: dict[str, str] = {}
        self._collected: dict[str, set[str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # torn by a crash while it was written
            os.truncate(path, len(whole))
        for line in whole.decode().splitlines():
            self._note(json.loads(line))

    def open_marks(self, keys: set[str]) -> list[str]:
        """Batches from which some of these requests were not yet collected, oldest first."""
        done = self._collected
        return [m for m, own in self.keys.items() if keys & (set(own) - done.get(m, set()))]

    def times_sent(self, keys: set[str]) -> int:
        """How many batches have held any of these requests."""
        return sum(bool(keys & set(own)) for own in self.keys.values())

    def add(self, event: dict) -> None:
        """Note an event once the disk has it."""
        with self._path.open("a", encoding="utf8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._note(event)

    def _note(self, event: dict) -> None:
        if event["event"] == "prepared":
            self.keys[event["mark"]] = event["keys"]
        elif event["event"] == "created":
            self.ids[event["mark"]] = event["id"]
        else:
            self._collected.setdefault(event["mark"], set()).update(event["keys"])


def _line(key: str, request: Request, model: str) -> str:
    body = chat_body(request, model)
    row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _chunks(missing: dict[str, Request], model: str) -> Iterator[dict[str, Request]]:
    """Cut requests into batches within the API's limits."""
    chunk: dict[str, Request] = {}
    size = 0
    for key, request in list(missing.items()):
        n_bytes = len(_line(key, request, model).encode())
        if chunk and (len(chunk) >= REQUESTS_MAX or size + n_bytes > BYTES_MAX):
            yield chunk
            chunk, size = {}, 0
        chunk[key] = request
        size += n_bytes
    if chunk:
        yield chunk
