"""The store survives crashes at any byte, a full disk, and two processes."""

import json
import subprocess
import sys
import textwrap

import pytest

from speed_utils.engines import Completion
from speed_utils.store import Store, StoreError, read_completions


def completion(i, text="text"):
    return Completion(f"{i:064x}", f"r{i}", f"{text} {i}", "stop", 3, 2)


def test_what_was_added_is_there_after_opening_again(tmp_path):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.add([completion(1), completion(2, "ünïcode\nand a new line")])
        store.add([completion(3)])
    with Store(path) as store:
        assert len(store) == 3
        assert store.get(completion(2).key) == completion(2, "ünïcode\nand a new line")
        assert store.get(completion(9).key) is None


@pytest.mark.parametrize("cut", range(1, 300, 13))
def test_a_store_cut_at_any_byte_keeps_its_whole_lines(tmp_path, cut):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.add([completion(i) for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    n_whole = whole[:-cut].count(b"\n")
    with Store(path) as store:
        assert [store.get(completion(i).key) is not None for i in range(3)] == [
            i < n_whole for i in range(3)
        ]
        store.add([completion(7)])
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_line_is_as_if_not_there(tmp_path):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.add([completion(i) for i in range(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:80] + b"\x00\xff" + lines[1][90:]
    path.write_bytes(b"".join(lines))
    with Store(path) as store:
        assert [store.get(completion(i).key) is None for i in range(3)] == [False, True, False]
        store.add([completion(1)])
    assert [c.id for c in read_completions(path)] == ["r0", "r2", "r1"]
    with Store(path) as store:
        assert store.get(completion(1).key) == completion(1)


def test_a_full_disk_is_said_and_the_store_stays_whole(tmp_path):
    # A file-size limit fails a write in its middle, as a full disk does.
    script = textwrap.dedent(
        """
        import resource, signal, sys
        sys.path.insert(0, "tests/unit")
        from test_store import Store, StoreError, completion
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with Store(sys.argv[1]) as store:
            store.add([completion(i) for i in range(10)])
            try:
                store.add([completion(i) for i in range(10, 60)])
            except StoreError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
            store.add([completion(99)])
            assert store.get(completion(9).key) == completion(9)
        """
    )
    path = tmp_path / "s.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert "free some space and run the same command again" in done.stdout
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [
        *(f"r{i}" for i in range(10)),
        "r99",
    ]


def test_a_nearly_full_disk_is_refused_before_anything_is_paid(tmp_path, monkeypatch):
    monkeypatch.setattr("speed_utils.store.FREE_BYTES_MIN", 2**62)
    with Store(tmp_path / "s.jsonl") as store, pytest.raises(StoreError, match="MiB are free"):
        store.require_space()


def test_one_process_writes_a_store_at_a_time(tmp_path):
    with Store(tmp_path / "s.jsonl"), pytest.raises(StoreError, match="--shard"):
        Store(tmp_path / "s.jsonl")
    Store(tmp_path / "s.jsonl").close()


def test_equal_work_in_any_order_is_equal_bytes(tmp_path):
    keys = [completion(i).key for i in range(5)]
    orders = {"a": [0, 1, 2, 3, 4], "b": [4, 2, 0, 1, 3], "c": [3, 3, 1, 0, 4, 2]}
    for name, order in orders.items():
        with Store(tmp_path / name) as store:
            for i in order:
                store.add([completion(i)])
            store.arrange(keys)
            assert store.get(keys[3]) == completion(3)
            store.arrange(keys)
    assert len({(tmp_path / name).read_bytes() for name in orders}) == 1


def test_arranging_keeps_what_is_not_asked_for_any_more(tmp_path):
    with Store(tmp_path / "s") as store:
        store.add([completion(i) for i in (3, 8, 1)])
        store.arrange([completion(1).key, completion(3).key])
    assert [c.id for c in read_completions(tmp_path / "s")] == ["r1", "r3", "r8"]
