# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The command `mmdensecl`: the tools of this project under one name.

`mmdensecl pretrain` chooses settings for a folder of images, writes them as a
config and runs tools/train.py on it. All other commands are tools by another
name, with the same flags.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .model_hub import index_file

METHODS = 'densecl', 'mocov2', 'dsc-km', 'dsc-pm'
TOOLS = {
    'probe': (
        'analysis_tools/dense_probe.py',
        'score frozen features against random weights and other files',
    ),
    'show': (
        'visualize/visualize_correspondence.py',
        'draw which cells of two views match',
    ),
    'features': (
        'visualize/visualize_features.py',
        'draw dense features as colours',
    ),
    'export': (
        'model_converters/publish_backbone.py',
        'publish a backbone for other toolboxes',
    ),
    'benchmark': ('benchmark.py', 'compare weights on downstream tasks'),
}
# In a folder of its own: mmengine writes what it ran beside the checkpoints,
# by the same name.
CONFIG_NAME = 'config/pretrain.py'
# What a resumed run must not be given anew.
SETTINGS = (
    'method',
    'backbone',
    'epochs',
    'time',
    'batch_size',
    'size',
    'seed',
    'init',
    'cfg_options',
)
# Shorter runs use the settings of configs/mini, longer ones the published.
SHORT_RUN = 20_000
# The fewest samples, images times epochs, with which a pre-training of ours
# was seen to help (docs/benchmarks.md).
FEW_SAMPLES = 50_000
# Shorter side of the smallest crop, by the image's: a fifth of the area, 3:4.
SMALLEST_CROP = (0.2 * 3 / 4) ** 0.5
NUM_LOOKED_AT = 32  # images, to choose the size of a view
TRIAL_STEPS = 8  # of the run that measures the speed
DEFAULT_TIME = 3600.0  # seconds, where no GPU trains


class Machine(NamedTuple):
    """What there is to train with.

    Attributes:
        cores: CPU cores of this process.
        gpus: GPUs.
    """

    cores: int
    gpus: int

    @property
    def processes(self) -> int:
        """Processes that train, one for each GPU."""
        return max(1, self.gpus)


class Choice(NamedTuple):
    """A setting, and why it was chosen.

    Attributes:
        name: Of the setting.
        value: Chosen.
        reason: For the user.
    """

    name: str
    value: Any
    reason: str


def root() -> Path:
    """Folder of configs/ and tools/, of a checkout or an installed package."""
    return index_file().parent


