# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pictures and files of every kind that a folder of strangers may hold."""

import errno
import io
import os
import pickle
import socket
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader

from mmdensecl.datasets import (
    PackImage,
    SampleTwoCropParams,
    TwoViews,
    UnlabeledFolder,
    UnlabeledList,
    UnlabeledShards,
    UnreadableImageError,
    unlabeled,
)
from mmdensecl.datasets.transforms.loading import (
    FORMATS,
    MAX_JPEG_SCANS,
    decode_rgb,
)
from mmdensecl.testing import write_pictures

COLOR = (200, 30, 60)


def encode(image=None, format='PNG', **options) -> bytes:
    stream = io.BytesIO()
    image = image or Image.new('RGB', (40, 30), COLOR)
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, content):
    return (
        struct.pack('>I', len(content))
        + kind
        + content
        + struct.pack('>I', zlib.crc32(kind + content))
    )


def png(width, height, depth=8, color=2, rows=b''):
    """A PNG that declares what it likes."""
    head = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', head)
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def patched(data, marker, offset, content):
    """``data`` with other bytes some way behind a marker."""
    data, start = bytearray(data), data.index(marker) + offset
    data[start : start + len(content)] = content
    return bytes(data)


def declared_jpeg(side, **options):
    marker = b'\xff\xc2' if options.get('progressive') else b'\xff\xc0'
    return patched(
        encode(format='JPEG', **options),
        marker,
        5,
        struct.pack('>HH', side, side),
    )


def tiff_tag(data, tag, value):
    """``data``, a small TIFF, with another value of a tag of 16 bits."""
    (start,) = struct.unpack_from('<I', data, 4)
    data = bytearray(data)
    for entry in range(start + 2, len(data) - 11, 12):
        if struct.unpack_from('<H', data, entry)[0] == tag:
            struct.pack_into('<HII', data, entry + 2, 4, 1, value)
            return bytes(data)


def many_scans(count):
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(format='JPEG', progressive=True)
    start, end = data.rindex(b'\xff\xda'), len(data) - 2
    return data[:end] + data[start:end] * count + data[end:]


NOISE = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
WHOLE = {
    name: encode(Image.fromarray(NOISE), name)
    for name in FORMATS
    if name != 'TIFF'
}
WHOLE['TIFF'] = encode(
    Image.fromarray(NOISE), 'TIFF', compression='tiff_adobe_deflate'
)
FLOATS = encode(Image.new('F', (4, 4), 0.5), 'TIFF')

