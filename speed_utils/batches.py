"""The order in which the embedder sees its examples, the same for one process and for many.

    sampler = KindBatches(kinds, batch_size=1536, n_processes=8, seed=42)

A batch is cut into one part for each process, so that all processes of a step work on one batch.

Paper: Section 3.3 (batches); the mixing of kinds is not stated.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence


class KindBatches:
    """Shuffled batches of row numbers, of one kind each, or of all kinds where they are all equal.

    Each epoch has an order of its own that depends on seed and epoch alone, so that an interrupted
    training goes on with the batches it would have had.

    Attributes:
        sampler: this object; accelerate finds ``set_epoch`` under this name.
    """

    def __init__(self, kinds: Sequence[str], *, batch_size: int, n_processes: int, seed: int):
        """``kinds`` of all rows; ``batch_size`` over all processes.

        Raises:
            ValueError: the batch cannot be shared out evenly, or there are too few rows for it.
        """
        if batch_size % n_processes:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared out evenly to {n_processes} processes"
            )
        if len(kinds) < n_processes:
            raise ValueError(f"{len(kinds)} examples are too few for {n_processes} processes")
        self._groups = defaultdict(list)
        for row, kind in enumerate(kinds):
            self._groups[kind].append(row)
        self._size, self._n_processes = batch_size, n_processes
        self._seed, self._epoch = seed, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Parts in an epoch: as many as batches times processes."""
        rows = [
            len(group) // self._n_processes * self._n_processes for group in self._groups.values()
        ]
        return self._n_processes * sum(-(-n // self._size) for n in rows)

    def __iter__(self) -> Iterator[list[int]]:
        """The parts of each batch, one for each process, in the order of processes.

        The last batch of a kind may be smaller. What cannot be shared out evenly, fewer rows than
        processes, sits out this epoch; the next one shuffles anew. (A kind that has fewer rows than
        there are processes is therefore never met.)
        """
        rng = random.Random(f"batches|{self._seed}|{self._epoch}")
        batches = []
        for rows in self._groups.values():
            shuffled = rng.sample(rows, len(rows) // self._n_processes * self._n_processes)
            starts = range(0, len(shuffled), self._size)
            batches += [shuffled[start : start + self._size] for start in starts]
        rng.shuffle(batches)
        for batch in batches:
            size = len(batch) // self._n_processes
            for start in range(0, len(batch), size):
                yield batch[start : start + size]
