# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The command `mmdensecl`: settings, refusals, a run from end to end."""

import os
import re
import signal
import sys

import pytest
import torch
from mmengine.config import Config
from runs import run

from mmdensecl import cli
from mmdensecl.testing import write_pictures

CPU = cli.Machine(cores=4, gpus=0)
SMALL = '--backbone resnet18 --size 64'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    write_pictures(folder, 12, size=40)
    return folder


def chosen(words='', num_images=10_000, side=500, machine=CPU):
    words = f'pretrain imgs --out x {words}'.split()
    args = cli.make_parser().parse_args(words)
    choices = cli.choose(args, num_images, side, machine)
    assert all(x.reason for x in choices)
    return {x.name: x.value for x in choices}


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """What the command changes of this one is changed back."""
    monkeypatch.setattr(sys, 'argv', ['mmdensecl'])
    monkeypatch.setattr(sys, 'path', [*sys.path])


@pytest.fixture
def pretrain(images):
    """Function that calls the command here and gives its status."""
    return lambda words: cli.main(['pretrain', str(images), *words.split()])


class TestChoose:
    def test_cpu(self):
        settings = chosen()
        assert settings['view size'] == 96
        assert settings['batch size'] == 64
        assert settings['seconds'] == cli.DEFAULT_TIME
        assert 'epochs' not in settings  # a trial finds them

    def test_gpus(self):
        """The published lengths and the published rate for 8 x 64 images."""
        machine = cli.Machine(cores=64, gpus=8)
        settings = chosen(num_images=118_000, machine=machine)
        assert settings['view size'] == 224
        assert settings['epochs'] == 800
        assert settings['learning rate'] == pytest.approx(0.06)
        assert settings['momentum'] == 0.001
        settings = chosen(num_images=1_281_167, machine=machine)
        assert settings['epochs'] == 200

    def test_few_small_images_and_what_is_given(self):
        settings = chosen('--epochs 5 --size 48', num_images=20, side=70)
        assert settings['view size'] == 48
        assert settings['batch size'] == 10
        assert settings['epochs'] == 5
        # 10 steps: configs/mini's .06 for 64 images.
        assert settings['learning rate'] == pytest.approx(0.06 * 10 / 64)
        assert settings['momentum'] == 0.01
        assert chosen(side=70)['view size'] == 64


