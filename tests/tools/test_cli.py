"""The command `mmdensecl`: settings, refusals, a run from end to end."""

import argparse
import re
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from mmdensecl import cli
from mmdensecl.testing import write_pictures

CPU = cli.Machine(cores=4, gpus=0)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    write_pictures(folder, 12, size=40)
    return folder


def parse(*argv):
    return cli.make_parser().parse_args(['pretrain', 'imgs', *argv])


def chosen(*argv, num_images=10_000, side=500, machine=CPU):
    args = parse('--out', 'x', *argv)
    choices = cli.choose(args, num_images, side, machine)
    assert all(x.reason for x in choices)
    return {x.name: x.value for x in choices}


def mmdensecl(*argv):
    return subprocess.run(
        [sys.executable, '-m', 'mmdensecl', *map(str, argv)],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    'text, seconds', [('90s', 90), ('30m', 1800), ('1h30m', 5400), ('.5h', 0)]
)
def test_duration(text, seconds):
    if seconds:
        assert cli.duration(text) == seconds
    else:
        with pytest.raises(argparse.ArgumentTypeError, match='got'):
            cli.duration(text)


@pytest.mark.parametrize('text', ['', '0s', '2', '-1h', '1h2'])
def test_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError, match='30m, 2h'):
        cli.duration(text)


class TestChoose:
    def test_cpu(self):
        settings = chosen()
        assert settings['view size'] == 96
        assert settings['batch size'] == 64
        assert settings['time'] == cli.DEFAULT_TIME
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

    def test_few_small_images(self):
        settings = chosen('--epochs', '5', num_images=20, side=70)
        assert settings['view size'] == 64
        assert settings['batch size'] == 10
        assert settings['epochs'] == 5
        # 10 steps: configs/mini's .06 for 64 images.
        assert settings['learning rate'] == pytest.approx(0.06 * 10 / 64)
        assert settings['momentum'] == 0.01

    def test_what_is_given_stays(self):
        settings = chosen('--batch-size', '6', '--size', '48', '--time', '2m')
        assert settings['batch size'] == 6
        assert settings['view size'] == 48
        assert settings['time'] == 120


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--out', '{out}', '--resume'], 'no run to resume'),
        (['--out', '{full}'], 'add --resume .* another --out'),
        (['--out', '{out}', '--epochs', '1', '--backbone', 'resnet7'],
         'neither resnet18 to resnet152 nor'),
        (['--out', '{out}', '--epochs', '1', '--size', '32'],
         'a single cell of a view of 32 pixels'),
    ],
)  # fmt: skip
def test_refusals(images, tmp_path, capsys, argv, message):
    full = tmp_path / 'full'
    full.mkdir()
    (full / cli.CONFIG_NAME).parent.mkdir()
    (full / cli.CONFIG_NAME).touch()
    argv = [x.format(out=tmp_path / 'out', full=full) for x in argv]
    assert cli.main(['pretrain', str(images), *argv]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / 'out' / cli.CONFIG_NAME).exists()


def test_folder_without_images(tmp_path, capsys):
    argv = ['pretrain', str(tmp_path), '--out', str(tmp_path / 'out')]
    assert cli.main(argv) == 2
    assert f'No images in "{tmp_path}"' in capsys.readouterr().err


@pytest.mark.parametrize(
    'method, model',
    [
        ('densecl', 'DenseCL'),
        ('mocov2', 'MoCoV2'),
        ('dsc-km', 'DSC'),
        ('dsc-pm', 'DSC'),
    ],
)
@pytest.mark.parametrize('backbone, channels', [('resnet18', 512)])
def test_config_of_each_method(
    images, tmp_path, method, model, backbone, channels
):
    argv = ['--method', method, '--backbone', backbone, '--epochs', '3']
    argv += ['--out', str(tmp_path), '--size', '64', '--dry-run']
    assert cli.main(['pretrain', str(images), *argv]) == 0
    cfg = Config.fromfile(tmp_path / cli.CONFIG_NAME)
    assert cfg.model.type == f'mmdensecl.{model}'
    assert cfg.model.neck.in_channels == channels
    assert cfg.model.queue_len == cfg.model.virtual_ranks == 'auto'
    assert cfg.train_dataloader.dataset.data_root == str(images)
    assert cfg.train_cfg.max_epochs == 3


