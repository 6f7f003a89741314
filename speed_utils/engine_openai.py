"""Any OpenAI-compatible server as an engine: the live teacher, or generators behind `vllm serve`.

The key comes from the environment variable OPENAI_API_KEY alone and is never written anywhere.
Every answered request is yielded once and stored before the next is waited for, so that nothing
that was paid for is lost; a request without an answer is a completion with finish_reason "error".

    engine = OpenAIEngine(model="gpt-4o-2024-08-06")
    for completion in engine.complete(requests): ...

Paper: Appendix B names the teacher (GPT-4o, May 2024) and its sampling; the rest is ours.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import queue
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from speed_utils.engines import Completion, EngineError, Request
from speed_utils.ledger import Budget, BudgetError
from speed_utils.pacing import Pace, backoff_seconds
from speed_utils.parsing import ParseError, parse_object

TIMEOUT_SECONDS = 120.0
TRIES_MAX = 8  # of one request, before it ends as an error
RETRIED_STATUS = (408, 409, 429)  # and 5xx, broken connections, time-outs
BUSY_STATUS = (429, 503)
FATAL_STATUS = (401, 403, 404)  # a wrong key, no right, no such model: nothing else will work
FATAL_CODES = ("insufficient_quota", "billing_hard_limit_reached")  # come as a 429
NO_KEY = "none"  # a server on this machine needs none, but the client wants a text
QUEUE_ROUNDS = 4  # a batch is this many times the most requests in flight
FEEDBACK = "That is not a valid answer: {error}. Answer again, with the JSON object only."


class OpenAIEngine:
    """Engine over the chat completions of an OpenAI-compatible server.

    Args:
        model: as the server names it.
        base_url: of the server's API, with /v1; empty for OpenAI's own.
        name: what answers are stored under; empty for address and model.
        budget: calls and money that may still be spent; None for no limit.
        pace: concurrency; None for the default.
        timeout: seconds for one call.

    Raises:
        EngineError: no model, or no key in the environment for a server elsewhere.
    """

    atomic_batches = False

    def __init__(
        self,
        *,
        model: str,
        base_url: str = "",
        name: str = "",
        budget: Budget | None = None,
        pace: Pace | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ):
        if not model:
            raise EngineError("an openai engine needs a model name, as openai:gpt-4o")
        self.key = api_key(base_url)
        self.model, self.base_url = model, base_url or None
        self.name = name or f"openai|{base_url}|{model}"
        self.pace = pace or Pace()
        self._budget = budget or Budget()
        self._usd_before = self._budget.usd
        self._timeout = timeout
        self.is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None  # while requests are under way
        self._forms = ["json_schema", "json_object", "none"]  # of the answer; the first is tried
        self._renamed: dict[str, str | None] = {}  # parameters that the server wants otherwise

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Slices of a few rounds of concurrent calls."""
        size = int(self.pace.limit_max) * QUEUE_ROUNDS
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Ask concurrently; each answer comes back as soon as it is there.

        Raises:
            EngineError: the server refuses, cannot be reached, or the budget is used up. What is
                under way then is waited for and yielded first.
        """
        # The loop runs in a thread of its own, so that it works in Jupyter (whose thread has a
        # running loop) and so that answers go on arriving while the last one is written to disk.
        answers: queue.SimpleQueue = queue.SimpleQueue()
        loop = self._loop = asyncio.new_event_loop()
        task = loop.create_task(self._ask_all(batch, answers))
        thread = threading.Thread(target=_run_loop, args=(loop, task, answers), daemon=True)
        thread.start()
        try:
            while (answer := answers.get()) is not None:
                yield answer
        except BaseException:  # the caller gave up
            loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            thread.join()
            self._loop = None
            loop.close()
        failure = task.exception()
        if failure is not None:
            raise EngineError(f"{self.model}: {hide_key(str(failure), self.key)}") from None

    def stop(self) -> None:
        """Start no further request; what is under way is still waited for, and yielded."""
        self.is_stopped = True
        if self._loop is not None:  # what waits for its turn must see it now
            self._loop.call_soon_threadsafe(self.pace.end_wait)

    def close(self) -> None:
        """Nothing to free."""

    def progress(self, n_done: int, n_total: int) -> str:
        """What has been spent, and a forecast for all of the requests: for a progress bar."""
        if self._budget.price is None or not n_done:
            return ""
        spent = self._budget.usd - self._usd_before
        return f"${spent:.4f} of about ${spent * n_total / n_done:.4f}"

    async def _ask_all(self, batch: Sequence[Request], answers: queue.SimpleQueue) -> None:
        import openai

        self.pace.open_loop()
        async with openai.AsyncOpenAI(
            api_key=self.key, base_url=self.base_url, timeout=self._timeout, max_retries=0
        ) as client:
            waiting = iter(batch)
            running: set[asyncio.Task] = set()
            failure: Exception | None = None
            try:
                while True:
                    # Start what there is room for, then wait for the first to end.
                    room = range(int(self.pace.limit_max) - len(running))
                    for _ in room if failure is None and not self.is_stopped else ():
                        request = next(waiting, None)
                        if request is None:
                            break
                        running.add(asyncio.create_task(self._answer(client, request)))
                    if not running:
                        break
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if task.exception() is None:
                            answers.put(task.result())
                        else:
                            failure = failure or task.exception()
            finally:
                for task in running:
                    task.cancel()
            if failure is not None:
                raise failure

    async def _answer(self, client: object, request: Request) -> Completion:
        """One request to its end: an answer, asked again once if invalid, or an error."""
        first = await self._try(client, request, list(request.messages))
        problem = _problem(request, first)
        if problem is None:
            return first
        talk = [
            *request.messages,
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": FEEDBACK.format(error=problem)},
        ]
        try:
            second = await self._try(client, request, talk)
        except Exception:
            return first  # paid for: keep it; the next request will meet the same obstacle
        return first if second.finish_reason == "error" else _sum(first, second)

    async def _try(self, client: object, request: Request, talk: list[dict]) -> Completion:
        import openai

        rng = random.Random(f"{request.id}|{request.seed}|{len(talk)}")
        why = "stopped before it was asked"
        for n_tries in range(1, TRIES_MAX + 1):
            completion, may_be_billed = None, False
            if self.is_stopped:
                break
            async with self.pace.turn() as began:
                if self.is_stopped:
                    break
                reserved = await self._reserve(replace(request, messages=tuple(talk)))
                try:
                    completion = await self._call(client, request, talk)
                    self.pace.succeeded()
                    return completion
                except openai.APIStatusError as error:
                    why = hide_key(f"{error.status_code} {error.message}", self.key)
                    if error.status_code in FATAL_STATUS or error.code in FATAL_CODES:
                        raise _FatalError(f"{type(error).__name__}: {why[:300]}") from None
                    if error.status_code in BUSY_STATUS:
                        self.pace.refused(began, _retry_after(error.response.headers), why[:200])
                    elif error.status_code in RETRIED_STATUS or error.status_code >= 500:
                        self.pace.failed(began, why[:200])
                    if error.status_code not in RETRIED_STATUS and error.status_code < 500:
                        break
                except (openai.APIConnectionError, TimeoutError) as error:
                    may_be_billed = isinstance(error, openai.APITimeoutError | TimeoutError)
                    why = f"{type(error).__name__}: {error.__cause__ or error}"
                    why = hide_key(why, self.key)
                    self.pace.failed(began, why[:200])
                except (
                    *(openai.APIResponseValidationError, ValueError, AttributeError),
                    *(TypeError, KeyError, IndexError),
                ) as error:  # a body that is not the JSON of an answer, as a gateway's own page
                    why = hide_key(f"unreadable body: {error}", self.key)
                    self.pace.failed(began, why[:200])
                finally:
                    self._budget.settle(reserved, completion, may_be_billed=may_be_billed)
            if n_tries < TRIES_MAX:
                await asyncio.sleep(backoff_seconds(n_tries, rng))
        text = f"no answer after {n_tries} tries: {why[:200]}"
        return Completion(request.key(self.name), request.id, text, "error", 0, 0, calls=0)

    async def _call(self, client: object, request: Request, talk: list[dict]) -> Completion:
        import openai

        while True:
            form = self._forms[0] if request.schema is not None else "none"
            arguments = {"model": self.model, "messages": talk, **self._sampling(request)}
            try:
                async with asyncio.timeout(self._timeout):  # the client's own is for each read
                    answer = await client.chat.completions.create(
                        **arguments, **_response_format(request.schema, form)
                    )
                break
            except openai.BadRequestError as error:
                if not self._learn(error.message, form, arguments):
                    raise
        return completion_of(answer.model_dump(warnings=False), request, self.name, self.model)

    async def _reserve(self, request: Request) -> float:
        """Set money aside; wait while calls under way may still give some back."""
        while True:
            try:
                return self._budget.reserve(request)
            except BudgetError:
                if not self._budget.has_reservations:
                    raise
                await asyncio.sleep(0.05)

    def _sampling(self, request: Request) -> dict:
        wanted = sampling(request)
        named = {self._renamed.get(name, name): value for name, value in wanted.items()}
        return {name: value for name, value in named.items() if name is not None}

    def _learn(self, message: str, form: str, arguments: dict) -> bool:
        """Adapt to what a server says it cannot do; whether asking again makes sense."""
        if form != "none" and ("response_format" in message or "json_schema" in message):
            if self._forms[0] == form:  # another request may have learnt it meanwhile
                self._forms.pop(0)
            return True
        for name in ("max_tokens", "temperature", "top_p", "seed"):
            if name in arguments and f"'{name}'" in message and "nsupported" in message:
                self._renamed[name] = "max_completion_tokens" if name == "max_tokens" else None
                return True
        return False


class _FatalError(RuntimeError):
    """The server says no to everything."""


def api_key(base_url: str) -> str:
    """The key from the environment; a server on this machine may do without.

    Raises:
        EngineError: none is set.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    is_local = urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
    if not key and not is_local:
        raise EngineError("set OPENAI_API_KEY in the environment to use a live teacher")
    return key or NO_KEY


