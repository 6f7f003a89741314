"""The decoding engine with a tiny random model: sampling, constraint, reproducibility."""

import json
from collections import Counter

import pytest
import torch

from speed_utils.constraints import compile_constraint, mask_logits
from speed_utils.engine_transformers import TransformersEngine, _draw, _Sampler
from speed_utils.engines import EngineError, Request, choose_engine
from speed_utils.generation import generate
from speed_utils.parsing import is_valid_answer
from speed_utils.prompts import answer_schema


@pytest.fixture(scope="module")
def engine(tiny_model):
    return TransformersEngine(tiny_model, batch_size=4)


def request(i, **fields):
    messages = ({"role": "user", "content": "word " * (1 + i % 5)},)
    return Request(**{"id": f"r{i}", "messages": messages, "max_tokens": 12, "seed": i, **fields})


def test_greedy_decoding_equals_transformers_generate(engine):
    batch = [request(i, temperature=0.0) for i in range(4)]
    ours = [completion.text for completion in engine.complete(batch)]
    encoded = engine.tokenizer(
        [f"{_rendered(engine, r)}" for r in batch], return_tensors="pt", padding=True
    )
    engine.model.set_attn_implementation("sdpa")
    theirs = engine.model.generate(**encoded, max_new_tokens=12, do_sample=False)
    engine.model.set_attn_implementation("speed_grouped")
    n_prompt = encoded["input_ids"].shape[1]
    assert ours == engine.tokenizer.batch_decode(theirs[:, n_prompt:], skip_special_tokens=True)


def _rendered(engine, r):
    from speed_utils.models import render_chat

    return render_chat(engine.tokenizer, r.messages)


def test_sampling_is_reproducible_and_seeds_differ(engine):
    batch = [request(i) for i in range(4)]
    first = [completion.text for completion in engine.complete(batch)]
    assert first == [completion.text for completion in engine.complete(batch)]
    other = [
        completion.text
        for completion in engine.complete([request(i, seed=i + 50) for i in range(4)])
    ]
    assert first != other


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = Counter()
    for seed in range(3000):
        generator = torch.Generator().manual_seed(seed)
        sampler = _Sampler(request(0), None, generator)
        counts[_draw(probabilities.log()[None], [sampler])[0]] += 1
    for token, probability in enumerate(probabilities.tolist()):
        assert counts[token] / 3000 == pytest.approx(probability, abs=0.03)


def test_a_nucleus_holds_only_its_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {
        _draw(
            logits.clone(),
            [_Sampler(request(0, top_p=0.75), None, torch.Generator().manual_seed(s))],
        )[0]
        for s in range(300)
    }
    assert drawn == {0, 1}


def test_a_nucleus_wider_than_the_fast_path_is_sampled_in_full():
    logits = torch.zeros(1, 4000)
    drawn = [
        _draw(
            logits.clone(),
            [_Sampler(request(0, top_p=0.9), None, torch.Generator().manual_seed(s))],
        )[0]
        for s in range(200)
    ]
    assert len(set(drawn)) > 150


def test_constrained_answers_are_valid_unless_cut(engine):
    schema = answer_schema("matching_short", length_limit=12)
    batch = [request(i, max_tokens=120, schema=schema) for i in range(4)]
    completions = list(engine.complete(batch))
    assert any(completion.finish_reason == "stop" for completion in completions)
    for completion in completions:
        if completion.finish_reason == "stop":
            assert list(json.loads(completion.text)) == ["input", "positive_document"]
            assert (
                completion.text.startswith('{"input": "')
                and '", "positive_document": "' in completion.text
            )


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('{"input": "a", "positive_document": "b"}', True),
        ('{"input":"a","positive_document":"b"}', False),
        ('{"positive_document": "b", "input": "a"}', False),
        ('{"input": "a"}', False),
        ('{"input": "", "positive_document": "b"}', False),
        ('{"input": "a \\"q\\" \\n é", "positive_document": "b"}', True),
        ('{"input": "a", "positive_document": "b", "x": "c"}', False),
    ],
)
def test_the_constraint_allows_exactly_the_canonical_form(engine, text, accepted):
    state = compile_constraint(engine.tokenizer, answer_schema("matching_short")).start()
    ok = True
    for token in engine.tokenizer(text)["input_ids"]:
        logits = torch.zeros(1, len(engine.tokenizer))
        mask_logits(logits, [state])
        if logits[0, token] < 0:
            ok = False
            break
        state.accept(token)
    assert (ok and state.matcher.is_accepting()) is accepted
    if accepted:
        assert is_valid_answer(text, "matching_short")


def test_an_interrupted_run_ends_with_the_same_texts(engine, tmp_path):
    requests = [request(i) for i in range(10)]
    whole = generate(requests, engine, tmp_path / "a.jsonl")
    generate(requests, engine, tmp_path / "b.jsonl")
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    resumed = generate(requests, engine, tmp_path / "b.jsonl")
    assert [c.text for c in resumed] == [c.text for c in whole]


def test_unknown_engines_are_refused_and_vllm_says_how_to_get_it():
    with pytest.raises(EngineError, match="unknown engine"):
        choose_engine("llama")
    assert choose_engine("transformers") == "transformers"
