"""What a user of distilabel would run for the same tasks; started by generation.py.

Reads {"model", "tasks", "max_tokens"} from standard input, prints one JSON object: seconds, tokens,
answers, whole, valid.
"""

import json
import sys
import time

from distilabel.models.llms import TransformersLLM
from distilabel.steps.tasks import (
    GenerateLongTextMatchingData,
    GenerateShortTextMatchingData,
    GenerateTextClassificationData,
    GenerateTextRetrievalData,
)

TASKS = {
    "classification": GenerateTextClassificationData,
    "retrieval": GenerateTextRetrievalData,
    "matching_short": GenerateShortTextMatchingData,
    "matching_long": GenerateLongTextMatchingData,
}


def main() -> None:
    """Answer all tasks and print."""
    job = json.loads(sys.stdin.read())
    llm = TransformersLLM(
        model=job["model"],
        generation_kwargs={"max_new_tokens": job["max_tokens"], "temperature": 0.6},
    )
    by_kind: dict[str, list[dict]] = {}
    for row in job["tasks"]:
        by_kind.setdefault(row["kind"], []).append({"task": row["task"]})
    steps = {}
    for kind in by_kind:
        steps[kind] = TASKS[kind](llm=llm, seed=42)
        steps[kind].load()
    first = next(iter(by_kind))
    list(steps[first].process(by_kind[first][:1]))
    started = time.perf_counter()
    rows = [
        (kind, row)
        for kind, inputs in by_kind.items()
        for output in steps[kind].process(inputs)
        for row in output
    ]
    seconds = time.perf_counter() - started
    result = {
        "seconds": round(seconds, 2),
        "tokens": sum(_tokens(row) for _, row in rows),
        "answers": len(rows),
        "whole": len(rows),
        "valid": sum(_is_valid(steps[kind].keys, row) for kind, row in rows),
    }
    print(json.dumps(result))


def _is_valid(keys: list[str], row: dict) -> bool:
    return all(isinstance(row.get(key), str) and row[key].strip() for key in keys)


def _tokens(row: dict) -> int:
    statistics = row.get("distilabel_metadata", {})
    return sum(
        value["output_tokens"]
        for name, value in statistics.items()
        if name.startswith("statistics_")
    )


if __name__ == "__main__":
    main()
