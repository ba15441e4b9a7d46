# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Train DenseCL here and in two peers, probe the frozen features, compare.

    python tools/benchmarks/peers.py --data-root data/my_images \
        --score data/cityscapes data/VOCdevkit/VOC2012 --out work_dirs/peers

mmpretrain's DenseCL and lightly-train's (AGPL, so no dependency of ours) each
live in an environment that uv makes under --envs. All train the network, views
and recipe of the first config on as many samples of the same images, one after
the other, and are scored by tools/analysis_tools/dense_probe.py. What is
finished is not repeated; a training that was stopped begins again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mmdensecl
from mmdensecl.engine.bfloat16 import native_bfloat16
from mmdensecl.engine.launch import count_cores
from mmdensecl.registry import DATASETS

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent
CONFIG = ROOT / 'configs/mini/densecl_r18w16_1xb64-coslr-11e.py'
RANDOM = 'random weights'
# Beside torch and torchvision, which are those of this environment.
PACKAGES = {
    'mmpretrain': [
        'mmpretrain==1.2.0',
        'mmengine==0.10.7',
        'mmcv-lite==2.1.0',
        'numpy==1.26.4',  # its jitter of the hue overflows with numpy 2
        'setuptools==80.9.0',  # mmengine imports pkg_resources
    ],
    'lightly-train': [
        'lightly-train==0.18.0',
        'lightly==1.5.26',  # with 1.6.0 it stops at the first step
        'pytorch-lightning==2.6.6',
        'albumentations==2.0.8',
        'numpy==2.4.6',
    ],
}
# In the work dir of a peer.
WEIGHTS = {
    'mmpretrain': 'epoch_{epochs}.pth',
    'lightly-train': 'exported_models/exported_last.pt',
}
# No telemetry, no look-ups of newer versions, no downloads.
OFFLINE = dict(
    LIGHTLY_TRAIN_EVENTS_DISABLED='1',
    LIGHTLY_DID_VERSION_CHECK='True',
    NO_ALBUMENTATIONS_UPDATE='1',
    HF_HUB_OFFLINE='1',
)
NOTES = """\
{epochs} epochs of {images:,} images in batches of {batch_size}, in {precision}
on {cores} cores, OMP_NUM_THREADS {threads}, torch {torch}. Samples a second:
the batch size over the median of the seconds a step, each value a mean over
{log_interval} steps, loading included; starting and saving count in the wall
time only. mIoU: mean ± standard deviation over the seeds of the probe (and of
the pre-training, if several); in brackets, less that of random weights.

What still differs:

* Initial weights of the heads: Kaiming's (ours), torch's default (the peers).
* mmpretrain: a wrapper of ours casts to bfloat16 on a CPU; its own refuses to.
* lightly-train: the learning rate rises during a tenth of the training, then
  follows the cosine step by step to a thousandth; in the others it starts at
  once and follows it epoch by epoch to zero. Biases and batch norm have no
  weight decay. Crops are resized by area averages, and mirrored before their
  colours are changed."""


