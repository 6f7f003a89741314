"""Fixtures shared by all tests, and one number format for them, whatever the processor has."""

import os
from pathlib import Path

import pytest

from speed_utils.records import Example

ROOT_DIR = Path(__file__).parent.parent
os.environ.setdefault("SPEED_DTYPE", "float32")  # bounds of 1e-5 need it; kernels inherit it


@pytest.fixture
def make_example():
    """A factory of valid examples; keyword arguments override fields."""

    def make(**fields) -> Example:
        defaults = {
            "id": "e1",
            "kind": "retrieval",
            "topic": "Arts/Movies",
            "task": "Given a question about films, retrieve a passage that answers it.",
            "slots": {},
            "query": "who scored the film",
            "positive": "The music was written by a composer from Lyon.",
            "negative": "The film was shot in Lyon over a single summer.",
            "source": "teacher",
        }
        return Example(**{**defaults, **fields})

    return make


@pytest.fixture
def examples(make_example) -> list[Example]:
    """Sixteen pairs and triplets of three kinds, their queries of four lengths."""
    kinds = ["sts", "retrieval", "matching_short"]
    return [
        make_example(
            id=str(i),
            kind=kinds[i % 3],
            query=f"query {i} " * (i % 4 + 1),
            positive=f"answer {i}",
            negative=None if i % 3 == 2 else f"other {i}",
        )
        for i in range(16)
    ]


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """An empty outputs folder for runs."""
    monkeypatch.setenv("SPEED_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer model with grouped attention and the study's own tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from speed_utils.models import resolve_model

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct"))
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
