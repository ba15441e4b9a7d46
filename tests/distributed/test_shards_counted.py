# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Every picture of shards, counted over the ranks of an epoch.

Neither the ranks nor their batches divide the number of pictures. How a run
on shards is stopped and goes on is in tests/tools/test_resume.py.
"""

from collections import Counter

import pytest
from mmengine.dataset import DefaultSampler
from runs import tool
from torch.utils.data import BatchSampler

from mmdensecl.datasets import ShardSampler, UnlabeledShards
from mmdensecl.testing import write_pictures

COUNT, IN_SHARD, EPOCHS = 49, 6, 3  # the last shard holds one


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    write_pictures(folder / 'pictures', COUNT, size=40)
    convert = 'dataset_converters/folder_to_shards.py pictures shards'
    tool(f'{convert} --max-count {IN_SHARD}', folder)
    dataset = UnlabeledShards(str(folder / 'shards'))
    assert dataset.shard_sizes == [IN_SHARD] * 8 + [1]
    return dataset


@pytest.fixture
def batches(monkeypatch):
    """Function that gives the batches of each rank in an epoch."""

    def batches(sampler, dataset, epoch, ranks, batch):
        result = []
        for rank in range(ranks):
            monkeypatch.setattr(
                f'{sampler.__module__}.get_dist_info',
                lambda at=(rank, ranks): at,
            )
            options = {} if sampler is DefaultSampler else dict(window=2)
            each = sampler(dataset, seed=0, **options)
            each.set_epoch(epoch)
            result.append([*BatchSampler(each, batch, drop_last=True)])
        return result

    return batches


@pytest.mark.parametrize('sampler', [ShardSampler, DefaultSampler])
@pytest.mark.parametrize('ranks', [1, 3, 8])
@pytest.mark.parametrize('batch', [1, 4])
def test_what_comes_twice_and_what_is_left_out(
    sampler, ranks, batch, dataset, batches
):
    """Counted, against the formula of docs/reliability.md."""
    share = -(-COUNT // ranks)
    left_out = share % batch  # of each rank
    epochs = []
    for epoch in range(EPOCHS):
        each = batches(sampler, dataset, epoch, ranks, batch)
        assert {len(x) for x in each} == {share // batch}
        drawn = Counter(sum(sum(each, []), []))
        assert sum(drawn.values()) == ranks * (share - left_out)
        assert max(drawn.values()) <= 2
        twice = sum(x == 2 for x in drawn.values())
        assert twice <= ranks * share - COUNT < ranks
        if not left_out:
            assert len(drawn) == COUNT
            assert twice == ranks * share - COUNT
        epochs.append(each)
    # Other pictures are left out in each epoch.
    assert epochs[0] != epochs[1] != epochs[2]
