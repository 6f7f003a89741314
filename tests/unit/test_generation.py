import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from speed_utils.engines import Completion, Request
from speed_utils.generation import answer_tokens, field_words, generate
from speed_utils.records import Prompted
from speed_utils.store import Store


class CountingEngine:
    """Answers with the request's id and remembers what it was asked."""

    name = "counting"

    def __init__(self, *, atomic_batches=False, fail_after=None):
        self.atomic_batches, self.fail_after, self.asked = atomic_batches, fail_after, []

    def batches(self, requests):
        return [list(requests[i : i + 3]) for i in range(0, len(requests), 3)]

    def complete(self, batch):
        for request in batch:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(request.id)
            yield Completion(request.key(self.name), request.id, f"text {request.id}", "stop", 3, 2)

    def progress(self, n_done, n_total):
        return ""

    def close(self):
        pass


REQUESTS = [
    Request(id=f"r{i}", messages=({"role": "user", "content": "hello"},), max_tokens=5, seed=i)
    for i in range(8)
]


def test_answers_come_in_order_and_are_asked_once(tmp_path):
    engine = CountingEngine()
    first = generate(REQUESTS, engine, tmp_path / "s.jsonl")
    again = generate(REQUESTS, engine, tmp_path / "s.jsonl")
    assert [c.id for c in first] == [r.id for r in REQUESTS]
    assert engine.asked == [r.id for r in REQUESTS]
    assert [c.text for c in again] == [c.text for c in first]
    assert not any(c.cached for c in first) and all(c.cached for c in again)


def test_an_interruption_keeps_what_was_answered(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(REQUESTS, CountingEngine(fail_after=5), tmp_path / "s.jsonl")
    engine = CountingEngine()
    completions = generate(REQUESTS, engine, tmp_path / "s.jsonl")
    assert engine.asked == ["r5", "r6", "r7"]
    assert len(completions) == 8


def test_a_batch_whose_answers_depend_on_each_other_is_redone_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(REQUESTS, CountingEngine(atomic_batches=True, fail_after=5), tmp_path / "s.jsonl")
    engine = CountingEngine(atomic_batches=True)
    generate(REQUESTS, engine, tmp_path / "s.jsonl")
    assert engine.asked == ["r3", "r4", "r5", "r6", "r7"]


def test_only_changed_requests_are_asked_again(tmp_path):
    generate(REQUESTS, CountingEngine(), tmp_path / "s.jsonl")
    changed = [*REQUESTS[:6], replace(REQUESTS[6], temperature=0.5), replace(REQUESTS[7], seed=99)]
    engine = CountingEngine()
    generate(changed, engine, tmp_path / "s.jsonl")
    assert engine.asked == ["r6", "r7"]


@pytest.mark.parametrize("cut", range(1, 200, 17))
def test_a_store_cut_at_any_byte_opens_with_its_whole_lines(tmp_path, cut):
    path = tmp_path / "s.jsonl"
    generate(REQUESTS, CountingEngine(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    n_whole = whole[:-cut].count(b"\n")
    assert len(Store(path)) == n_whole
    completions = generate(REQUESTS, CountingEngine(), path)
    assert [c.text for c in completions] == [f"text r{i}" for i in range(8)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_identical_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="identical"):
        generate([REQUESTS[0], REQUESTS[0]], CountingEngine(), tmp_path / "s.jsonl")


def test_kill_9_while_writing_loses_nothing_that_was_answered(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        sys.path.insert(0, "tests/unit")
        from test_generation import CountingEngine, REQUESTS
        from speed_utils.generation import generate

        class Slow(CountingEngine):
            def complete(self, batch):
                for completion in super().complete(batch):
                    time.sleep(0.05)
                    yield completion
                    print(completion.id, flush=True)

        generate(REQUESTS, Slow(), sys.argv[1])
        """
    )
    path = tmp_path / "s.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    seen = [process.stdout.readline().strip() for _ in range(3)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    engine = CountingEngine()
    generate(REQUESTS, engine, path)
    assert seen == ["r0", "r1", "r2"]
    assert not set(seen) & set(engine.asked)


def test_the_token_limit_follows_the_length_slots():
    def limit(kind, **slots):
        return answer_tokens(Prompted(id="x", kind=kind, topic="t", task="x", slots=slots))

    assert limit("retrieval", num_words=300) > 300 * 2 * 1.5
    assert limit("classification", num_words="less than 10") < limit(
        "classification", num_words="at least 100"
    )
    assert field_words(
        Prompted(id="x", kind="retrieval", topic="t", task="x", slots={"num_words": 300})
    ) == {"user_query": 20, "positive_document": 450, "hard_negative_document": 450}
    short = Prompted(
        id="x", kind="classification", topic="t", task="x", slots={"num_words": "less than 10"}
    )
    assert field_words(short)["input_text"] == 20
    assert limit("matching_short") < limit("sts", unit="sentence")
