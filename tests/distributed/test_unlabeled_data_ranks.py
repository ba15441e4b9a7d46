# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Ranks train on the same images, and know what each could not read."""

import logging
from types import SimpleNamespace

from ranks import run_ranks
from torch.utils.data import DataLoader

from mmdensecl.datasets import UnlabeledFolder
from mmdensecl.engine import UnlabeledDataHook
from mmdensecl.testing import write_pictures


def begin(rank, folder, iterations=0):
    dataset = UnlabeledFolder(
        str(folder), [dict(type='mmdensecl.DecodeRGB')], max_unreadable=0.5
    )
    runner = SimpleNamespace(
        train_dataloader=DataLoader(dataset, batch_size=2),
        work_dir=str(folder.parent),
        logger=logging.getLogger('data'),
        iter=iterations,
        epoch=0,
        max_iters=60,
    )
    hook = UnlabeledDataHook()
    hook.before_train(runner)
    return hook, runner, dataset


def look(rank, world_size, tmp_path):
    """Each rank has a folder of its own, as on disks of several machines."""
    try:
        dataset = UnlabeledFolder(str(tmp_path / f'machine-{rank}'))
    except FileNotFoundError as error:
        return str(error)
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def test_rank_0_lists_for_all(tmp_path):
    (tmp_path / 'ranks').mkdir()
    write_pictures(tmp_path / 'machine-0', 3, size=4)
    write_pictures(tmp_path / 'machine-1', 5, size=4)
    found = run_ranks(look, 2, tmp_path / 'ranks', tmp_path)
    assert found == [['0000.png', '0001.png', '0002.png']] * 2


def test_an_error_of_rank_0_is_that_of_all(tmp_path):
    (tmp_path / 'ranks').mkdir()
    write_pictures(tmp_path / 'machine-1', 5, size=4)
    said = run_ranks(look, 2, tmp_path / 'ranks', tmp_path)
    assert said[0] == said[1] and 'machine-0" does not exist' in said[0]


def meet(rank, world_size, folder, iterations, indices):
    hook, runner, dataset = begin(rank, folder, iterations)
    for i in indices[rank]:
        dataset[i]
    met = dataset.unreadable.nonzero().flatten().tolist()
    if iterations:
        hook.after_train_epoch(runner)
    return met, dataset.unreadable.nonzero().flatten().tolist()


def test_a_stop_and_on(tmp_path):
    """What both ranks met before a stop, all know after it."""
    folder, ranks = tmp_path / 'pictures', tmp_path / 'ranks'
    write_pictures(folder, 40, size=4)
    listed = tmp_path / 'unreadable.txt'
    listed.write_text('of an older run\n')
    for i in (3, 4, 20, 35):
        (folder / f'{i:04d}.png').write_bytes(b'')
    ranks.mkdir()
    run_ranks(meet, 2, ranks, folder, 0, ([3, 4], [35]))
    lines = listed.read_text().splitlines()
    assert sorted(lines) == ['0003.png', '0004.png', '0035.png']
    write_pictures(tmp_path / 'other', 5, size=4)
    (tmp_path / 'other/0004.png').rename(folder / '0004.png')  # mended
    results = run_ranks(meet, 2, ranks, folder, 4, ([], [20]))
    everything = [3, 20, 35]
    assert results == [([3, 35], everything), (everything, everything)]
    assert listed.read_text() == '0003.png\n0020.png\n0035.png\n'
