"""The order of batches: complete, even, of one kind, the same for any number of processes."""

import pytest

from speed_utils.batches import KindBatches

KINDS = ["sts"] * 13 + ["retrieval"] * 7 + ["matching_long"] * 4


def steps_of(sampler, n_processes):
    """The batches of steps, each as the parts of its processes."""
    parts = list(sampler)
    assert len(parts) == len(sampler)
    return [parts[i : i + n_processes] for i in range(0, len(parts), n_processes)]


def test_every_row_is_met_once_and_kinds_stay_apart():
    sampler = KindBatches(KINDS, batch_size=4, n_processes=1, seed=1)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(KINDS)))
    assert all(len({KINDS[row] for row in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 4


def test_epochs_differ_and_repeat():
    sampler = KindBatches([""] * 9, batch_size=4, n_processes=1, seed=1)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = KindBatches([""] * 9, batch_size=4, n_processes=1, seed=1)
    again.set_epoch(1)
    assert list(again) == second
    assert list(KindBatches([""] * 9, batch_size=4, n_processes=1, seed=2)) != first


@pytest.mark.parametrize("kinds", [KINDS, [""] * len(KINDS)])
def test_processes_share_the_batches_of_one(kinds):
    one = KindBatches(kinds, batch_size=4, n_processes=1, seed=3)
    two = KindBatches(kinds, batch_size=4, n_processes=2, seed=3)
    steps = steps_of(two, 2)
    assert all(len(parts) == 2 and len(parts[0]) == len(parts[1]) > 0 for parts in steps)
    assert all(len({kinds[row] for part in parts for row in part}) == 1 for parts in steps)
    rows = [row for parts in steps for part in parts for row in part]
    assert len(set(rows)) == len(rows)
    assert len(kinds) - len(rows) == sum(kinds.count(kind) % 2 for kind in set(kinds))
    if len(set(kinds)) == 1:
        assert [first + second for first, second in steps_of(two, 2)] == list(one)


def test_accelerate_gives_each_process_its_part():
    from accelerate.data_loader import BatchSamplerShard

    sampler = KindBatches(KINDS, batch_size=4, n_processes=2, seed=3)
    expected = steps_of(sampler, 2)
    for rank in range(2):
        shard = BatchSamplerShard(sampler, 2, rank, even_batches=False)
        assert list(shard) == [parts[rank] for parts in expected]
        assert len(shard) == len(expected)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="cannot be shared out evenly to 2"):
        KindBatches(KINDS, batch_size=5, n_processes=2, seed=1)
    with pytest.raises(ValueError, match="too few for 8"):
        KindBatches(["sts"] * 7, batch_size=8, n_processes=8, seed=1)
