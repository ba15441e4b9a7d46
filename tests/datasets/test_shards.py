# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import gzip
import io
import os
import runpy
import shutil
import sys
import tarfile
from pathlib import Path
from urllib.parse import unquote

import pytest
import webdataset
from torch.utils.data import DataLoader

from mmdensecl.datasets import (
    ShardSampler,
    UnlabeledFolder,
    UnlabeledShards,
    samplers,
)
from mmdensecl.datasets.shards import find_shards

CONVERTER = (
    Path(__file__).parents[2] / 'tools/dataset_converters/folder_to_shards.py'
)


def content(name):
    """Bytes that are of no picture; only the pipeline would mind."""
    return name.encode() * (1 + len(name) % 7)


def write_tar(path, members):
    """A shard by plain tarfile, of names or TarInfos."""
    with tarfile.open(path, 'w') as tar:
        for member in members:
            if isinstance(member, str):
                data = content(member)
                member = tarfile.TarInfo(member)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            else:
                tar.addfile(member)
    return str(path)


def write_folder(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name))
    return str(folder)


def names(dataset):
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def same(results):
    return results


def contents(dataset, workers=0, **kwargs):
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=lambda batch: batch[0],
        **kwargs,
    )
    return {item['img_path']: item['img_bytes'] for item in loader}


