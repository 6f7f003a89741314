"""The recorded teacher against its files; what is asked of any teacher."""

import pytest

from speed_utils.engines import EngineError, Request
from speed_utils.generation import generate
from speed_utils.prompts import answer_schema, words_bound
from speed_utils.records import KINDS, Task
from speed_utils.teacher import (
    RecordedTeacher,
    kind_counts,
    open_teacher,
    recorded_candidates,
    recorded_roots,
    recorded_topics,
    sample_prompts,
    seed_prompts,
    seed_requests,
    sts_task,
)


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


def test_a_key_is_needed_and_its_absence_said(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EngineError, match="OPENAI_API_KEY"):
        open_teacher("openai:gpt-4o")
    for wrong in ("openai", "openai:", "recorder"):
        with pytest.raises(EngineError, match="unknown teacher"):
            open_teacher(wrong)


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


def test_recorded_lists_and_roots_fit_the_words_asked_for():
    for recorded in (
        recorded_candidates,
        lambda n, most: [prompted for prompted, _ in recorded_roots(n, most)],
    ):
        everything, short = recorded(10_000, None), recorded(10_000, 25)
        least = [words_bound(item.slots.get("num_words"))[0] for item in everything]
        assert max(least) > 25
        assert short == [item for item, n in zip(everything, least, strict=True) if n <= 25]
        assert recorded(5, 25) == short[:5]
