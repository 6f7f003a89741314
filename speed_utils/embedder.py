"""A causal language model as an embedder: built, checked, saved as anybody can load it.

    model = build_embedder(base_dir, tokens_max=512)
    model.encode([query_text("Retrieve an answer", "how do tides work")])

Paper: Section 3.3: the last token, an appended [EOS], is the embedding; instructions on the query.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from speed_utils.models import device_and_dtype
from speed_utils.records import record_id
from speed_utils.training import TrainingError

QUERY_TEMPLATE = "Instruct: {task}\nQuery: {query}"  # on the query side only (Section 3.3)
# Other implementations take a batch without padding, which has no mask, for a causal one.
UNMASKED = {"attn_implementation": "eager"}


def query_text(task: str, query: str) -> str:
    """The query with its task instruction, as in training and evaluation."""
    return QUERY_TEMPLATE.format(task=task, query=query)


def build_embedder(base_dir: Path | str, tokens_max: int, attention: str = "causal") -> object:
    """A causal language model as an embedder: its last token, an appended EOS, L2 normalised.

    The EOS is added by the saved tokenizer itself, so that a plain SentenceTransformer does it too;
    so is bidirectional attention by the saved configuration.

    Returns:
        A SentenceTransformer whose embeddings have shape (batch, hidden size), float32.

    Raises:
        TrainingError: the tokenizer cannot be made to append the EOS.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Pooling,
        Transformer,
    )

    device, dtype = device_and_dtype()
    # Without this, sentence-transformers renders every text through the base's chat template.
    text_only = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    is_causal = attention == "causal"
    transformer = Transformer(
        str(base_dir),
        max_seq_length=tokens_max,
        model_kwargs={"dtype": dtype, **({} if is_causal else UNMASKED)},
        modality_config=text_only,
        module_output_name="token_embeddings",
    )
    if not is_causal:
        transformer.model.config.is_causal = False  # transformers makes its masks by it
    transformer.tokenizer.chat_template = None
    _append_eos(transformer.tokenizer)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)
    model.max_seq_length = tokens_max
    assert_eos(model, ["a", "a longer text " * tokens_max])
    return model


def assert_eos(model: object, texts: Sequence[str]) -> None:
    """Check that every text ends with the EOS after tokenization, cut or not.

    Raises:
        TrainingError: one does not; its embedding would be that of another token.
    """
    features = model.preprocess(list(texts))
    assert_features_end(features, model.tokenizer.eos_token_id)


def assert_features_end(features: dict, eos_id: int) -> None:
    """Check that the last token of every row is the EOS; see assert_eos."""
    ids, mask = features["input_ids"], features["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    if not (ids.gather(1, last[:, None]).squeeze(1) == eos_id).all():
        raise TrainingError("an input does not end with the EOS token")


def save_embedder(model: object, model_dir: Path, settings: dict, metrics: dict) -> None:
    """Write the model in one step, as a plain sentence-transformers folder with a card.

    Args:
        model: as build_embedder gives it, trained.
        model_dir: is replaced.
        settings: of its training, for the card; with ``attention``.
        metrics: of its training: n_examples and n_steps.
    """
    part = model_dir.with_name(f"{model_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save(str(part), create_model_card=False)
    if settings["attention"] == "bidirectional":
        path = part / "sentence_bert_config.json"
        config = json.loads(path.read_text(encoding="utf8"))
        path.write_text(json.dumps({**config, "model_kwargs": UNMASKED}, indent=1), encoding="utf8")
    (part / "README.md").write_text(_model_card(settings, metrics), encoding="utf8")
    shutil.rmtree(model_dir, ignore_errors=True)
    part.rename(model_dir)


def _model_card(settings: dict, metrics: dict) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language: en
tags: [sentence-transformers, synthetic-data, speed-study]
---

# Embedding model trained on synthetic data ({record_id(settings, metrics)})

Trained by the SPEED study on {metrics["n_examples"]} synthesized examples in
{metrics["n_steps"]} steps. The last token (an EOS that the tokenizer appends) is the embedding.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/of/this/folder")
queries = ["Instruct: Retrieve text that answers the question\\nQuery: how do tides work"]
documents = ["The pull of the moon raises the sea twice a day."]
print(model.similarity(model.encode(queries), model.encode(documents)))
```

Queries carry the instruction, documents do not. For symmetric tasks both sides carry it.

| setting | value |
| --- | --- |
{rows}

Limits: English; a small base model and little data; not for decisions about people.
"""


def _append_eos(tokenizer: object) -> None:
    from tokenizers.processors import TemplateProcessing

    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    ids = tokenizer("x")["input_ids"]
    if ids[-1] == eos_id:
        return
    bos = [tokenizer.bos_token] if ids[0] == tokenizer.bos_token_id else []
    special = [(eos, eos_id)] + [(token, tokenizer.bos_token_id) for token in bos]
    single = [*bos, "$A", eos]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=[*single, "$B:1", f"{eos}:1"], special_tokens=special
    )
    if tokenizer("x")["input_ids"][-1] != eos_id:
        raise TrainingError(f"cannot make {type(tokenizer).__name__} append {eos!r}")