def convert(folder, out, *flags):
    """Run the tool as a script, but in this process."""
    command = [str(x) for x in (CONVERTER, folder, out, *flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', command)
        patch.syspath_prepend(CONVERTER.parent)
        runpy.run_path(str(CONVERTER), run_name='__main__')


class TestConverter:
    PLAIN = [
        f'{label}/{i:03d}.{extension}'
        for label in ('a', 'v1.2', 'ü')
        for i, extension in enumerate(('jpg', 'JPEG', 'png', 'webp'))
    ]
    ODD = [
        'a.jpg',
        'a.png',
        'a.jpg.jpg',
        'a%2Ejpg.jpg',
        'x.1.jpg',
        'x.2.jpg',
        '50%/b.JPG',
        '50%/b.jpg',
        'long/' + 120 * 'n' + '/' + 120 * 'm' + '.jpg',
    ]

    @pytest.fixture(scope='class')
    def converted(self, tmp_path_factory):
        """A folder and its shards."""
        root = tmp_path_factory.mktemp('converted')
        folder = write_folder(root / 'folder', self.PLAIN)
        convert(folder, root / 'shards', '--max-count', 5)
        return folder, root / 'shards'

    def test_equals_the_folder(self, converted):
        folder = UnlabeledFolder(converted[0], [same])
        shards = UnlabeledShards(str(converted[1]), pipeline=[same])
        assert shards.shard_sizes == [5, 5, 2]
        assert names(shards) == names(folder) == sorted(self.PLAIN)
        for dataset in (folder, shards):
            dataset.set_epoch(3, seed=1)
        for ours, theirs in zip(shards, folder, strict=True):
            assert (
                ours['img_bytes']
                == theirs['img_bytes']
                == content(ours['img_path'])
            )
            assert ours['seed'] == theirs['seed']

    def test_webdataset_reads_them(self, converted):
        urls = f'{converted[1]}/shard-{{000000..000002}}.tar'
        samples = webdataset.WebDataset(urls, shardshuffle=False)
        read = {}
        for sample in samples:
            ((key,),) = [[k for k in sample if not k.startswith('__')]]
            read[sample['__key__'], key] = sample[key]
        # webdataset makes extensions small.
        assert read == {
            (
                name.rpartition('.')[0],
                name.rpartition('.')[2].lower(),
            ): content(name)
            for name in self.PLAIN
        }

    def test_odd_names_lead_back(self, tmp_path, capsys):
        folder = write_folder(tmp_path / '%d', self.ODD)
        out = tmp_path / '%s out'
        convert(folder, out)
        log = capsys.readouterr().out
        assert 'Wrote 9 images in 1 shards' in log
        assert 'mmdensecl.UnlabeledShards' in log
        found = contents(UnlabeledShards(str(out), pipeline=[same]))
        back = {}
        for name, data in found.items():
            key, extension = name.rsplit('.', 1)
            assert '.' not in key.rpartition('/')[2]
            file = unquote(key)
            back[file if file in self.ODD else f'{file}.{extension}'] = data
        assert back == {name: content(name) for name in self.ODD}
        samples = webdataset.WebDataset(
            str(out / 'shard-000000.tar'), shardshuffle=False
        )
        assert len(list(samples)) == len(self.ODD)

    def test_shuffled_the_same_way_each_time(self, converted, tmp_path):
        for out in ('x', 'y'):
            convert(
                converted[0],
                tmp_path / out,
                '--shuffle',
                '--max-size',
                50 / 2**20,
            )
        shards = [sorted((tmp_path / out).iterdir()) for out in ('x', 'y')]
        assert len(shards[0]) > 2
        for a, b in zip(*shards, strict=True):
            assert a.read_bytes() == b.read_bytes()
        mixed = names(UnlabeledShards(str(tmp_path / 'x')))
        assert mixed != sorted(mixed) == sorted(self.PLAIN)

    def test_nothing_half_done(self, converted, tmp_path, capsys):
        """And the work of another call stays."""
        other = tmp_path / 'out.unfinished'
        other.mkdir()
        (other / 'file').touch()
        with pytest.raises(SystemExit, match='out.unfinished" exists'):
            convert(converted[0], tmp_path / 'out')
        assert (other / 'file').exists() and not (tmp_path / 'out').exists()
        shutil.rmtree(other)
        with pytest.raises(SystemExit):
            convert(*converted)
        assert 'exists already' in capsys.readouterr().err
        folder = Path(write_folder(tmp_path / 'folder', ['a.jpg']))
        (folder / 'b.jpg').symlink_to('nowhere')
        with pytest.raises(FileNotFoundError):
            convert(folder, tmp_path / 'out')
        assert not (tmp_path / 'out').exists()
        (folder / 'b.jpg').unlink()
        convert(folder, tmp_path / 'out')
        assert [x.name for x in tmp_path.iterdir()].count('out') == 1
        assert names(UnlabeledShards(str(tmp_path / 'out'))) == ['a.jpg']


class TestFindShards:
    @pytest.mark.parametrize(
        'pattern, expected',
        [
            ('', 's-00 s-01 s-10 t x[0]{1}'),
            ('s-{00..01}.tar', 's-00 s-01'),
            ('s-?0.tar', 's-00 s-10'),
            ('{t,s-0*}.tar', 't s-00 s-01'),
            ('t.tar', 't'),
            ('x[0]{1}.tar', 'x[0]{1}'),  # which looks like a pattern
            ('s-{00..02}.tar', 's-02.tar'),
            ('none-*.tar', 'none-'),
            ('sub', 'sub'),
            ('empty', 'No shards in'),
        ],
    )
    def test_patterns(self, tmp_path, pattern, expected):
        """The shards, or the error where one is missing."""
        folder = tmp_path / 'shards'
        (folder / 'empty').mkdir(parents=True)
        for name in ('s-00', 's-01', 's-10', 't', 'x[0]{1}'):
            (folder / f'{name}.tar').touch()
        (folder / 'x.txt').touch()
        names = expected.split()
        if (folder / f'{names[0]}.tar').exists():
            found = find_shards(str(folder / pattern))
            assert found == [str(folder / f'{name}.tar') for name in names]
        else:
            with pytest.raises(FileNotFoundError, match=expected):
                find_shards(str(folder / pattern))

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ('s-00.tar', 's-01.tar', 's-10.tar', 't.tar', 'x.txt'):
            (tmp_path / name).touch()
        return tmp_path


class TestMembers:
    def test_one_image_of_a_sample(self, tmp_path):
        members = 'a/0.cls a/0.jpg a/0.json a/1.seg.png a/1.jpg a/2.txt'
        members += ' b/1.PNG b/1.jpg c/photo.2.jpg'
        path = write_tar(tmp_path / 'x.tar', members.split())
        dataset = UnlabeledShards(path, pipeline=[same])
        expected = ['a/0.jpg', 'a/1.jpg', 'b/1.PNG', 'c/photo.2.jpg']
        assert contents(dataset) == {name: content(name) for name in expected}

    def test_links_devices_hidden_files_and_paths(self, tmp_path):
        odd = []
        for kind in 'SYMTYPE', 'LNKTYPE', 'CHRTYPE', 'FIFOTYPE', 'DIRTYPE':
            odd.append(tarfile.TarInfo(f'{kind}.jpg'))
            odd[-1].type, odd[-1].linkname = (
                getattr(tarfile, kind),
                '/etc/passwd',
            )
        hidden = ['._0.jpg', '__MACOSX/0.jpg', '.x/0.jpg']
        paths = ['./0.jpg', '/etc/1.jpg', '../2.jpg']
        path = write_tar(tmp_path / 'x.tar', [*odd, *hidden, *paths])
        dataset = UnlabeledShards(path, pipeline=[same])
        # The second is a name like others: nothing opens it.
        assert names(dataset) == ['0.jpg', '/etc/1.jpg']
        assert dataset[0]['img_bytes'] == content('./0.jpg')
        assert dataset[1]['img_bytes'] == content('/etc/1.jpg')


class TestReading:
    @pytest.fixture
    def dataset(self, tmp_path):
        """Six shards of four images."""
        for s in range(6):
            write_tar(
                tmp_path / f'{s}.tar', [f'{s}/{i}.jpg' for i in range(4)]
            )
        return UnlabeledShards(str(tmp_path), pipeline=[same])

    @pytest.mark.parametrize('workers', [0, 2])
    def test_in_and_out_of_workers(self, dataset, workers):
        expected = {name: content(name) for name in names(dataset)}
        assert len(expected) == 24
        sampler = ShardSampler(dataset, window=3, seed=0)
        assert contents(dataset, workers, sampler=sampler) == expected

    def test_a_shard_that_shrinks_later(self, dataset, tmp_path):
        os.truncate(tmp_path / '0.tar', 600)
        assert dataset[1]['img_path'] != '0/1.jpg'
        assert dataset.unreadable[1]


def header(kind, size=0, repeats=1, pax=()):
    """As often as told, the header of a member that lies."""
    info = tarfile.TarInfo('././@LongLink')
    info.type, info.size, info.pax_headers = kind, size, dict(pax)
    format = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    return (info.tobuf(format) + bytes(512)) * repeats


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: b'',
        lambda data: b'no tar at all' * 100,
        lambda data: data[:700],
        lambda data: data[:1024],
        lambda data: data[:1030],
        lambda data: data[: 3 * 1024],
        lambda data: data[:1024] + b'\7' * 512 + data[1536:],
        gzip.compress,
        # CVE-2025-8194: a size below 0 sends tarfile to the same header.
        lambda data: header(tarfile.REGTYPE, pax=dict(size='-1536')),
        # Of 2**60 bytes, or of names of names of names.
        lambda data: header(tarfile.GNUTYPE_LONGNAME, 1 << 60, 3000),
        lambda data: header(tarfile.XHDTYPE, 1 << 60),
        lambda data: header(tarfile.GNUTYPE_LONGNAME, 1, 3000),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage):
    shard = tmp_path / 'x.tar'
    write_tar(shard, [f'{i}.jpg' for i in range(3)])
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match='x.tar" is not a whole'):
        UnlabeledShards(str(shard))


