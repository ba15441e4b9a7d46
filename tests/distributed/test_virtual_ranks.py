# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Four ranks: four processes, two of two groups, one of four groups."""

import pytest
import torch
from ranks import METHODS, assert_close, build, method_cfgs, run_ranks, train

from mmdensecl.models.distributed import auto_virtual_ranks

RANKS, ROWS, STEPS = 4, 3, 3


def views_of_step(step):
    """The images of all ranks; each rank's are brighter than the last's."""
    generator = torch.Generator().manual_seed(100 + step)
    views = torch.randn(2, RANKS * ROWS, 3, 32, 32, generator=generator)
    for rank in range(RANKS):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        views[:, own] = (1 + rank) * views[:, own] + rank
    return list(views.double())


def own_views(process, processes):
    share = RANKS * ROWS // processes
    own = slice(process * share, (process + 1) * share)
    return [[x[own] for x in views_of_step(step)] for step in range(STEPS)]


def work(process, processes, cfgs):
    return {
        name: train(
            build(cfg, virtual_ranks=RANKS // processes),
            own_views(process, processes),
        )
        for name, cfg in cfgs.items()
    }


@pytest.fixture(scope='module')
def cfgs(tiny_cfg):
    # Two steps of twelve keys go past the end of a queue of sixteen.
    return method_cfgs(tiny_cfg, queue_len=16)


@pytest.fixture(scope='module')
def four_processes(cfgs, tmp_path_factory):
    return run_ranks(work, 4, tmp_path_factory.mktemp('four'), cfgs)


@pytest.fixture(scope='module')
def two_processes(cfgs, tmp_path_factory):
    return run_ranks(work, 2, tmp_path_factory.mktemp('two'), cfgs)


@pytest.fixture(scope='module')
def one_process(cfgs):
    return [
        {
            name: train(
                build(cfg, virtual_ranks=RANKS), own_views(0, 1), False
            )
            for name, cfg in cfgs.items()
        }
    ]


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('processes', ['one_process', 'two_processes'])
def test_ranks_of_any_kind(request, four_processes, processes, name):
    """Losses, gradients, and all that the first process saves."""
    results = [x[name] for x in request.getfixturevalue(processes)]
    expected = [x[name] for x in four_processes]
    for step in range(STEPS):
        losses = [
            {
                key: sum(x[step]['losses'][key] for x in xs) / len(xs)
                for key in xs[0][step]['losses']
            }
            for xs in (results, expected)
        ]
        assert_close(*losses)
        for result in results:
            assert_close(
                result[step]['gradients'], expected[0][step]['gradients']
            )
    state, other = (x[-1]['state'] for x in expected[:2])
    assert_close(results[0][-1]['state'], state)  # seeds included
    # Statistics of other ranks differ: those are really the first's.
    statistics = [key for key in state if 'running_mean' in key]
    assert any(not torch.allclose(state[x], other[x]) for x in statistics)


def test_one_group_is_another_method(cfgs, one_process):
    """Batch norm over all images gives other numbers: groups matter."""
    alone = train(build(cfgs['DenseCL']), own_views(0, 1), False)
    expected = one_process[0]['DenseCL'][0]['losses']['loss_dense']
    actual = alone[0]['losses']['loss_dense']
    assert (actual - expected).abs() > 1e-4


def test_a_last_batch_that_does_not_divide(cfgs):
    """Groups of 3, 3, 2 and 2 images; of fewer images groups of one."""
    model = build(cfgs['DenseCL'], virtual_ranks=4)
    sizes = []
    encode = type(model).encode

    def spy(backbone, neck, images):
        sizes.append(len(images))
        return encode(model, backbone, neck, images)

    model.encode = spy
    views = views_of_step(0)
    for size, expected in ((10, [3, 3, 2, 2]), (3, [1, 1, 1])):
        sizes.clear()
        outputs = model.loss([x[:size] for x in views])
        assert sizes == 2 * expected
        assert all(torch.isfinite(x) for x in outputs.values())
        before = int(model.queue.enqueued)
        model.queue.flush()
        assert int(model.queue.enqueued) == before + size


def test_auto(cfgs):
    sizes = {1: 1, 3: 1, 4: 2, 32: 2, 64: 2, 96: 3, 256: 8}
    assert {n: auto_virtual_ranks(n) for n in sizes} == sizes
    model = build(cfgs['DenseCL'], virtual_ranks='auto')
    model.loss(views_of_step(0))  # of twelve images
    assert model.virtual_ranks == 2


def test_statistics_are_updated_once_a_step(cfgs):
    model = build(cfgs['DenseCL'], virtual_ranks=4)
    model.loss(views_of_step(0))
    counts = {
        int(x) for n, x in model.named_buffers() if 'num_batches_tracked' in n
    }
    assert counts == {1}
