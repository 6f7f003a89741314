"""What the teacher's calls cost, and a budget that is never passed.

    stage.used_teacher(ledger(answers))

Paper: Section 4.5, Table 5.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from speed_utils.engines import Completion, Request
from speed_utils.settings import ROOT_DIR
from speed_utils.shards import current_shard
from speed_utils.store import read_completions

PRICES_PATH = ROOT_DIR / "data" / "prices.toml"
PRICES_VARIABLE = "SPEED_PRICES"  # a file of the same form whose entries come first
CHARS_PER_TOKEN_MIN = 2.5  # of English, never so few in practice


class PriceError(ValueError):
    """The price file is not readable, or a price is needed and not known."""


class BudgetError(RuntimeError):
    """The next call might pass the budget."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, and the date of the list they are from."""

    prompt: float
    completion: float
    cached_prompt: float
    batch_discount: float
    as_of: str

    def usd(
        self, prompt_tokens: float, completion_tokens: float, cached_prompt_tokens: float = 0
    ) -> float:
        """What so many tokens cost; cached prompt tokens are among the prompt tokens."""
        fresh = prompt_tokens - cached_prompt_tokens
        total = fresh * self.prompt + cached_prompt_tokens * self.cached_prompt
        return (total + completion_tokens * self.completion) / 1e6


def load_price(model: str, path: Path | None = None) -> Price | None:
    """The price of a model, or None when no list has it.

    Args:
        model: as the server names it.
        path: a price file; None for the user's ($SPEED_PRICES) and then the bundled one.

    Raises:
        PriceError: a file is not valid.
    """
    own = os.environ.get(PRICES_VARIABLE)
    paths = [path] if path else [*([Path(own)] if own else []), PRICES_PATH]
    for file in paths:
        try:
            entry = tomllib.loads(file.read_text(encoding="utf8")).get(model)
            if entry is not None:
                prompt = float(entry["prompt"])
                cached = float(entry.get("cached_prompt", prompt))
                discount = float(entry.get("batch_discount", 0.0))
                as_of = str(entry.get("as_of", "no date"))
                return Price(prompt, float(entry["completion"]), cached, discount, as_of)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise PriceError(f"{file} is not a valid price file: {error}") from None
    return None


def ledger(completions: Sequence[Completion]) -> dict:
    """Calls, tokens and money of a stage's teacher answers, by the prices of their models.

    Returns:
        calls, cached (of these, what cost nothing now: recorded, or answered before),
        prompt_tokens, cached_prompt_tokens, completion_tokens, reasoning_tokens (of all answers),
        usd (what was paid now; None when calls were made at an unknown price) and models (the same
        for each live model).
    """
    models = sorted({c.model for c in completions if c.model})
    total = _totals(completions)
    total["models"] = {
        name: _totals([c for c in completions if c.model == name]) for name in models
    }
    return total


def spent(store_paths: Iterable[Path]) -> tuple[int, float | None]:
    """The calls and dollars (None: a price is not known) that the answers of stores once cost.

    An answer that stands in two of them (a shard's, and the joined one) was paid once.
    """
    calls, usd = 0, 0.0
    seen: set[str] = set()
    for path in store_paths:
        for completion in read_completions(path):
            if completion.cached or completion.key in seen:
                continue
            seen.add(completion.key)
            calls += completion.calls
            cost = _usd(completion)
            usd = None if usd is None or cost is None else usd + cost
    return calls, usd


