# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Rows that move between two and three real processes."""

import pytest
import torch
from ranks import run_ranks

from mmdensecl.models import BatchShuffle, exchange_rows

ROWS = 5  # of each rank


def global_batches(world_size):
    """Batches of all ranks together, told apart by their values."""
    size = ROWS * world_size
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 3, 4, 6, generator=generator)
    return dict(
        numbers=torch.arange(size),
        double=torch.randn(size, 2, 3, generator=generator).double(),
        images=images,
        channels_last=images.to(memory_format=torch.channels_last),
        transposed=torch.arange(4 * size).view(4, size).t(),
    )


def orders(world_size):
    size = ROWS * world_size
    generator = torch.Generator().manual_seed(4)
    return dict(
        identity=torch.arange(size),
        reverse=torch.arange(size).flip(0),
        next_rank=torch.arange(size).roll(ROWS),
        **{
            f'random_{i}': torch.randperm(size, generator=generator)
            for i in range(4)
        },
    )


def own(x, rank):
    return x[rank * ROWS : (rank + 1) * ROWS]


def work(rank, world_size):
    """Everything that the tests below look at, in one go."""
    batches = global_batches(world_size)
    exchanged = {
        (name, order_name): exchange_rows(own(x, rank), order)
        for name, x in batches.items()
        for order_name, order in orders(world_size).items()
    }
    torch.manual_seed(rank)  # as with mmengine's diff_rank_seed
    shuffle = BatchShuffle()
    numbers = own(batches['numbers'], rank)
    # Of different shapes; they travel together.
    packed = [own(batches[x], rank).float() for x in ('images', 'double')]
    packed.append(numbers.float()[:, None])
    shuffled, restored = [], []
    for _ in range(4):
        mixed, order = shuffle.shuffle(numbers)
        shuffled.append(mixed)
        there = [exchange_rows(x, torch.argsort(order)) for x in packed]
        restored.append(shuffle.unshuffle(there, order))
        (back,) = shuffle.unshuffle([mixed[:, None]], order)
        assert torch.equal(back.flatten(), numbers)
    # A resumed run goes on where the other was.
    resumed = BatchShuffle()
    resumed.load_state_dict(shuffle.state_dict())
    for _ in range(3):
        mixed, _ = shuffle.shuffle(numbers)
        shuffled.append(mixed)
        assert torch.equal(mixed, resumed.shuffle(numbers)[0])
    return exchanged, shuffled, packed, restored, shuffle.seed


@pytest.fixture(scope='module', params=[2, 3])
def ranks(request, tmp_path_factory):
    """World size, and of each rank what it returned."""
    folder = tmp_path_factory.mktemp('ranks')
    results = run_ranks(work, request.param, folder)
    return request.param, *zip(*results, strict=True)


def test_exchange_is_global_indexing(ranks):
    world_size, exchanged, *_ = ranks
    for name, rows in global_batches(world_size).items():
        for order_name, order in orders(world_size).items():
            received = [x[name, order_name] for x in exchanged]
            assert torch.equal(torch.cat(received), rows[order]), order_name


def test_each_step_is_another_permutation_of_all_rows(ranks):
    """With rows of other ranks in each batch, in one step at least."""
    world_size, _, shuffled, *_, seeds = ranks
    assert len(set(seeds)) == 1
    steps = [torch.cat(x).tolist() for x in zip(*shuffled, strict=True)]
    assert len({*map(tuple, steps)}) == len(steps) == 7
    assert all(sorted(x) == [*range(ROWS * world_size)] for x in steps)
    for rank, batches in enumerate(shuffled):
        foreign = [(x // ROWS != rank).sum() for x in batches]
        assert any(0 < n < ROWS for n in foreign)


def test_unshuffle_is_the_way_back(ranks):
    """For several tensors of different shapes at once."""
    _, _, _, packed, restored, _ = ranks
    for before, steps in zip(packed, restored, strict=True):
        for after in steps:
            assert len(after) == len(before) == 3
            for a, b in zip(after, before, strict=True):
                assert torch.equal(a, b)


def test_one_process():
    """Nothing happens; the state is that before the first step."""
    shuffle, x = BatchShuffle(), torch.randn(4, 2)
    shuffled, order = shuffle.shuffle(x)
    assert shuffled is x and order is None
    (restored,) = shuffle.unshuffle([x], order)
    assert restored is x
    other = BatchShuffle()
    other.seed, other.step = 3, 9
    other.load_state_dict(shuffle.state_dict())
    assert other.seed is None and other.step == 0