# What cannot be used, and a part of what is said of it.
BROKEN = {
    **{
        f'half a {name}': (data[: len(data) // 2], '')
        for name, data in WHOLE.items()
    },
    **{f'head of a {name}': (data[:20], '') for name, data in WHOLE.items()},
    'a PNG with a wrong checksum': (
        patched(WHOLE['PNG'], b'IDAT', 2000, b'????'),
        '',
    ),
    'nothing': (b'', 'none of JPEG'),
    'zeros': (bytes(5000), 'none of JPEG'),
    'a text': (b'cat, dog\n' * 100, 'none of JPEG'),
    'a web page': (b'<!DOCTYPE html><title>404</title>', 'none of JPEG'),
    'a script': (b'#!/bin/sh\ntouch /tmp/x\n', 'none of JPEG'),
    'a pickle': (pickle.dumps(print), 'none of JPEG'),
    'an SVG': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'none of JPEG'),
    'a PNG of no width': (png(0, 10), ''),
    'a PPM of no height': (b'P6 10 0 255\n', ''),
    'a JPEG of no height': (declared_jpeg(0), ''),
    'floats': (FLOATS, 'floats have no agreed range'),
    'a PNG bomb': (png(65500, 65500), 'bomb'),
    'a JPEG bomb': (declared_jpeg(65500), 'bomb'),
    'a progressive JPEG bomb': (
        declared_jpeg(65500, progressive=True),
        'bomb',
    ),
    'a BMP bomb': (
        patched(
            encode(format='BMP'), b'BM', 18, struct.pack('<ii', 60000, 60000)
        ),
        'bomb',
    ),
    'a PPM bomb': (b'P6 60000 60000 255\n', 'bomb'),
    'a TIFF bomb': (
        tiff_tag(tiff_tag(encode(format='TIFF'), 256, 60000), 257, 60000),
        'bomb',
    ),
    'a WebP bomb': (
        b'RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xfe\x3f\0\xfe\x3f\0'
        b'VP8L\x05\0\0\0\x2f\xfe\xff\xff\x0f\0',
        '',
    ),
    'a JPEG of very many scans': (many_scans(MAX_JPEG_SCANS), 'scans'),
}


class TestBroken:
    @pytest.mark.parametrize('name', BROKEN)
    def test_refused(self, name):
        data, said = BROKEN[name]
        with pytest.raises(UnreadableImageError, match=said):
            decode_rgb(data)

    def test_postscript_is_not_run(self, tmp_path, monkeypatch):
        """PIL's decoder would start ghostscript, which runs the program."""
        fake = tmp_path / 'gs'
        fake.write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
        fake.chmod(0o755)
        monkeypatch.setattr(EpsImagePlugin, 'gs_binary', str(fake))
        with pytest.raises(UnreadableImageError, match='none of JPEG'):
            decode_rgb(
                b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'
                b'%%EndComments\nshowpage\n'
            )
        assert not (tmp_path / 'ran').exists()

    @pytest.mark.skipif(
        not Path('/proc/self/statm').exists(), reason='asks Linux'
    )
    @pytest.mark.parametrize('name', [x for x in BROKEN if 'bomb' in x])
    def test_bombs_take_no_memory(self, name):
        """With no more memory to be had they are refused all the same."""
        import resource

        pages = int(Path('/proc/self/statm').read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + 2**27
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            with pytest.raises(UnreadableImageError) as error:
                decode_rgb(BROKEN[name][0])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert 'MemoryError' not in str(error.value)

    def test_max_pixels(self):
        """It does not raise PIL's own limit."""
        assert decode_rgb(encode(), max_pixels=1200).size == (40, 30)
        with pytest.raises(UnreadableImageError, match='40 x 30 .*1199'):
            decode_rgb(encode(), max_pixels=1199)
        with pytest.raises(UnreadableImageError, match='bomb'):
            decode_rgb(png(65500, 65500), max_pixels=2**40)

    @pytest.mark.parametrize('format', FORMATS)
    def test_damaged_bytes(self, format):
        """Decoded or refused, and no other error; a crash would be one."""
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(60):
            data = bytearray(WHOLE[format][: rng.integers(20, 20000)])
            # The head is where the decoders have to be careful.
            ends = 64 if rng.random() < 0.5 else len(data)
            for place in rng.integers(0, ends, rng.integers(1, 8)):
                data[place % len(data)] = rng.integers(256)
            try:
                decode_rgb(bytes(data), max_pixels=10**6)
            except UnreadableImageError:
                refused += 1
        assert refused > 30


def split_cmyk(mode='CMYK'):
    """Half of it without ink, half in full magenta."""
    image = Image.new(mode, (40, 30), (0, 0, 0, 0))
    image.paste((0, 255, 0, 0), (20, 0, 40, 30))
    return image


def frames(format, **options):
    pages = [Image.new('RGB', (40, 30), c) for c in (COLOR, 'blue', 'green')]
    return encode(
        pages[0], format, save_all=True, append_images=pages[1:], **options
    )


class TestOdd:
    """Pictures that are unusual and whole."""

    @pytest.mark.parametrize('name, data', [
        ('progressive', encode(format='JPEG', progressive=True, quality=95)),
        ('trailing garbage', encode() + os.urandom(3000)),
        ('JPEG and more', encode(format='JPEG', quality=95) + b'\0' * 999),
        ('APNG', frames('PNG')),
        ('animated WebP', frames('WEBP', lossless=True)),
        ('TIFF of pages', frames('TIFF')),
        ('MPO', frames('MPO', quality=95)),
        ('many scans', many_scans(100)),
        ('adobe palette',
         encode(Image.new('RGB', (40, 30), COLOR).quantize(4))),
        ('lossless WebP', encode(format='WEBP', lossless=True)),
        ('LZW TIFF', encode(format='TIFF', compression='tiff_lzw')),
    ])  # fmt: skip
    def test_the_first_frame_in_its_colours(self, name, data):
        image = decode_rgb(data)
        assert image.mode == 'RGB' and image.size == (40, 30)
        color = COLOR if 'scans' not in name else image.getpixel((0, 0))
        assert np.abs(np.subtract(image.getpixel((9, 9)), color)).max() <= 3

    def test_cmyk(self):
        """JPEGs hold it inverted, as Adobe's programs write it; not TIFFs."""
        for format in ('JPEG', 'TIFF'):
            options = dict(quality=100) if format == 'JPEG' else {}
            image = decode_rgb(encode(split_cmyk(), format, **options))
            white, magenta = image.getpixel((5, 5)), image.getpixel((35, 5))
            assert np.abs(np.subtract(white, (255, 255, 255))).max() <= 3
            assert np.abs(np.subtract(magenta, (255, 0, 255))).max() <= 3

    @pytest.mark.parametrize(
        'mode, color, expected',
        [
            ('L', 77, (77, 77, 77)),
            ('LA', (77, 0), (77, 77, 77)),
            ('RGBA', (1, 2, 3, 0), (1, 2, 3)),
            ('1', 1, (255, 255, 255)),
        ],
    )
    def test_modes(self, mode, color, expected):
        image = decode_rgb(encode(Image.new(mode, (40, 30), color)))
        assert image.mode == 'RGB' and image.getpixel((5, 5)) == expected

    def test_transparency_is_dropped(self):
        """The colours behind it are kept, as by the authors' loader."""
        palette = Image.new('RGB', (40, 30), COLOR).quantize(4)
        for data in (
            encode(palette, transparency=0),
            encode(Image.new('RGBA', (40, 30), (*COLOR, 0))),
        ):
            assert decode_rgb(data).getpixel((5, 5)) == COLOR

    def test_large_jpegs_at_a_fraction(self):
        """Not below min_side, nearly the same, and broken is broken."""
        ramp = np.linspace(0, 255, 800).astype(np.uint8)[None].repeat(600, 0)
        data = encode(Image.fromarray(ramp).convert('RGB'), 'JPEG', quality=95)
        assert decode_rgb(data, min_side=301).size == (800, 600)
        half = decode_rgb(data, min_side=300)
        assert half.size == (400, 300)
        whole = decode_rgb(data).reduce(2)
        difference = np.asarray(half, int) - np.asarray(whole, int)
        assert np.abs(difference).max() <= 2
        with pytest.raises(UnreadableImageError, match='truncated'):
            decode_rgb(data[: len(data) // 2], min_side=300)
        small = encode(Image.new('RGB', (800, 600)))  # PNG has no such sizes
        assert decode_rgb(small, min_side=100).size == (800, 600)

    @pytest.mark.parametrize('size', [(1, 1), (1, 10000), (10000, 1)])
    def test_extreme_shapes_give_views(self, size):
        image = decode_rgb(encode(Image.new('RGB', size, COLOR)))
        views = TwoViews(size=16)(dict(img=image))['view_imgs']
        assert views[0].shape == (3, 16, 16)
        sample = dict(img=image, img_path='', sample_idx=0)
        PackImage()(SampleTwoCropParams()(sample))


DECODE = [dict(type='mmdensecl.DecodeRGB')]


def names(dataset):
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def unreadable(dataset):
    listed = names(dataset)
    return {listed[i] for i in dataset.unreadable.nonzero().flatten().tolist()}


class TestFiles:
    """Names that lead to no file with a picture."""

    @pytest.fixture
    def folder(self, tmp_path):
        write_pictures(tmp_path / 'pictures', 8)
        return tmp_path / 'pictures'

    def read_all(self, folder, **kwargs):
        dataset = UnlabeledFolder(
            str(folder), DECODE, max_unreadable=0.9, **kwargs
        )
        for i in range(len(dataset)):
            dataset[i]
        return dataset

    def test_substitutes_are_the_same_in_every_run(self, folder):
        """And on any number of workers; only epochs differ."""
        for i in (0, 3, 6):
            (folder / f'{i:04d}.png').write_bytes(b'')

        def drawn(workers, epoch):
            dataset = UnlabeledFolder(str(folder), DECODE, max_unreadable=0.5)
            dataset.set_epoch(epoch, seed=5)
            loader = DataLoader(
                dataset, num_workers=workers, collate_fn=lambda x: x[0]
            )
            items = [(item['sample_idx'], item['seed']) for item in loader]
            assert dataset.unreadable.sum() == 3  # counted in workers too
            return items

        assert drawn(0, 1) == drawn(2, 1)
        assert drawn(0, 1) != drawn(0, 2)

    def test_whatever_bears_the_name(self, folder):
        """A pipe would block its reader and /dev/zero never ends."""
        os.mkfifo(folder / 'pipe.jpg')
        (folder / 'gone.jpg').symlink_to(folder / 'nowhere')
        (folder / 'self.jpg').symlink_to(folder / 'self.jpg')
        (folder / 'zero.jpg').symlink_to('/dev/zero')
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / 'socket.jpg'))
        (folder / 'folder.jpg').mkdir()
        for format in FORMATS:  # of a wrong name, which is no fault
            (folder / f'{format}.jpg').write_bytes(encode(format=format))
        with open(folder / 'huge.jpg', 'wb') as file:
            file.truncate(2**40)  # takes no place on the disk
        dataset = self.read_all(folder)
        assert unreadable(dataset) == {
            'pipe.jpg',
            'gone.jpg',
            'self.jpg',
            'zero.jpg',
            'socket.jpg',
            'huge.jpg',
        }

    def test_lists_may_name_anything(self, folder):
        os.mkfifo(folder / 'pipe')
        bad = ['pipe', '/dev/zero', '.', '/', '\0', 'x' * 5000, 'a/../b.jpg']
        good = [x.name for x in folder.glob('*.png')]
        (folder / 'list.txt').write_text('\n'.join(bad + good))
        dataset = UnlabeledList(
            'list.txt', str(folder), pipeline=DECODE, max_unreadable=0.9
        )
        for i in range(len(dataset)):
            dataset[i]
        assert unreadable(dataset) == set(bad)

    def test_names_of_any_bytes(self, folder):
        """Found, read, and named in one line if they cannot be."""
        odd = ['é☃.png', 'a\nb.png', '\x1b[31m.png', os.fsdecode(b'\xe4.png')]
        for name in odd:
            (folder / name).write_bytes(encode())
        assert not unreadable(self.read_all(folder))
        for name in odd:
            (folder / name).write_bytes(b'')
        assert unreadable(self.read_all(folder)) == set(odd)
        dataset = UnlabeledFolder(str(folder), DECODE, max_unreadable=0)
        with pytest.raises(RuntimeError) as error:
            dataset[names(dataset).index('a\nb.png')]
        assert r"'a\nb.png'" in str(error.value)
        assert '\n' not in str(error.value)


def make_folder(root, pictures):
    for name, data in pictures.items():
        (root / name).write_bytes(data)
    return UnlabeledFolder, dict(data_root=str(root))


def make_list(root, pictures):
    make_folder(root, pictures)
    (root / 'list.txt').write_text('\n'.join(pictures))
    return UnlabeledList, dict(ann_file='list.txt', data_root=str(root))


def make_shards(root, pictures):
    with tarfile.open(root / '0.tar', 'w') as tar:
        for name, data in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return UnlabeledShards, dict(data_root=str(root))


READERS = [make_folder, make_list, make_shards]


class TestShares:
    """Of a thousand pictures some are broken, whatever they are kept in."""

    def build(self, root, make, bad, **kwargs):
        kinds = [data for data, _ in BROKEN.values() if data]
        good = encode(Image.new('RGB', (4, 4), COLOR))
        pictures = {
            f'{i:04d}.jpg': kinds[i // 20 % len(kinds)]
            if i % 20 == 7 and i // 20 < bad
            else good
            for i in range(1000)
        }
        cls, arguments = make(root, pictures)
        expected = {name for name, x in pictures.items() if x is not good}
        return cls(**arguments, pipeline=DECODE, **kwargs), expected

    @pytest.mark.parametrize('make', READERS)
    def test_skipped_and_counted(self, tmp_path, make):
        dataset, expected = self.build(tmp_path, make, 50)
        assert len(expected) == 50
        items = [dataset[i] for i in range(1000)]
        assert {item['img'].size for item in items} == {(4, 4)}
        listed = names(dataset)
        assert expected == {
            listed[i]
            for i, item in enumerate(items)
            if item['sample_idx'] != i
        }
        assert unreadable(dataset) == expected

    def test_too_many_stop(self, tmp_path):
        dataset, expected = self.build(
            tmp_path, make_shards, 50, max_unreadable=0.03
        )
        with pytest.raises(
            RuntimeError, match='31 of 1000 images.*max_unreadable'
        ) as error:
            for i in range(1000):
                dataset[i]
        assert unreadable(dataset) <= expected
        assert any(repr(name) in str(error.value) for name in expected)


class Flaky(UnlabeledFolder):
    """Its disk fails some times before it reads a picture."""

    def fail(self, number, times, which=None):
        self.number, self.left, self.which = number, times, which
        return self

    def read(self, info):
        if self.left and self.which in (None, info['img_path']):
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return super().read(info)


class TestHiccups:
    @pytest.fixture
    def slept(self, monkeypatch):
        """The pauses that were made, none of which is slept."""
        pauses = []
        monkeypatch.setattr(unlabeled.time, 'sleep', pauses.append)
        return pauses

    def build(self, tmp_path, count=40, **kwargs):
        write_pictures(tmp_path, count, size=8)
        return Flaky(str(tmp_path), DECODE, **kwargs)

    @pytest.mark.parametrize(
        'number',
        [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE],
    )
    def test_change_nothing(self, tmp_path, slept, number):
        dataset = self.build(tmp_path).fail(number, 3)
        assert dataset[5]['sample_idx'] == 5
        assert slept == [1, 2, 4]
        assert not dataset.unreadable.any()

    @pytest.mark.parametrize('number', [errno.ENOENT, errno.EACCES])
    def test_what_will_not_pass_is_not_waited_for(
        self, tmp_path, slept, number
    ):
        dataset = self.build(tmp_path).fail(number, 1)
        assert dataset[5]['sample_idx'] != 5
        assert not slept and unreadable(dataset) == {'0005.png'}
        # And a bad sector once.
        dataset.fail(errno.EIO, 99, '0007.png')
        for _ in range(3):
            assert dataset[7]['sample_idx'] != 7
        assert slept == [1, 2, 4]

    @pytest.mark.parametrize('number', [errno.EIO, errno.ENOENT])
    def test_a_dead_disk_stops_soon(self, tmp_path, slept, number):
        """Not when a tenth of a large data set has been tried."""
        dataset = self.build(tmp_path, max_unreadable=1, max_refetch=200).fail(
            number, 10**9
        )
        with pytest.raises(
            RuntimeError, match=r"201 images.*\.png'.*--resume"
        ):
            dataset[5]
        assert sum(slept) <= 7
