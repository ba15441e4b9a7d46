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
    """Each rank has folders of its own, as on disks of several machines."""
    try:
        UnlabeledFolder(str(tmp_path / f'no-machine-{rank}'))
        error = None
    except FileNotFoundError as raised:
        error = str(raised)
    dataset = UnlabeledFolder(str(tmp_path / f'machine-{rank}'))
    paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    return paths, error


def test_rank_0_lists_for_all(tmp_path):
    """Its error is that of all, too."""
    write_pictures(tmp_path / 'machine-0', 3, size=4)
    for folder in ('machine-1', 'no-machine-1'):
        write_pictures(tmp_path / folder, 5, size=4)
    first, other = run_ranks(look, 2, tmp_path, tmp_path)
    assert first == other
    assert first[0] == ['0000.png', '0001.png', '0002.png']
    assert 'no-machine-0" does not exist' in first[1]


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
    folder, listed = tmp_path / 'pictures', tmp_path / 'unreadable.txt'
    write_pictures(folder, 40, size=4)
    listed.write_text('of an older run\n')
    mended = (folder / '0004.png').read_bytes()
    for i in (3, 4, 20, 35):
        (folder / f'{i:04d}.png').write_bytes(b'')
    run_ranks(meet, 2, tmp_path, folder, 0, ([3, 4], [35]))
    lines = listed.read_text().splitlines()
    assert sorted(lines) == ['0003.png', '0004.png', '0035.png']
    (folder / '0004.png').write_bytes(mended)
    results = run_ranks(meet, 2, tmp_path, folder, 4, ([], [20]))
    everything = [3, 20, 35]
    assert results == [([3, 35], everything), (everything, everything)]
    assert listed.read_text() == '0003.png\n0020.png\n0035.png\n'
