"""A batch's common beginning is encoded once, and nobody can tell from the embeddings."""

import pytest
import torch

from speed_utils.embedder import build_embedder, query_text
from speed_utils.shared_prefix import common_prefix_length, share_prefix

PROMPT = query_text("Retrieve semantically similar text.", "")
TEXTS = ["a", "the tide", "how the moon raises the tide " * 9, "the tide", "Ebb & flood?"]


def embeddings(model, texts, prompt):
    return model.encode(texts, prompt=prompt, convert_to_tensor=True, batch_size=len(texts))


@pytest.mark.parametrize("prompt", [PROMPT, None])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ["same words here"] * 3])
def test_embeddings_stay_the_same(tiny_model, texts, prompt):
    model = build_embedder(tiny_model, 40)
    before = embeddings(model, texts, prompt)
    share_prefix(model)
    after = embeddings(model, texts, prompt)
    assert torch.allclose(before, after, atol=1e-5)


def test_the_prefix_is_computed_for_one_row_only(tiny_model):
    model = build_embedder(tiny_model, 40)
    n_prompt = len(model.tokenizer(PROMPT)["input_ids"]) - 1  # without the EOS
    shapes = []
    original = model[0].model.forward
    model[0].model.forward = lambda *args, **kwargs: (
        shapes.append(tuple(kwargs["input_ids"].shape)) or original(*args, **kwargs)
    )
    share_prefix(model)
    embeddings(model, TEXTS, PROMPT)
    (rows, tokens), (all_rows, rest) = shapes
    assert (rows, all_rows) == (1, len(TEXTS))
    assert tokens >= n_prompt - 1 and tokens + rest == 40  # the longest text is cut there


def test_gradients_are_left_alone(tiny_model):
    model = build_embedder(tiny_model, 40)
    share_prefix(model)
    features = model.preprocess([PROMPT + text for text in TEXTS])
    model(features)["sentence_embedding"].sum().backward()
    gradient = model[0].model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_the_common_prefix_leaves_a_token_to_each_row():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert common_prefix_length(ids, mask) == 2
    assert common_prefix_length(ids[:1], mask[:1]) == 0
    assert common_prefix_length(torch.tensor([[1, 2], [3, 2]]), mask[:, :2]) == 0
