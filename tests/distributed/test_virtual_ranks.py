# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Four ranks: four processes, two of two groups, one of four groups."""
import numpy as np
import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from ranks import run_ranks

from mmdensecl.models.distributed import auto_virtual_ranks
from mmdensecl.registry import MODELS

RANKS, ROWS, STEPS = 4, 3, 3


def build(cfg, virtual_ranks):
    torch.manual_seed(0)
    np.random.seed(0)  # what shared seeds are drawn from
    model = MODELS.build({**cfg, 'virtual_ranks': virtual_ranks})
    with torch.no_grad():  # Not equal, so that mistaking them shows.
        for x in model.encoder_k.parameters():
            x.add_(0.1 * torch.randn_like(x))
    # SyncBN aside, this is what a distributed run trains: batch statistics.
    return model.double().train()


def views_of_step(step):
    """The images of all ranks; each rank's are brighter than the last's."""
    generator = torch.Generator().manual_seed(100 + step)
    views = torch.randn(2, RANKS * ROWS, 3, 32, 32, generator=generator)
    for rank in range(RANKS):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        views[:, own] = (1 + rank) * views[:, own] + rank
    return list(views.double())


def train(model, wrapper, process, processes):
    """Losses and gradients of three steps, and the state after them."""
    optimizer = torch.optim.SGD(
        [x for x in model.parameters() if x.requires_grad],
        lr=0.05,
        momentum=0.9)
    steps = []
    share = RANKS * ROWS // processes
    own = slice(process * share, (process + 1) * share)
    for step in range(STEPS):
        outputs = wrapper([x[own] for x in views_of_step(step)],
                          None,
                          mode='loss')
        optimizer.zero_grad()
        losses = {n: x for n, x in outputs.items() if 'loss' in n}
        sum(losses.values()).backward()
        steps.append(
            dict(
                losses={n: x.detach()
                        for n, x in losses.items()},
                gradients={
                    n: x.grad.clone()
                    for n, x in model.named_parameters() if x.requires_grad
                }))
        optimizer.step()
    state = {n: x for n, x in model.state_dict().items() if x.numel()}
    return dict(steps=steps, state=state)


def work(process, processes, cfgs):
    result = {}
    for name, cfg in cfgs.items():
        model = build(cfg, RANKS // processes)
        wrapper = MMDistributedDataParallel(
            module=model, device_ids=None, broadcast_buffers=False)
        result[name] = train(model, wrapper, process, processes)
    return result


NAMES = ('MoCoV2', 'DenseCL', 'DenseCL_cells', 'DenseCL_weighted', 'DSC_KM',
         'DSC_PM')


@pytest.fixture(scope='module')
def cfgs(tiny_cfg):
    kmeans = dict(type='mmdensecl.KMeansCategoryHead', num_clusters=6)
    prototypes = dict(
        type='mmdensecl.PrototypeCategoryHead', num_prototypes=6, feat_dim=4)
    weighted = dict(type='mmdensecl.BackboneSimilarity', weight_power=2.)
    # Two steps of twelve keys go past the end of a queue of sixteen.
    own = dict(momentum=0.1, queue_len=16)
    dsc = dict(type='mmdensecl.DSC', num_samples=5, **own)
    return dict(
        MoCoV2=tiny_cfg('MoCoV2', **own),
        DenseCL=tiny_cfg(**own),
        DenseCL_cells=tiny_cfg(
            dense_negatives='cells', cells_per_image=2, **own),
        DenseCL_weighted=tiny_cfg(correspondence=weighted, **own),
        DSC_KM=tiny_cfg(category=kmeans, **dsc),
        DSC_PM=tiny_cfg(category=prototypes, **dsc))


@pytest.fixture(scope='module')
def four_processes(cfgs, tmp_path_factory):
    return run_ranks(work, 4, tmp_path_factory.mktemp('four'), cfgs)


@pytest.fixture(scope='module')
def two_processes(cfgs, tmp_path_factory):
    return run_ranks(work, 2, tmp_path_factory.mktemp('two'), cfgs)


@pytest.fixture(scope='module')
def one_process(cfgs):
    result = {}
    for name, cfg in cfgs.items():
        model = build(cfg, RANKS)
        result[name] = train(model, model, 0, 1)
    return [result]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', NAMES)
class TestRanksOfAnyKind:

    @pytest.fixture(params=['one_process', 'two_processes'])
    def results(self, request, name):
        return [x[name] for x in request.getfixturevalue(request.param)]

    @pytest.fixture
    def expected(self, four_processes, name):
        return [x[name] for x in four_processes]

    def test_losses(self, results, expected, name):
        for step in range(STEPS):
            for key in expected[0]['steps'][step]['losses']:
                means = [
                    sum(x['steps'][step]['losses'][key]
                        for x in xs) / len(xs) for xs in (results, expected)
                ]
                assert_close(*means)

    def test_gradients(self, results, expected, name):
        for step in range(STEPS):
            for result in results:
                assert_close(result['steps'][step]['gradients'],
                             expected[0]['steps'][step]['gradients'])

    def test_weights_queues_and_statistics(self, results, expected, name):
        """Everything that the first process saves, seeds included."""
        assert set(results[0]['state']) == set(expected[0]['state'])
        for key, x in expected[0]['state'].items():
            assert_close(results[0]['state'][key], x)
        # Statistics of other ranks differ: those are really the first's.
        statistics = [
            key for key in expected[0]['state'] if 'running_mean' in key
        ]
        assert statistics
        assert any(
            not torch.allclose(expected[0]['state'][key],
                               expected[1]['state'][key])
            for key in statistics)


def test_one_group_is_another_method(cfgs, one_process):
    """Batch norm over all images gives other numbers: groups matter."""
    model = build(cfgs['DenseCL'], 1)
    alone = train(model, model, 0, 1)
    expected = one_process[0]['DenseCL']['steps'][0]['losses']['loss_dense']
    actual = alone['steps'][0]['losses']['loss_dense']
    assert (actual - expected).abs() > 1e-4


def test_a_last_batch_that_does_not_divide(cfgs):
    """Groups of 3, 3, 2 and 2 images; of fewer images groups of one."""
    model = build(cfgs['DenseCL'], 4)
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


@pytest.mark.parametrize('batch, expected', [(1, 1), (2, 1), (3, 1), (4, 2),
                                             (32, 2), (64, 2), (96, 3),
                                             (256, 8)])
def test_auto(batch, expected):
    assert auto_virtual_ranks(batch) == expected


def test_auto_is_settled_at_the_first_step(cfgs):
    model = build(cfgs['DenseCL'], 'auto')
    model.loss(views_of_step(0))  # of twelve images
    assert model.virtual_ranks == 2


@pytest.mark.parametrize('value', [0, -1, 1.5, 'many'])
def test_errors(cfgs, value):
    with pytest.raises(ValueError, match='virtual_ranks must be a positive'):
        build(cfgs['DenseCL'], value)


def test_statistics_are_updated_once_a_step(cfgs):
    model = build(cfgs['DenseCL'], 4)
    model.loss(views_of_step(0))
    counts = {
        int(x)
        for n, x in model.named_buffers() if 'num_batches_tracked' in n
    }
    assert counts == {1}
