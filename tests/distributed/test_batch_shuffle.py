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
    result = dict(exchanged={}, shuffled=[], returned=[], restored=[])
    for name, x in global_batches(world_size).items():
        for order_name, order in orders(world_size).items():
            result['exchanged'][f'{name}/{order_name}'] = exchange_rows(
                own(x, rank), order
            )
    torch.manual_seed(rank)  # as with mmengine's diff_rank_seed
    shuffle = BatchShuffle()
    packed = [global_batches(world_size)[k] for k in ('images', 'double')]
    packed = [own(x, rank).float() for x in packed] + [
        own(torch.arange(ROWS * world_size), rank).float()[:, None]
    ]
    for _ in range(4):
        numbers, order = shuffle.shuffle(
            own(torch.arange(ROWS * world_size), rank)
        )
        result['shuffled'].append(numbers)
        (returned,) = shuffle.unshuffle([numbers[:, None]], order)
        result['returned'].append(returned.flatten())
        there = [exchange_rows(x, torch.argsort(order)) for x in packed]
        result['restored'].append(shuffle.unshuffle(there, order))
    result['packed'] = packed
    # A resumed run goes on where the other was.
    resumed = BatchShuffle()
    resumed.load_state_dict(shuffle.state_dict())
    numbers = own(torch.arange(ROWS * world_size), rank)
    result['continued'] = [
        [each.shuffle(numbers)[0] for _ in range(3)]
        for each in (shuffle, resumed)
    ]
    result['seed'] = shuffle.seed
    return result


@pytest.fixture(scope='module', params=[2, 3])
def ranks(request, tmp_path_factory):
    """World size, and what each rank returned."""
    world_size = request.param
    return world_size, run_ranks(
        work, world_size, tmp_path_factory.mktemp('ranks')
    )


class TestExchangeRows:
    @pytest.mark.parametrize('name', global_batches(2))
    def test_is_global_indexing(self, ranks, name):
        world_size, results = ranks
        rows = global_batches(world_size)[name]
        for order_name, order in orders(world_size).items():
            received = torch.cat(
                [x['exchanged'][f'{name}/{order_name}'] for x in results]
            )
            assert torch.equal(received, rows[order]), order_name


class TestBatchShuffle:
    def test_each_step_is_another_permutation_of_all_rows(self, ranks):
        world_size, results = ranks
        steps = zip(*(x['shuffled'] for x in results), strict=True)
        steps = {tuple(torch.cat(step).tolist()) for step in steps}
        assert len(steps) == 4
        assert {tuple(sorted(x)) for x in steps} == {
            tuple(range(ROWS * world_size))
        }

    def test_brings_rows_of_other_ranks(self, ranks):
        """Each rank's batch is mixed, in one step at least."""
        for rank, result in enumerate(ranks[1]):
            foreign = [(x // ROWS != rank).sum() for x in result['shuffled']]
            assert any(0 < n < ROWS for n in foreign)

    def test_unshuffle_is_the_way_back(self, ranks):
        """For several tensors of different shapes at once."""
        world_size, results = ranks
        for rank, result in enumerate(results):
            numbers = own(torch.arange(ROWS * world_size), rank)
            assert all(torch.equal(x, numbers) for x in result['returned'])
            for restored in result['restored']:
                assert len(restored) == len(result['packed']) == 3
                for a, b in zip(restored, result['packed'], strict=True):
                    assert torch.equal(a, b)

    def test_state_continues_the_sequence(self, ranks):
        _, results = ranks
        for result in results:
            went_on, resumed = result['continued']
            for a, b in zip(went_on, resumed, strict=True):
                assert torch.equal(a, b)
            assert not torch.equal(went_on[0], result['shuffled'][0])
        assert len({x['seed'] for x in results}) == 1


class TestOneProcess:
    def test_nothing_happens(self):
        shuffle, x = BatchShuffle(), torch.randn(4, 2)
        shuffled, order = shuffle.shuffle(x)
        assert shuffled is x
        assert order is None
        (restored,) = shuffle.unshuffle([x], order)
        assert restored is x

    def test_state_before_the_first_step(self):
        shuffle = BatchShuffle()
        other = BatchShuffle()
        other.seed, other.step = 3, 9
        other.load_state_dict(shuffle.state_dict())
        assert other.seed is None and other.step == 0
