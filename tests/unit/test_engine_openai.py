"""The live teacher against a real HTTP server on loopback."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI

from speed_utils.engine_openai import OpenAIEngine
from speed_utils.engines import EngineError, Request
from speed_utils.generation import generate
from speed_utils.ledger import Budget, Price, ledger, run_budget, spent
from speed_utils.pacing import Pace
from speed_utils.prompts import answer_schema
from speed_utils.store import Store

CANARY = "sk-canary-7d1f"
PRICE = Price(prompt=1.0, completion=2.0, cached_prompt=0.5, batch_discount=0.5, as_of="2026-01-01")


def requests_for(n, schema=None):
    return [
        Request(
            id=f"r{i}",
            messages=({"role": "user", "content": f"question {i}"},),
            max_tokens=9,
            seed=i,
            schema=schema,
        )
        for i in range(n)
    ]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setattr("speed_utils.pacing.BACKOFF_SECONDS", 0.01)
    servers = []

    def start(**settings):
        servers.append(FakeOpenAI(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def engine_for(server, **settings):
    return OpenAIEngine(model="big-model", base_url=server.url, **settings)


def test_answers_come_in_order_and_are_paid_once(serve, tmp_path):
    server = serve()
    answers = generate(requests_for(40), engine_for(server), tmp_path / "s.jsonl")
    assert [a.text for a in answers] == [f"re: question {i}" for i in range(40)]
    generate(requests_for(40), engine_for(server), tmp_path / "s.jsonl")
    assert server.calls == 40 and server.asked_after_good == 0
    assert server.keys == {f"Bearer {CANARY}"}
    assert CANARY not in (tmp_path / "s.jsonl").read_text()


@pytest.mark.parametrize(
    "fault", ["429", "429 with Retry-After", "500", "408", "409", "dropped", "cut body", "timeout"]
)
def test_a_passing_fault_is_tried_again(serve, tmp_path, fault):
    server = serve(script={"question 1": [fault, fault]}, slow_seconds=0.6)
    answers = generate(requests_for(3), engine_for(server, timeout=0.3), tmp_path / "s.jsonl")
    assert [a.text for a in answers] == [f"re: question {i}" for i in range(3)]
    assert server.tries == {"question 0": 1, "question 1": 3, "question 2": 1}


def test_a_lasting_fault_ends_as_an_error_with_its_name_and_is_asked_again(serve, tmp_path):
    server = serve(script={"question 1": ["500"] * 100})
    answers = generate(requests_for(3), engine_for(server), tmp_path / "s.jsonl")
    assert [a.finish_reason for a in answers] == ["stop", "error", "stop"]
    assert "no answer after 8 tries: 500" in answers[1].text
    server.script = {}
    answers = generate(requests_for(3), engine_for(server), tmp_path / "s.jsonl")
    assert answers[1].text == "re: question 1"
    assert server.tries["question 0"] == 1


def test_one_refused_request_does_not_stop_the_others(serve, tmp_path):
    server = serve(script={"question 1": ["400 content policy"]})
    answers = generate(requests_for(3), engine_for(server), tmp_path / "s.jsonl")
    assert answers[1].finish_reason == "error" and "content policy" in answers[1].text
    assert server.tries["question 1"] == 1


def test_what_was_paid_is_kept_when_the_key_is_refused(serve, tmp_path):
    server = serve(script={"question 3": [f"403 no right for {CANARY}"] * 9})
    with pytest.raises(EngineError, match="PermissionDenied") as caught:
        generate(requests_for(6), engine_for(server), tmp_path / "s.jsonl")
    assert CANARY not in str(caught.value)
    n_paid = server.calls
    with Store(tmp_path / "s.jsonl") as store:
        assert len(store) == n_paid
    server.script = {}
    generate(requests_for(6), engine_for(server), tmp_path / "s.jsonl")
    assert server.calls == 6 and server.asked_after_good == 0


def test_a_dead_server_breaks_the_circuit_with_a_clear_message(serve, tmp_path):
    server = serve(faults={"500": 1.0})
    engine = engine_for(server, pace=Pace(failures_max=10))
    with pytest.raises(EngineError, match=r"nothing but failures .*run the same command again"):
        generate(requests_for(200), engine, tmp_path / "s.jsonl")
    assert sum(server.tries.values()) < 200


def test_a_server_without_json_schema_is_asked_for_less(serve, tmp_path):
    refusal = "400 response_format json_schema is not supported"
    server = serve(script={"question 0": [refusal, "400 response_format is not supported"]})
    server.answer = lambda body: f'{{"S1": "a", "S2": "b", "S3": "{len(body)}"}}'
    requests = requests_for(2, answer_schema("sts"))
    engine = engine_for(server, pace=Pace(limit=1, limit_max=1))
    answers = generate(requests, engine, tmp_path / "s.jsonl")
    assert all(a.finish_reason == "stop" for a in answers)
    assert server.tries == {"question 0": 3, "question 1": 1}


def test_a_reasoning_model_gets_its_own_parameter_names(serve, tmp_path):
    refusals = [
        "400 Unsupported parameter: 'max_tokens'; use 'max_completion_tokens' instead",
        "400 Unsupported value: 'temperature' does not support 0.7",
    ]
    bodies = []
    server = serve(script={"question 0": refusals})
    server.answer = lambda body: bodies.append(body) or "fine"
    answers = generate(requests_for(1), engine_for(server), tmp_path / "s.jsonl")
    assert answers[0].text == "fine"
    assert bodies[0]["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & set(bodies[0])


def test_an_invalid_answer_is_fed_back_once_and_both_calls_are_counted(serve, tmp_path):
    server = serve(script={"question 0": ["not json"], "question 1": ["not json", "wrong keys"]})
    answers = generate(requests_for(3, answer_schema("sts")), engine_for(server), tmp_path / "s")
    assert [a.calls for a in answers] == [2, 2, 1]
    assert answers[0].text.startswith('{"S1"') and answers[1].text == '{"something": "else"}'
    counted = ledger(answers)
    assert counted["calls"] == server.calls == 5
    assert counted["prompt_tokens"] == server.tokens["prompt"]
    assert counted["completion_tokens"] == server.tokens["completion"]


def test_concurrency_falls_when_the_server_is_busy_and_recovers(serve, tmp_path):
    server = serve(capacity=lambda _s: 4, latency=0.05)
    engine = engine_for(server, pace=Pace(limit=32, limit_max=64))
    answers = generate(requests_for(300), engine, tmp_path / "s.jsonl")
    assert all(a.finish_reason == "stop" for a in answers)
    limits = [limit for _, limit in engine.pace.trace]
    lowest = limits.index(min(limits))
    assert limits[lowest] <= 16 and max(limits[lowest:]) > limits[lowest] + 1


def test_a_budget_stops_before_the_call_that_would_pass_it(serve, tmp_path):
    server = serve()
    with pytest.raises(EngineError, match="budget_calls 7 is used up"):
        generate(requests_for(20), engine_for(server, budget=Budget(calls=7)), tmp_path / "a.jsonl")
    assert server.calls == 7
    with Store(tmp_path / "a.jsonl") as store:
        assert len(store) == 7
    budget = Budget(usd=1e-4, price=PRICE)
    with pytest.raises(EngineError, match=r"budget_usd 0\.0001 might be passed"):
        generate(requests_for(20), engine_for(server, budget=budget), tmp_path / "b.jsonl")
    assert 0 < budget.usd <= 1e-4


def test_a_budget_counts_what_the_run_paid_before(serve, tmp_path):
    server = serve()
    generate(requests_for(5), engine_for(server), tmp_path / "artifacts" / "02" / "answers.jsonl")
    assert spent(tmp_path.glob("artifacts/**/answers.jsonl")) == (5, None)
    (tmp_path / "manifest.json").write_text('{"budget": {"budget_usd": 0, "budget_calls": 8}}')
    budget = run_budget("big-model", tmp_path)
    with pytest.raises(EngineError, match="budget_calls 8"):
        generate(
            requests_for(9)[5:], engine_for(server, budget=budget), tmp_path / "artifacts/03/a"
        )
    assert server.calls == 8


def test_an_empty_account_stops_at_once(serve, tmp_path, monkeypatch):
    server = serve()
    body = {"error": {"message": "no credit", "code": "insufficient_quota"}}
    handler = server.http.RequestHandlerClass
    monkeypatch.setattr(handler, "_chat", lambda self, _body: self._json(429, body))
    with pytest.raises(EngineError, match="no credit"):
        generate(requests_for(9), engine_for(server), tmp_path / "s.jsonl")


@pytest.mark.parametrize("page", [b"<html>", b"null", b'{"choices": [{}]}', b'{"choices": []}'])
def test_a_page_that_is_no_answer_is_a_fault_like_others(serve, tmp_path, monkeypatch, page):
    server = serve()
    handler, pages = server.http.RequestHandlerClass, [page] * 2
    chat = handler._chat

    def chat_or_page(self, body):
        kind = "text/html" if page == b"<html>" else "application/json"
        return self._send(200, pages.pop(), kind) if pages else chat(self, body)

    monkeypatch.setattr(handler, "_chat", chat_or_page)
    pace = Pace(limit=1, limit_max=1)
    answers = generate(requests_for(2), engine_for(server, pace=pace), tmp_path / "s.jsonl")
    assert [a.text for a in answers] == ["re: question 0", "re: question 1"]


def test_many_connections_that_break_at_once_are_one_failure(serve, tmp_path):
    server = serve(script={f"question {i}": ["dropped"] for i in range(60)})
    engine = engine_for(server, pace=Pace(limit=60, failures_max=5))
    answers = generate(requests_for(60), engine, tmp_path / "s.jsonl")
    assert all(a.finish_reason == "stop" for a in answers)


def test_a_key_never_shows_in_an_error_however_it_is_cut(serve, tmp_path):
    text = f"400 {'x' * 180} {CANARY} and sk-cana***7d1f"
    server = serve(script={"question 0": [text]})
    answers = generate(requests_for(1), engine_for(server), tmp_path / "s.jsonl")
    assert answers[0].finish_reason == "error" and "sk-" not in answers[0].text


def test_ctrl_c_waits_for_what_is_under_way_and_keeps_it(serve, tmp_path):
    server = serve(latency=0.3)
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, "tests/unit")
        from test_engine_openai import OpenAIEngine, requests_for
        from speed_utils.generation import generate

        engine = OpenAIEngine(model="m", base_url=sys.argv[1])
        print("ready", flush=True)
        generate(requests_for(500), engine, sys.argv[2])
        """
    )
    path = tmp_path / "s.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), "tests"])}
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.url, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    process.stdout.readline()
    while server.calls < 10:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    with Store(path) as store:
        assert len(store) == server.calls < 500


