"""2,000 requests to a server of which 30 % fail: is anything lost, paid twice or counted wrongly?

python tests/benchmarks/teacher_faults.py [--requests 2000] [--plot concurrency.png]

Prints one JSON object: requests, records, rejections, sent_twice, ledger_equals_server, and the
concurrency at its start, lowest and end.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT_DIR), str(ROOT_DIR / "tests")]

from fake_openai import FAULTS, FakeOpenAI  # noqa: E402

from speed_utils import pacing  # noqa: E402
from speed_utils.engine_openai import OpenAIEngine  # noqa: E402
from speed_utils.generation import generate  # noqa: E402
from speed_utils.ledger import ledger  # noqa: E402
from speed_utils.records import KINDS, Example, Prompted, record_id  # noqa: E402
from speed_utils.synthesis import read_examples  # noqa: E402
from speed_utils.teacher import seed_requests  # noqa: E402

BUSY_SECONDS = (4.0, 8.0)  # in this time the server takes few requests at once
CAPACITY, CAPACITY_BUSY = 48, 6


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--faults", type=float, default=0.3, help="share of requests that fail")
    parser.add_argument("--plot", type=Path, help="where to draw the concurrency over time")
    options = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "sk-benchmark"
    pacing.BACKOFF_SECONDS = 0.05  # the server recovers at once; a real one would not
    server = FakeOpenAI(
        faults=dict.fromkeys(FAULTS, options.faults / len(FAULTS)),
        capacity=lambda s: CAPACITY_BUSY if BUSY_SECONDS[0] < s < BUSY_SECONDS[1] else CAPACITY,
        latency=0.05,
        slow_seconds=1.5,
    )
    prompts = [
        Prompted(
            id=record_id("fault", i),
            kind=KINDS[i % len(KINDS)],
            topic=f"Topic/{i}",
            task=f"task {i}",
            slots={"unit": "sentence", "high_score": 5, "low_score": 2, "language": "English",
                   "num_words": 50, "clarity": "clear", "query_type": "common",
                   "query_length": "5 to 15 words", "difficulty": None, "order": i},
        )
        for i in range(options.requests)
    ]  # fmt: skip
    engine = OpenAIEngine(model="m", base_url=server.url, timeout=1.0)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answers = generate(seed_requests(prompts), engine, Path(folder) / "answers.jsonl")
        seconds = time.monotonic() - started
        records, rejections = read_examples(prompts, answers, "teacher", "faults")
    counted = ledger(answers)
    assert all(isinstance(record, Example) for record in records)
    limits = [limit for _, limit in engine.pace.trace]
    lowest = min(range(len(limits)), key=limits.__getitem__)
    result = {
        "requests": len(prompts),
        "records": len(records),
        "rejections": len(rejections),
        "rejections_by_reason": _counts(r.reason.split(":")[0] for r in rejections),
        "sent": sum(server.tries.values()),
        "sent_twice": server.asked_after_good,
        "ledger_equals_server": (
            counted["calls"] == server.calls
            and counted["prompt_tokens"] == server.tokens["prompt"]
            and counted["completion_tokens"] == server.tokens["completion"]
        ),
        "peak_in_flight": server.peak,
        "concurrency_highest": round(max(limits), 1),
        "concurrency_lowest": round(limits[lowest], 1),
        "concurrency_highest_after": round(max(limits[lowest:]), 1),
        "seconds": round(seconds, 1),
    }
    if options.plot:
        _plot(engine.pace.trace, options.plot)
    server.close()
    print(json.dumps(result))


def _counts(reasons: object) -> dict[str, int]:
    found: dict[str, int] = {}
    for reason in reasons:
        found[reason] = found.get(reason, 0) + 1
    return found


def _plot(trace: list[tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.step(*zip(*trace, strict=True), where="post")
    axes.axvspan(*BUSY_SECONDS, alpha=0.15, color="tab:red", label=f"takes {CAPACITY_BUSY} at once")
    axes.set(xlabel="seconds", ylabel="requests that may be in flight", title="Concurrency")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
