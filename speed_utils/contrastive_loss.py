"""The contrastive loss of Eq. 4 for batches of any size, over pairs and triplets in one batch.

Texts of a batch are encoded in groups of like length. A batch that exceeds ``mini_batch_tokens`` is
encoded twice, piece by piece (GradCache), so that memory does not grow with it; the loss and its
gradients stay those of the whole batch. Over several processes, each one's documents are the
others' negatives too.

    loss = ContrastiveLoss(model, temperature=0.02, mini_batch_tokens=8192)
    loss([anchors, positives, negatives], labels)  # labels: see text_labels

Paper: Section 3.3, Eq. 4. GradCache: Gao et al., 2021, by sentence-transformers' own machinery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor

ROWS_AT_ONCE = 256  # rows of the score matrix in memory
STRETCH_MAX = 1.25  # a text joins a group up to this many times its shortest
TOKENS_MIN = 96  # a group with fewer is not closed: small products use a processor badly
NO_TEXT = 0


def text_labels(positive: str, negative: str | None, *, has_in_batch: bool = True) -> list[int]:
    """What the loss must know of an example beside its tokens.

    Args:
        positive: its text decides which documents of a batch are not negatives.
        negative: None for a pair.
        has_in_batch: whether other examples' documents are its negatives.

    Returns:
        [id of the positive, id of the negative (0: none), 1 or 0], 62-bit integers.
    """
    ids = [NO_TEXT if text is None else _text_id(text) for text in (positive, negative)]
    return [*ids, int(has_in_batch)]


class ContrastiveLoss(CachedLossMixin, torch.nn.Module):
    """Negative log-likelihood of the positive among all documents that are not the same text.

    Attributes:
        n_tokens, n_padding: encoded so far, and how many of them were padding.
    """

    def __init__(self, model: torch.nn.Module, *, temperature: float, mini_batch_tokens: int):
        super().__init__()
        self.model = model
        self.scale = 1 / temperature
        self.mini_batch_size = 1  # unused: the number of tokens decides
        self.mini_batch_num_tokens = mini_batch_tokens
        self.n_tokens = self.n_padding = 0
        self._places = torch.empty(0)

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The mean loss over the batch.

        Args:
            sentence_features: tokens of anchors, positives and (optionally) negatives; a row
                without a negative holds any text there. input_ids and attention_mask of shape
                (batch, tokens), padded on the right.
            labels: as text_labels gives them. Shape (batch, 3), int64.
        """
        columns = list(sentence_features)[:3]
        texts, places = _flatten(columns, labels)
        lengths = texts["attention_mask"].sum(1)
        order = lengths.argsort(stable=True)
        self._places = places[order]
        pieces, is_cached = self._pieces(lengths[order].tolist())
        groups = [
            {name: value[order[rows.start : rows.stop]] for name, value in texts.items()}
            for rows in pieces
        ]
        groups = [_trimmed(group) for group in groups]
        n_all = sum(group["attention_mask"].numel() for group in groups)
        self.n_tokens += n_all
        self.n_padding += n_all - int(lengths.sum())
        if is_cached:
            return self.forward_cached(groups, labels)
        embeddings = [[self.model(dict(group))["sentence_embedding"]] for group in groups]
        return self.calculate_loss(embeddings, labels)

    def _pieces(self, lengths: list[int]) -> tuple[list[range], bool]:
        """Rows of ascending lengths that are encoded together, and whether they are encoded twice.

        Every process has as many pieces, since FSDP lets them encode in step.
        """
        pieces = length_groups(lengths)
        n_tokens = sum(lengths[rows[-1]] * len(rows) for rows in pieces)
        is_cached = (
            bool(_largest(n_tokens > self.mini_batch_num_tokens)) and torch.is_grad_enabled()
        )
        if is_cached:
            pieces = [
                part
                for rows in pieces
                for part in token_parts(rows, lengths, self.mini_batch_num_tokens)
            ]
        for _ in range(_largest(len(pieces)) - len(pieces)):
            rows = max(pieces, key=len)
            at, half = pieces.index(rows), len(rows) // 2
            pieces[at : at + 1] = [rows[:half], rows[half:]]
        return pieces, is_cached

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss from the embeddings of the groups, in the order of their texts."""
        flat = torch.cat([piece for pieces in reps for piece in pieces])
        n_rows, n_columns = len(labels), 2 + int((labels[:, 1] != NO_TEXT).any())
        if torch.distributed.is_initialized():  # all processes take part in the same gathers
            n_columns = 3
        table = flat.new_zeros(3 * n_rows, flat.shape[1]).index_copy(0, self._places, flat)
        anchors, *documents = table.view(3, n_rows, -1)[:n_columns]
        ids = [labels[:, column] for column in range(n_columns - 1)]
        if torch.distributed.is_initialized():
            documents = [all_gather_with_grad(column.contiguous()) for column in documents]
            ids = [all_gather(column.contiguous()) for column in ids]
            offset = torch.distributed.get_rank() * n_rows
        else:
            offset = 0
        total = _RowLoss(torch.cat(ids), len(ids[0]), offset, self.scale)
        if with_backward:
            return total.backward(anchors, torch.cat(documents), labels)
        return total(anchors, torch.cat(documents), labels)


class _RowLoss:
    """The loss of rows of scores, some at a time."""

    def __init__(self, ids: Tensor, n_world: int, offset: int, scale: float):
        self.ids, self.n_world, self.offset, self.scale = ids, n_world, offset, scale

    def __call__(self, anchors: Tensor, documents: Tensor, labels: Tensor) -> Tensor:
        """Mean over the anchors. Anchors (rows, width), documents (documents, width)."""
        parts = [self._sum(anchors, documents, labels, start) for start in self._starts(labels)]
        return sum(parts) / len(labels)

    def backward(self, anchors: Tensor, documents: Tensor, labels: Tensor) -> Tensor:
        """The same, with the gradients of both already propagated; memory for some rows only."""
        leaves = [tensor.detach().requires_grad_() for tensor in (anchors, documents)]
        total = torch.zeros((), device=anchors.device)
        for start in self._starts(labels):
            part = self._sum(*leaves, labels, start) / len(labels)
            part.backward()
            total += part.detach()
        torch.autograd.backward((anchors, documents), [leaf.grad for leaf in leaves])
        return total

    def _starts(self, labels: Tensor) -> range:
        return range(0, len(labels), ROWS_AT_ONCE)

    def _sum(self, anchors: Tensor, documents: Tensor, labels: Tensor, start: int) -> Tensor:
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, len(labels)), device=anchors.device)
        own = self.offset + rows
        here = torch.arange(len(rows), device=anchors.device)
        ids = labels[rows]
        is_candidate = (self.ids != NO_TEXT) & (self.ids != ids[:, :1]) & (ids[:, 2:] == 1)
        is_candidate[here, own] = True
        if len(self.ids) > self.n_world:
            is_candidate[here, self.n_world + own] = ids[:, 1] != NO_TEXT
        scores = (anchors[rows] @ documents.T).float() * self.scale
        scores = scores.masked_fill(~is_candidate, -torch.inf)
        return (scores.logsumexp(1) - scores[here, own]).sum()


def length_groups(lengths: list[int]) -> list[range]:
    """Cut ascending lengths into groups that waste little."""
    groups, start = [], 0
    for i, length in enumerate(lengths):
        is_full = lengths[i - 1] * (i - start) >= TOKENS_MIN if i > start else False
        if is_full and length > STRETCH_MAX * lengths[start]:
            groups.append(range(start, i))
            start = i
    return [*groups, range(start, len(lengths))]


def token_parts(rows: range, lengths: list[int], n_tokens: int) -> list[range]:
    """Cut rows into parts of at most so many tokens, padding included, or of one row."""
    parts, start = [], rows.start
    for row in rows:
        if row > start and lengths[row] * (row + 1 - start) > n_tokens:
            parts.append(range(start, row))
            start = row
    return [*parts, range(start, rows.stop)]


def _largest(number: int) -> int:
    """Over all processes."""
    if not torch.distributed.is_initialized():
        return number
    numbers = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(numbers, number)
    return max(numbers)


def _flatten(columns: list[dict[str, Tensor]], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """All texts of a batch in one table of tokens, and the place of each: column x batch + row.

    Several processes have as many rows each: there, what holds no text is a text of its EOS alone.
    """
    width = max(column["attention_mask"].shape[1] for column in columns)
    rows = torch.arange(len(labels), device=labels.device)
    is_text = labels[:, 1] != NO_TEXT
    with_negative = rows if torch.distributed.is_initialized() else rows[is_text]
    chosen = [rows, rows, with_negative][: len(columns)]
    texts = {
        name: torch.cat(
            [
                torch.nn.functional.pad(column[name], (0, width - column[name].shape[1]))[own]
                for column, own in zip(columns, chosen, strict=True)
            ]
        )
        for name in ("input_ids", "attention_mask")
    }
    places = [number * len(rows) + own for number, own in enumerate(chosen)]
    return texts, torch.cat(places)


def _trimmed(group: dict[str, Tensor]) -> dict[str, Tensor]:
    width = int(group["attention_mask"].sum(1).max())
    return {name: value[:, :width] for name, value in group.items()}


def _text_id(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2 or 1
