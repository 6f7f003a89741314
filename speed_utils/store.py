"""Finished completions on disk: what was asked once is never asked again.

A store is a JSON Lines file, one completion a line, named by its request's content hash. Lines are
appended and synced; memory holds the hashes and where their lines begin, not the texts.

    with Store(path) as store:
        store.add(completions)
        store.get(key)

Paper: not stated; ours, because teacher calls cost money and generation costs hours.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from speed_utils.engines import Completion

KEY_START = b'{"key": "'  # a line begins so, then come the 64 hex digits of its key
KEY_END = len(KEY_START) + 64
FREE_BYTES_MIN = 64 * 2**20  # nothing is asked with less than this left on the disk


class StoreError(RuntimeError):
    """A store cannot be written; the message says why and what to do."""


class Store:
    """Completions by their request's key; opened by one process at a time.

    A last line that a crash cut short is dropped on opening, a damaged one is as if not there, and
    the newest line of a key holds.

    Raises:
        StoreError: another process writes the store.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file.fileno()).st_ino != self.path.stat().st_ino:
                raise OSError("replaced while it was opened")
        except OSError:
            self._file.close()
            raise StoreError(
                f"{self.path} is being written by another process; wait for it, or give each "
                "process its own part with --shard"
            ) from None
        self._places: dict[bytes, int] = {}  # where each key's newest line begins
        self._n_lines = self._size = 0
        self._index()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def get(self, key: str) -> Completion | None:
        """The stored completion of a request key, or None."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        self._file.seek(place)
        try:
            completion = Completion(**json.loads(self._file.readline()))
        except (ValueError, TypeError):
            return None  # damaged: it will be asked again
        return completion if completion.key == key else None

    def add(self, completions: Iterable[Completion]) -> None:
        """Append completions in one write, and wait until the disk has them.

        Raises:
            StoreError: the disk is full; the store is as it was before.
        """
        lines = [(c.key, json.dumps(asdict(c), ensure_ascii=True) + "\n") for c in completions]
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write("".join(line for _, line in lines).encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._undo()
            raise StoreError(
                f"cannot write {self.path}: {error.strerror}; free some space and run the same "
                "command again"
            ) from None
        for key, line in lines:
            self._places[bytes.fromhex(key)] = self._size
            self._size += len(line)
            self._n_lines += 1

    def require_space(self) -> None:
        """Refuse to go on when answers that will be paid for might not fit.

        Raises:
            StoreError: less than FREE_BYTES_MIN are free.
        """
        free = shutil.disk_usage(self.path.parent).free
        if free < FREE_BYTES_MIN:
            raise StoreError(
                f"only {free // 2**20} MiB are free where {self.path} lies; free some space and "
                "run the same command again (all answers so far are kept)"
            )

    def arrange(self, keys: Sequence[str]) -> None:
        """Put the lines of these keys first, in this order, so that equal work is equal bytes.

        Whoever asked in whatever order, and whichever shard: the file comes out the same. Lines of
        other keys (of requests that have since changed) follow as they were.
        """
        wanted = dict.fromkeys(bytes.fromhex(key) for key in keys)
        ordered = [key for key in wanted if key in self._places]
        rest = [key for key in self._places if key not in wanted]
        places = [self._places[key] for key in ordered + rest]
        if places == sorted(places) and self._n_lines == len(places):
            return
        part = self.path.with_name(f"{self.path.name}.part")
        new_places, size = {}, 0
        try:
            part.unlink(missing_ok=True)
            file = part.open("a+b")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before it takes the store's name
            for key in ordered + rest:
                self._file.seek(self._places[key])
                line = self._file.readline()
                file.write(line)
                new_places[key], size = size, size + len(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StoreError(
                f"cannot arrange {self.path}: {error.strerror}; free some space and run the same "
                "command again (all answers are kept)"
            ) from None
        part.replace(self.path)
        self._file.close()
        self._file = file
        self._places, self._size, self._n_lines = new_places, size, len(new_places)

    def _index(self) -> None:
        """Note where each whole line begins; cut a torn last one."""
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(self._size)
                break
            key = _line_key(line)
            if key is not None:
                self._places[key] = self._size
            self._size += len(line)
            self._n_lines += 1

    def _undo(self) -> None:
        """Go back to the last whole write; what the buffer still holds must not come later."""
        with contextlib.suppress(OSError):  # the buffer cannot be written
            self._file.close()
        with self.path.open("r+b") as file:
            file.truncate(self._size)
        self._file = self.path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_completions(path: Path) -> Iterator[Completion]:
    """The whole, undamaged lines of a store, which another process may be writing."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield Completion(**json.loads(line))
            except (ValueError, TypeError):
                continue


def _line_key(line: bytes) -> bytes | None:
    if not (line.startswith(KEY_START) and line.endswith(b"}\n")):
        return None
    try:
        return bytes.fromhex(line[len(KEY_START) : KEY_END].decode("ascii"))
    except ValueError:
        return None