@pytest.mark.parametrize(
    'words, message',
    [
        ('--out {new} --resume', 'no run to resume'),
        ('--out {full}', 'add --resume .* another --out'),
        (
            '--out {new} --epochs 1 --backbone resnet7',
            'neither resnet18 to resnet152 nor',
        ),
        (
            '--out {new} --epochs 1 --size 32',
            'a single cell of a view of 32 pixels',
        ),
        (
            '--out {new} --epochs 1 --backbone swin-tiny --size 64',
            'swin-tiny cannot take a view of 64 pixels',
        ),
        ('--out {new} --epochs 1 --batch-size 1', 'expected at least 2'),
        ('--out {new} --epochs 1 --batch-size 13', 'no more than there are'),
    ],
)
def test_refusals(pretrain, tmp_path, capsys, words, message):
    new, full = tmp_path / 'new', tmp_path / 'full'
    (full / cli.CONFIG_NAME).parent.mkdir(parents=True)
    (full / cli.CONFIG_NAME).touch()
    assert pretrain(words.format(new=new, full=full)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (new / cli.CONFIG_NAME).exists()


@pytest.mark.parametrize(
    'method, model', [('mocov2', 'MoCoV2'), ('dsc-km', 'DSC')]
)
def test_config_of_each_method(images, pretrain, tmp_path, method, model):
    words = f'--method {method} {SMALL} --epochs 3 --out {tmp_path} --dry-run'
    assert pretrain(words) == 0
    cfg = Config.fromfile(tmp_path / cli.CONFIG_NAME)
    assert cfg.model.type == f'mmdensecl.{model}'
    assert cfg.model.neck.in_channels == 512
    assert cfg.model.queue_len == cfg.model.virtual_ranks == 'auto'
    assert cfg.train_dataloader.dataset.data_root == str(images)
    assert cfg.train_cfg.max_epochs == 3


def test_what_is_given_is_part_of_the_run(pretrain, tmp_path, capsys):
    """So that --resume knows it without being told again."""
    words = f'--out {tmp_path} --epochs 1 {SMALL}'
    options = 'model.dense_negatives=cells optim_wrapper.optimizer.lr=.5'
    given = f'--init old.pth --cfg-options {options} --dry-run'
    assert pretrain(f'{words} {given}') == 0
    said = capsys.readouterr().out
    assert options in said
    assert '12 images x 1 epochs = 12' in said  # few
    cfg = Config.fromfile(tmp_path / cli.CONFIG_NAME)
    assert cfg.model.dense_negatives == 'cells'
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    # Views of 64 pixels: no crop is enlarged that would not be anyway.
    decode = cfg.train_dataloader.dataset.pipeline[0]
    assert decode == dict(type='mmdensecl.DecodeRGB', min_side=166)
    (tmp_path / 'others').mkdir()
    argv = 'pretrain', str(tmp_path / 'others'), '--out', str(tmp_path)
    assert cli.main([*argv, '--resume']) == 2
    assert f'images {tmp_path / "others"}, was' in capsys.readouterr().err
    init = cfg.model.backbone.init_cfg
    assert init.type == 'mmdensecl.PretrainedBackbone'
    assert init.checkpoint == 'old.pth'
    for other, answer in (
        ('--init new.pth', 'init new.pth, was old.pth'),
        ('--cfg-options model.dense_negatives=cells', 'cfg_options'),
    ):
        assert pretrain(f'{words} --resume {other}') == 2
        assert answer in capsys.readouterr().err


def test_log_shows_what_happens_not_where(capsys):
    """Environment, config and hooks are in the file alone."""
    show = cli.LogFilter()
    log = '11/28 00:52:52 - mmengine'
    for line in (
        f'{log} - INFO - \n', 'System environment:\n',
        f'{log} - INFO - Config:\n', 'model = 1\n',
        f'{log} - WARNING - \n', 'seen\n',
        f'{log} - INFO - Epoch(train) [1][2/2]\n', 'Traceback\n',
    ):  # fmt: skip
        show(line)
    seen = capsys.readouterr().out
    assert 'seen' in seen and 'Epoch(train)' in seen and 'Traceback' in seen
    assert 'System' not in seen and 'model = 1' not in seen


def test_sigterm_is_the_command_s():
    """It ends by itself, and what it says then is shown."""
    command = (
        'import signal, sys, time\n'
        'def leave(*_):\n'
        '    print("saved")\n'
        '    sys.exit(5)\n'
        'signal.signal(signal.SIGTERM, leave)\n'
        'print("ready")\n'
        'time.sleep(60)\n'
    )
    lines = []

    def take(line):
        lines.append(line.strip())
        if line == 'ready\n':
            os.kill(os.getpid(), signal.SIGTERM)

    def unhandled(*_):
        raise AssertionError('SIGTERM was not passed on')

    own = signal.signal(signal.SIGTERM, unhandled)
    try:
        assert cli.run([sys.executable, '-c', command], take) == 5
        assert signal.getsignal(signal.SIGTERM) is unhandled
    finally:
        signal.signal(signal.SIGTERM, own)
    assert lines == ['ready', 'saved']


def test_from_images_to_weights(images, pretrain, tmp_path, capfd):
    """Trains, is refused a second time, resumes, exports."""
    out = tmp_path / 'out'
    words = f'--out {out} {SMALL} --batch-size 4'
    command = [sys.executable, '-m', 'mmdensecl', 'pretrain', images]
    first = run(*command, *words.split(), '--time', '1s', cwd=tmp_path)
    assert 's a step, 3 steps an epoch' in first.stdout
    assert 'Epoch(train)' in first.stdout
    assert 'System environment' not in first.stdout
    cfg = Config.fromfile(out / cli.CONFIG_NAME)
    weights = out / f'epoch_{cfg.train_cfg.max_epochs}.pth'
    assert f"checkpoint='{weights}'" in first.stdout
    # Of stock heads, for a ResNet-18.
    assert 'decode_head=dict(in_channels=512, channels=128)' in first.stdout
    # Its settings are not those of the trial.
    assert cfg.default_hooks.logger.interval == 50
    assert 'indices' not in cfg.train_dataloader.dataset

    assert pretrain(words) == 2
    assert 'add --resume' in capfd.readouterr().err
    assert pretrain(f'{words} --epochs 7 --resume') == 2
    assert 'differ: epochs 7, was None' in capfd.readouterr().err
    # mmengine's record of a resumed run does not take its place.
    assert Config.fromfile(out / cli.CONFIG_NAME).resume is False
    assert pretrain(f'{words} --resume') == 0
    assert f'Weights: {weights}' in capfd.readouterr().out

    exported = tmp_path / 'backbone.pth'
    assert not cli.main(['export', str(weights), str(exported)])
    (file,) = tmp_path.glob('backbone*.pth')
    state = torch.load(file, weights_only=True)['state_dict']
    assert state['conv1.weight'].shape == (64, 3, 7, 7)


def test_help_names_every_command(capfd):
    for words, names in (
        (['--help'], ['pretrain', *cli.TOOLS]),
        (['probe', '--help'], ['mmdensecl probe', '--unlabeled']),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        text = capfd.readouterr().out
        assert not [x for x in names if x not in text]
