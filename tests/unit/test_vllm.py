"""vllm for real: the engine, a server as teacher and generator, and the language it accepts.

Slow: python -m pytest -m slow tests/unit/test_vllm.py (make setup-vllm first).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from speed_utils.constraints import JSON_FORM, compile_constraint
from speed_utils.engines import Request, open_engine
from speed_utils.generation import bounded_schema, generate
from speed_utils.models import device_and_dtype, resolve_model
from speed_utils.parsing import has_valid_json, parse_example
from speed_utils.prompts import answer_schema, sample_slots
from speed_utils.records import KINDS, STS_TASK, Example, Prompted
from speed_utils.synthesis import example_requests
from speed_utils.teacher import open_teacher, seed_requests

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
START_SECONDS = 300


def prompts(n):
    """Data prompts over all kinds with short documents."""
    return [
        Prompted(
            id=f"p{i}",
            kind=kind,
            topic="Science/Biology",
            task=STS_TASK if kind == "sts" else "Tell which animal a field note is about.",
            slots=sample_slots(kind, i, 50),
        )
        for i, kind in enumerate(KINDS[k % len(KINDS)] for k in range(n))
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `vllm serve` of the base model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(resolve_model(BASE)), "--served-model-name", "base", "smol"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096"),
    ]
    if device_and_dtype()[0] != "cuda":
        command += ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"}
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    base_url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.time() + START_SECONDS
        while not _answers(base_url):
            if process.poll() is not None or time.time() > deadline:
                log.seek(0)
                pytest.fail(f"vllm serve did not answer: {log.read()[-3000:]}")
            time.sleep(1)
        yield base_url
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def _answers(base_url):
    try:
        urllib.request.urlopen(f"{base_url}/models", timeout=2)
    except (urllib.error.URLError, OSError):
        return False
    return True


def test_a_server_generates_what_the_schema_allows(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asked = prompts(10)
    engine = open_engine(f"openai@{server}", resolve_model(BASE))
    requests = example_requests(asked, seed=1, temperature=0.7, is_constrained=True)
    answers = generate(requests, engine, tmp_path / "store.jsonl")
    whole = [(a, p) for a, p in zip(answers, asked, strict=True) if a.finish_reason == "stop"]
    assert len(whole) >= 8
    assert all(has_valid_json(answer.text, prompt.kind) for answer, prompt in whole)
    assert all(answer.prompt_tokens > 50 and answer.completion_tokens > 5 for answer in answers)
    again = generate(requests, engine, tmp_path / "store.jsonl")
    assert [a.text for a in again] == [a.text for a in answers]
    assert all(a.cached for a in again)
    engine.close()


def test_a_server_is_a_teacher(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asked = prompts(5)
    teacher = open_teacher(f"openai:smol@{server}")
    requests = [replace(request, max_tokens=400) for request in seed_requests(asked)]
    answers = generate(requests, teacher, tmp_path / "store.jsonl")
    records = [
        parse_example(a.text, p, "teacher", stage="test")
        for a, p in zip(answers, asked, strict=True)
        if a.finish_reason == "stop"
    ]
    assert any(isinstance(record, Example) for record in records), [a.text for a in answers]
    teacher.close()


@pytest.fixture(scope="module")
def engine():
    """The offline engine over the base model."""
    return open_engine("vllm", resolve_model(BASE), batch_size=16)


def test_the_engine_obeys_schema_and_seeds(engine, tmp_path):
    asked = prompts(10)
    requests = example_requests(asked, seed=1, temperature=0.7, is_constrained=True)
    answers = generate(requests, engine, tmp_path / "store.jsonl")
    whole = [(a, p) for a, p in zip(answers, asked, strict=True) if a.finish_reason == "stop"]
    assert len(whole) >= 8
    assert all(has_valid_json(answer.text, prompt.kind) for answer, prompt in whole)
    messages = ({"role": "user", "content": "Tell a story."},)
    same = [Request(id=f"s{i}", messages=messages, max_tokens=24, seed=i) for i in range(4)]
    first = [completion.text for completion in engine.complete(same)]
    assert len(set(first)) == 4
    assert first == [completion.text for completion in engine.complete(same)]


def test_an_abandoned_batch_leaves_nothing_in_the_engine(engine):
    requests = example_requests(prompts(6), seed=3, temperature=0.7)
    stream = engine.complete(requests)
    first = next(stream)
    assert first.id in {request.id for request in requests}
    stream.close()  # as an interrupted cell does
    assert not engine.llm.llm_engine.has_unfinished_requests()
    keys = {answer.id: answer.key for answer in engine.complete(requests[:3])}
    assert keys == {request.id: request.key(engine.name) for request in requests[:3]}
    assert set(keys) == {"p0", "p1", "p2"}


def test_auto_takes_vllm_where_it_is_installed(engine):
    chosen = open_engine("auto", resolve_model(BASE), batch_size=16)
    assert chosen.name == engine.name and chosen.name.startswith("vllm|")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two random LoRA adapters, named as the stages name theirs."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from speed_utils.training import lora_config

    folders = []
    for seed, stage in enumerate(("06_train_senior", "08_train_revisor")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(resolve_model(BASE), dtype="float32")
        config = lora_config(16)
        config.init_lora_weights = False  # or the adapter would change nothing
        folder = tmp_path_factory.mktemp("run") / stage / "training" / "adapter"
        get_peft_model(model, config).save_pretrained(folder)
        folders.append(folder)
    return folders


def test_adapters_on_one_base_write_what_merged_copies_write(adapters, monkeypatch):
    messages = ({"role": "user", "content": "Tell where rivers end."},)
    request = Request(id="r", messages=messages, max_tokens=12, temperature=0.0)
    merged = []
    for folder in (None, *adapters):
        opened = open_engine("vllm", resolve_model(BASE), folder, batch_size=4)
        merged += [completion.text for completion in opened.complete([request])]
    assert len(set(merged)) == 3
    monkeypatch.setenv("SPEED_VLLM_LORA", "1")
    engines = [
        open_engine("vllm", resolve_model(BASE), folder, batch_size=4)
        for folder in (None, *adapters)
    ]
    assert len({id(opened.llm) for opened in engines}) == 1, "the base was loaded more than once"
    texts = [completion.text for opened in engines for completion in opened.complete([request])]
    assert texts == merged


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_accept_and_reject_the_same_texts(engine, kind):
    from vllm.config import VllmConfig
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    prompt = next(p for p in prompts(10) if p.kind == kind)
    schema = bounded_schema(prompt)
    config: VllmConfig = engine.llm.llm_engine.vllm_config
    backend = GuidanceBackend(config, engine.tokenizer, len(engine.tokenizer))
    keys = list(schema["properties"])
    fine = {key: f"text for {key}" for key in keys}
    odd = {**fine, keys[0]: 'é “quoted” \\ "so" \n new'}
    limit = schema["properties"][keys[0]]["maxLength"]
    texts = {
        json.dumps(fine): True,
        json.dumps(odd, ensure_ascii=False): True,
        json.dumps(odd): False,  # escapes what needs none; training texts do not
        json.dumps(fine, separators=(",", ":")): False,
        json.dumps(fine, indent=1): False,
        json.dumps({key: fine[key] for key in reversed(keys)}): False,
        json.dumps({key: fine[key] for key in keys[:-1]}): False,
        json.dumps({**fine, "more": "x"}): False,
        json.dumps({**fine, keys[0]: ""}): False,
        json.dumps({**fine, keys[0]: "x" * limit}): True,
        json.dumps({**fine, keys[0]: "x" * (limit + 1)}): False,
        json.dumps({**fine, keys[0]: 3}): False,
        f"```json\n{json.dumps(fine)}\n```": False,
        f" {json.dumps(fine)}": False,
        json.dumps(fine)[:-1]: False,
    }
    specification = json.dumps({**schema, "x-guidance": JSON_FORM})
    constraint = compile_constraint(engine.tokenizer, schema)
    for text, expected in texts.items():
        tokens = [*engine.tokenizer.encode(text), engine.tokenizer.eos_token_id]
        theirs = backend.compile_grammar(StructuredOutputOptions.JSON, specification)
        assert theirs.accept_tokens("r", tokens) is expected, text
        assert _accepts(constraint.start(), tokens) is expected, text
    assert answer_schema(kind)["properties"].keys() == schema["properties"].keys()


def _accepts(state, tokens):
    try:
        for token in tokens:
            state.accept(token)
    except ValueError:
        return False
    return state.matcher.is_stopped()
