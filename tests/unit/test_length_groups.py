"""Grouping a batch by length changes neither embeddings nor gradients, and saves padding."""

import pytest
import torch

from speed_utils.contrastive import build_embedder
from speed_utils.length_groups import LengthGroups, length_groups

TEXTS = ["a label", "b", *(f"a longer text number {n} " * n for n in (9, 1, 4, 7, 2))]


@pytest.fixture
def model(tiny_model):
    return build_embedder(tiny_model, 48)


def gradients(model, module):
    model.zero_grad()
    features = model.preprocess(list(TEXTS))
    embeddings = module(dict(features))["sentence_embedding"]
    (embeddings @ embeddings.t()).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return embeddings.detach(), found


def test_embeddings_and_gradients_are_the_models_own(model):
    plain, own = gradients(model, model)
    grouped, ours = gradients(model, LengthGroups(model))
    assert torch.allclose(plain, grouped, atol=1e-6)
    assert own.keys() == ours.keys() and len(own) > 10
    for name, gradient in own.items():
        assert torch.allclose(gradient, ours[name], atol=1e-5), name


def test_padding_is_counted_and_small(model, monkeypatch):
    monkeypatch.setattr("speed_utils.length_groups.TOKENS_MIN", 1)
    groups = LengthGroups(model)
    features = model.preprocess(list(TEXTS))
    groups(dict(features))
    mask = features["attention_mask"]
    assert groups.n_tokens - groups.n_padding == int(mask.sum())
    assert groups.n_tokens < 0.6 * mask.numel()


def test_groups_cover_all_texts_once():
    for lengths in ([5], [3, 3, 3], [2, 2, 40, 41, 90, 96], list(range(1, 60))):
        groups = length_groups(lengths)
        assert [i for group in groups for i in group] == list(range(len(lengths)))


def test_the_models_attributes_show_through(model):
    assert LengthGroups(model).max_seq_length == model.max_seq_length
    with pytest.raises(AttributeError):
        LengthGroups(model).no_such_thing  # noqa: B018
