"""Shards share out a stage's prompts; merged, their answers are those of one process."""

import pytest
from test_generation import REQUESTS, CountingEngine

from speed_utils import runs
from speed_utils.generation import generate
from speed_utils.records import Prompted
from speed_utils.shards import SHARD_VARIABLE, Shard, ShardError, block_numbers, parse_shard

PROMPTS = [
    Prompted(id=f"r{i}", kind="sts", topic="T", task="t", slots={}) for i in range(len(REQUESTS))
]


def test_every_item_is_in_one_shard():
    for count in (1, 2, 3, 8):
        parts = [Shard(i, count).part(range(8)) for i in range(count)]
        assert sorted(x for part in parts for x in part) == list(range(8))


def test_blocks_stay_together():
    blocks = block_numbers(PROMPTS, size=3)
    assert list(blocks.values()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [p.id for p in Shard(0, 2).part(PROMPTS, blocks)] == ["r0", "r1", "r2", "r6", "r7"]
    assert [p.id for p in Shard(1, 2).part(PROMPTS, blocks)] == ["r3", "r4", "r5"]
    with pytest.raises(ShardError, match="there is work for 3 shards"):
        Shard(3, 4).part(PROMPTS, blocks)


@pytest.mark.parametrize("text", ["", "2", "8/8", "-1/4", "1/0", "a/b", "1/2/3"])
def test_a_shard_is_index_and_count(text):
    with pytest.raises(ShardError, match="INDEX/COUNT"):
        parse_shard(text)
    assert parse_shard("0/8") == Shard(0, 8)


@pytest.mark.parametrize("atomic", [False, True])
def test_merged_shards_give_the_bytes_of_one_process_and_ask_nothing_again(
    tmp_path, monkeypatch, atomic
):
    monkeypatch.setenv("SPEED_OUTPUTS", str(tmp_path))
    blocks = block_numbers(PROMPTS, size=3)
    whole = generate(
        REQUESTS, CountingEngine(atomic_batches=atomic), tmp_path / "one.jsonl", blocks=blocks
    )
    asked = []
    for shard in ("1/2", "0/2"):
        monkeypatch.setenv(SHARD_VARIABLE, shard)
        stage = runs.Stage("09_synthesize", "r", {})
        own = {prompt.id for prompt in stage.part(PROMPTS, blocks)}
        engine = CountingEngine(atomic_batches=atomic)
        requests = [request for request in REQUESTS if request.id in own]
        generate(requests, engine, stage.output("senior.jsonl"), blocks=blocks)
        stage.finish()
        asked += engine.asked
    monkeypatch.delenv(SHARD_VARIABLE)
    assert runs.read_record("r", "09_synthesize") is None
    stage = runs.Stage("09_synthesize", "r", {})
    engine = CountingEngine(atomic_batches=atomic)
    merged = generate(REQUESTS, engine, stage.output("senior.jsonl"), blocks=blocks)
    assert engine.asked == [] and sorted(asked) == [request.id for request in REQUESTS]
    assert [c.text for c in merged] == [c.text for c in whole]
    assert stage.output("senior.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_shard_takes_over_what_the_whole_and_other_splits_have_answered(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_OUTPUTS", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        stage = runs.Stage("09_synthesize", "r", {})
        generate(REQUESTS, CountingEngine(fail_after=4), stage.output("senior.jsonl"))
    asked = []
    for shard in ("0/2", "1/2"):
        monkeypatch.setenv(SHARD_VARIABLE, shard)
        stage = runs.Stage("09_synthesize", "r", {})
        engine = CountingEngine()
        generate(stage.part(REQUESTS), engine, stage.output("senior.jsonl"))
        asked += engine.asked
    assert sorted(asked) == ["r4", "r5", "r6", "r7"]


def test_a_shard_leaves_its_own_record(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_OUTPUTS", str(tmp_path))
    monkeypatch.setenv(SHARD_VARIABLE, "1/4")
    stage = runs.Stage("03_write_seed_data", "r", {})
    assert stage.dir.name == "shard-1-of-4"
    stage.finish(n=1)
    assert runs.read_record("r", "03_write_seed_data", Shard(1, 4))["status"] == "done"
    assert runs.Stage("04_train_junior", "r", {}).shard is None
