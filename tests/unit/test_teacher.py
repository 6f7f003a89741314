"""The live teacher against a real HTTP server on loopback, the recorded one against its files."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from speed_utils.engines import Completion, EngineError, Request
from speed_utils.generation import generate
from speed_utils.prompts import answer_schema
from speed_utils.records import KINDS, Task
from speed_utils.teacher import (
    RecordedTeacher,
    kind_counts,
    ledger,
    open_teacher,
    recorded_topics,
    sample_prompts,
    seed_prompts,
    seed_requests,
    sts_task,
)

CANARY = "sk-canary-7d1f"


class FakeServer:
    """An OpenAI-compatible server that fails as told and counts what it answered."""

    def __init__(self):
        self.failures, self.answered, self.keys = {}, [], set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.add(self.headers["Authorization"])
                content = body["messages"][-1]["content"]
                status, limit = outer.failures.get(content, (200, 0))
                if limit > 0:
                    outer.failures[content] = (status, limit - 1)
                    message = "response_format is not supported" if status == 400 else "busy"
                    return self.reply(status, {"error": {"message": f"{message} {CANARY}"}})
                outer.answered.append(content)
                answer = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [
                        {
                            "index": 0,
                            "finish_reason": "stop",
                            "message": {"role": "assistant", "content": f"re: {content}"},
                        }
                    ],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
                }
                return self.reply(200, answer)

            def reply(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    fake = FakeServer()
    yield fake
    fake.http.shutdown()


def requests_for(n):
    return [
        Request(
            id=f"r{i}",
            messages=({"role": "user", "content": f"question {i}"},),
            max_tokens=9,
            schema=answer_schema("sts"),
        )
        for i in range(n)
    ]


def test_a_live_teacher_answers_in_order_and_is_paid_once(server, tmp_path):
    teacher = open_teacher(f"openai:big-model@{server.url}")
    answers = generate(requests_for(40), teacher, tmp_path / "s.jsonl")
    assert [a.text for a in answers] == [f"re: question {i}" for i in range(40)]
    generate(requests_for(40), teacher, tmp_path / "s.jsonl")
    assert sorted(server.answered) == sorted(f"question {i}" for i in range(40))
    assert server.keys == {f"Bearer {CANARY}"}
    assert CANARY not in (tmp_path / "s.jsonl").read_text()


def test_busy_answers_are_tried_again(server, tmp_path):
    server.failures = {"question 1": (429, 2), "question 2": (500, 1)}
    answers = generate(
        requests_for(4), open_teacher(f"openai:m@{server.url}"), tmp_path / "s.jsonl"
    )
    assert len(answers) == 4 and len(server.answered) == 4


def test_what_was_paid_is_kept_when_one_request_is_refused(server, tmp_path):
    server.failures = {"question 3": (403, 10**6)}
    teacher = open_teacher(f"openai:m@{server.url}")
    with pytest.raises(EngineError, match="PermissionDenied") as caught:
        generate(requests_for(6), teacher, tmp_path / "s.jsonl")
    assert CANARY not in str(caught.value)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 5
    server.failures = {}
    generate(requests_for(6), teacher, tmp_path / "s.jsonl")
    assert sorted(server.answered) == sorted(f"question {i}" for i in range(6))


def test_a_server_without_json_schema_is_asked_without_it(server, tmp_path):
    server.failures = {"question 0": (400, 1)}
    answers = generate(
        requests_for(1), open_teacher(f"openai:m@{server.url}"), tmp_path / "s.jsonl"
    )
    assert answers[0].text == "re: question 0"


def test_a_key_is_needed_and_its_absence_said(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EngineError, match="OPENAI_API_KEY"):
        open_teacher("openai:gpt-4o")
    for wrong in ("openai", "openai:", "recorder"):
        with pytest.raises(EngineError, match="unknown teacher"):
            open_teacher(wrong)


def test_the_ledger_counts_all_and_bills_what_was_not_cached():
    paid = Completion("k", "i", "t", "stop", 1000, 200)
    cached = Completion("k2", "i2", "t", "stop", 500, 100, cached=True)
    assert ledger([paid, cached], (5.0, 15.0)) == {
        "calls": 2,
        "cached": 1,
        "prompt_tokens": 1500,
        "completion_tokens": 300,
        "usd": 0.008,
    }
    assert ledger([paid], None)["usd"] is None
    assert ledger([cached], None)["usd"] == 0.0


def test_the_mixture_is_7_7_7_2():
    assert kind_counts(230) == {
        "classification": 70,
        "sts": 70,
        "retrieval": 70,
        "matching_short": 10,
        "matching_long": 10,
    }
    for n in (1, 7, 48, 151):
        assert sum(kind_counts(n).values()) == n


def test_sampled_prompts_use_tasks_evenly_and_differ():
    topics = [f"T{i}" for i in range(5)]
    tasks = [sts_task(topic) for topic in topics] + [
        Task(id=f"{kind}{topic}", topic=topic, kind=kind, text=f"{kind} of {topic}")
        for topic in topics
        for kind in KINDS
        if kind != "sts"
    ]
    prompts = sample_prompts(tasks, 92, seed=1, document_words_max=50)
    assert len({prompt.id for prompt in prompts}) == 92
    retrieval = [prompt.topic for prompt in prompts if prompt.kind == "retrieval"]
    assert max(map(retrieval.count, topics)) - min(map(retrieval.count, topics)) <= 1
    assert prompts == sample_prompts(tasks, 92, seed=1, document_words_max=50)


def test_the_recorded_teacher_answers_its_own_prompts_and_no_others(tmp_path):
    tasks = [sts_task(topic) for topic in sorted(recorded_topics())]
    prompts = seed_prompts(tasks, n_examples=46, seed=1, document_words_max=100, teacher="recorded")
    answers = generate(seed_requests(prompts), RecordedTeacher(), tmp_path / "s.jsonl")
    assert len(answers) == len(prompts) >= 44
    assert all(answer.cached for answer in answers)
    with pytest.raises(EngineError, match="no answer to request r0"):
        generate(requests_for(1), RecordedTeacher(), tmp_path / "s.jsonl")