def test_an_image_of_an_absurd_size(tmp_path):
    """Beyond what a file can have, where seeking fails."""
    info = tarfile.TarInfo('0.jpg')
    info.size = 1 << 62
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    (tmp_path / 'x.tar').write_bytes(data)
    with pytest.raises(ValueError, match='"0.jpg" is to end at'):
        UnlabeledShards(str(tmp_path))


class Sized:
    """As much of a data set as a sampler sees."""

    def __init__(self, *sizes):
        self.shard_sizes = sizes

    def __len__(self):
        return sum(self.shard_sizes)


class TestSampler:
    SIZES = (5, 1, 40, 17, 8, 30, 30, 12, 9, 25, 3, 28)

    @pytest.fixture
    def ranks(self, monkeypatch):
        """Function that gives what each rank draws in an epoch."""

        def draw(world_size=3, epoch=0, sizes=self.SIZES, **kwargs):
            drawn = []
            for rank in range(world_size):
                monkeypatch.setattr(
                    samplers,
                    'get_dist_info',
                    lambda rank=rank: (rank, world_size),
                )
                sampler = ShardSampler(Sized(*sizes), **{'seed': 0, **kwargs})
                sampler.set_epoch(epoch)
                drawn.append(list(sampler))
                assert len(drawn[-1]) == len(sampler)
            return drawn

        return draw

    @pytest.mark.parametrize('world_size', [1, 2, 3, 7])
    def test_each_picture_once(self, ranks, world_size):
        total = sum(self.SIZES)
        assert [len(x) for x in ranks(5, sizes=(1, 1))] == [1] * 5
        drawn = ranks(world_size)
        assert len({len(x) for x in drawn}) == 1
        everything = sum(drawn, [])
        assert set(everything) == set(range(total))
        assert len(everything) - total == -total % world_size

    def test_fixed_by_seed_and_epoch(self, ranks):
        assert ranks(epoch=2) == ranks(epoch=2)
        different = [ranks(epoch=0), ranks(epoch=1), ranks(seed=1)]
        for i, one in enumerate(different):
            assert all(one != other for other in different[:i])

    @pytest.mark.parametrize('window', [1, 2, 4])
    def test_few_shards_at_once_and_mixed(self, ranks, window):
        count, size = 30, 50
        for drawn in ranks(sizes=(size,) * count, window=window):
            shards = [index // size for index in drawn]
            # Two windows meet, and a part may start within a shard.
            for start in range(0, len(shards), size):
                near = shards[start : start + window * size]
                assert len(set(near)) <= 2 * window + 1
            for shard in set(shards):
                places = [i for i, s in enumerate(shards) if s == shard]
                assert places[-1] - places[0] < window * size
            inside = [i % size for i in drawn if i // size == shards[0]]
            assert inside != sorted(inside)
            if window > 1:
                assert len(set(shards[:10])) > 1