class Budget:
    """Calls and money that a run may still spend; each call reserves its worst case before it.

    Args:
        calls: most calls, None for no limit.
        usd: most money in dollars, None for no limit.
        price: of the model.
        spent_calls, spent_usd: what the run has paid before.

    Raises:
        PriceError: a limit in money, and no price.
    """

    def __init__(
        self,
        *,
        calls: int | None = None,
        usd: float | None = None,
        price: Price | None = None,
        spent_calls: int = 0,
        spent_usd: float = 0.0,
    ):
        if usd is not None and price is None:
            raise PriceError(
                "budget_usd needs the model's price: add it to a file named by "
                f"${PRICES_VARIABLE} (as {PRICES_PATH.name}), or use budget_calls"
            )
        self.calls_max, self.usd_max, self.price = calls, usd, price
        self.calls, self.usd = spent_calls, spent_usd
        self._reserved_calls, self._reserved_usd = 0, 0.0

    def reserve(self, request: Request) -> float:
        """Set the worst case of a call aside; returns it in dollars, for ``settle``.

        Raises:
            BudgetError: with it, the budget might be passed.
        """
        worst = self._worst_usd(request)
        calls = self.calls + self._reserved_calls + 1
        usd = self.usd + self._reserved_usd + worst
        if self.calls_max is not None and calls > self.calls_max:
            raise BudgetError(
                f"budget_calls {self.calls_max} is used up ({self.calls} calls answered); raise "
                "it and run the same command again (all answers so far are kept)"
            )
        if self.usd_max is not None and usd > self.usd_max:
            raise BudgetError(
                f"budget_usd {self.usd_max:g} might be passed by the next call (${self.usd:.4f} "
                "spent); raise it and run the same command again (all answers so far are kept)"
            )
        self._reserved_calls += 1
        self._reserved_usd += worst
        return worst

    @property
    def has_reservations(self) -> bool:
        """Whether calls are under way that may cost less than was set aside for them."""
        return self._reserved_calls > 0

    def settle(
        self, reserved_usd: float, completion: Completion | None, *, may_be_billed: bool = False
    ) -> None:
        """Replace a reservation by what the call cost; None when it was not answered.

        A call that may be billed although its answer never came counts with all that was reserved.
        """
        self._reserved_calls -= 1
        self._reserved_usd -= reserved_usd
        if completion is not None:
            self.spend(completion)
        elif may_be_billed:
            self.calls += 1
            self.usd += reserved_usd

    def spend(self, completion: Completion) -> None:
        """Count an answer that nothing was reserved for."""
        self.calls += completion.calls
        self.usd += _cost(completion, self.price) if self.price else 0.0

    def _worst_usd(self, request: Request) -> float:
        if self.price is None:
            return 0.0
        texts = [message["content"] for message in request.messages]
        n_chars = sum(len(text) + 20 for text in texts) + len(json.dumps(request.schema))
        n_bytes = sum(len(text.encode("utf8", "surrogatepass")) - len(text) for text in texts)
        most = n_chars / CHARS_PER_TOKEN_MIN + n_bytes  # other scripts: up to a token a byte
        return self.price.usd(most, request.max_tokens)


def run_budget(model: str, run_dir: Path | None) -> Budget:
    """What a run may still spend on a model, after all that its stages and shards have paid.

    The limits are the profile's teacher.budget_usd and teacher.budget_calls, which the runner notes
    in the run's manifest. Shards share evenly what was left when the stage had not begun.

    Raises:
        PriceError: a limit in dollars, and the price of the model (or of an earlier one) missing.
    """
    path = run_dir / "manifest.json" if run_dir is not None else None
    manifest = json.loads(path.read_text(encoding="utf8")) if path and path.is_file() else {}
    limits = manifest.get("budget", {})
    usd, calls = limits.get("budget_usd") or None, limits.get("budget_calls") or None
    if usd is None and calls is None:
        return Budget(price=load_price(model))
    stores = list(run_dir.glob("artifacts/**/answers.jsonl"))
    shard = current_shard()
    if shard is not None:
        together = [p for p in stores if p.parent.name.endswith(f"-of-{shard.count}")]
        before = [path for path in stores if path not in together]
        before_calls, before_usd = _spent(before, needs_usd=usd is not None)
        stores = [path for path in together if path.parent.name == shard.name]
        calls = None if calls is None else max(0, calls - before_calls) // shard.count
        usd = None if usd is None else max(0.0, usd - before_usd) / shard.count
    spent_calls, spent_usd = _spent(stores, needs_usd=usd is not None)
    price = load_price(model)
    return Budget(calls=calls, usd=usd, price=price, spent_calls=spent_calls, spent_usd=spent_usd)


def _spent(store_paths: Sequence[Path], *, needs_usd: bool) -> tuple[int, float]:
    calls, usd = spent(store_paths)
    if usd is None and needs_usd:
        raise PriceError("budget_usd needs prices, and the run paid a model that has none; add it")
    return calls, usd or 0.0


def _totals(completions: Sequence[Completion]) -> dict:
    costs = [_usd(c) for c in completions if c.calls and not c.cached]
    return {
        "calls": sum(c.calls for c in completions),
        "cached": sum(c.calls for c in completions if c.cached),
        "prompt_tokens": sum(c.prompt_tokens for c in completions),
        "cached_prompt_tokens": sum(c.cached_prompt_tokens for c in completions),
        "completion_tokens": sum(c.completion_tokens for c in completions),
        "reasoning_tokens": sum(c.reasoning_tokens for c in completions),
        "usd": None if None in costs else round(sum(costs), 6),
    }


def _usd(completion: Completion) -> float | None:
    price = _price(completion.model, os.environ.get(PRICES_VARIABLE))
    return None if price is None else _cost(completion, price)


def _cost(completion: Completion, price: Price) -> float:
    discount = price.batch_discount if completion.is_batch else 0.0
    return (1 - discount) * price.usd(
        completion.prompt_tokens, completion.completion_tokens, completion.cached_prompt_tokens
    )


@cache
def _price(model: str, _own_file: str | None) -> Price | None:
    return load_price(model)
