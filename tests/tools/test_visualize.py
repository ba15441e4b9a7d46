# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from mmdensecl.models.modules import Features
from mmdensecl.registry import MODELS
from mmdensecl.testing import write_pictures

TOOLS = Path(__file__).parents[2] / 'tools' / 'visualize'


@pytest.fixture
def workplace(tiny_cfg, tmp_path, monkeypatch):
    """A config, a checkpoint and images."""
    model = tiny_cfg(data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3))
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=model,
            train_dataloader=dict(
                dataset=dict(
                    type='mmdensecl.UnlabeledFolder',
                    data_root='images',
                    pipeline=[
                        dict(type='mmdensecl.DecodeRGB'),
                        dict(
                            type='mmdensecl.TwoViews',
                            size=32,
                            crop_scale=(0.7, 1.0),
                        ),
                        dict(type='mmdensecl.PackViews'),
                    ],
                )
            ),
        )
    )
    cfg.dump(tmp_path / 'tiny.py')
    built = MODELS.build(model)
    built.init_weights()
    torch.save(
        dict(state_dict=built.state_dict(), meta=dict(cfg=cfg.pretty_text)),
        tmp_path / 'tiny.pth',
    )
    write_pictures(tmp_path / 'images', 3, size=80)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs a tool here and gives its status and output."""

    def call(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{tool}.py', *map(str, arguments)])
        code = 0
        try:
            with DefaultScope.overwrite_default_scope('mmpretrain'):
                runpy.run_path(str(TOOLS / f'{tool}.py'), run_name='__main__')
        except SystemExit as stop:
            code = stop.code
        finally:
            logging.disable(logging.NOTSET)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


class TestCorrespondence:
    TOOL = 'visualize_correspondence'

    def test_two_views(self, workplace, run):
        code, out, err = run(
            self.TOOL,
            'tiny.py',
            'tiny.pth',
            'images/0000.png',
            '--before',
            'none',
            '--out',
            'made/c.png',
            '--margin',
            0,
            '--cells',
            2,
        )
        assert code == 0, err
        assert 'random weights' in out and 'chance' in out
        assert 'standard errors' in out and 'features match object' in out
        for name in ('c.png', 'c_cells.png'):
            image = np.asarray(
                Image.open(workplace / 'made' / name).convert('RGB')
            )
            assert image.shape[1] > 600 and image.std() > 10

    def test_two_images_by_similarity(self, workplace, run):
        code, out, err = run(
            self.TOOL,
            'tiny.py',
            'tiny.pth',
            'images/0000.png',
            'images/0001.png',
            '--cells',
            0,
        )
        assert code == 0, err
        assert (workplace / 'correspondence.png').exists()
        assert not (workplace / 'correspondence_cells.png').exists()

    def test_same_seed_same_words(self, workplace, run):
        words = [
            run(
                self.TOOL,
                'tiny.py',
                'tiny.pth',
                'images/0000.png',
                '--cells',
                0,
                '--margin',
                0,
                '--seed',
                seed,
            )[1]
            for seed in (1, 1, 2)
        ]
        assert words[0] == words[1] != words[2]

    def test_the_margin_is_of_the_lines_alone(self, workplace, run):
        """The test is of all cells, as everywhere."""
        words = [
            run(
                self.TOOL,
                'tiny.py',
                'tiny.pth',
                'images/0000.png',
                '--cells',
                0,
                '--margin',
                margin,
            )[1]
            for margin in (0, 3)
        ]
        assert words[0] == words[1]

    def test_maps_share_one_scale(self, monkeypatch):
        """Of random weights above and trained ones below."""
        monkeypatch.syspath_prepend(str(TOOLS))
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
        limits = {
            x.get_clim()
            for ax in figure.axes
            for x in ax.images
            if x.get_cmap().name == 'inferno'
        }
        assert limits == {(0.0, 1.0)}

    @pytest.mark.parametrize(
        'arguments, words',
        [
            (('tiny.py', 'tiny.pth', 'gone.png'), 'gone.png'),
            (('tiny.py', 'gone.pth', 'images/0000.png'), 'gone.pth'),
            (('gone.py', 'tiny.pth', 'images/0000.png'), 'gone.py'),
            (('tiny.py', 'tiny.pth', 'tiny.py'), 'no image'),
            (
                ('tiny.py', 'tiny.pth', 'images/0000.png', '--pairs', '2'),
                'at least 8',
            ),
            (('other.py', 'tiny.pth', 'images/0000.png'), 'draws no views'),
        ],
    )
    def test_errors(self, workplace, run, arguments, words):
        (workplace / 'other.py').write_text('model = dict()')
        code, _, err = run(self.TOOL, *arguments)
        assert code == 2 and words in err.splitlines()[-1]
        assert 'Traceback' not in err


class TestFeatures:
    TOOL = 'visualize_features'

    @pytest.mark.parametrize('checkpoint', ['tiny.pth', 'none'])
    def test_folder(self, workplace, run, checkpoint):
        (workplace / 'images/broken.png').write_text('no image')
        code, out, err = run(
            self.TOOL,
            'tiny.py',
            checkpoint,
            'images',
            '--size',
            64,
            '--margin',
            1,
        )
        assert code == 0, err
        assert 'left out' in out and 'broken.png' in out
        image = Image.open(workplace / 'features/features.png')
        assert np.asarray(image.convert('RGB')).std() > 10
        html = (workplace / 'features/index.html').read_text()
        # 8 x 8 cells less the margin, and the middle.
        assert '"chosen": [3, 3]' in html and '[6, 6]' in html

    def test_most_images_of_a_folder(self, workplace, run):
        code, out, err = run(
            self.TOOL,
            'tiny.py',
            'none',
            'images',
            '--size',
            64,
            '--max-images',
            2,
        )
        assert code == 0, err
        html = (workplace / 'features/index.html').read_text()
        assert '0000.png' in html and '0002.png' in html
        assert '0001.png' not in html

    @pytest.mark.parametrize(
        'arguments, words',
        [
            (('tiny.py', 'tiny.pth', 'gone'), 'gone'),
            (('tiny.py', 'tiny.pth', 'empty'), 'No images'),
            (
                ('tiny.py', 'tiny.pth', 'images', '--margin', '40'),
                'lower the margin',
            ),
        ],
    )
    def test_errors(self, workplace, run, arguments, words):
        (workplace / 'empty').mkdir()
        code, _, err = run(self.TOOL, *arguments, '--size', 64)
        assert code == 2 and words in err.splitlines()[-1]
