# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Images are not passed over or ruined without a word."""

import io
import struct

import cv2
import numpy as np
import pytest
from mmengine.logging import MMLogger
from PIL import Image, features
from torch.utils.data import DataLoader

from mmdensecl.datasets import UnlabeledFolder, UnreadableImageError
from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.evaluation.knn_hook import split_labelled


@pytest.fixture
def messages(monkeypatch):
    seen = []
    monkeypatch.setattr(
        MMLogger,
        'callHandlers',
        lambda _, entry: seen.append((entry.levelname, entry.getMessage())),
    )
    MMLogger.get_instance('passed_over')
    return seen


def encoded(format, **options):
    stream = io.BytesIO()
    Image.new('RGB', (8, 6), (200, 100, 50)).save(stream, format, **options)
    return stream.getvalue()


def decode(*args):
    return np.asarray(decode_rgb(*args)).astype(int)


def cv2_encoded(ending, array):
    return cv2.imencode(ending, array)[1].tobytes()


def tiff(bands, photometric=1, planar=1):
    """An uncompressed TIFF of 8 x 6 pixels of 8 bits, without extra tags."""
    count = len(bands)
    pixels = np.stack(bands, -1).tobytes()
    extra = [8] * count
    tags = {
        256: (3, 8), 257: (3, 6), 259: (3, 1), 262: (3, photometric),
        277: (3, count), 278: (3, 6), 279: (4, len(pixels)),
        284: (3, planar),
    }  # fmt: skip
    end = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags[273] = (4, end + 2 * count)
    entries = {
        tag: struct.pack('<HHII', tag, kind, 1, value)
        for tag, (kind, value) in tags.items()
    }
    entries[258] = struct.pack('<HHII', 258, 3, count, end)
    if count <= 2:
        entries[258] = struct.pack('<HHIHH', 258, 3, count, 8, 8)
    return b''.join([
        b'II*\0', struct.pack('<IH', 8, len(entries)),
        *(entries[tag] for tag in sorted(entries)), bytes(4),
        struct.pack(f'<{count}H', *extra), pixels,
    ])  # fmt: skip


class TestEndings:
    TAKEN = {
        'a.jfif': 'JPEG',
        'b.JPE': 'JPEG',
        'c.jpg_large': 'JPEG',
        'd': 'JPEG',
        'e': 'PNG',
        'f.gif': 'GIF',
        **({'g.avif': 'AVIF'} if features.check('avif') else {}),
    }

    def write(self, folder):
        for name, kind in self.TAKEN.items():
            (folder / name).write_bytes(encoded(kind))
        for name in ('a.heic', 'b.HEIC', 'README', 'c.txt'):
            (folder / name).write_text('no image')

    def test_what_decodes_is_taken(self, tmp_path, messages):
        """And the others are counted, once."""
        (tmp_path / 'a.heic').write_text('')
        with pytest.raises(FileNotFoundError, match='over 1 .*1 .heic'):
            UnlabeledFolder(str(tmp_path))
        self.write(tmp_path)
        messages.clear()
        decode = [dict(type='mmdensecl.DecodeRGB')]
        dataset = UnlabeledFolder(str(tmp_path), decode, max_unreadable=0)
        assert len(dataset) == len(self.TAKEN)
        (text,) = [x for level, x in messages if level == 'INFO']
        assert 'Passed over 4 other files: 2 .heic, ' in text
        assert '1 without an ending' in text and '1 .txt' in text
        for item in dataset:
            assert np.ptp(np.asarray(item['img']), (0, 1)).max() <= 8

    def test_the_labelled_images_of_the_knn_hook(self, tmp_path):
        for name in ('cat/1.jfif', 'cat/2', 'dog/1.jpg', 'dog/2.JPE'):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(encoded('JPEG'))
        assert sum(map(len, split_labelled(str(tmp_path)))) == 4


class TestDeep:
    RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)

    @pytest.mark.parametrize('ending', ['.png', '.tiff', '.ppm'])
    def test_colour_of_12_bits_in_16(self, ending):
        bgr = np.stack([self.RAMP, self.RAMP // 2, self.RAMP // 4], -1)
        values = decode(cv2_encoded(ending, bgr))
        assert np.abs(values[..., 2] - self.RAMP // 16).max() <= 1
        assert np.abs(values[..., 0] - self.RAMP // 64).max() <= 1

    @pytest.mark.parametrize('bits', [10, 12, 16])
    def test_grey(self, bits):
        ramp = np.linspace(0, 2**bits - 1, 256).astype(np.uint16)[None]
        values = decode(cv2_encoded('.png', ramp.repeat(4, 0)))[0, :, 0]
        assert np.abs(values - np.arange(256)).max() <= 1

    @pytest.mark.parametrize('bands', [1, 3])
    def test_a_hot_pixel(self, bands):
        image = np.stack([self.RAMP] * bands, -1)
        image[9, 9] = 65535
        values = decode(cv2_encoded('.png', image))
        assert len(np.unique(values)) == 256
        assert (values[9, 9] == 255).all()

    def test_negative_numbers(self):
        ct = self.RAMP.astype(np.int16) - 1024
        values = decode(cv2_encoded('.tiff', ct))[..., 0]
        assert np.abs(values - self.RAMP // 16).max() <= 1

    @pytest.mark.parametrize('workers', [0, 2])
    def test_one_warning_a_run(self, tmp_path, workers):
        for i in range(6):
            Image.fromarray(self.RAMP).save(tmp_path / f'{i}.png')
        decode = [dict(type='mmdensecl.DecodeRGB')]
        dataset = UnlabeledFolder(str(tmp_path), decode)
        logger = MMLogger.get_instance(
            f'deep{workers}', log_file=str(tmp_path / 'log')
        )
        for _ in range(2):
            for _ in DataLoader(dataset, num_workers=workers, batch_size=None):
                pass
        logger.handlers[-1].flush()
        text = (tmp_path / 'log').read_text()
        # Two workers may meet their first one at the same time.
        count = text.count('more than 8 bits a channel')
        assert 1 <= count <= max(1, workers)


class TestBands:
    BAND = np.arange(48, dtype=np.uint8).reshape(6, 8)

    @pytest.mark.parametrize('count', [2, 4, 13])
    def test_other_numbers(self, count):
        with pytest.raises(UnreadableImageError, match='three'):
            decode_rgb(tiff([self.BAND] * count))

    def test_grey_and_rgb_are_taken(self):
        assert (decode(tiff([self.BAND]))[..., 0] == self.BAND).all()
        rgb = [self.BAND, self.BAND + 1, self.BAND + 2]
        assert (decode(tiff(rgb, 2)) == np.stack(rgb, -1)).all()

    def test_the_first_refusal_says_why(self, tmp_path, messages):
        (tmp_path / 'a.tif').write_bytes(tiff([self.BAND] * 4))
        (tmp_path / 'b.png').write_bytes(encoded('PNG'))
        decode = [dict(type='mmdensecl.DecodeRGB')]
        dataset = UnlabeledFolder(str(tmp_path), decode, max_unreadable=0.5)
        for _ in range(3):
            dataset[0]
        warned = [x for level, x in messages if level == 'WARNING']
        assert len(warned) == 1 and 'write three bands as RGB' in warned[0]