def hide_key(text: str, key: str) -> str:
    """A server's message without the key, which servers like to quote, whole or in part."""
    hidden = text.replace(key, "***") if key != NO_KEY else text
    return re.sub(r"sk-[\w*-]{4,}", "***", hidden)


def sampling(request: Request) -> dict:
    """A request's sampling, under the names of the chat completions API."""
    names = ("max_tokens", "temperature", "top_p", "seed")
    return {name: getattr(request, name) for name in names}


def chat_body(request: Request, model: str) -> dict:
    """A request as the body of a chat completion call."""
    return {
        "model": model,
        "messages": list(request.messages),
        **sampling(request),
        **_response_format(request.schema, "json_schema"),
    }


def completion_of(
    body: dict, request: Request, engine_name: str, model: str, *, is_batch: bool = False
) -> Completion:
    """The body of a chat completion's answer as a completion.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: it is no such body.
    """
    choice, usage = body["choices"][0], body.get("usage") or {}
    prompt_details = usage.get("prompt_tokens_details") or {}
    answer_details = usage.get("completion_tokens_details") or {}
    return Completion(
        key=request.key(engine_name),
        id=request.id,
        text=choice["message"]["content"] or "",
        finish_reason=choice.get("finish_reason") or "stop",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        model=model,
        cached_prompt_tokens=prompt_details.get("cached_tokens") or 0,
        reasoning_tokens=answer_details.get("reasoning_tokens") or 0,
        is_batch=is_batch,
    )


def _response_format(schema: dict | None, form: str) -> dict:
    if schema is None or form == "none":
        return {}
    if form == "json_object":
        return {"response_format": {"type": "json_object"}}
    json_schema = {"name": "answer", "schema": schema, "strict": False}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def _problem(request: Request, completion: Completion) -> str | None:
    """What is wrong with the form of an answer, or None; one that was cut is not asked again."""
    if request.schema is None or completion.finish_reason != "stop":
        return None
    try:
        parse_object(completion.text, tuple(request.schema["properties"]))
    except ParseError as error:
        return str(error)
    return None


def _sum(first: Completion, second: Completion) -> Completion:
    counted = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "reasoning_tokens")
    totals = {name: getattr(first, name) + getattr(second, name) for name in (*counted, "calls")}
    return replace(second, **totals)


def _retry_after(headers: object) -> float | None:
    """Seconds of a Retry-After header (a number or a date), or None."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _run_loop(loop, task, answers: queue.SimpleQueue) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        answers.put(None)