def test_a_key_is_needed_elsewhere_and_not_on_this_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EngineError, match="OPENAI_API_KEY"):
        OpenAIEngine(model="gpt-4o")
    OpenAIEngine(model="m", base_url="http://127.0.0.1:1/v1")


def test_a_call_that_timed_out_may_be_billed_and_counts(serve, tmp_path):
    server = serve(script={"question 0": ["timeout"]})
    budget = Budget(calls=9, usd=1.0, price=PRICE)
    engine = engine_for(server, timeout=0.3, budget=budget)
    answer = generate(requests_for(1), engine, tmp_path / "s.jsonl")[0]
    assert answer.finish_reason == "stop" and budget.calls == 2
    once = PRICE.usd(answer.prompt_tokens, answer.completion_tokens)
    assert budget.usd > once  # the worst case of the lost one on top


def test_a_stop_does_not_wait_for_a_long_retry_after(serve, tmp_path, monkeypatch):
    server = serve()
    handler = server.http.RequestHandlerClass
    body = {"error": {"message": "busy"}}
    refuse = lambda self, _body: self._json(429, body, {"Retry-After": "100"})  # noqa: E731
    monkeypatch.setattr(handler, "_chat", refuse)
    engine = engine_for(server)
    timer = threading.Timer(1.0, engine.stop)
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        generate(requests_for(4), engine, tmp_path / "s.jsonl")
    assert time.monotonic() - started < 20
