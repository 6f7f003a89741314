"""Train the embedding model: contrastive LoRA tuning, last-token [EOS] pooling, instructions.

Reads examples, writes a plain sentence-transformers folder that anybody can load.

    training = train_embedder(base_dir, examples, out_dir, plan)
    SentenceTransformer(str(training.model_dir))

Paper: Section 3.3, Eq. 4; Appendix B. Temperature and learning rate are not stated there;
E5_mistral (whose recipe the paper follows) has temperature 0.02, learning rate 1e-4, LoRA rank 16
on all linear layers.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from speed_utils.batches import KindBatches
from speed_utils.contrastive_loss import ContrastiveLoss, text_labels
from speed_utils.embedder import (
    assert_features_end,
    build_embedder,
    query_text,
    save_embedder,
)
from speed_utils.launch import n_processes
from speed_utils.models import device_and_dtype
from speed_utils.records import KINDS, Example, write_text
from speed_utils.training import (
    CHECKPOINT_EVERY_STEPS,
    TrainingError,
    finished_training,
    has_checkpoint,
    run_training,
    training_key,
    use_text_progress,
)

CPU_ACTIVATION_BYTES = 2 * 2**30
CHECKPOINT_FILE = "trained.safetensors"
SCHEDULES = {"linear": "linear", "constant": "constant_with_warmup"}  # ours to transformers'
ATTENTIONS = ("causal", "bidirectional")


@dataclass(frozen=True)
class EmbedderPlan:
    """How the embedder is trained.

    Attributes:
        learning_rate: peak, reached after the warm-up (none below ten steps).
        epochs: passes over the data; fractions are allowed.
        batch_size: examples per step; each is the others' negative.
        mini_batch_tokens: tokens encoded with gradients at once; a batch with more is encoded
            twice, piece by piece, and needs no more memory for it. 0: what the memory allows.
        temperature: tau of Eq. 4.
        schedule: of the learning rate after the warm-up: "linear" decay to zero, or "constant"
            where a few dozen steps leave no time for a decay.
        tokens_max: of a query or document, EOS included; longer ones are cut.
        lora_rank: rank of the adapters on all linear layers; alpha is twice the rank.
        in_batch_negatives: where an example's negatives come from, beside its own: "all" examples
            of its batch, or those of its "kind" (batches are of one kind then); with " except "
            and kinds that take none, as in "all except classification" (labels are short, and
            right for many texts).
        attention: "causal" as in the paper; "bidirectional" lets every token see all others (an
            extension, as in LLM2Vec: the base was not trained for it).
        seed: of data order and adapter initialisation.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    mini_batch_tokens: int = 0
    temperature: float = 0.02
    schedule: str = "linear"
    tokens_max: int = 512
    lora_rank: int = 16
    in_batch_negatives: str = "all"
    attention: str = "causal"
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        for name, known in (("schedule", SCHEDULES), ("attention", ATTENTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        source, unknown = self._negatives()[0], self._negatives()[1] - set(KINDS)
        if source not in ("all", "kind") or unknown:
            raise ValueError(
                f"in_batch_negatives {self.in_batch_negatives!r} is neither all nor kind, "
                f"with or without ' except ' and some of {', '.join(KINDS)}"
            )

    def _negatives(self) -> tuple[str, set[str]]:
        source, _, kinds = self.in_batch_negatives.partition(" except ")
        return source, {kind.strip() for kind in kinds.split(",") if kind.strip()}

    @property
    def is_of_one_kind(self) -> bool:
        """Whether a batch has examples of one kind only."""
        return self._negatives()[0] == "kind"

    @property
    def own_negatives_only(self) -> set[str]:
        """Kinds whose examples have no negatives from the batch."""
        return self._negatives()[1]


@dataclass(frozen=True)
class EmbedderTraining:
    """A finished training: the model's folder, logged steps, metrics, and whether it was reused."""

    model_dir: Path
    history: list[dict]
    metrics: dict[str, float]
    was_reused: bool


def training_rows(
    examples: Sequence[Example], own_negatives_only: Collection[str] = ()
) -> dict[str, list[dict]]:
    """Examples as columns for the trainer, by kind: anchor, positive, negative and label.

    Queries carry the instruction, documents and labels do not. A pair's negative is the empty text,
    which the loss leaves out.
    """
    rows = defaultdict(list)
    for example in examples:
        has_in_batch = example.kind not in own_negatives_only
        row = {
            "anchor": query_text(example.task, example.query),
            "positive": example.positive,
            "negative": example.negative or "",
            "label": text_labels(example.positive, example.negative, has_in_batch=has_in_batch),
        }
        rows[example.kind].append(row)
    return dict(rows)


def train_embedder(
    base_dir: Path | str, examples: Sequence[Example], out_dir: Path, plan: EmbedderPlan
) -> EmbedderTraining:
    """Train by in-batch and hard negatives, merge the adapter, save the whole model.

    Args:
        base_dir: folder or hub name of the base model.
        examples: pairs and triplets of any kind.
        out_dir: folder of the training; ``out_dir/model`` is the result.
        plan: hyperparameters.

    Returns:
        The training; metrics n_examples, n_steps, n_processes, train_seconds, first_loss,
        last_loss, tokens_per_second (padding included), padding_share.

    Raises:
        TrainingError: no examples, an input without EOS, or a config for DeepSpeed.
        LaunchError: one of several processes failed.

    Paper: Eq. 4.
    """
    if not examples:
        raise TrainingError("no examples to train the embedder on; run 09 and 10 first")
    rows = training_rows(examples, plan.own_negatives_only)
    key = training_key(base_dir, plan, [r for kind in sorted(rows) for r in rows[kind]])
    done = _finished(out_dir, key)
    if done is not None:
        return done
    arguments = {
        "base_dir": str(base_dir),
        "rows": rows,
        "out_dir": str(out_dir),
        "plan": asdict(plan),
        "key": key,
    }
    run_training("speed_utils.contrastive:train_here", arguments, out_dir)
    return replace(_finished(out_dir, key), was_reused=False)


def train_here(base_dir: str, rows: dict[str, list[dict]], out_dir: str, plan: dict, key: str):
    """Train in this process, alone or as one of several that were started together.

    Args:
        base_dir: as for train_embedder.
        rows: as training_rows gives them.
        out_dir: as for train_embedder; training.json there tells when all is done.
        plan: the fields of an EmbedderPlan.
        key: of the training.

    Raises:
        TrainingError: DeepSpeed.
    """
    plan, folder = EmbedderPlan(**plan), Path(out_dir)
    model = build_embedder(base_dir, plan.tokens_max, plan.attention)
    _add_lora(model, plan)
    trainer = _trainer(model, rows, folder, plan)
    result = trainer.train(resume_from_checkpoint=has_checkpoint(folder) or None)
    model = _whole_model(trainer, base_dir, plan)
    if not trainer.is_world_process_zero():
        return
    _merge_lora(model)
    history = [row for row in trainer.state.log_history if "loss" in row]
    metrics = {
        "n_examples": sum(map(len, rows.values())),
        "n_steps": trainer.state.global_step,
        "n_processes": n_processes(),
        "train_seconds": result.metrics["train_runtime"],
        "first_loss": history[0]["loss"] if history else None,
        "last_loss": history[-1]["loss"] if history else None,
        "tokens_per_second": n_processes()
        * trainer.loss.n_tokens
        / result.metrics["train_runtime"],
        "padding_share": trainer.loss.n_padding / max(1, trainer.loss.n_tokens),
    }
    save_embedder(model, folder / "model", asdict(plan), metrics)
    state = {"key": key, "done": True, "history": history, "metrics": metrics}
    write_text(folder / "training.json", json.dumps(state, indent=1))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _add_lora(model: object, plan: EmbedderPlan) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(plan.seed)
    config = LoraConfig(
        r=plan.lora_rank,
        lora_alpha=2 * plan.lora_rank,
        target_modules="all-linear",
        task_type="FEATURE_EXTRACTION",
    )
    model[0].model = get_peft_model(model[0].model, config)
    for parameter in model[0].model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _merge_lora(model: object) -> None:
    model[0].model = model[0].model.merge_and_unload()


def _trainer(model: object, rows: dict, out_dir: Path, plan: EmbedderPlan) -> object:
    from accelerate.utils import parse_flag_from_env
    from datasets import Dataset
    from safetensors.torch import load_file, save_file
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    class Trainer(SentenceTransformerTrainer):
        """The library's trainer with our batches; a checkpoint holds what is trained, no more."""

        def get_batch_sampler(self, *_arguments, **_named):
            return batches

        def _save(self, output_dir=None, state_dict=None):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            trained = trained_weights(model)
            if state_dict is not None:  # FSDP's parameters are parts; these are whole
                trained = {name: state_dict[name] for name in trained}
            save_file(trained, Path(output_dir) / CHECKPOINT_FILE)

        def _load_from_checkpoint(self, checkpoint_path, *_arguments):
            saved = load_file(Path(checkpoint_path) / CHECKPOINT_FILE)
            if saved.keys() != trained_weights(model).keys():
                raise TrainingError(f"{checkpoint_path} is of another model; remove it")
            set_model_state_dict(
                model, saved, options=StateDictOptions(full_state_dict=True, strict=False)
            )

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise TrainingError(
            "the embedder's loss goes backward piece by piece, which DeepSpeed's engine does not "
            "do; take a config with DDP or FSDP (data/accelerate)"
        )
    # Accelerate takes a last module named after a norm for a language model's own, and FSDP cannot
    # spread this one; told that the base model is the first module, it finds none.
    model.base_model_prefix = "0"
    device, dtype = device_and_dtype()
    kinds = [kind if plan.is_of_one_kind else "" for kind in rows for _ in rows[kind]]
    batches = KindBatches(
        kinds, batch_size=plan.batch_size, n_processes=n_processes(), seed=plan.seed
    )
    n_steps = len(batches) // n_processes() * plan.epochs
    loss = ContrastiveLoss(
        model,
        temperature=plan.temperature,
        mini_batch_tokens=plan.mini_batch_tokens or tokens_in_memory(model),
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out_dir),
        learning_rate=plan.learning_rate,
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.batch_size // n_processes(),
        lr_scheduler_type=SCHEDULES[plan.schedule],
        warmup_steps=min(100, int(n_steps) // 10),
        logging_steps=max(1, int(n_steps) // 20),
        save_steps=CHECKPOINT_EVERY_STEPS,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed,
        use_cpu=device == "cpu",
        bf16="bfloat16" in str(dtype),
        accelerator_config={"even_batches": False},  # the batches are even already
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device == "cuda",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([row for own in rows.values() for row in own]),
        loss=loss,
    )
    _assert_eos_in_batches(trainer, model.tokenizer.eos_token_id)
    use_text_progress(trainer, "embedder")
    return trainer


def tokens_in_memory(model: object) -> int:
    """How many tokens may be encoded with gradients at once, by rule of thumb.

    A token's activations take about 34 numbers of the hidden size in each layer, in bfloat16 (two
    bytes a number). 2 GiB of a CPU's memory are given to them, and half of what is free of a GPU's.

    Source: Korthikanti et al., 2022, Section 4.1 (34 bytes at two bytes a number).
    """
    import torch

    config = model[0].model.config
    width = next(p for p in model.parameters() if not p.requires_grad).element_size()
    n_bytes = 17 * width * config.hidden_size * config.num_hidden_layers
    if torch.cuda.is_available():
        return max(1, torch.cuda.mem_get_info()[0] // 2 // n_bytes)
    return max(1, CPU_ACTIVATION_BYTES // n_bytes)


def trained_weights(model: object) -> dict[str, object]:
    """The parameters with gradients, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _whole_model(trainer: object, base_dir: str, plan: EmbedderPlan) -> object:
    """The trained model with all its weights on this process; FSDP has spread them."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    model = build_embedder(base_dir, plan.tokens_max, plan.attention)
    _add_lora(model, plan)
    model.load_state_dict(state)
    return model


def _assert_eos_in_batches(trainer: object, eos_id: int) -> None:
    collect = trainer.collect_features

    def collect_and_check(inputs):
        features, labels = collect(inputs)
        for feature in features:
            assert_features_end(feature, eos_id)
        return features, labels

    trainer.collect_features = collect_and_check


def _finished(out_dir: Path, key: str) -> EmbedderTraining | None:
    done = finished_training(out_dir, key)
    if done is None:
        return None
    return EmbedderTraining(out_dir / "model", done.history, done.metrics, True)
