# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
from mmengine.dataset import (
    ClassBalancedDataset,
    ConcatDataset,
    DefaultSampler,
    RepeatDataset,
)
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
)

from mmdensecl.datasets import UnlabeledFolder, UnlabeledList, draws
from mmdensecl.datasets.draws import num_distinct_images, number_draws
from mmdensecl.engine.train_loop import skip_batches

COUNT = 5


def seed_of(results):
    return results['seed']


@pytest.fixture
def dataset(tmp_path):
    for i in range(COUNT):
        Image.new('RGB', (4, 4), (i, 0, 0)).save(tmp_path / f'{i}.png')
    dataset = UnlabeledFolder(str(tmp_path), [seed_of])
    dataset.set_epoch(0)
    return dataset


class TwoClasses(UnlabeledFolder):
    METAINFO = dict(classes=('common', 'rare'))

    def get_cat_ids(self, idx):
        return [int(idx == 0)]


def make(kind, dataset):
    root, pipeline = dataset.data_root, dataset.pipeline.transforms
    if kind == 'repeat':
        return RepeatDataset(dataset, times=4)
    if kind == 'concat':
        return ConcatDataset([dataset, dataset])
    if kind == 'nested':
        return Subset(RepeatDataset(dataset, 2), [*range(2 * COUNT)] * 2)
    if kind == 'subset':
        return Subset(dataset, [0, 0, 1, 2, 3, 4, 4])
    if kind == 'balanced':
        rare = TwoClasses(root, pipeline)
        rare.set_epoch(0)
        return ClassBalancedDataset(rare, oversample_thr=1.0)
    if kind == 'slice':
        return dataset.get_subset([*range(COUNT)] * 3)
    with open(f'{root}/list.txt', 'w') as file:
        file.write('\n'.join(f'{i % COUNT}.png' for i in range(20)))
    listed = UnlabeledList('list.txt', root, pipeline=pipeline)
    listed.set_epoch(0)
    return listed


KINDS = ['repeat', 'concat', 'nested', 'subset', 'balanced', 'slice', 'list']


def draw_all(dataset, workers=0, **kwargs):
    loader = DataLoader(
        dataset, num_workers=workers, collate_fn=list, **kwargs
    )
    number_draws(loader)
    return [seed for batch in loader for seed in batch]


class TestSeeds:
    @pytest.mark.parametrize('kind', KINDS)
    def test_copies_in_one_epoch_differ(self, dataset, kind):
        wrapped = make(kind, dataset)
        seeds = draw_all(wrapped, batch_size=4)
        assert len(set(seeds)) == len(seeds) == len(wrapped) > COUNT

    def test_samplers_that_repeat(self, dataset):
        sampler = RandomSampler(dataset, replacement=True, num_samples=40)
        assert len({*draw_all(dataset, sampler=sampler)}) == 40
        batches = [[0, 0], [1, 0], (0, 1)]
        assert len({*draw_all(dataset, batch_sampler=batches)}) == 6

    def test_wrappers_are_found_through(self, dataset):
        """DistSamplerSeedHook sets the epoch at the sampler."""
        sampler = DefaultSampler(dataset, seed=3)
        batches = type('Own', (BatchSampler,), {})(sampler, 2, False)
        loader = DataLoader(dataset, batch_sampler=batches)
        for _ in range(2):  # as by a second run
            number_draws(loader)
        assert loader.dataset.data_root == dataset.data_root
        assert loader.batch_sampler.sampler is sampler

    def test_ranks_that_pad_with_the_same_image(self, dataset, monkeypatch):
        seeds = []
        for rank in range(3):
            for module in ('mmengine.dataset.sampler', draws.__name__):
                monkeypatch.setattr(
                    f'{module}.get_dist_info', lambda rank=rank: (rank, 3)
                )
            sampler = DefaultSampler(dataset, seed=0)
            seeds += draw_all(dataset, sampler=sampler)
        assert len({*seeds}) == len(seeds) == 6

    def test_do_not_depend_on_workers_or_batches(self, dataset):
        seeds = [
            draw_all(make('repeat', dataset), workers, batch_size=size)
            for workers, size in ((0, 4), (2, 4), (2, 3))
        ]
        assert seeds[0] == seeds[1] == seeds[2]

    def test_the_rest_of_an_epoch_after_a_break(self, dataset):
        wrapped = make('repeat', dataset)
        sampler = DefaultSampler(wrapped, seed=0)
        loader = DataLoader(
            wrapped, sampler=sampler, batch_size=4, collate_fn=list
        )
        number_draws(loader)
        whole = [*loader]
        with skip_batches(loader, 2) as to_drop:
            assert to_drop == 0 and [*loader] == whole[2:]


class TestCount:
    @pytest.mark.parametrize('kind', KINDS)
    def test_copies_count_once(self, dataset, kind):
        assert num_distinct_images(make(kind, dataset)) == COUNT

    def test_folders_that_share_names_are_apart(self, dataset, tmp_path):
        other = tmp_path / 'other'
        other.mkdir()
        Image.new('RGB', (4, 4)).save(other / '0.png')
        parts = [dataset, UnlabeledFolder(str(other))]
        assert num_distinct_images(ConcatDataset(parts)) == COUNT + 1
