"""What the teacher cost: calls, tokens and money of a run, beside Table 5.

    rows = stage_costs(records, load_price("gpt-4o-2024-05-13"))
    table = per_thousand(rows, n_examples=920)

Paper: Section 4.5, Table 5 (brainstorming is not counted there; here it has its own row).
"""

from __future__ import annotations

from collections.abc import Sequence

from speed_utils.ledger import Price

# Table 5 and Section 4.5: calls and tokens of the teacher.
PAPER_COSTS = (
    {"who": "E5_mistral", "calls": 500_000, "tokens": 180_000_000, "examples": 500_000},
    {"who": "SPEED", "calls": 45_000, "tokens": 32_000_000, "examples": 920_415},
)


def list_price(teacher: dict, price: Price | None) -> float | None:
    """What a stage's tokens cost at list price, paid or recorded; None when not known."""
    if price is None:
        return None
    return price.usd(teacher["prompt_tokens"], teacher["completion_tokens"])


def stage_costs(records: Sequence[dict], price: Price | None) -> list[dict]:
    """One row per stage that used the teacher: calls, cached, tokens, paid and list-price money."""
    rows = []
    for record in records:
        teacher = record["teacher"]
        if teacher["calls"] == 0:
            continue
        rows.append(
            {
                "stage": record["stage"],
                "calls": teacher["calls"],
                "cached": teacher["cached"],
                "tokens": teacher["prompt_tokens"] + teacher["completion_tokens"],
                "paid_usd": teacher["usd"],
                "list_price_usd": list_price(teacher, price),
            }
        )
    return rows


def per_thousand(rows: Sequence[dict], n_examples: int) -> list[dict]:
    """This run (without brainstorming, as the paper counts) and Table 5, per 1,000 final examples.

    Raises:
        ValueError: no examples.
    """
    if n_examples <= 0:
        raise ValueError("no final examples to divide the cost by; run 10_deduplicate first")
    counted = [row for row in rows if "brainstorm" not in row["stage"]]
    own = {
        "who": "this run",
        "calls": sum(row["calls"] for row in counted),
        "tokens": sum(row["tokens"] for row in counted),
        "examples": n_examples,
    }
    return [
        {
            **entry,
            "calls_per_1000": 1000 * entry["calls"] / entry["examples"],
            "tokens_per_1000": 1000 * entry["tokens"] / entry["examples"],
        }
        for entry in (*PAPER_COSTS, own)
    ]
