"""Any OpenAI-compatible server as an engine: the live teacher, or generators behind `vllm serve`.

The key comes from the environment variable OPENAI_API_KEY alone and is never written anywhere.
Retries, time-outs and Retry-After are those of the openai client.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from speed_utils.engines import Completion, EngineError, Request

CONCURRENCY = 16  # requests in flight
TIMEOUT_SECONDS = 120.0
MAX_RETRIES = 6  # by the client, with growing delays, on 408, 409, 429, 5xx and broken connections


class OpenAIEngine:
    """Engine over the chat completions of an OpenAI-compatible server."""

    atomic_batches = False

    def __init__(self, *, model: str, base_url: str = ""):
        if not model:
            raise EngineError("an openai engine needs a model name, as teacher_model=gpt-4o")
        key = os.environ.get("OPENAI_API_KEY")
        is_local = urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
        if not key and not is_local:
            raise EngineError("set OPENAI_API_KEY in the environment to use a live teacher")
        self._key, self._model, self._base_url = key or "none", model, base_url or None
        self.name = f"openai|{base_url}|{model}"
        self._schema_refused = False

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Slices of a few rounds of concurrent calls."""
        size = CONCURRENCY * 4
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Ask concurrently; each answer comes back as soon as it is there.

        Raises:
            EngineError: the server refuses or cannot be reached; answers so far were yielded.
        """
        loop = asyncio.new_event_loop()
        stream = self._stream(batch)
        try:
            while True:
                try:
                    yield _run(loop, stream.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            _run(loop, stream.aclose())
            loop.close()

    def close(self) -> None:
        """Nothing to free."""

    async def _stream(self, batch: Sequence[Request]):
        import openai

        gate = asyncio.Semaphore(CONCURRENCY)
        async with openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self._base_url,
            timeout=TIMEOUT_SECONDS,
            max_retries=MAX_RETRIES,
        ) as client:
            waiting = [asyncio.ensure_future(self._ask(client, gate, r)) for r in batch]
            failure = None
            try:
                for finished in asyncio.as_completed(waiting):
                    try:
                        yield await finished
                    except openai.OpenAIError as error:
                        failure = failure or error  # the others go on: what is paid is kept
            finally:
                for task in waiting:
                    task.cancel()
            if failure is not None:
                text = str(failure).replace(self._key, "***")
                raise EngineError(
                    f"{self._model}: {type(failure).__name__}: {text[:300]}"
                ) from None

    async def _ask(self, client, gate, request: Request) -> Completion:
        import openai

        arguments = {
            "model": self._model,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        schema = request.schema if not self._schema_refused else None
        async with gate:
            try:
                answer = await client.chat.completions.create(
                    **arguments, **_response_format(schema)
                )
            except openai.BadRequestError as error:
                if schema is None or "response_format" not in str(error):
                    raise
                self._schema_refused = True  # an older server: the prompt alone names the keys
                answer = await client.chat.completions.create(**arguments)
        choice, usage = answer.choices[0], answer.usage
        return Completion(
            key=request.key(self.name),
            id=request.id,
            text=choice.message.content or "",
            finish_reason=choice.finish_reason or "stop",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )


def _response_format(schema: dict | None) -> dict:
    if schema is None:
        return {}
    json_schema = {"name": "answer", "schema": schema, "strict": False}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def _run(loop: asyncio.AbstractEventLoop, coroutine):
    """Run to completion; in Jupyter a loop already runs in this thread, so use another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return loop.run_until_complete(coroutine)
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(loop.run_until_complete, coroutine).result()
