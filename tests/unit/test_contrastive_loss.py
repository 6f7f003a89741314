"""The loss against its definition in numpy, in pieces and over two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speed_utils.contrastive_loss import ContrastiveLoss, length_groups, text_labels
from speed_utils.embedder import build_embedder
from speed_utils.launch import CONFIG_VARIABLE, launch

TAU = 0.05
ANCHORS = ["q one", "q two " * 9, "q three", "q four", "q five " * 3, "q six"]
POSITIVES = ["p one", "p two", "the same text", "p four " * 12, "the same text", "p six"]
NEGATIVES = ["n one", None, "n three " * 5, None, "n five", "p one"]
OWN_ONLY = {3, 5}  # rows without in-batch negatives


ALL_ROWS = range(len(ANCHORS))


def batch(model, rows=ALL_ROWS):
    columns = [
        [ANCHORS[i] for i in rows],
        [POSITIVES[i] for i in rows],
        [NEGATIVES[i] or "" for i in rows],
    ]
    labels = [text_labels(POSITIVES[i], NEGATIVES[i], has_in_batch=i not in OWN_ONLY) for i in rows]
    return [model.preprocess(column) for column in columns], torch.tensor(labels)


def definition(model):
    """Mean over rows of log sum exp of the allowed scores minus the positive's."""
    q, p, n = (model.encode([t or "" for t in texts]) for texts in (ANCHORS, POSITIVES, NEGATIVES))
    losses = []
    for i in range(len(ANCHORS)):
        allowed = [q[i] @ p[i] / TAU]
        if NEGATIVES[i] is not None:
            allowed.append(q[i] @ n[i] / TAU)
        if i not in OWN_ONLY:
            for j in range(len(ANCHORS)):
                if j != i and POSITIVES[j] != POSITIVES[i]:
                    allowed.append(q[i] @ p[j] / TAU)
                if j != i and NEGATIVES[j] not in (None, POSITIVES[i]):
                    allowed.append(q[i] @ n[j] / TAU)
        losses.append(np.log(np.exp(allowed).sum()) - allowed[0])
    return np.mean(losses)


def value_and_gradients(model, loss, features, labels):
    model.zero_grad()
    value = loss([dict(column) for column in features], labels)
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return value.item(), found


@pytest.fixture(scope="module")
def model(tiny_model):
    return build_embedder(tiny_model, 48)


@pytest.mark.parametrize("mini_batch_tokens", [10_000, 40, 1])
def test_the_loss_is_eq_4_whole_and_in_pieces(model, monkeypatch, mini_batch_tokens):
    monkeypatch.setattr("speed_utils.contrastive_loss.ROWS_AT_ONCE", 4)
    features, labels = batch(model)
    whole = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=10_000)
    expected, gradients = value_and_gradients(model, whole, features, labels)
    assert expected == pytest.approx(definition(model), rel=1e-5)
    pieces = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=mini_batch_tokens)
    value, found = value_and_gradients(model, pieces, features, labels)
    assert value == pytest.approx(expected, abs=1e-5)
    assert found.keys() == gradients.keys() and len(found) > 10
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, found[name], atol=1e-5), name


def test_pairs_alone_and_triplets_alone(model):
    loss = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=40)
    for rows in ([1, 3], [0, 2, 4]):
        features, labels = batch(model, rows)
        value, gradients = value_and_gradients(model, loss, features, labels)
        assert np.isfinite(value) and all(g.isfinite().all() for g in gradients.values())


def test_no_gradients_are_kept_in_evaluation(model):
    features, labels = batch(model)
    loss = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=20)
    with torch.no_grad():
        value = loss(features, labels)
    assert value.item() == pytest.approx(definition(model), rel=1e-5) and not value.requires_grad


def test_padding_is_counted_and_small(model, monkeypatch):
    monkeypatch.setattr("speed_utils.contrastive_loss.TOKENS_MIN", 1)
    features, labels = batch(model)
    loss = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=10_000)
    loss(features, labels)
    texts = [*ANCHORS, *POSITIVES, *(text for text in NEGATIVES if text)]
    n_real = sum(len(model.tokenizer(text)["input_ids"]) for text in texts)
    assert loss.n_tokens - loss.n_padding == n_real
    longest = max(column["attention_mask"].shape[1] for column in features)
    assert loss.n_tokens < 0.6 * longest * len(texts)


def test_groups_cover_all_texts_once():
    for lengths in ([5], [3, 3, 3], [2, 2, 40, 41, 90, 96], list(range(1, 60))):
        groups = length_groups(lengths)
        assert [i for group in groups for i in group] == list(range(len(lengths)))


def test_two_processes_have_the_loss_and_gradients_of_one(model, tiny_model, tmp_path, monkeypatch):
    features, labels = batch(model)
    whole = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=10_000)
    expected, gradients = value_and_gradients(model, whole, features, labels)
    monkeypatch.setenv(CONFIG_VARIABLE, "data/accelerate/two_processes.yaml")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the processes find this
    arguments = {"model_dir": str(tiny_model), "out_dir": str(tmp_path)}
    launch("test_contrastive_loss:save_loss_of_a_half", arguments, tmp_path)
    for saved in torch.load(tmp_path / "gradients.pt"):
        assert saved["loss"] == pytest.approx(expected, abs=1e-5)
        assert saved["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, saved["gradients"][name], atol=1e-5), name


def save_loss_of_a_half(model_dir, out_dir):
    """What each of the two processes does: three of the six rows."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    model = build_embedder(model_dir, 48)
    features, labels = batch(model, ALL_ROWS[:3] if accelerator.is_main_process else ALL_ROWS[3:])
    wrapped = accelerator.prepare(model)
    found = []
    for mini_batch_tokens in (10_000, 30):
        loss = ContrastiveLoss(wrapped, temperature=TAU, mini_batch_tokens=mini_batch_tokens)
        value, gradients = value_and_gradients(model, loss, features, labels)
        mean = accelerator.reduce(torch.tensor(value), "mean").item()
        found.append({"loss": mean, "gradients": gradients})
    if accelerator.is_main_process:
        torch.save(found, f"{out_dir}/gradients.pt")
    accelerator.wait_for_everyone()
