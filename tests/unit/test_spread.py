"""Trainings over two processes that each hold a part of the model, by FSDP and DeepSpeed ZeRO-3."""

import importlib.util

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_utils import launch, training
from speed_utils.contrastive import EmbedderPlan, train_embedder
from speed_utils.dpo import DpoPlan, preference_rows, train_dpo
from speed_utils.launch import LaunchError
from speed_utils.records import Preference
from speed_utils.sft import sft_rows, train_sft
from speed_utils.training import TrainingPlan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for CPUs")
has_deepspeed = importlib.util.find_spec("deepspeed")
no_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="pip install deepspeed==0.19.8")
configs = pytest.mark.parametrize("config", ["fsdp", pytest.param("zero3", marks=no_deepspeed)])
PLAN = {"learning_rate": 1e-2, "batch_size": 4, "tokens_max": 128}


@pytest.fixture
def spread(monkeypatch):
    """A function that lets trainings from now on run under a config, and fail at a step."""
    monkeypatch.setattr(launch, "_assert_for_cpu", lambda _path: None)
    monkeypatch.setenv("PYTHONPATH", "tests")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def begin(config="fsdp", stop_at=None):
        def launch_spread(function, arguments, out_dir):
            arguments = {"function": function, "arguments": arguments, "stop_at": stop_at}
            launch.launch("spread_on_cpu:call_spread", arguments, out_dir)

        monkeypatch.setenv("SPEED_ACCELERATE", f"data/accelerate/{config}.yaml")
        monkeypatch.setattr(training, "launch", launch_spread)

    return begin


def largest_difference(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def loss_of(base_dir, adapter_dir, prompts, completions):
    """Mean loss of the completions by an adapter that was saved, EOS included."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_dir)
    losses = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([ids])
        labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
        losses.append(model(input_ids=torch.tensor([ids]), labels=labels).loss.item())
    return sum(losses) / len(losses)


def test_the_embedder(tiny_model, examples, tmp_path, spread):
    plan = EmbedderPlan(
        **PLAN | {"tokens_max": 32}, epochs=2, temperature=0.1, mini_batch_tokens=30
    )
    one = train_embedder(tiny_model, examples, tmp_path / "one", plan)
    spread(stop_at=5)
    with pytest.raises(LaunchError, match="stopped at step 5"):
        train_embedder(tiny_model, examples, tmp_path / "two", plan)
    assert (tmp_path / "two" / "checkpoint-4").is_dir()
    spread(stop_at=3)  # which a training that goes on from step 4 does not meet
    two = train_embedder(tiny_model, examples, tmp_path / "two", plan)
    assert two.metrics["n_processes"] == 2 and two.metrics["n_steps"] == 8
    names = [training.model_dir / "model.safetensors" for training in (one, two)]
    assert largest_difference(*names) < 1e-4


@configs
def test_fine_tuning(tiny_model, tmp_path, spread, config):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = sft_rows(tokenizer, [(f"write number {i}", f'{{"S1": "{i}"}}') for i in range(10)])
    plan = TrainingPlan(**PLAN, epochs=2)
    one = train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "one", plan)
    spread(config, stop_at=3)
    with pytest.raises(LaunchError, match="stopped at step 3"):
        train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "two", plan)
    spread(config, stop_at=1)
    two = train_sft(tiny_model, rows[2:], rows[:2], tmp_path / "two", plan)
    assert two.metrics["heldout_loss"] == pytest.approx(one.metrics["heldout_loss"], abs=0.2)
    assert two.metrics["heldout_loss"] < two.metrics["heldout_loss_base"] - 0.2
    heldout = [[row[name] for row in rows[:2]] for name in ("prompt", "completion")]
    saved = loss_of(tiny_model, two.adapter_dir, *heldout)
    assert saved == pytest.approx(two.metrics["heldout_loss"], abs=0.02)


@configs
def test_preference_optimization(tiny_model, tmp_path, spread, config):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = sft_rows(tokenizer, [(f"write number {i}", f'{{"S1": "{i}"}}') for i in range(10)])
    junior = train_sft(
        tiny_model, rows, rows[:2], tmp_path / "junior", TrainingPlan(**PLAN, epochs=1)
    )
    slots = {"unit": "sentence", "high_score": 4, "low_score": 3, "difficulty": None}
    fields = {"kind": "sts", "topic": "t", "task": "x", "reason": "form", "best": 0, "worst": 1}
    judged = [
        Preference(
            id=str(i),
            slots={**slots, "language": "English", "order": 1},
            texts=[f'{{"S1": "{i}"}}', f"no json {i}"],
            **fields,
        )
        for i in range(10)
    ]
    pairs = preference_rows(tokenizer, judged)
    plan = DpoPlan(**PLAN | {"tokens_max": 512, "learning_rate": 5e-3}, epochs=3, beta=0.1)
    spread(config, stop_at=5)
    with pytest.raises(LaunchError, match="stopped at step 5"):
        train_dpo(tiny_model, junior.adapter_dir, pairs[2:], pairs[:2], tmp_path / "s", plan)
    spread(config, stop_at=3)
    senior = train_dpo(tiny_model, junior.adapter_dir, pairs[2:], pairs[:2], tmp_path / "s", plan)
    assert senior.metrics["heldout_margin"] > 0 and senior.metrics["heldout_accuracy"] == 1.0
    prompts = [pair["prompt"] for pair in pairs[:2]]
    gaps = [
        loss_of(tiny_model, training.adapter_dir, prompts, [pair["rejected"] for pair in pairs[:2]])
        - loss_of(tiny_model, training.adapter_dir, prompts, [pair["chosen"] for pair in pairs[:2]])
        for training in (junior, senior)
    ]
    assert gaps[1] > gaps[0] + 0.1
