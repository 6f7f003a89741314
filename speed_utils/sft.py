"""Supervised fine-tuning of a generator: junior on seed data, revisor on revisions.

Reads records, writes ``<out_dir>/adapter`` (PEFT LoRA) and ``<out_dir>/training.json``.

    rows = sft_rows(tokenizer, [(prompt_of(e), example_text(e)) for e in seed])
    training = train_sft(base_dir, rows, heldout, out_dir, plan)

Paper: Section 3.2.2, Eq. 1 (junior); Section 3.2.4, Eq. 3 (revisor); Appendix B.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from speed_utils.models import device_and_dtype, render_chat
from speed_utils.prompts import messages
from speed_utils.training import (
    Training,
    TrainingError,
    TrainingPlan,
    common_arguments,
    finished_training,
    has_checkpoint,
    lora_config,
    run_training,
    save_training,
    training_key,
    use_text_progress,
)

T = TypeVar("T")


def split_heldout(items: Sequence[T], n_heldout: int, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle and split into (train, held out).

    Raises:
        ValueError: nothing would be left to train on.
    """
    if n_heldout >= len(items):
        raise ValueError(f"cannot hold out {n_heldout} of {len(items)}; lower n_heldout")
    shuffled = list(items)
    random.Random(f"heldout|{seed}").shuffle(shuffled)
    return shuffled[n_heldout:], shuffled[:n_heldout]


def sft_rows(tokenizer: object, pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """(data prompt, answer) pairs as the text the trainer sees.

    The prompt is rendered by the same function as for generation, so that a trained model meets
    exactly the form it was trained on.

    Returns:
        Rows with ``prompt`` (ends where the answer begins) and ``completion`` (without EOS, which
        the trainer appends).
    """
    return [
        {"prompt": render_chat(tokenizer, messages(prompt)), "completion": answer}
        for prompt, answer in pairs
    ]


def within_tokens(
    tokenizer: object, rows: Sequence[dict[str, str]], tokens_max: int
) -> list[dict[str, str]]:
    """The rows whose text fits; nothing is cut, since a cut answer teaches broken JSON."""
    fields = [name for name in rows[0] if name != "prompt"] if rows else []
    kept = []
    for row in rows:
        longest = max(
            len(tokenizer(row["prompt"] + row[field])["input_ids"]) + 1 for field in fields
        )
        if longest <= tokens_max:
            kept.append(row)
    return kept


def train_sft(
    base_dir: Path | str,
    rows: Sequence[dict[str, str]],
    heldout: Sequence[dict[str, str]],
    out_dir: Path,
    plan: TrainingPlan,
) -> Training:
    """Train a LoRA adapter on completions only (the prompt carries no loss).

    Args:
        base_dir: folder or hub name of the unaligned base model.
        rows: prompt and completion each, as sft_rows gives them.
        heldout: the same, never trained on; its loss is measured before and after.
        out_dir: folder of the training; kept between runs for reuse and resume.
        plan: hyperparameters.

    Returns:
        The training; metrics heldout_loss_base, heldout_loss and train_seconds, n_rows, n_left_out.

    Raises:
        TrainingError: no row fits plan.tokens_max.
        LaunchError: one of several processes failed.

    Paper: Eq. 1 and 3: minus the log-likelihood of the answer given prompt and task.
    """
    key = training_key(base_dir, plan, rows, "sft")
    done = finished_training(out_dir, key)
    if done is not None:
        return done
    arguments = {
        "base_dir": str(base_dir),
        "rows": list(rows),
        "heldout": list(heldout),
        "out_dir": str(out_dir),
        "plan": asdict(plan),
        "key": key,
    }
    return run_training("speed_utils.sft:train_here", arguments, out_dir)


def train_here(
    base_dir: str, rows: list[dict], heldout: list[dict], out_dir: str, plan: dict, key: str
) -> None:
    """Train in this process, alone or as one of several; arguments as train_sft has them."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    plan, out_dir = TrainingPlan(**plan), Path(out_dir)

    disable_progress_bars()  # of tokenizing, which takes a moment
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    fitting = within_tokens(tokenizer, rows, plan.tokens_max)
    fitting_heldout = within_tokens(tokenizer, heldout, plan.tokens_max)
    arguments = common_arguments(plan, out_dir, len(fitting))
    is_resumed = has_checkpoint(out_dir)
    arguments["eval_on_start"] = not is_resumed  # a checkpoint has this in its history
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_dir, dtype=device_and_dtype()[1]),
        args=SFTConfig(completion_only_loss=True, packing=False, **arguments),
        train_dataset=Dataset.from_list(fitting),
        eval_dataset=Dataset.from_list(fitting_heldout),
        processing_class=tokenizer,
        peft_config=lora_config(plan.lora_rank),
    )
    use_text_progress(trainer, "sft")
    result = trainer.train(resume_from_checkpoint=is_resumed or None)
    before = next((row for row in trainer.state.log_history if "eval_loss" in row), None)
    if before is None:
        raise TrainingError(f"a checkpoint in {out_dir} is of an older version; remove that folder")
    own_seconds = 0 if is_resumed else before["eval_runtime"]
    metrics = {
        "heldout_loss_base": before["eval_loss"],
        "heldout_loss": trainer.evaluate()["eval_loss"],
        "train_seconds": result.metrics["train_runtime"] - own_seconds,
        "n_rows": len(fitting),
        "n_left_out": len(rows) - len(fitting),
    }
    save_training(trainer, out_dir, key, metrics)
