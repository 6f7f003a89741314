"""Encode texts that begin alike without encoding their beginning again and again.

All queries of a task carry one instruction, often a third of their tokens. In a causal model the
states of those tokens do not depend on what follows, so one row computes them for the batch.

    share_prefix(model)
    model.encode(queries, prompt="Instruct: Retrieve semantically similar text.\\nQuery: ")
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

PREFIX_TOKENS_MIN = 4  # a shorter prefix (or a single row) is not worth a second pass


def share_prefix(model: object) -> None:
    """Let a SentenceTransformer over a causal language model encode a batch's common prefix once.

    The embeddings stay the same up to rounding. Training must not use it: it is for inference.

    Args:
        model: its first module is a Transformer whose texts are padded on the right; one that
            pools anything but the last token, or reads both ways, is left as it is.
    """
    if getattr(model[1], "pooling_mode", None) != "lasttoken":
        return
    network = model[0].model
    if not getattr(network.config, "is_causal", True):
        return
    forward = network.forward

    def forward_sharing_prefix(input_ids, attention_mask, **kwargs):
        n_shared = common_prefix_length(input_ids, attention_mask)
        if torch.is_grad_enabled() or n_shared < PREFIX_TOKENS_MIN:
            return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        n_rows, n_tokens = input_ids.shape
        prefix = forward(input_ids=input_ids[:1, :n_shared], use_cache=True)
        cache = prefix.past_key_values
        cache.batch_repeat_interleave(n_rows)
        rest = forward(
            input_ids=input_ids[:, n_shared:],
            attention_mask=attention_mask,
            position_ids=torch.arange(n_shared, n_tokens, device=input_ids.device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        shared = prefix.last_hidden_state.expand(n_rows, -1, -1)
        return BaseModelOutputWithPast(torch.cat([shared, rest.last_hidden_state], dim=1))

    network.forward = forward_sharing_prefix


def common_prefix_length(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """How many first tokens all rows have in common, at least one token of each row left over.

    Shapes: both (rows, tokens). 0 for a single row.
    """
    if len(input_ids) < 2:
        return 0
    alike = (input_ids == input_ids[:1]).all(0) & attention_mask.all(0).bool()
    n_alike = int(alike.long().cumprod(0).sum())
    return min(n_alike, int(attention_mask.sum(1).min()) - 1)