def duration(text: str) -> float:
    """Read a time such as 90s, 30m, 2h or 1h30m, in seconds.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    match = re.fullmatch(
        r'(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?',
        text,
    )
    parts = [float(x or 0) for x in match.groups()] if match else []
    seconds = sum(
        x * unit for x, unit in zip(parts, (3600, 60, 1), strict=False)
    )
    if seconds <= 0:
        raise argparse.ArgumentTypeError(
            f'a time such as 90s, 30m, 2h or 1h30m is expected, got {text!r}'
        )
    return seconds


def positive(text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f'a whole number of at least 1 is expected, got {text!r}'
        )
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog='mmdensecl',
        description='Dense self-supervised pre-training: from a folder of '
        'images to weights for mmdet, mmseg and Python.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    pretrain = commands.add_parser(
        'pretrain', help='train a backbone on a folder of images'
    )
    add = pretrain.add_argument
    add('images', type=Path, help='folder of images, nested or not')
    add('--out', type=Path, required=True, help='folder of the run')
    add('--method', choices=METHODS, default='densecl')
    add(
        '--backbone',
        default='resnet50',
        help="resnet18 to resnet152, a model of mmpretrain's hub such as "
        'convnext-tiny, or a registered type such as HRNet (default: '
        'resnet50)',
    )
    length = pretrain.add_mutually_exclusive_group()
    length.add_argument('--epochs', type=positive, metavar='N')
    length.add_argument(
        '--time',
        type=duration,
        metavar='2h',
        help='train for about this long; a trial of a few steps measures '
        'the speed (default without a GPU: 1h)',
    )
    add('--batch-size', type=positive, metavar='N', help='of a process')
    add('--size', type=positive, metavar='PIXELS', help='side of a view')
    add('--seed', type=int, default=0)
    add('--init', metavar='FILE', help='weights to start from')
    add(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='any other setting of the config, as of tools/train.py',
    )
    add('--resume', action='store_true', help='go on with the run in --out')
    add(
        '--dry-run',
        action='store_true',
        help='choose and write the config, but do not train',
    )
    for name, (_, text) in TOOLS.items():
        # A tool reads its own flags; its own help is shown.
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments. Defaults to those of the process.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in TOOLS:
        return run_tool(*argv)
    args = make_parser().parse_args(argv)
    try:
        return pretrain(args)
    except (ValueError, OSError) as error:
        print(f'mmdensecl: error: {error}', file=sys.stderr)
        return 2


def run_tool(name: str, *argv: str) -> int:
    """Run one of the tools in this process."""
    path = root() / 'tools' / TOOLS[name][0]
    sys.argv = [f'mmdensecl {name}', *argv]
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    code = compile(path.read_bytes(), str(path), 'exec')
    # Not by runpy, which would have its help speak of another command.
    exec(code, {'__name__': '__main__', '__file__': str(path)})
    return 0


def pretrain(args: argparse.Namespace) -> int:
    """Choose, write the config, train, and say how to use the weights.

    Raises:
        FileExistsError: There is a run in the folder and no --resume.
        FileNotFoundError: There is none to resume, or no images.
        ValueError: The backbone is not known or gives no map, or other
            settings are given to a run that is resumed.
    """
    if not args.images.is_dir():
        raise FileNotFoundError(
            f'"{args.images}" is no folder (working directory: "{Path.cwd()}")'
        )
    config = args.out / CONFIG_NAME
    if args.resume:
        if not config.is_file():
            raise FileNotFoundError(
                f'"{config}" does not exist, so there is no run to resume. '
                'Start without --resume.'
            )
        check_settings(args, config)
        print(f'Settings of {config}')
    elif config.exists():
        raise FileExistsError(
            f'"{config}" exists: add --resume to go on with that run, or '
            'choose another --out.'
        )
    else:
        write_config(args, config)
    if args.dry_run:
        return 0
    machine = find_machine()
    options = ['--resume'] if args.resume else []
    status = run(
        train_command(config, args.out, machine, options), LogFilter()
    )
    if status == 0:
        newest = (args.out / 'last_checkpoint').read_text(encoding='utf-8')
        print(how_to_use(newest.strip(), config))
    return status


def check_settings(args: argparse.Namespace, config: Path) -> None:
    """Refuse to resume a run with other settings than it has.

    Raises:
        ValueError: With those that differ.
    """
    from mmengine.config import Config

    default = make_parser().parse_args(['pretrain', '.', '--out', '.'])
    cfg = Config.fromfile(config)
    made_with = cfg.get('made_with', {})
    differing = []
    for name in SETTINGS:
        new, old = getattr(args, name), made_with.get(name)
        if new not in (getattr(default, name), None, old):
            differing.append(f'{name} {new}, was {old}')
    images, old = str(args.images.absolute()), cfg.get('data_root')
    if images != old:
        differing.insert(0, f'images {images}, was {old}')
    if differing:
        raise ValueError(
            f'--resume goes on with the settings of "{config}", and these '
            f'differ: {"; ".join(differing)}. Leave them out, edit that file, '
            'or start another run with another --out.'
        )


def find_machine() -> Machine:
    """Count cores and GPUs."""
    import torch

    from .engine.launch import count_cores

    return Machine(count_cores(), torch.cuda.device_count())


def write_config(args: argparse.Namespace, path: Path) -> None:
    """Choose what the command line leaves open, print it, write the config."""
    # Late: a command that only helps or refuses should not wait for them.
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from PIL import Image

    from .engine import set_pretrained
    from .registry import DATASETS

    init_default_scope('mmpretrain')
    name = args.method.replace('-', '_')
    cfg = Config.fromfile(
        root() / 'configs' / f'{name}_r50_8xb32-coslr-200e.py'
    )
    loader = cfg.train_dataloader
    loader.dataset.data_root = str(args.images.absolute())
    dataset = DATASETS.build(loader.dataset)
    sides = []
    for i in range(0, len(dataset), max(1, len(dataset) // NUM_LOOKED_AT)):
        file = args.images / dataset.get_data_info(i)['img_path']
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except OSError:  # training counts and reports them
            continue
    if not sides:
        raise ValueError(
            f'None of the images looked at below "{args.images}" can be read'
        )
    machine = find_machine()
    choices = choose(args, len(dataset), int(median(sides)), machine)
    settings = {choice.name: choice.value for choice in choices}
    set_backbone(cfg, args.backbone, settings['view size'])
    if args.init:
        set_pretrained(cfg, args.init)
    apply(cfg, settings, args)
    if 'seconds' in settings:
        choices += fit_time(settings, cfg, args.out, machine)
        apply(cfg, {x.name: x.value for x in choices}, args)
    if args.cfg_options:
        text = ' '.join(args.cfg_options)
        choices.append(Choice('cfg-options', text, 'as given, over the above'))
    width = max(len(x.name) for x in choices)
    for choice in choices:
        print(f'{choice.name:{width}}  {choice.value}  ({choice.reason})')
    samples = len(dataset) * cfg.train_cfg.max_epochs
    if samples < FEW_SAMPLES:
        print(
            f'Few samples: {len(dataset)} images x {cfg.train_cfg.max_epochs} '
            f'epochs = {samples}. The least that was seen to help was about '
            f'{FEW_SAMPLES}: expect little, and check with `mmdensecl probe`.'
        )
    cfg.made_with = {name: getattr(args, name) for name in SETTINGS}
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    print(f'Config: {path}', flush=True)


def choose(
    args: argparse.Namespace, num_images: int, side: int, machine: Machine
) -> list[Choice]:
    """Choose the settings that do not depend on the network.

    Args:
        args: Of the command line; what it has set is left.
        num_images: In the folder.
        side: Median of the shorter side of the images, in pixels.
        machine: What trains.

    Returns:
        The settings, in the order in which they are told.
    """
    found: dict[str, Choice] = {}

    def pick(name: str, own: Any, value: Any, why: str) -> None:
        why = 'as given' if own else why
        found[name] = Choice(name, own or value, why)

    pick('images', None, num_images, f'"{args.images}"')
    most, place = (224, 'as published') if machine.gpus else (96, 'no GPU')
    size = max(64, min(most, side // 32 * 32))
    why = place if size == most else f'images have {side} pixels'
    pick('view size', args.size, size, why)
    batch = max(2, min(64, num_images // machine.processes // 2))
    why = 'each process' if batch == 64 else f'{num_images} images'
    pick('batch size', args.batch_size, batch, why)
    step = found['batch size'].value * machine.processes
    if not 2 * machine.processes <= step <= num_images:
        raise ValueError(
            f'--batch-size {found["batch size"].value} on {machine.processes} '
            f'processes with {num_images} images: expected at least 2, which '
            'batch norm needs, and no more than there are images'
        )
    workers = max(1, min(8, machine.cores // machine.processes - 1))
    pick('workers', None, workers, f'{machine.cores} cores')
    if args.epochs is None and (args.time or not machine.gpus):
        why = 'no GPU; set --time or --epochs'
        pick('seconds', args.time, DEFAULT_TIME, why)
        return [*found.values()]
    if num_images >= 500_000:
        pick('epochs', args.epochs, 200, 'as published for ImageNet')
    else:
        pick('epochs', args.epochs, 800, 'as published for COCO')
    settings = {x.name: x.value for x in found.values()}
    return [*found.values(), *recipe(settings['epochs'], settings, machine)]


def steps_an_epoch(settings: dict, machine: Machine) -> int:
    """Count the steps of an epoch; the last, smaller batch is dropped."""
    batch = settings['batch size'] * machine.processes
    return max(1, settings['images'] // batch)


def recipe(epochs: int, settings: dict, machine: Machine) -> list[Choice]:
    """Choose learning rate and momentum by the length of the run.

    Args:
        epochs: Of the run.
        settings: With the numbers of images and of those in a batch.
        machine: What trains.
    """
    steps = epochs * steps_an_epoch(settings, machine)
    images = settings['batch size'] * machine.processes
    if steps < SHORT_RUN:
        why = f'{steps} steps: the recipe of configs/mini'
        lr, momentum = 0.06 * images / 64, 0.01
        lr = min(lr, 0.06)
    else:
        why = f'{steps} steps: the published recipe'
        lr, momentum = 0.03 * images / 256, 0.001
    return [
        Choice(
            'learning rate', round(lr, 6), f'{why}, {images} images a step'
        ),
        Choice('momentum', momentum, 'weight of the query in the key encoder'),
    ]


def apply(cfg: Any, settings: dict, args: argparse.Namespace) -> None:
    """Write settings into a config, and --cfg-options over them."""
    from .engine.config import merge_options, parse_options

    cfg.model.update(queue_len='auto', virtual_ranks='auto')
    cfg.optim_wrapper.update(
        type='mmdensecl.BFloat16OptimWrapper', enabled='auto'
    )
    loader = cfg.train_dataloader
    loader.update(
        batch_size=settings['batch size'], num_workers=settings['workers']
    )
    size = settings['view size']
    for transform in loader.dataset.pipeline:
        if transform['type'] == 'mmdensecl.TwoViews':
            transform['size'] = size
        elif transform['type'] == 'mmdensecl.DecodeRGB':
            transform['min_side'] = math.ceil(size / SMALLEST_CROP)
    cfg.train_pipeline = loader.dataset.pipeline
    cfg.data_root = loader.dataset.data_root
    cfg.randomness.seed = args.seed
    if 'learning rate' in settings:
        cfg.optim_wrapper.optimizer.lr = settings['learning rate']
        cfg.model.momentum = settings['momentum']
    if 'epochs' in settings:
        epochs = settings['epochs']
        cfg.train_cfg.max_epochs = epochs
        # Ten checkpoints a run, of which the last three stay.
        cfg.default_hooks.checkpoint.interval = max(1, epochs // 10)
    merge_options(cfg, parse_options(cfg, args.cfg_options))


def set_backbone(cfg: Any, name: str, size: int) -> None:
    """Put another backbone into a config and fit the neck to its map.

    Args:
        cfg: Of a pre-training, with a ResNet-50.
        name: See --backbone.
        size: Side of a view in pixels.

    Raises:
        ValueError: There is no such backbone, or it gives no map.
    """
    import torch

    from .models.modules import last_map
    from .registry import MODELS

    if match := re.fullmatch(r'resnet(18|34|50|101|152)', name.lower()):
        cfg.model.backbone.depth = int(match[1])
    else:
        cfg.model.backbone = find_backbone(name)
    try:
        backbone = MODELS.build(cfg.model.backbone)
        backbone.eval()  # returns None in mmpretrain
        with torch.no_grad():
            maps = backbone(torch.zeros(1, 3, size, size))
    except Exception as error:  # of many kinds, by backbone
        raise ValueError(
            f'--backbone {name} cannot take a view of {size} pixels '
            f'({type(error).__name__}: {error}). Set --size to what it is '
            'made for'
        ) from error
    shape = tuple(last_map(maps).shape)
    if len(shape) != 4:
        raise ValueError(
            f'--backbone {name} gives features of shape {shape}, not a map '
            '(N, C, H, W)'
        )
    if max(shape[2:]) < 2:
        raise ValueError(
            f'--backbone {name} makes a single cell of a view of {size} '
            'pixels, and dense contrast needs several: raise --size'
        )
    if max(shape[2:]) < 3:
        print(
            f'Few cells: {shape[2]} x {shape[3]} of a view of {size} pixels. '
            'match_acc is high by chance then, and the dense branch learns '
            'little; a larger --size gives more'
        )
    cfg.model.neck.in_channels = shape[1]


def find_backbone(name: str) -> Any:
    """Find the config of a backbone by a name of mmpretrain's.

    Raises:
        ValueError: There is none.
    """
    from mmengine.config import ConfigDict
    from mmpretrain import list_models
    from mmpretrain.apis.model import ModelHub

    from .registry import MODELS

    known = [x for x in list_models() if x == name or x.startswith(f'{name}_')]
    if known:
        backbone = ModelHub.get(known[0]).config.model.backbone
        backbone.pop('init_cfg', None)  # weights are for --init
    elif MODELS.get(f'mmpretrain.{name}') is not None:
        backbone = ConfigDict(type=f'mmpretrain.{name}')
    else:
        raise ValueError(
            f'--backbone {name} is neither resnet18 to resnet152 nor in '
            "mmpretrain's hub (mmpretrain.list_models()) or registry"
        )
    # Some give a vector unless they are asked for the map.
    if backbone.type in ('ConvNeXt', 'mmpretrain.ConvNeXt'):
        backbone.gap_before_final_norm = False
    if 'out_type' in backbone or backbone.type.endswith('VisionTransformer'):
        backbone.out_type = 'featmap'
    return backbone


def fit_time(
    settings: dict, cfg: Any, out: Path, machine: Machine
) -> list[Choice]:
    """Choose the length of a run by a time, and what depends on the length.

    Args:
        settings: With the time.
        cfg: Of the run.
        out: Folder of the run; a trial of a few steps lies in `trial/` there.
        machine: What trains.

    Returns:
        Epochs, at least 1, learning rate and momentum.

    Raises:
        ValueError: The trial failed.
    """
    from .engine.hooks.queue_length_hook import fit_queue_len

    num_images = settings['images']
    batch = settings['batch size'] * machine.processes
    trial = deepcopy(cfg)
    trial.train_dataloader.dataset.indices = min(
        num_images, TRIAL_STEPS * batch
    )
    trial.model.queue_len = fit_queue_len(num_images, batch)
    trial.train_cfg.max_epochs = 1
    trial.default_hooks.logger.interval = 1
    trial.default_hooks.checkpoint.interval = 10
    folder = out / 'trial'
    folder.mkdir(parents=True, exist_ok=True)
    trial.dump(folder / 'trial.py')
    print(
        f'Measuring the speed with {TRIAL_STEPS} steps, which --time does not '
        'count ...',
        flush=True,
    )
    command = train_command(folder / 'trial.py', folder, machine, [])
    with open(folder / 'output.txt', 'w', encoding='utf-8') as log:
        status = run(command, log.write, stderr=subprocess.STDOUT)
    lines = sorted(folder.glob('*/vis_data/scalars.json'))
    if status or not lines:
        raise ValueError(
            f'the trial run ended with status {status}; "{log.name}" says why'
        )
    scalars = lines[-1].read_text(encoding='utf-8').splitlines()
    # mmengine smooths: the least has the least of the slow first steps.
    step = min(json.loads(line)['time'] for line in scalars)
    shutil.rmtree(folder)
    steps = steps_an_epoch(settings, machine)
    epochs = max(1, int(settings['seconds'] / (step * steps)))
    why = f'{step:.2f} s a step, {steps} steps an epoch'
    return [
        Choice('epochs', epochs, why),
        *recipe(epochs, settings, machine),
    ]


def train_command(
    config: Path, out: Path, machine: Machine, options: list[str]
) -> list[str]:
    """Make the command line of tools/train.py, one process a GPU."""
    tools = root() / 'tools'
    options = ['--work-dir', str(out), *options]
    if machine.gpus < 2:
        return [sys.executable, str(tools / 'train.py'), str(config), *options]
    script = str(tools / 'dist_train.sh')
    return ['bash', script, str(config), str(machine.gpus), *options]


def run(command: list[str], take: Callable[[str], Any], **kwargs: Any) -> int:
    """Run a command; signals to stop are the command's, which then saves.

    Args:
        command: Program and arguments.
        take: Called with each line of its output.
        **kwargs: Of :class:`subprocess.Popen`.

    Returns:
        The exit status.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        encoding='utf-8',
        errors='replace',
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        **kwargs,
    )
    # Ctrl-C reaches both, SIGTERM this process alone.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(
            signal.SIGTERM, lambda *_: process.terminate()
        ),
    }
    try:
        for line in process.stdout or ():
            take(line)
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class LogFilter:
    """Print a log without environment, config and hooks: its file has them."""

    START = re.compile(r'\d\d/\d\d \d\d:\d\d:\d\d - mmengine - (\w+) - (.*)')
    LEFT_OUT = '', 'Config:', 'Hooks will be executed in the following order:'

    def __init__(self) -> None:
        self.shown = True

    def __call__(self, line: str) -> None:
        """Print a line, or leave it out with the record it is part of."""
        if start := self.START.match(line):
            level, text = start.groups()
            self.shown = level != 'INFO' or text.strip() not in self.LEFT_OUT
        if self.shown:
            print(line, end='', flush=True)


