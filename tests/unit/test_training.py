"""SFT, DPO and contrastive training with a tiny random model: everything that should move does."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from speed_utils.contrastive import EmbedderPlan, train_embedder, training_rows
from speed_utils.dpo import DpoPlan, preference_rows, train_dpo
from speed_utils.embedder import assert_eos, build_embedder, query_text
from speed_utils.records import Preference, example_text
from speed_utils.sft import sft_rows, split_heldout, train_sft, within_tokens
from speed_utils.training import TrainingError, TrainingPlan

PLAN = TrainingPlan(learning_rate=1e-2, epochs=2, batch_size=4, tokens_max=128, seed=1)


@pytest.fixture(scope="module")
def rows(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return sft_rows(tokenizer, [(f"write number {i}", f'{{"S1": "{i}"}}') for i in range(10)])


@pytest.fixture(scope="module")
def junior(tiny_model, rows, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("junior")
    return train_sft(tiny_model, rows[2:], rows[:2], out_dir, PLAN)


def test_sft_moves_every_adapter_and_lowers_the_held_out_loss(junior):
    weights = load_file(junior.adapter_dir / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2  # A and B of q, k, v, o, gate, up, down in two layers
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert junior.metrics["heldout_loss"] < junior.metrics["heldout_loss_base"]
    assert [row for row in junior.history if "loss" in row]


def test_a_finished_training_is_reused_and_a_changed_one_is_not(tiny_model, rows, tmp_path):
    plan = TrainingPlan(learning_rate=1e-2, epochs=1, batch_size=8, tokens_max=128)
    first = train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "t", plan)
    again = train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "t", plan)
    assert (first.was_reused, again.was_reused) == (False, True)
    assert again.metrics == first.metrics
    other = train_sft(tiny_model, rows[3:], rows[:2], tmp_path / "t", plan)
    assert not other.was_reused


def test_the_prompt_carries_no_loss(tiny_model, rows):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(
            completion_only_loss=True, max_length=128, use_cpu=True, report_to="none", bf16=False
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids[labels != -100])
        assert text.startswith('{"S1": "') and text.endswith(tokenizer.eos_token)


def test_long_examples_are_left_out_never_cut(tiny_model, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    long = {"prompt": rows[0]["prompt"], "completion": "word " * 200}
    assert within_tokens(tokenizer, [*rows, long], 128) == rows
    with pytest.raises(TrainingError, match="no training rows"):
        train_sft(tiny_model, [long], [rows[0]], tiny_model / "none", PLAN)


def test_a_held_out_part_is_disjoint_and_seeded():
    train, heldout = split_heldout(list(range(10)), 3, seed=1)
    assert sorted(train + heldout) == list(range(10)) and len(heldout) == 3
    assert split_heldout(list(range(10)), 3, seed=1) == (train, heldout)
    with pytest.raises(ValueError, match="hold out"):
        split_heldout([1, 2], 2, seed=1)


def preferences():
    good, bad = '{{"S1": "{}"}}', "no json {}"
    fields = {
        "kind": "sts",
        "topic": "t",
        "task": "x",
        "reason": "form",
        "slots": {
            "unit": "sentence",
            "high_score": 4,
            "low_score": 3,
            "difficulty": None,
            "language": "English",
            "order": 1,
        },
    }
    return [
        Preference(id=str(i), texts=[good.format(i), bad.format(i)], best=0, worst=1, **fields)
        for i in range(10)
    ]


def test_dpo_starts_at_the_junior_and_learns_the_preference(tiny_model, junior, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = preference_rows(tokenizer, preferences())
    long = {**pairs[0], "chosen": pairs[0]["chosen"] * 500}
    before = load_file(junior.adapter_dir / "adapter_model.safetensors")
    plan = DpoPlan(learning_rate=5e-3, epochs=3, batch_size=4, tokens_max=512, seed=1, beta=0.1)
    senior = train_dpo(
        tiny_model, junior.adapter_dir, pairs[2:], [*pairs[:2], long], tmp_path / "s", plan
    )
    losses = [float(row["loss"]) for row in senior.history if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-2)
    assert senior.metrics["heldout_margin"] > 0
    assert senior.metrics["heldout_accuracy"] == 1.0
    assert senior.metrics["n_heldout"] == 2, "the long one is left out"
    after = load_file(senior.adapter_dir / "adapter_model.safetensors")
    assert set(after) == set(before)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    unchanged = load_file(junior.adapter_dir / "adapter_model.safetensors")
    assert all(torch.equal(unchanged[name], before[name]) for name in before)


def examples_of(make_example, n=12):
    kinds = ["sts", "retrieval", "matching_short"]
    return [
        make_example(
            id=str(i),
            kind=kinds[i % 3],
            query=f"query {i}",
            positive=f"answer {i}",
            negative=None if i % 3 == 2 else f"other {i}",
        )
        for i in range(n)
    ]


def test_the_embedder_is_a_plain_sentence_transformer_with_an_eos(
    tiny_model, make_example, tmp_path
):
    from sentence_transformers import SentenceTransformer

    plan = EmbedderPlan(
        learning_rate=1e-2, epochs=1, batch_size=4, mini_batch_tokens=40, tokens_max=32
    )
    training = train_embedder(tiny_model, examples_of(make_example), tmp_path / "e", plan)
    model = SentenceTransformer(str(training.model_dir))
    vectors = model.encode(["a", "b " * 99])
    assert vectors.shape == (2, 48) and np.linalg.norm(vectors, axis=1) == pytest.approx(
        [1, 1], abs=1e-5
    )
    assert_eos(model, ["a", "b " * 99])
    card = (training.model_dir / "README.md").read_text()
    assert "12 synthesized examples" in card and "temperature | 0.02" in card
    untrained = build_embedder(tiny_model, 32).encode(["a", "b " * 99])
    assert not np.allclose(untrained, vectors, atol=1e-3)
    assert train_embedder(tiny_model, examples_of(make_example), tmp_path / "e", plan).was_reused


def test_a_tokenizer_that_drops_the_eos_is_noticed(tiny_model):
    model = build_embedder(tiny_model, 32)
    model.tokenizer.backend_tokenizer.post_processor = None
    from tokenizers.processors import ByteLevel

    model.tokenizer.backend_tokenizer.post_processor = ByteLevel()
    with pytest.raises(TrainingError, match="EOS"):
        assert_eos(model, ["a"])


def test_the_instruction_stands_before_queries_only(make_example):
    rows = training_rows(examples_of(make_example))
    for kind, group in rows.items():
        for row in group:
            assert row["anchor"].startswith("Instruct: Given a question about films")
            assert "\nQuery: query" in row["anchor"]
            assert "Instruct" not in row["positive"] + row["negative"]
            assert bool(row["negative"]) == (kind != "matching_short")
    assert query_text("t", "q") == "Instruct: t\nQuery: q"


def test_training_text_is_the_canonical_json(make_example):
    text = example_text(make_example())
    assert json.dumps(json.loads(text)) == text


def test_interrupted_trainings_end_as_undisturbed_ones(
    tiny_model, rows, junior, tmp_path, monkeypatch
):
    from speed_utils import training

    monkeypatch.setattr(training, "CHECKPOINT_EVERY_STEPS", 2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = preference_rows(tokenizer, preferences())
    plan = DpoPlan(learning_rate=1e-3, epochs=1, batch_size=2, tokens_max=512)

    def sft(name):
        return train_sft(tiny_model, rows[2:], rows[:2], tmp_path / name, PLAN)

    def dpo(name):
        out_dir = tmp_path / name
        return train_dpo(tiny_model, junior.adapter_dir, pairs[2:], pairs[:2], out_dir, plan)

    for train in (sft, dpo):
        calm = train(f"calm {train.__name__}")
        with monkeypatch.context() as patch:
            patch.setattr(training.ProgressBar, "on_step_end", stop_after(3))
            with pytest.raises(KeyboardInterrupt):
                train(f"stopped {train.__name__}")
        assert training.has_checkpoint(tmp_path / f"stopped {train.__name__}")
        went_on = train(f"stopped {train.__name__}")
        assert went_on.metrics.get("heldout_loss_base") == calm.metrics.get("heldout_loss_base")
        expected = load_file(calm.adapter_dir / "adapter_model.safetensors")
        found = load_file(went_on.adapter_dir / "adapter_model.safetensors")
        largest = max((found[name] - expected[name]).abs().max().item() for name in expected)
        assert largest < 1e-6, train.__name__


def stop_after(n_steps):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == n_steps:
            raise KeyboardInterrupt

    return on_step_end


def test_two_processes_fine_tune_like_one(tiny_model, rows, tmp_path, monkeypatch):
    one = train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "one", PLAN)
    monkeypatch.setenv("SPEED_ACCELERATE", "data/accelerate/two_processes.yaml")
    two = train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "two", PLAN)
    assert two.metrics["n_rows"] == one.metrics["n_rows"] == 8
    assert len(two.history) == len(one.history)
    assert two.metrics["heldout_loss"] == pytest.approx(one.metrics["heldout_loss"], abs=0.2)
    assert two.metrics["heldout_loss"] < two.metrics["heldout_loss_base"] - 0.2
