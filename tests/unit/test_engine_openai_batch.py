"""The Batch API against a server on loopback: what is missing is sent again, and nothing else."""

import pytest
from fake_openai import FakeOpenAI

from speed_utils.engine_openai_batch import OpenAIBatchEngine
from speed_utils.engines import EngineError, Request
from speed_utils.generation import generate
from speed_utils.ledger import Budget

REQUESTS = [
    Request(id=f"r{i}", messages=({"role": "user", "content": f"question {i}"},), max_tokens=9)
    for i in range(9)
]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-9c")
    fake = FakeOpenAI()
    yield fake
    fake.close()


@pytest.fixture
def batch_engine(server, tmp_path):
    def make(**settings):
        return OpenAIBatchEngine(
            model="m",
            base_url=server.url,
            state_path=tmp_path / "batches.jsonl",
            poll_seconds=(0.01, 0.01),
            **settings,
        )

    return make


def test_all_are_answered_in_one_batch_at_the_discount(server, batch_engine, tmp_path):
    answers = generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert [a.text for a in answers] == [f"re: question {i}" for i in range(9)]
    assert all(a.is_batch for a in answers)
    assert len(server.sent_batches) == 1
    generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert len(server.sent_batches) == 1


@pytest.mark.parametrize("status", ["expired", "cancelled", "completed"])
def test_only_what_is_missing_is_sent_again(server, batch_engine, tmp_path, status):
    fates = {"question 2": "missing", "question 5": "error"}
    server.batch_plan = lambda number, row: (
        fates.get(row["body"]["messages"][0]["content"], "ok") if number == 0 else "ok"
    )
    server.batch_status = lambda number: status if number == 0 else "completed"
    answers = generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert [a.text for a in answers] == [f"re: question {i}" for i in range(9)]
    sizes = [batch["request_counts"]["total"] for batch in server.sent_batches.values()]
    assert sizes == [9, 2]
    assert set(server.good.values()) == {1}


def test_a_batch_with_nothing_but_errors_ends_as_named_errors(server, batch_engine, tmp_path):
    server.batch_plan = lambda _number, _row: "error"
    answers = generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert {a.finish_reason for a in answers} == {"error"}
    assert "it broke" in answers[0].text
    assert len(server.sent_batches) == 3


def test_a_restart_polls_what_was_sent_instead_of_sending_it_again(server, batch_engine, tmp_path):
    engine = batch_engine()
    engine._wait = lambda _id: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(REQUESTS, engine, tmp_path / "s.jsonl")
    answers = generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert len(answers) == 9 and len(server.sent_batches) == 1


def test_a_crash_between_sending_and_noting_the_id_sends_nothing_twice(
    server, batch_engine, tmp_path
):
    engine = batch_engine()
    add = engine._state.add

    def crash(event):
        if event["event"] == "created":
            raise KeyboardInterrupt
        add(event)

    engine._state.add = crash
    with pytest.raises(KeyboardInterrupt):
        generate(REQUESTS, engine, tmp_path / "s.jsonl")
    assert len(server.sent_batches) == 1
    generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert len(server.sent_batches) == 1


def test_a_torn_note_is_dropped(server, batch_engine, tmp_path):
    generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    with (tmp_path / "batches.jsonl").open("a") as file:
        file.write('{"event": "prep')
    more = [*REQUESTS, Request(id="new", messages=REQUESTS[0].messages, max_tokens=9)]
    generate(more, batch_engine(), tmp_path / "s.jsonl")
    sizes = [batch["request_counts"]["total"] for batch in server.sent_batches.values()]
    assert sizes == [9, 1]


def test_batches_keep_to_the_limits_of_the_api(server, batch_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("speed_utils.engine_openai_batch.REQUESTS_MAX", 4)
    generate(REQUESTS, batch_engine(), tmp_path / "a.jsonl")
    sizes = [batch["request_counts"]["total"] for batch in server.sent_batches.values()]
    assert sizes == [4, 4, 1]


def test_a_refused_batch_says_why_and_a_budget_stops_before_sending(server, batch_engine, tmp_path):
    with pytest.raises(EngineError, match="budget_calls 5"):
        generate(REQUESTS, batch_engine(budget=Budget(calls=5)), tmp_path / "s.jsonl")
    assert not server.sent_batches
    server.batch_status = lambda _number: "failed"
    server.batch_plan = lambda _number, _row: "missing"
    with pytest.raises(EngineError, match="refused batch"):
        generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    server.batch_status = server.batch_plan = None
    assert len(generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")) == 9


def test_a_batch_of_which_a_part_was_collected_still_has_the_rest(server, batch_engine, tmp_path):
    engine = batch_engine()
    engine._wait = lambda _id: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(REQUESTS, engine, tmp_path / "s.jsonl")
    for part in (REQUESTS[:4], REQUESTS[4:]):
        generate(part, batch_engine(), tmp_path / "s.jsonl")
    assert len(server.sent_batches) == 1


def test_line_separators_within_an_answer_do_not_cut_it(server, batch_engine, tmp_path):
    server.answer = lambda _body: "one\u2028two\u0085three"
    answers = generate(REQUESTS, batch_engine(), tmp_path / "s.jsonl")
    assert answers[0].text == "one\u2028two\u0085three" and len(server.sent_batches) == 1
