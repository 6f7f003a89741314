"""Encode the texts of a training batch in groups of like length, so that little is padding.

A mixed batch holds labels of two tokens beside documents of a hundred; padded together, half of
the work is for nothing. The embeddings, and so the loss and its gradients, are the same.

    loss = MultipleNegativesRankingLoss(LengthGroups(model))
"""

from __future__ import annotations

import torch

STRETCH_MAX = 1.25  # a text joins a group up to this many times its shortest
TOKENS_MIN = 96  # a group with fewer is not closed: small products use a processor badly


class LengthGroups(torch.nn.Module):
    """A SentenceTransformer that splits each batch by length; attributes are the model's own.

    Attributes:
        n_tokens, n_padding: tokens encoded so far, and how many of them were padding.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.n_tokens = self.n_padding = 0

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, features: dict, **kwargs) -> dict:
        """As the model's own; of its outputs, the sentence_embedding. Shape (texts, width)."""
        mask = features["attention_mask"]
        lengths = mask.sum(1)
        order = lengths.argsort()
        embeddings = []
        for rows in length_groups(lengths[order].tolist()):
            index = order[rows.start : rows.stop]
            width = int(lengths[index].max())
            part = {
                name: value[index, :width] if _is_per_token(value, mask) else value
                for name, value in features.items()
            }
            self.n_tokens += width * len(index)
            self.n_padding += width * len(index) - int(lengths[index].sum())
            embeddings.append(self.model(part, **kwargs)["sentence_embedding"])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return {**features, "sentence_embedding": torch.cat(embeddings)[back]}


def length_groups(lengths: list[int]) -> list[range]:
    """Cut ascending lengths into groups that waste little."""
    groups, start = [], 0
    for i, length in enumerate(lengths):
        is_full = lengths[i - 1] * (i - start) >= TOKENS_MIN if i > start else False
        if is_full and length > STRETCH_MAX * lengths[start]:
            groups.append(range(start, i))
            start = i
    return [*groups, range(start, len(lengths))]


def _is_per_token(value: object, mask: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape[:2] == mask.shape
