"""Direct preference optimization of the junior: its own adapter trained further, reference frozen.

Reads preferences, writes ``<out_dir>/adapter`` and ``<out_dir>/training.json``.

    rows = preference_rows(tokenizer, preferences)
    training = train_dpo(base_dir, junior_dir, rows, heldout, out_dir, plan)

Paper: Section 3.2.3, Eq. 2; Appendix B (learning rate 1e-5, beta 0.1, batch size 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from speed_utils.models import device_and_dtype, folder_fingerprint, render_chat
from speed_utils.prompts import messages, prompt_of
from speed_utils.records import Preference
from speed_utils.sft import within_tokens
from speed_utils.training import (
    Training,
    TrainingPlan,
    common_arguments,
    finished_training,
    has_checkpoint,
    run_training,
    save_training,
    training_key,
    use_text_progress,
)

PAD_TO_TOKENS = 64  # lengths that recur let the allocator use its memory again


@dataclass(frozen=True)
class DpoPlan(TrainingPlan):
    """A training plan for pairs, which are two sequences each.

    Attributes:
        beta: how strongly the senior is held near the junior.
    """

    beta: float = 0.1
    device_batch_size: int = 1


def preference_rows(tokenizer: object, preferences: Sequence[Preference]) -> list[dict[str, str]]:
    """Preferences as prompt, chosen and rejected text (best and worst of each list)."""
    return [
        {
            "prompt": render_chat(tokenizer, messages(prompt_of(preference))),
            "chosen": preference.texts[preference.best],
            "rejected": preference.texts[preference.worst],
        }
        for preference in preferences
    ]


def train_dpo(
    base_dir: Path | str,
    junior_dir: Path,
    rows: Sequence[dict[str, str]],
    heldout: Sequence[dict[str, str]],
    out_dir: Path,
    plan: DpoPlan,
) -> Training:
    """Train the junior's adapter on preferences; the reference is its frozen copy.

    Args:
        base_dir: folder or hub name of the base model.
        junior_dir: folder of the junior's adapter; it is read, never changed.
        rows: prompt, chosen and rejected each.
        heldout: the same, never trained on.
        out_dir: folder of the training; kept between runs for reuse and resume.
        plan: hyperparameters.

    Returns:
        The training; metrics heldout_accuracy and heldout_margin (implicit reward of chosen minus
        rejected, in nats times beta), heldout_loss, train_seconds, n_rows, n_left_out, n_heldout
        (the held-out pairs that were short enough).

    Raises:
        TrainingError: no row fits plan.tokens_max.
        LaunchError: one of several processes failed.

    Paper: Eq. 2.
    """
    key = training_key(base_dir, plan, rows, "dpo", folder_fingerprint(junior_dir))
    done = finished_training(out_dir, key)
    if done is not None:
        return done
    arguments = {
        "base_dir": str(base_dir),
        "junior_dir": str(junior_dir),
        "rows": list(rows),
        "heldout": list(heldout),
        "out_dir": str(out_dir),
        "plan": asdict(plan),
        "key": key,
    }
    return run_training("speed_utils.dpo:train_here", arguments, out_dir)


def train_here(
    base_dir: str,
    junior_dir: str,
    rows: list[dict],
    heldout: list[dict],
    out_dir: str,
    plan: dict,
    key: str,
) -> None:
    """Train in this process, alone or as one of several; arguments as train_dpo has them."""
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        """The library's trainer, whose resume reads the reference adapter and not the trained."""

        def _load_from_checkpoint(self, checkpoint, model=None):
            super()._load_from_checkpoint(checkpoint, model)
            self.model.load_adapter(checkpoint, "default", is_trainable=True)

    plan, out_dir = DpoPlan(**plan), Path(out_dir)
    disable_progress_bars()  # of tokenizing, which takes a moment
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    fitting = within_tokens(tokenizer, rows, plan.tokens_max)
    fitting_heldout = within_tokens(tokenizer, heldout, plan.tokens_max)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=device_and_dtype()[1])
    arguments = common_arguments(plan, out_dir, len(fitting))
    arguments["train_sampling_strategy"] = "random"  # pairs have no single length to group by
    arguments["pad_to_multiple_of"] = PAD_TO_TOKENS
    arguments["logging_first_step"] = True  # the loss of ln 2 is checked
    trainer = Trainer(
        model=PeftModel.from_pretrained(base, junior_dir, is_trainable=True),
        args=DPOConfig(beta=plan.beta, **arguments),
        train_dataset=Dataset.from_list(fitting),
        eval_dataset=Dataset.from_list(fitting_heldout),
        processing_class=tokenizer,
    )
    use_text_progress(trainer, "dpo")
    result = trainer.train(resume_from_checkpoint=has_checkpoint(out_dir) or None)
    after = trainer.evaluate()
    metrics = {
        "heldout_loss": after["eval_loss"],
        "heldout_accuracy": after["eval_rewards/accuracies"],
        "heldout_margin": after["eval_rewards/margins"],
        "train_seconds": result.metrics["train_runtime"],
        "n_rows": len(fitting),
        "n_left_out": len(rows) - len(fitting),
        "n_heldout": len(fitting_heldout),
    }
    save_training(trainer, out_dir, key, metrics)
