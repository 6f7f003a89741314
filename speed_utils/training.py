"""What supervised fine-tuning and preference optimization share: plan, resume, progress, history.

A training is named by its inputs: trained again with the same data and plan, it is read from disk;
interrupted, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from speed_utils.launch import launch, n_processes
from speed_utils.models import device_and_dtype, folder_fingerprint
from speed_utils.records import write_text

CHECKPOINT_EVERY_STEPS = 20


class TrainingError(RuntimeError):
    """A training cannot start: no data, or examples longer than the model is trained on."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a generator is trained.

    Attributes:
        learning_rate: peak, decayed linearly after the warm-up (none below ten steps).
        epochs: passes over the data; fractions are allowed.
        batch_size: examples (or pairs) per optimizer step.
        device_batch_size: of these, how many at once; the rest is accumulated.
        tokens_max: prompt and answer together; longer examples are left out, and counted.
        lora_rank: rank of the adapters on all linear layers; alpha is twice the rank.
        seed: of data order and adapter initialisation.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    device_batch_size: int = 2
    tokens_max: int = 512
    lora_rank: int = 16
    seed: int = 42


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        adapter_dir: folder of the PEFT adapter.
        history: logged steps: step, loss and, where known, eval_loss and more.
        metrics: flat name to number.
        was_reused: True when it was read from disk instead of trained.
    """

    adapter_dir: Path
    history: list[dict]
    metrics: dict[str, float]
    was_reused: bool


def training_key(base_dir: Path | str, plan: TrainingPlan, rows: Sequence[dict], *more: str) -> str:
    """SHA-256 of all that decides a training: base weights, plan and data."""
    parts = [folder_fingerprint(base_dir), asdict(plan), list(rows), *more]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished_training(out_dir: Path, key: str) -> Training | None:
    """The training of this key in ``out_dir``, or None; leftovers of another key are cleared."""
    path = out_dir / "training.json"
    if path.is_file():
        state = json.loads(path.read_text(encoding="utf8"))
        if state["key"] == key and state["done"]:
            return Training(out_dir / "adapter", state["history"], state["metrics"], True)
        if state["key"] == key:
            return None
    shutil.rmtree(out_dir, ignore_errors=True)
    write_text(path, json.dumps({"key": key, "done": False}))
    return None


def save_training(trainer: object, out_dir: Path, key: str, metrics: dict) -> None:
    """Save adapter and history, mark the training as done, remove its checkpoints.

    Called by every process of a training; the first one writes.

    Args:
        trainer: a trained TRL trainer.
        out_dir: folder of the training.
        key: as training_key gives it.
        metrics: flat name to number.
    """
    adapter_dir = out_dir / "adapter"
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(adapter_dir, state_dict=weights, selected_adapters=["default"])
    logged = trainer.state.log_history
    history = [row for row in logged if "loss" in row or "eval_loss" in row]
    state = {"key": key, "done": True, "history": history, "metrics": metrics}
    write_text(out_dir / "training.json", json.dumps(state, indent=1))
    for checkpoint in out_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def run_training(function: str, arguments: dict, out_dir: Path) -> Training:
    """Call a training function here, or in all processes that accelerate is to start.

    Args:
        function: "module:function"; it leaves a finished training.json in out_dir.
        arguments: of the call, as JSON can hold them; must have ``key``.
        out_dir: folder of the training.

    Raises:
        LaunchError: one of several processes failed.
    """
    launch(function, arguments, out_dir)
    return replace(finished_training(out_dir, arguments["key"]), was_reused=False)


def has_checkpoint(out_dir: Path) -> bool:
    """Whether an interrupted training left a checkpoint to go on from."""
    return any((path / "trainer_state.json").is_file() for path in out_dir.glob("checkpoint-*"))


def common_arguments(plan: TrainingPlan, out_dir: Path, n_rows: int) -> dict:
    """Trainer arguments that both trainers share.

    Raises:
        TrainingError: no rows.
    """
    if n_rows == 0:
        raise TrainingError("no training rows; check tokens_max and the stage before")
    device, dtype = device_and_dtype()
    share = max(1, plan.batch_size // n_processes())
    device_batch = min(plan.device_batch_size, share, n_rows)
    accumulation = max(1, share // device_batch)
    n_steps = math.ceil(n_rows / (device_batch * accumulation * n_processes()) * plan.epochs)
    return {
        "output_dir": str(out_dir),
        "learning_rate": plan.learning_rate,
        "num_train_epochs": plan.epochs,
        "per_device_train_batch_size": device_batch,
        "per_device_eval_batch_size": device_batch,
        "gradient_accumulation_steps": accumulation,
        "max_length": plan.tokens_max,
        "seed": plan.seed,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(10, n_steps // 10),
        "logging_steps": max(1, n_steps // 20),
        "save_steps": CHECKPOINT_EVERY_STEPS,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "bf16": "bfloat16" in str(dtype),
        "gradient_checkpointing": device == "cuda",
        "dataloader_pin_memory": device == "cuda",
    }


def lora_config(rank: int) -> object:
    """LoRA on all linear layers, alpha twice the rank, for a causal language model."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


class ProgressBar(TrainerCallback):
    """A text progress bar that reads the same in a terminal, papermill and JupyterLab."""

    def __init__(self, title: str):
        self._title, self._bar = title, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._title)

    def on_step_end(self, args, state, control, **kwargs):
        """Advance by one optimizer step."""
        self._bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest loss."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self._bar.close()


def use_text_progress(trainer: object, title: str) -> None:
    """Replace the notebook widget of the trainer by a text bar."""
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils.notebook import NotebookProgressCallback

    for callback in (NotebookProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar(title))
