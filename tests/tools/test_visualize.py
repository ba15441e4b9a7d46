# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import logging
import runpy
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from runs import TOOLS

from mmdensecl.models.modules import Features
from mmdensecl.registry import MODELS
from mmdensecl.testing import write_pictures

VIEWS = dict(type='mmdensecl.TwoViews', size=32, crop_scale=(0.7, 1.0))
DATASET = dict(
    type='mmdensecl.UnlabeledFolder',
    data_root='images',
    pipeline=[
        dict(type='mmdensecl.DecodeRGB'),
        VIEWS,
        dict(type='mmdensecl.PackViews'),
    ],
)


@pytest.fixture
def workplace(tiny_cfg, tmp_path, monkeypatch):
    """A config, a checkpoint and images."""
    model = tiny_cfg(data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3))
    cfg = dict(default_scope='mmpretrain', model=model)
    cfg = Config(dict(cfg, train_dataloader=dict(dataset=DATASET)))
    cfg.dump(tmp_path / 'tiny.py')
    built = MODELS.build(model)
    built.init_weights()
    torch.save(
        dict(state_dict=built.state_dict(), meta=dict(cfg=cfg.pretty_text)),
        tmp_path / 'tiny.pth',
    )
    write_pictures(tmp_path / 'images', 3, size=80)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'other.py').write_text('model = dict()')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(workplace, monkeypatch, capsys):
    """Function that runs a tool here and gives its status and output."""

    def call(tool, words):
        script = str(TOOLS / 'visualize' / f'visualize_{tool}.py')
        monkeypatch.setattr(sys, 'argv', [script, *words.split()])
        code = 0
        try:
            with DefaultScope.overwrite_default_scope('mmpretrain'):
                runpy.run_path(script, run_name='__main__')
        except SystemExit as stop:
            code = stop.code
        finally:
            logging.disable(logging.NOTSET)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def run(call):
    """What a tool that succeeds says."""

    def run(tool, words):
        code, out, err = call(tool, words)
        assert code == 0, err
        return out

    return run


def assert_picture(path):
    pixels = np.asarray(Image.open(path).convert('RGB'))
    assert pixels.shape[1] > 60 and pixels.std() > 10


class TestCorrespondence:
    ONE = 'tiny.py tiny.pth images/0000.png'

    def test_two_views(self, workplace, run):
        flags = '--before none --out made/c.png --margin 0 --cells 2'
        out = run('correspondence', f'{self.ONE} {flags}')
        assert 'random weights' in out and 'chance' in out
        assert 'standard errors' in out and 'features match object' in out
        for name in ('c.png', 'c_cells.png'):
            assert_picture(workplace / 'made' / name)

    def test_two_images(self, workplace, run):
        """Nothing is true of them: colours show the similarity."""
        run('correspondence', f'{self.ONE} images/0001.png --cells 0')
        assert_picture(workplace / 'correspondence.png')
        assert not (workplace / 'correspondence_cells.png').exists()

    def test_what_the_words_depend_on(self, run):
        """The seed; a margin is of the lines alone, the test of all cells."""
        words = [
            run('correspondence', f'{self.ONE} --cells 0 {flags}')
            for flags in (
                '--margin 0 --seed 1',
                '--margin 3 --seed 1',
                '--margin 0 --seed 2',
            )
        ]
        assert words[0] == words[1] != words[2]

    def test_maps_share_one_scale(self, monkeypatch):
        """Of random weights above and trained ones below."""
        monkeypatch.syspath_prepend(str(TOOLS / 'visualize'))
        import visualize_correspondence as tool

        shape = dict(global_proj=torch.ones(1, 1), shape=(2, 2))
        cells = torch.eye(4)[None]
        pairs = [
            tool.FeaturePair(
                name,
                Features(backbone_feats=cells, **shape),
                Features(backbone_feats=x * cells, **shape),
            )
            for name, x in (('before', 0.1), ('after', 1.0))
        ]
        view = torch.zeros(3, 8, 8, dtype=torch.uint8)
        figure = tool.draw_all_maps(pairs, [view, view], None, 1)
        images = [x for ax in figure.axes for x in ax.images]
        maps = [x for x in images if x.get_cmap().name == 'inferno']
        assert {x.get_clim() for x in maps} == {(0.0, 1.0)}


class TestFeatures:
    @pytest.mark.parametrize('checkpoint', ['tiny.pth', 'none'])
    def test_folder(self, workplace, run, checkpoint):
        # Also as the first, of which patches are looked up.
        (workplace / 'images/0.png').write_text('no image')
        (workplace / 'images/broken.png').write_text('no image')
        flags = '--size 64 --margin 1'
        out = run('features', f'tiny.py {checkpoint} images {flags}')
        assert out.count('left out') == 2
        assert '"images/0.png"' in out and '"images/broken.png"' in out
        assert_picture(workplace / 'features/features.png')
        html = (workplace / 'features/index.html').read_text()
        # 8 x 8 cells less the margin, and the middle.
        assert '"chosen": [3, 3]' in html and '[6, 6]' in html


@pytest.mark.parametrize(
    'tool, words, message',
    [
        ('correspondence', 'tiny.py tiny.pth gone.png', 'gone.png'),
        ('correspondence', 'tiny.py tiny.pth tiny.py', 'no image'),
        ('correspondence', 'other.py tiny.pth images/0000.png', 'no views'),
        ('features', 'tiny.py tiny.pth empty', 'No images'),
        ('features', 'tiny.py tiny.pth tiny.py', 'no image that can be read'),
        (
            'features',
            'tiny.py tiny.pth images --margin 40',
            'lower the margin',
        ),
    ],
)
def test_errors(call, tool, words, message):
    if tool == 'features':
        words += ' --size 64'
    code, _, err = call(tool, words)
    assert code == 2 and message in err.splitlines()[-1]
    assert 'Traceback' not in err