class Run(NamedTuple):
    """One pre-training.

    Attributes:
        name: Of its row.
        folder: Where it is kept once it is finished.
        settings: Whatever its result depends on.
        command: Trains into ``{work_dir}``, as ``{settings}`` say.
        weights: The file in the work dir.
        config: Of the network.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    command: list[str]
    weights: str
    config: Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--data-root', type=Path, required=True, help='images to train on')
    text = 'labelled images, laid out as VOC2012 or Cityscapes, none of them '
    text += 'in --data-root'
    add('--score', nargs='+', required=True, metavar='DIR', help=text)
    text = 'of ours; the peers are set to the first, a DenseCL of a ResNet-18'
    add('--configs', nargs='+', type=Path, default=[CONFIG], help=text)
    add('--peers', nargs='*', choices=[*PACKAGES], default=[*PACKAGES])
    text = 'of a pre-training, to the nearest whole epoch'
    add('--samples', type=int, default=250_000, help=text)
    add('--seeds', type=int, default=1, help='pre-trainings of each')
    add('--max-images', type=int, default=150, help='of a split, to score')
    add('--out', type=Path, default=Path('work_dirs/peers'))
    text = "where the peers' environments are or are made, peers-NAME"
    add('--envs', type=Path, default=Path('work_dirs'), help=text)
    return parser.parse_args()


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))


def install(peer: str, envs: Path) -> str:
    """Make or complete the environment of a peer; its interpreter."""
    uv = shutil.which('uv') or shutil.which(ROOT / '.uv/bin/uv')
    if uv is None:
        sys.exit('The peers are installed by uv: run "pip install uv"')
    python = (envs / f'peers-{peer}' / 'bin/python').absolute()
    if not python.exists():
        env = str(python.parents[1])
        subprocess.run([uv, 'venv', '-p', sys.executable, env], check=True)
    packages = [
        f'{x.__name__}=={x.__version__.partition("+")[0]}'
        for x in (torch, torchvision)
    ] + PACKAGES[peer]
    command = [uv, 'pip', 'install', '-p', str(python), *packages]
    subprocess.run(command, check=True)
    return str(python)


def read_settings(config: Path, data_root: Path, samples: int) -> dict:
    """What a config of DenseCL sets for all, as peer_train.py takes it."""
    cfg = Config.fromfile(config)
    model, loader = cfg.model, cfg.train_dataloader
    network = model.type, model.backbone.type, model.backbone.depth
    if network != ('mmdensecl.DenseCL', 'ResNet', 18):
        raise ValueError(
            f'Expected DenseCL of a ResNet-18, got {network}: {config}'
        )
    init_default_scope('mmpretrain')
    folder = dict(type='mmdensecl.UnlabeledFolder', pipeline=[])
    images = len(DATASETS.build(dict(folder, data_root=str(data_root))))
    steps = images // loader.batch_size
    if steps < 2:
        raise ValueError(
            f'{data_root} holds {images} images, expected at least two '
            f'batches of {loader.batch_size}'
        )
    sgd = cfg.optim_wrapper.optimizer.to_dict()
    return dict(
        data_root=str(data_root.resolve()),
        images=images,
        epochs=max(1, round(samples / (steps * loader.batch_size))),
        log_interval=min(50, steps // 2),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        # What the speed depends on.
        torch=torch.__version__,
        cores=count_cores(),
        threads=os.environ.get('OMP_NUM_THREADS', 'not set'),
        size=next(x.size for x in loader.dataset.pipeline if 'size' in x),
        model=json.loads(json.dumps(model.to_dict())),
        sgd={k: v for k, v in sgd.items() if k != 'type'},
        precision='bfloat16' if native_bfloat16()[0] else 'float32',
    )


def make_runs(
    args: argparse.Namespace, pythons: dict[str, str]
) -> Iterator[Run]:
    """Every pre-training, ours first; ``pythons`` run the peers."""
    shared = read_settings(args.configs[0], args.data_root, args.samples)
    epochs = shared['epochs']
    ours = [
        f'mmdensecl=={mmdensecl.__version__}',
        *(f'{x}=={version(x)}' for x in ('mmpretrain', 'mmengine', 'numpy')),
    ]
    for seed in range(args.seeds):
        options = [
            f'data_root={shared["data_root"]}',
            f'randomness.seed={seed}',
            f'train_cfg.max_epochs={epochs}',
            f'param_scheduler.T_max={epochs}',
            f'default_hooks.logger.interval={shared["log_interval"]}',
        ]
        for config in args.configs:
            text = Config.fromfile(config).pretty_text
            command = [sys.executable, f'{TOOLS}/train.py', str(config)]
            command += ['--work-dir', '{work_dir}', '--cfg-options', *options]
            yield Run(
                f'ours, {config.stem}',
                args.out / f'{config.stem}-seed{seed}',
                dict(shared, seed=seed, packages=ours, config=text),
                command,
                f'epoch_{epochs}.pth',
                config,
            )
        for peer, python in pythons.items():
            script = f'{TOOLS}/benchmarks/peer_train.py'
            yield Run(
                peer,
                args.out / f'{peer}-seed{seed}',
                dict(shared, seed=seed, packages=PACKAGES[peer]),
                [python, script, peer, '{settings}', '{work_dir}'],
                WEIGHTS[peer].format(epochs=epochs),
                args.configs[0],
            )


def call(command: list[str], log: Path) -> bool:
    """Run a script, offline; say so if it fails."""
    cache = str(log.parent.resolve() / 'cache')
    env = dict(os.environ, **OFFLINE, LIGHTLY_TRAIN_CACHE_DIR=cache)
    paths = [str(ROOT), env.pop('PYTHONPATH', '')]
    if command[0] == sys.executable:
        env['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
    print(shlex.join(command), flush=True)
    with log.open('w', encoding='utf-8') as file:
        code = subprocess.run(command, env=env, stdout=file, stderr=file)
    if code.returncode:
        print(f'FAILED ({code.returncode}), see {log}', flush=True)
    return not code.returncode


def train(run: Run) -> bool:
    """Pre-train, unless that is done; whether it is done now.

    Raises:
        ValueError: It was done with other settings.
    """
    if run.folder.exists():
        saved = read_json(run.folder / 'run.json')['settings']
        if saved != run.settings:
            keys = saved.keys() | run.settings.keys()
            other = [k for k in keys if saved.get(k) != run.settings.get(k)]
            raise ValueError(
                f'{run.folder} was trained with another '
                f'{", ".join(sorted(other))}: name another --out'
            )
        return True
    partial = run.folder.with_name(f'{run.folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    paths = {f'{{{x}}}': str(partial / x) for x in ('settings', 'work_dir')}
    Path(paths['{settings}']).write_text(json.dumps(run.settings), 'utf-8')
    begin = time.perf_counter()
    if not call([paths.get(x, x) for x in run.command], partial / 'train.log'):
        return False
    wall = time.perf_counter() - begin
    lines = [
        json.loads(line)
        for path in partial.rglob('scalars.json')
        for line in path.read_text('utf-8').splitlines()
    ]
    record = dict(
        settings=run.settings,
        seconds=median(line['time'] for line in lines if 'time' in line),
        wall=wall,
    )
    (partial / 'run.json').write_text(json.dumps(record, indent=1), 'utf-8')
    partial.rename(run.folder)
    return True


def score(run: Run, roots: Sequence[str], max_images: int) -> bool:
    """Probe a finished pre-training, unless that is done; whether it is now.

    Args:
        run: The pre-training.
        roots: Folders of labelled images.
        max_images: Of each split.
    """
    done, partial = run.folder / 'probe.json', run.folder / 'partial.json'
    roots = [str(Path(x).resolve()) for x in roots]
    if done.exists():
        saved = read_json(done)
        found = saved['max_images'], [x['data_root'] for x in saved['data']]
        if found == (max_images, roots):
            return True
    command = [sys.executable, f'{TOOLS}/analysis_tools/dense_probe.py']
    command += [str(run.folder / 'work_dir' / run.weights)]
    command += ['--label', 'trained', '--config', str(run.config)]
    command += ['--data-root', *roots, '--max-images', str(max_images)]
    if not call([*command, '--json', str(partial)], run.folder / 'probe.log'):
        return False
    partial.rename(done)
    return True


def make_table(runs: Sequence[Run]) -> str:
    """The table in Markdown, of the runs that are scored."""
    found: dict[str, list[tuple[dict, dict]]] = {}
    for run in runs:
        if (run.folder / 'probe.json').exists():
            record, probe = (
                read_json(run.folder / x) for x in ('run.json', 'probe.json')
            )
            found.setdefault(run.name, []).append((record, probe['values']))
    columns = [*next(iter(found.values()))[0][1]] if found else []
    rows = [
        ['DenseCL', 'samples a second', 'wall, min', *columns, 'versions'],
        ['---', *['---:'] * (len(columns) + 2), '---'],
    ]
    for name, seeds in found.items():
        base, trained = (
            [
                [x for _, v in seeds for x in v[column][row]]
                for column in columns
            ]
            for row in (RANDOM, 'trained')
        )
        if len(rows) == 2:
            rows.append([RANDOM, '', '', *map(spread, base), ''])
        settings = seeds[0][0]['settings']
        speed = fmean(settings['batch_size'] / r['seconds'] for r, _ in seeds)
        cells = [
            f'{spread(a)} ({fmean(a) - fmean(b):+.1f})'
            for a, b in zip(trained, base, strict=True)
        ]
        wall = fmean(record['wall'] / 60 for record, _ in seeds)
        packages = ', '.join(settings['packages']).replace('==', ' ')
        rows.append([name, f'{speed:.0f}', f'{wall:.1f}', *cells, packages])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f'{fmean(values):.1f} ± {stdev(values):.1f}'


def main() -> None:
    """Train, score, print."""
    args = parse_args()
    pythons = {peer: install(peer, args.envs) for peer in args.peers}
    runs = [*make_runs(args, pythons)]
    done = [
        train(run) and score(run, args.score, args.max_images) for run in runs
    ]
    text = f'{make_table(runs)}\n\n{NOTES.format(**runs[0].settings)}\n'
    print(f'\n{text}')
    (args.out / 'peers.md').write_text(text, encoding='utf-8')
    sys.exit(not all(done))


if __name__ == '__main__':
    main()
