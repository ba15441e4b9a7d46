# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Two processes with N pictures each, and one with 2 N."""

import pytest
import torch
import torch.nn as nn
from ranks import METHODS, assert_close, build, method_cfgs, run_ranks, train

from mmdensecl.registry import MODELS

RANKS, ROWS, STEPS = 2, 3, 3
SHUFFLED = 'DenseCL', 'MoCoV2'


def set_mode(model, frozen_norm):
    model.train()
    if frozen_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return model


def views_of_step(step):
    """All ranks' pictures; those of the second are brighter."""
    generator = torch.Generator().manual_seed(100 + step)
    views = torch.randn(2, RANKS * ROWS, 3, 32, 32, generator=generator)
    views[:, ROWS:] = 2 * views[:, ROWS:] + 1
    return list(views.double())


def own(x, rank):
    return x[rank * ROWS : (rank + 1) * ROWS]


def encode_keys(model, rank):
    """Keys of a rank's second views, and what its encoder saw of them."""
    images = own(views_of_step(0)[1], rank)
    model.encoder_k.momentum = 0.0
    # One in ten permutations of 2 x 3 rows would mix nothing.
    model.batch_shuffle.seed = 1
    seen, encode = [], model.encode

    def spy(*args):
        seen.append((args[2], encode(*args)))
        return seen[-1][1]

    model.encode = spy
    mixed = model.encode_key(images).global_proj
    with torch.no_grad():
        key = model.encoder_k
        alone = encode(key.backbone, key.neck, images).global_proj
    return dict(
        mixed=mixed,
        alone=alone,
        images=seen[0][0],
        shuffled=seen[0][1].global_proj,
    )


def work(rank, world_size, cfgs):
    """Everything that the tests below look at, in one go."""
    result = {}
    for name, cfg in cfgs.items():
        pairs = [
            [own(x, rank) for x in views_of_step(step)]
            for step in range(STEPS)
        ]
        result[name] = train(set_mode(build(cfg), True), pairs)
        for mode in ('frozen', 'train') if name in SHUFFLED else ():
            model = set_mode(build(cfg), mode == 'frozen')
            result[f'{name}/keys/{mode}'] = encode_keys(model, rank)
        # Ranks with a seed of their own, as with mmengine's diff_rank_seed.
        torch.manual_seed(rank)
        model = set_mode(MODELS.build(cfg).double(), True)
        result[f'{name}/seeds'] = train(model, pairs[:1])
    return result


@pytest.fixture(scope='module')
def cfgs(tiny_cfg):
    # Two steps of six keys go past the end of a queue of eight.
    return method_cfgs(tiny_cfg)


@pytest.fixture(scope='module')
def ranks(cfgs, tmp_path_factory):
    return run_ranks(work, RANKS, tmp_path_factory.mktemp('ranks'), cfgs)


@pytest.fixture(scope='module')
def alone(cfgs):
    pairs = [views_of_step(step) for step in range(STEPS)]
    return {
        name: train(set_mode(build(cfg), True), pairs, False)
        for name, cfg in cfgs.items()
    }


def queues(step):
    return {n: x for n, x in step['state'].items() if 'queue' in n}


@pytest.mark.parametrize('name', METHODS)
class TestRanksEqualOne:
    def test_losses(self, ranks, alone, name):
        """The mean over the ranks is the loss over all."""
        for step, expected in enumerate(alone[name]):
            for key, x in expected['losses'].items():
                mean = sum(r[name][step]['losses'][key] for r in ranks) / RANKS
                assert_close(mean, x)

    def test_gradients(self, ranks, alone, name):
        for step, expected in enumerate(alone[name]):
            for result in ranks:
                assert_close(
                    result[name][step]['gradients'], expected['gradients']
                )
        assert all(
            x.abs().sum() > 0
            for n, x in alone[name][0]['gradients'].items()
            if 'weight' in n
        )

    def test_queues(self, ranks, alone, name):
        """In the order of the ranks, to the last bit the same on all."""
        for step, expected in enumerate(alone[name]):
            first = self.same_queues(x[name][step] for x in ranks)
            assert_close(first, queues(expected))
            assert first['queue.enqueued'] == RANKS * ROWS * (step + 1)

    def test_queues_of_ranks_that_are_seeded_differently(self, ranks, name):
        """broadcast_buffers=False, mmengine's default, leaves them be."""
        self.same_queues(x[f'{name}/seeds'][0] for x in ranks)

    @staticmethod
    def same_queues(steps):
        first, other = map(queues, steps)
        for key, x in other.items():
            assert torch.equal(x, first[key]), key
        return first


def test_categories_of_ranks_are_one(ranks):
    """The same number of clusters in use, and the same spread of points."""
    for name in ('DSC_KM', 'DSC_PM'):
        for step in range(STEPS):
            first, other = (r[name][step]['categories'] for r in ranks)
            assert len(first) == 2 and first == other


@pytest.mark.parametrize('name', SHUFFLED)
class TestShuffledKeys:
    def test_nothing_changes_with_frozen_norm(self, ranks, name):
        """An image's key does not depend on the others, so it is back."""
        for result in ranks:
            keys = result[f'{name}/keys/frozen']
            assert_close(keys['mixed'], keys['alone'])
            assert not torch.equal(keys['shuffled'], keys['mixed'])

    def test_images_share_statistics_with_other_ranks(self, ranks, name):
        """And every key is its image's where batch norm makes them matter."""
        images = views_of_step(0)[1]
        results = [x[f'{name}/keys/train'] for x in ranks]
        mixed, alone, seen, computed = (
            torch.cat([x[key] for x in results])
            for key in ('mixed', 'alone', 'images', 'shuffled')
        )
        same = (seen[:, None] == images).flatten(2).all(dim=2)  # seen, image
        assert (same.sum(dim=0) == 1).all()
        owners = same.int().argmax(dim=1) // ROWS
        for rank in range(RANKS):
            assert set(own(owners, rank).tolist()) != {rank}
            difference = own(mixed, rank) - own(alone, rank)
            assert difference.abs().max() > 1e-3
        assert torch.equal(computed[same.int().argmax(dim=0)], mixed)
