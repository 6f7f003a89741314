"""One part of a stage's prompts, so that many processes share the work of one stage.

``--shard 2/8`` (counted from 0, as Slurm counts array tasks) reaches the notebook's kernel in an
environment variable. A shard writes into a folder of its own; the same stage without ``--shard``
then finds all its answers there, and its artifacts are those of a single process.

Paper: not stated; 1.15 million examples are more than one process should write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from speed_utils.records import Prompted

SHARD_VARIABLE = "SPEED_SHARD"
SHARDED_STAGES = (
    "03_write_seed_data",
    "05_build_preferences",
    "07_write_revisions",
    "09_synthesize",
)
BLOCK_PROMPTS = 128

T = TypeVar("T")


class ShardError(ValueError):
    """Not a shard, or one without work."""


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count`` parts."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """Of its folder and files: "shard-2-of-8"."""
        return f"shard-{self.index}-of-{self.count}"

    def part(self, items: Sequence[T], blocks: Mapping[str, int] | None = None) -> list[T]:
        """The items of this shard: those of every ``count``-th block, or every ``count``-th item.

        Args:
            items: all of the stage's; with blocks, each has an ``id``.
            blocks: id to block number; None where each item may be answered on its own.

        Raises:
            ShardError: none is left for this shard.
        """
        numbers = range(len(items)) if blocks is None else [blocks[item.id] for item in items]
        own = [x for x, n in zip(items, numbers, strict=True) if n % self.count == self.index]
        if not own:
            raise ShardError(
                f"nothing is left for {self.name}; there is work for {len(set(numbers))} shards"
            )
        return own


def block_numbers(prompts: Sequence[Prompted], size: int = BLOCK_PROMPTS) -> dict[str, int]:
    """Prompt id to block: prompts that may be answered in one batch, and go to one shard."""
    return {prompt.id: position // size for position, prompt in enumerate(prompts)}


def parse_shard(text: str) -> Shard:
    """Read "2/8".

    Raises:
        ShardError: another form, or an index that is not below the count.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise ShardError(f"--shard is INDEX/COUNT, 0/8 to 7/8 for eight parts; got {text!r}")
    return Shard(int(match[1]), int(match[2]))


def current_shard() -> Shard | None:
    """The shard that this process works on, or None for the whole."""
    text = os.environ.get(SHARD_VARIABLE)
    return parse_shard(text) if text else None


def shard_files(path: Path) -> list[Path]:
    """The files of this name that the whole stage and its shards have, other than this one."""
    folder = path.parent
    if re.fullmatch(r"shard-\d+-of-\d+", folder.name):
        folder = folder.parent
    found = [folder / path.name, *sorted(folder.glob(f"shard-*-of-*/{path.name}"))]
    return [file for file in found if file != path and file.is_file()]