def how_to_use(checkpoint: str, config: Path) -> str:
    """Say how mmdet, mmseg and Python use a checkpoint."""
    from mmengine.config import Config

    backbone = Config.fromfile(config).model.backbone
    init = (
        f"init_cfg=dict(type='mmdensecl.PretrainedBackbone', "
        f"checkpoint='{checkpoint}')"
    )
    network, neck, heads = (
        f"type='{backbone.type.rpartition('.')[2]}', ",
        '',
        '',
    )
    if 'depth' in backbone:
        network += f'depth={backbone.depth}, '
        if backbone.depth < 50:  # a quarter of the channels
            neck = 'neck=dict(in_channels=[64, 128, 256, 512]), '
            heads = (
                'decode_head=dict(in_channels=512, channels=128), '
                'auxiliary_head=dict(in_channels=256, channels=64), '
            )
    return (
        f'\nWeights: {checkpoint}\n'
        f'mmdet: model = dict({neck}backbone=dict({network}{init}))\n'
        f'mmseg: model = dict(pretrained=None, {heads}'
        f'backbone=dict({network}{init}))\n'
        f"Python: mmdensecl.load_backbone('{checkpoint}')\n"
        f'Is it any good: mmdensecl probe {checkpoint} --unlabeled IMAGES\n'
        f'A picture: mmdensecl show {config} {checkpoint} IMAGE --before none'
    )
