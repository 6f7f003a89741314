"""Embedder training interrupted, in two processes, and with every token seeing all others."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from speed_utils import contrastive
from speed_utils.contrastive import EmbedderPlan, train_embedder, training_rows
from speed_utils.embedder import build_embedder
from speed_utils.launch import LaunchError
from speed_utils.training import TrainingError

PLAN = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 4, "tokens_max": 32, "temperature": 0.1}


def weights(training):
    return load_file(training.model_dir / "model.safetensors")


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_an_interrupted_training_ends_as_an_undisturbed_one(
    tiny_model, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(contrastive, "CHECKPOINT_EVERY_STEPS", 3)
    plan = EmbedderPlan(**PLAN, in_batch_negatives="kind")
    calm = train_embedder(tiny_model, examples, tmp_path / "calm", plan)
    columns = iter(range(3 * 7 + 1))  # of seven steps, in the second epoch of six each

    def stop_in_step_8(*_):
        if next(columns) == 3 * 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "assert_features_end", stop_in_step_8)
        with pytest.raises(KeyboardInterrupt):
            train_embedder(tiny_model, examples, tmp_path / "stopped", plan)
    steps = [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")]
    assert steps, "no checkpoint was written before the stop"
    went_on = train_embedder(tiny_model, examples, tmp_path / "stopped", plan)
    assert went_on.metrics["n_steps"] == calm.metrics["n_steps"] == 18
    assert largest_difference(weights(calm), weights(went_on)) < 1e-6
    untrained = build_embedder(tiny_model, 32)[0].model.state_dict()
    assert largest_difference({k: weights(calm)[k] for k in untrained}, dict(untrained)) > 1e-3


def test_two_processes_train_the_model_of_one(tiny_model, examples, tmp_path, monkeypatch):
    plan = EmbedderPlan(**PLAN, mini_batch_tokens=30)
    one = train_embedder(tiny_model, examples, tmp_path / "one", plan)
    monkeypatch.setenv("SPEED_ACCELERATE", "data/accelerate/two_processes.yaml")
    two = train_embedder(tiny_model, examples, tmp_path / "two", plan)
    assert two.metrics["n_processes"] == 2 and not two.was_reused
    assert two.metrics["n_steps"] == one.metrics["n_steps"] == 12
    assert largest_difference(weights(one), weights(two)) < 1e-4
    assert [row["loss"] for row in two.history] == pytest.approx(
        [row["loss"] for row in one.history], abs=1e-3
    )


def test_a_failed_process_is_told_with_its_cause(tiny_model, examples, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_ACCELERATE", "data/accelerate/two_processes.yaml")
    plan = EmbedderPlan(**{**PLAN, "batch_size": 5})
    with pytest.raises(LaunchError, match="cannot be shared out evenly to 2"):
        train_embedder(tiny_model, examples, tmp_path / "odd", plan)
    monkeypatch.setenv("SPEED_ACCELERATE", "nowhere.yaml")
    with pytest.raises(LaunchError, match=r"nowhere.yaml is not there; see data/accelerate"):
        train_embedder(tiny_model, examples, tmp_path / "none", EmbedderPlan(**PLAN))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("config", ["fsdp", "zero3"])
def test_a_model_is_not_spread_without_gpus(config, tiny_model, examples, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_ACCELERATE", f"data/accelerate/{config}.yaml")
    with pytest.raises(LaunchError, match=f"{config}.yaml .* needs GPUs.*two_processes.yaml"):
        train_embedder(tiny_model, examples, tmp_path / "spread", EmbedderPlan(**PLAN))


def test_bidirectional_attention_is_kept_by_the_saved_model(tiny_model, examples, tmp_path):
    plan = EmbedderPlan(**PLAN, attention="bidirectional")
    training = train_embedder(tiny_model, examples, tmp_path / "b", plan)
    loaded = SentenceTransformer(str(training.model_dir))
    for texts in (["red green blue"], ["red green blue", "a longer text beside it"]):
        token_embeddings = loaded.encode(texts, output_value="token_embeddings")[0]
        changed = [texts[0].replace("blue", "grey"), *texts[1:]]
        other = loaded.encode(changed, output_value="token_embeddings")[0]
        difference = np.abs(token_embeddings[0] - other[0]).max()
        assert difference > 1e-6, "the first token does not see the last"
    causal = build_embedder(tiny_model, 32)
    first = [
        causal.encode([text], output_value="token_embeddings")[0][0]
        for text in ("red green blue", "red green grey")
    ]
    assert np.abs(first[0] - first[1]).max() < 1e-6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention", "sideways", "attention 'sideways' is none of causal, bidirectional"),
        ("in_batch_negatives", "none", "'none' is neither all nor kind"),
        ("in_batch_negatives", "all except labels", "neither all nor kind"),
        ("schedule", "cosine", "schedule 'cosine' is none of"),
    ],
)
def test_unknown_choices_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        EmbedderPlan(**PLAN, **{field: value})


def test_negatives_are_taken_as_said(examples):
    plan = EmbedderPlan(**PLAN, in_batch_negatives="kind except sts, retrieval")
    assert plan.is_of_one_kind and plan.own_negatives_only == {"sts", "retrieval"}
    rows = training_rows(examples, plan.own_negatives_only)
    switches = {kind: {row["label"][2] for row in own} for kind, own in rows.items()}
    assert switches == {"sts": {0}, "retrieval": {0}, "matching_short": {1}}


def test_deepspeed_is_refused_with_a_reason(tiny_model, examples, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(TrainingError, match="DDP or FSDP"):
        train_embedder(tiny_model, examples, tmp_path / "d", EmbedderPlan(**PLAN))
