"""How many requests are in flight at a server that says "too many": as TCP does it.

Each success adds a little, each refusal halves; after Retry-After nobody asks until the time is up.
When nothing but failures comes back, a circuit breaker stops instead of waiting for hours.

    async with pace.turn():
        answer = await ask()
    pace.succeeded()        # or pace.refused(retry_after), pace.failed("500")

Paper: not stated; additive increase, multiplicative decrease is Chiu and Jain (1989).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CONCURRENCY_START = 8
CONCURRENCY_MAX = 128
FAILURES_IN_A_ROW_MAX = 12  # waves of failures without one success in between
REFUSALS_PER_FAILURE = 50  # a busy server is given more patience
BACKOFF_SECONDS = 0.5  # doubled at each try, and drawn evenly from zero to that
BACKOFF_SECONDS_MAX = 30.0
RETRY_AFTER_SECONDS_MAX = 120.0  # a server that asks for more is waited for this long, then asked


class BrokenCircuitError(RuntimeError):
    """Failures only: the server, the address or the key is at fault, and waiting does not help."""


@dataclass
class Pace:
    """Shared by all requests to one server.

    Attributes:
        limit: requests that may be in flight now; its whole part counts.
        trace: (seconds since the start, limit) at each change, for a plot.
    """

    limit: float = CONCURRENCY_START
    limit_max: float = CONCURRENCY_MAX
    failures_max: int = FAILURES_IN_A_ROW_MAX
    trace: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._why = ""
        self._open_at = self._last_cut = self._last_failure = self._started = time.monotonic()
        self.open_loop()
        self._note()

    def open_loop(self) -> None:
        """Begin with a new event loop: nothing is in flight there."""
        self._in_flight = self._failures = self._refusals = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for a place; gives the time at which the request began.

        Raises:
            BrokenCircuitError: too many failures in a row.
        """
        while True:
            self._raise_if_broken()
            wait = self._open_at - time.monotonic()
            if wait <= 0 and self._in_flight < int(self.limit):
                break
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), wait if wait > 0 else None)
            except TimeoutError:
                continue
        self._in_flight += 1
        try:
            yield time.monotonic()
        finally:
            self._in_flight -= 1
            self._changed.set()

    def succeeded(self) -> None:
        """One more may be in flight after about as many successes as are in flight now."""
        self._failures = self._refusals = 0
        self._set(min(self.limit_max, self.limit + 1 / self.limit))

    def refused(self, began: float, retry_after: float | None, why: str) -> None:
        """Halve, once for all requests that were under way at that time; then wait if asked to."""
        self._refusals += 1
        self._why = why
        if began >= self._last_cut:
            self._last_cut = time.monotonic()
            self._set(max(1.0, self.limit / 2))
        if retry_after is not None:
            until = time.monotonic() + min(retry_after, RETRY_AFTER_SECONDS_MAX)
            self._open_at = max(self._open_at, until)
        self._changed.set()

    def failed(self, began: float, why: str) -> None:
        """Count a failure of the server, once for all requests that were under way at that time."""
        if began >= self._last_failure:
            self._last_failure = time.monotonic()
            self._failures += 1
        self._why = why
        self._changed.set()

    def end_wait(self) -> None:
        """Forget a Retry-After: whoever waited for it has other reasons to go on, or none."""
        self._open_at = time.monotonic()
        self._changed.set()

    def _raise_if_broken(self) -> None:
        n_bad = max(self._failures, self._refusals // REFUSALS_PER_FAILURE)
        if n_bad >= self.failures_max:
            raise BrokenCircuitError(
                f"nothing but failures ({self._failures} in a row, and {self._refusals} times "
                f"busy), the last: {self._why}; see whether the server runs, and run the same "
                "command again (all answers so far are kept)"
            )

    def _set(self, limit: float) -> None:
        self.limit = limit
        self._note()
        self._changed.set()

    def _note(self) -> None:
        if not self.trace or self.trace[-1][1] != self.limit:
            self.trace.append((time.monotonic() - self._started, self.limit))


def backoff_seconds(n_tries: int, rng: random.Random) -> float:
    """How long to wait before the next try: full jitter under an exponential bound."""
    return rng.uniform(0, min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS * 2 ** (n_tries - 1)))