def test_what_is_given_is_part_of_the_run(images, tmp_path, capsys):
    """So that --resume knows it without being told again."""
    argv = ['pretrain', str(images), '--out', str(tmp_path), '--epochs', '1']
    argv += ['--backbone', 'resnet18', '--size', '64']
    options = 'model.dense_negatives=cells', 'optim_wrapper.optimizer.lr=.5'
    given = ['--init', 'old.pth', '--cfg-options', *options, '--dry-run']
    assert cli.main([*argv, *given]) == 0
    said = capsys.readouterr().out
    assert ' '.join(options) in said
    assert '12 images x 1 epochs = 12' in said  # few
    cfg = Config.fromfile(tmp_path / cli.CONFIG_NAME)
    assert cfg.model.dense_negatives == 'cells'
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    # Views of 64 pixels: no crop is enlarged that would not be anyway.
    decode = cfg.train_dataloader.dataset.pipeline[0]
    assert decode == dict(type='mmdensecl.DecodeRGB', min_side=166)
    init = cfg.model.backbone.init_cfg
    assert init.type == 'mmdensecl.PretrainedBackbone'
    assert init.checkpoint == 'old.pth'
    assert cli.main([*argv, '--init', 'new.pth', '--resume']) == 2
    assert 'init new.pth, was old.pth' in capsys.readouterr().err
    assert cli.main([*argv, '--resume', '--cfg-options', options[0]]) == 2
    assert 'cfg_options' in capsys.readouterr().err


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


@pytest.mark.parametrize(
    'name, channels', [('convnext-tiny', 768), ('MobileNetV2', 1280)]
)
def test_backbones_of_the_host(name, channels):
    cfg = Config.fromfile(
        cli.root() / 'configs/densecl_r50_8xb32-coslr-200e.py'
    )
    cli.set_backbone(cfg, name, size=64)
    assert cfg.model.neck.in_channels == channels


def test_from_images_to_weights(images, tmp_path, capsys):
    """Trains, is refused a second time, resumes, exports."""
    out = tmp_path / 'out'
    argv = ['pretrain', images, '--out', out, '--backbone', 'resnet18']
    argv += ['--size', 64, '--batch-size', 4]
    first = mmdensecl(*argv, '--time', '1s')
    assert first.returncode == 0, first.stdout + first.stderr
    assert 's a step, 3 steps an epoch' in first.stdout
    assert 'Epoch(train)' in first.stdout
    assert 'System environment' not in first.stdout
    cfg = Config.fromfile(out / cli.CONFIG_NAME)
    weights = out / f'epoch_{cfg.train_cfg.max_epochs}.pth'
    assert f"checkpoint='{weights}'" in first.stdout
    # Its settings are not those of the trial.
    assert cfg.default_hooks.logger.interval == 50
    assert 'indices' not in cfg.train_dataloader.dataset

    assert cli.main([*map(str, argv)]) == 2
    assert 'add --resume' in capsys.readouterr().err
    other = [*map(str, argv), '--epochs', '7', '--resume']
    assert cli.main(other) == 2
    assert 'differ: epochs 7, was None' in capsys.readouterr().err
    # mmengine's record of a resumed run does not take its place.
    assert Config.fromfile(out / cli.CONFIG_NAME).resume is False
    resumed = mmdensecl(*argv, '--resume')
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f'Weights: {weights}' in resumed.stdout

    exported = mmdensecl('export', weights, tmp_path / 'backbone.pth')
    assert exported.returncode == 0, exported.stdout + exported.stderr
    (file,) = tmp_path.glob('backbone*.pth')
    state = torch.load(file, weights_only=True)['state_dict']
    assert state['conv1.weight'].shape == (64, 3, 7, 7)


def test_help_names_every_command():
    text = mmdensecl('--help').stdout
    assert all(name in text for name in ('pretrain', *cli.TOOLS))
    assert '--unlabeled' in mmdensecl('probe', '--help').stdout
