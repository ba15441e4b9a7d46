# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""All that only a GPU can tell, in one run that ends by itself; see gpu.sh.

Each part runs in processes with a time limit, forked from one that has
imported the libraries. A part that fails says so in the table and the next one
starts; gpu.md and gpu.log are up to date after each.
"""

import argparse
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from mmengine.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRELOAD = (
    'torch._dynamo mmengine.runner mmpretrain.models mmpretrain.datasets '
    'mmdensecl.models mmdensecl.datasets mmdensecl.engine pytest'
)
SUMMARY = 'On a GPU'
NOT_RUN = 'GPU: not run'
PEER = 'mmpretrain DenseCL'
BFLOAT16 = 'configs/densecl_r50_8xb32-coslr-200e_amp.py'
DEVICE_VIEWS = 'configs/densecl_r50_8xb32-coslr-200e_fast.py'
PUBLISHED = 'configs/densecl_r50_8xb32-coslr-800e_coco.py'
MINI = 'configs/mini/densecl_r18w16_1xb64-coslr-11e.py'
# The authors' log of COCO, 800 epochs: weighted losses, global / dense.
AUTHORS = ['4.29 / 4.39', '4.84 / 4.75', '4.96 / 4.79', '4.98 / 4.78']
PIECE = 15 * 2**20  # bytes
# mmpretrain's own recipe on a folder, with our cast to bfloat16.
INSTALLED = Path(str(getattr(find_spec('mmpretrain'), 'origin', ''))).parent
MMPRETRAIN = f"""
_base_ = ('{INSTALLED}/.mim/configs/densecl/'
          'densecl_resnet50_8xb32-coslr-200e_in1k.py')
custom_imports = dict(imports=['baselines'])
optim_wrapper = dict(type='mmdensecl.BFloat16OptimWrapper')
train_dataloader = dict(pin_memory=True, dataset=dict(
    _delete_=True, type='CustomDataset', data_root='', with_label=False,
    pipeline={{{{_base_.train_pipeline}}}}))
"""
CHANNELS_LAST = f"""
_base_ = '{ROOT}/{BFLOAT16}'
model = dict(channels_last=True)
"""
COMPILED = """
_base_ = './channels_last.py'
model = dict(compile_encoders=True)
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    out = os.environ.get('OUT', 'work_dirs/gpu')
    add = parser.add_argument
    add('--out', type=Path, default=out, help='folder for all that is found')
    add('--minutes', type=float, default=9, help='after which all has ended')
    add('--tiny', action='store_true', help='small and short')
    add('--parts', nargs='+', choices=PARTS, default=[*PARTS], metavar='PART')
    add('--data', type=Path, help='images or shards; by default gpu_data')
    add('--mini', default=MINI, help='config of the part of that name')
    add('--mini-options', nargs='+', default=[], metavar='KEY=VALUE')
    add('--commit', help='to name, where there is no git')
    add('--scratch', type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(script: str, argv: list[str], log: str) -> None:
    """In a process of its own: run a script, or a module by its name."""
    os.setsid()  # so that all of its processes can be ended together
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [script, *argv]
    sys.path[:0] = [str(HERE)]
    run = runpy.run_path if script.endswith('.py') else runpy.run_module
    run(script, run_name='__main__')


def touch_gpu() -> None:
    """Fail where the GPU cannot be used."""
    torch.ones(8, device='cuda').sum().item()


def last_line(text: str) -> str:
    """What a script said last, fit for a table."""
    lines = text.strip().splitlines() or ['no output']
    return lines[-1][:300].replace('|', '/')


def scalars(folder: Path) -> list[dict]:
    """The rows of a run's log; its last line may not be whole yet."""
    text = ''.join(
        x.read_text('utf-8') for x in folder.glob('*/*/scalars.json')
    )
    lines = text.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith('\n')]
    return [row for row in rows if 'loss' in row]


class Skip(Exception):
    """A part has nothing to do here."""


class Session:
    """Starts processes within the time, and collects what they find."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.end = time.monotonic() + 60 * args.minutes
        self.reserve = 12 * args.minutes * ('mini' in args.parts)
        self.args, self.tiny, self.scratch = args, args.tiny, args.scratch
        self.out = args.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / 'gpu.log'
        self.log.write_text('', 'utf-8')
        self.cuda = torch.cuda.is_available()
        self.context: Any = multiprocessing.get_context('forkserver')
        self.context.set_forkserver_preload(PRELOAD.split())
        if self.cuda:  # may a fork use it?
            process = self.context.Process(target=touch_gpu)
            process.start()
            process.join(60)
            if process.exitcode != 0:
                self.context = multiprocessing.get_context('spawn')
        self.workers = max(1, min(14, len(os.sched_getaffinity(0)) - 2))
        self.part = ''
        self.steps: dict[int, float] = {}  # seconds of a step, by batch
        # By title: the command, and the rows of a table.
        self.tables: dict[str, tuple[str, list[dict]]] = {SUMMARY: ('', [])}

    def left(self) -> float:
        """Seconds for this part; the last one keeps its own.

        And 20 are for what comes before this object, and after the parts.
        """
        return self.end - time.monotonic() - 20 - self.reserve

    def find(self, what: str, baseline='', target='', measured='') -> None:
        """A row of the first table; only a GPU at full size measures."""
        if not measured.startswith(('failed', 'stopped', 'not run')):
            tiny = ' (--tiny)' * self.tiny
            measured = measured + tiny if self.cuda else NOT_RUN
        row = dict(what=what, baseline=baseline, target=target)
        row.update(measured=measured, command=f'`gpu.sh --parts {self.part}`')
        self.tables[SUMMARY][1].append(row)

    def compare(self, what, baseline, target, ours, theirs) -> None:
        """A row with a ratio, where both were measured."""
        if ours and theirs:
            self.find(what, baseline, target, f'{ours / theirs:.3g}x')

    def write(self) -> None:
        """All that is known so far, as Markdown."""
        git = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
        commit = subprocess.run(git, capture_output=True, text=True).stdout
        commit = self.args.commit or commit.strip() or 'unknown'
        device = torch.cuda.get_device_name() if self.cuda else NOT_RUN
        where = f'{device}, {os.cpu_count()} CPU cores, commit {commit}, '
        where += f'torch {torch.__version__}, {time.strftime("%Y-%m-%d")}'
        with (self.out / 'gpu.md').open('w', encoding='utf-8') as file:
            for title, (how, rows) in self.tables.items():
                first = title == SUMMARY
                print('##' if first else '###', title, file=file)
                print(f'\n{where}\n' if first else f'\n`{how}`\n', file=file)
                print(measure.markdown(rows) + '\n' if rows else '', file=file)

    def command(self, script: str, argv: list) -> str:
        """A command line as one types it, in the repository."""
        words = [f'"{x}"' if ' ' in str(x) else str(x) for x in argv]
        text = ' '.join(['python', script, *words])
        return text.replace(f'{ROOT}/', '').replace(f'{self.scratch}/', '')

    def run(self, script, argv, seconds, until=None, save=False) -> str:
        """Run a script until it ends, or is enough; what it printed."""
        argv = [str(x) for x in argv]
        place = self.log.stat().st_size
        with self.log.open('a', encoding='utf-8') as file:
            file.write(f'\n$ {self.command(script, argv)}\n')
        path = str(ROOT / script) if script.endswith('.py') else script
        args = path, argv, str(self.log)
        process = self.context.Process(target=child, args=args)
        process.start()
        seconds *= self.args.minutes / 9 * (1 + self.tiny)  # also on a CPU
        seconds = min(seconds, self.left())
        end, enough = time.monotonic() + seconds, False
        while process.is_alive() and time.monotonic() < end and not enough:
            process.join(0.3)
            enough = until is not None and until()
        late = process.is_alive() and not enough
        if save and process.is_alive():
            process.terminate()  # it saves, and leaves
            process.join(30)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # all of it has ended
            process.kill()
        process.join()
        text = self.log.read_bytes()[place:].decode(errors='replace')
        if until is None and (late or process.exitcode):
            why = f'stopped after {seconds:.0f} s' if late else 'failed'
            raise RuntimeError(f'{why}: {last_line(text)}')
        return text

    def bench(self, name: str, argv: list, seconds: float) -> list[dict]:
        """Run a script of this folder; its rows become a table."""
        script, out = f'tools/benchmarks/{name}.py', self.scratch / 'x.json'
        self.run(script, [*argv, '--out', out], seconds)
        content = json.loads(out.read_text('utf-8'))
        how = self.command(script, argv)
        self.tables[content['title']] = how, content['rows']
        return content['rows']

    def loader(self, batch: int, images: Path, interval: int) -> dict:
        """Settings of all training runs."""
        return {
            'train_dataloader.batch_size': batch,
            'train_dataloader.num_workers': self.workers,
            'train_dataloader.dataset.data_root': images,
            'default_hooks.logger.interval': interval,
            'log_processor.window_size': interval,
            'env_cfg.cudnn_benchmark': True,
        }

    def train(self, name, config, options, until, seconds, flags=(), save=0):
        """Train up to an iteration or a time; command, and the log's rows."""
        folder = self.scratch / name
        argv = [config, '--work-dir', folder, *flags, '--cfg-options']
        argv += [f'{k}={v}' for k, v in options.items()]

        def enough() -> bool:
            rows = scalars(folder)
            return bool(rows) and rows[-1]['step'] >= until

        text = self.run('tools/train.py', argv, seconds, enough, save)
        rows = scalars(folder)
        if not rows:
            raise RuntimeError(f'no iteration was logged: {last_line(text)}')
        return self.command('tools/train.py', argv), rows

    def images(self) -> Path:
        """The folder of images to train on."""
        source = self.args.data or ROOT / 'gpu_data'
        if not source.is_dir() and not self.args.data:
            return self.photographs()
        shards = sorted(source.glob('*.tar'))
        folder = self.scratch / 'images' if shards else source
        if shards and not folder.exists():
            for shard in shards[:1] if self.tiny else shards:
                with tarfile.open(shard) as tar:
                    tar.extractall(folder / shard.stem, filter='data')
        return folder

    def photographs(self) -> Path:
        """Drawn JPEGs of 500 x 400, under many names: an epoch is long."""
        folder = self.scratch / 'photographs'
        if not folder.exists():
            from benchmark_data import draw_jpegs

            folder.mkdir()
            draw_jpegs(folder, 4 if self.tiny else 128, seed=0)
            for path in [*folder.iterdir()]:
                for i in range(100):
                    os.link(path, path.with_name(f'{path.stem}_{i}.jpg'))
        return folder


def tests(s: Session) -> None:
    """Those that need a GPU."""
    argv = ['-m', 'gpu', 'tests/gpu', '-q', '-rs', '-W', 'ignore']
    try:
        found = last_line(s.run('pytest', argv, 100))
    except RuntimeError as error:
        failed = re.findall('^FAILED .*::(.*)', s.log.read_text('utf-8'), re.M)
        found = '; '.join([str(error), *failed]).replace('|', '/')
    s.find('pytest -m gpu tests/gpu', '', 'all pass', found)


def step(s: Session) -> None:
    """A training step, and its memory."""
    sizes = [(2, 64, 1)] if s.tiny else [(32, 224, 7), (256, 224, 7)]
    for batch, size, rounds in sizes:
        argv = ['--batch', batch, '--size', size, '--rounds', rounds]
        argv += ['--precision', 'bfloat16', '--baselines']
        rows = s.bench('benchmark_step', [*argv, 'mmpretrain MoCo-v2'], 90)
        ours = {x['what']: x for x in rows}['mmdensecl DenseCL']
        s.steps[batch] = ours['seconds']
        for baseline, target, column in (
            (PEER, '0.7x', 'to_mmpretrain_DenseCL'),
            ('both encoders alone', '1.2x', 'to_encoders_alone'),
            ('our MoCo-v2', '1.03x', 'to_MoCo-v2'),
            (f'memory of {PEER}', '0.6x', 'memory_ratio'),
        ):
            what = f'step, batch {batch}, bfloat16'
            s.compare(what, baseline, target, ours[column], 1)


def loss(s: Session) -> None:
    """The dense loss."""
    for batch in (2,) if s.tiny else (32, 256):
        argv = ['--batch', batch, '--precision', 'bfloat16']
        argv += ['--queue-len', 4096, '--rounds', 1] if s.tiny else []
        ours, *_ = s.bench('benchmark_loss', argv, 40)
        what = f'dense loss, batch {batch}'
        s.compare(f'{what}: time', PEER, '0.5x', ours['time_ratio'], 1)
        s.compare(f'{what}: memory', PEER, '0.05x', ours['memory_ratio'], 1)


def data(s: Session) -> None:
    """From a JPEG to two views."""
    number, rounds = (2, 1) if s.tiny else (96, 3)
    argv = ['--num-images', number, '--rounds', rounds]
    for row in s.bench('benchmark_data', argv, 60):
        if row['what'].startswith('mmdensecl'):
            what = f'two views a second: {row["what"]}'
            s.compare(what, PEER, '', row['speed_ratio'], 1)


def run(s: Session) -> None:
    """ResNet-50 in bfloat16 with Runner, hooks and logging."""
    theirs = s.scratch / 'mmpretrain_densecl.py'
    theirs.write_text(MMPRETRAIN, 'utf-8')
    small, large = (2, 2) if s.tiny else (32, 256)
    few, many = min(4, s.workers), s.workers
    interval, until = (1, 2) if s.tiny else (10, 40)
    seconds, table = {}, []
    plans = [(BFLOAT16, small, many), (theirs, large, many)]
    plans += [(BFLOAT16, large, many), (DEVICE_VIEWS, large, many)]
    plans += [(BFLOAT16, large, few), (DEVICE_VIEWS, large, few)]
    for plan in dict.fromkeys(plans):
        config, batch, workers = plan
        options = s.loader(batch, s.photographs(), interval)
        options['train_dataloader.num_workers'] = workers
        if config is DEVICE_VIEWS:  # those alone
            options['model.compile_encoders'] = False
            options['model.channels_last'] = False
        name = f'run_{Path(config).stem}_{batch}_{workers}'
        try:
            how, rows = s.train(name, str(config), options, until, 60)
        except RuntimeError as error:
            s.find(name, measured=f'failed: {error}')
            continue
        rows = [x for x in rows if x['step'] > interval] or rows
        seconds[plan] = median(x['time'] for x in rows)
        row = dict(what=name, seconds=seconds[plan])
        row['images_a_second'] = batch / seconds[plan]
        row['waiting_for_data'] = median(x['data_time'] for x in rows)
        row['peak_MiB'] = rows[-1].get('memory', 0)
        table.append(row)
        s.tables['Runs with Runner, hooks and logging'] = how, table
    get = seconds.get
    for batch in dict.fromkeys([small, large]):
        time_ = get((BFLOAT16, batch, many))
        what = f'iteration of a run, batch {batch}'
        s.compare(what, 'bare step', '1.03x', time_, s.steps.get(batch))
    s.compare(what, PEER, '', time_, get((theirs, large, many)))
    for workers in dict.fromkeys([many, few]):
        on_cpu = get((BFLOAT16, large, workers))
        on_gpu = get((DEVICE_VIEWS, large, workers))
        what = f'speed of a run, views on the device, {workers} workers'
        s.compare(what, 'views by workers', '1.3x', on_cpu, on_gpu)


def compiled(s: Session) -> None:
    """What channels_last and torch.compile earn."""
    if not s.cuda:
        raise Skip('torch.compile is meant for GPUs')
    configs = s.scratch / 'channels_last.py', s.scratch / 'compiled.py'
    configs[0].write_text(CHANNELS_LAST, 'utf-8')
    configs[1].write_text(COMPILED, 'utf-8')
    argv = ['--batch', 4 if s.tiny else 256, '--precision', 'bfloat16']
    argv += ['--rounds', 3, '--baselines', 'DenseCL', '--configs', *configs]
    rows = s.bench('benchmark_step', argv, 150)
    plain, last, both = (
        next(x['seconds'] for x in rows if x['what'] == f'mmdensecl {name}')
        for name in ('DenseCL', 'channels_last', 'compiled')
    )
    s.compare('speed with channels_last', 'without', '', plain, last)
    s.compare('speed compiled, too', 'channels_last', '1.3x', last, both)


def recipe(s: Session) -> None:
    """The published recipe beside the authors' log."""
    batch, interval, until = (4, 1, 2) if s.tiny else (256, 50, 250)
    options = s.loader(batch, s.images(), interval)
    options['model.virtual_ranks'] = 2 if s.tiny else 8
    how, rows = s.train('recipe', PUBLISHED, options, until, 170)
    s.tables['The published recipe'] = (
        how,
        [
            {k: row[k] for k in ('step', 'loss_global', 'loss_dense', 'time')}
            for row in rows
        ],
    )
    for row, theirs in zip(rows, AUTHORS[s.tiny * 4 :], strict=False):
        what = f'weighted losses, global / dense, iteration {row["step"]}'
        ours = f'{row["loss_global"]:.2f} / {row["loss_dense"]:.2f}'
        s.find(what, f"authors' log of COCO: {theirs}", '', ours)


def mini(s: Session) -> None:
    """Train with the time that is left, and keep the backbone."""
    config, folder, flags = s.args.mini, s.images(), ['--amp'] * s.cuda
    own = Config.fromfile(config).train_dataloader.batch_size
    options = s.loader(own, folder, 1 if s.tiny else 20)
    options.update(x.split('=', 1) for x in s.args.mini_options)
    start = time.monotonic()
    until = 2 if s.tiny else 60
    _, rows = s.train('speed', config, options, until, 45, flags)
    seconds = rows[-1]['time']
    startup = time.monotonic() - start - rows[-1]['step'] * seconds
    budget = 40 if s.tiny else s.left() - 25
    images = sum(x.is_file() for x in folder.rglob('*'))
    steps = max(1, images // int(options['train_dataloader.batch_size']))
    epochs = max(1, int(0.9 * (budget - startup) / seconds / steps))
    options['train_cfg.max_epochs'] = epochs
    options['param_scheduler.T_max'] = epochs
    budget *= 9 / s.args.minutes
    how, rows = s.train('mini', config, options, 1e9, budget, flags, save=True)
    s.tables[f'The mini network, {epochs} epochs of {images} images'] = (
        how,
        [
            {k: row[k] for k in ('step', 'loss', 'time')}
            for row in rows[:: len(rows) // 10 + 1]
        ],
    )
    lines = [json.dumps(row) + '\n' for row in rows]
    (s.out / 'mini_scalars.json').write_text(''.join(lines), 'utf-8')
    checkpoints = (s.scratch / 'mini').glob('*.pth')
    newest = max(checkpoints, key=lambda x: x.stat().st_mtime)
    argv = [newest, s.scratch / 'backbone']
    s.run('tools/model_converters/publish_backbone.py', argv, 30)
    (path,) = s.scratch.glob('backbone-*.pth')
    state = torch.load(path, weights_only=True)['state_dict']
    for name, x in state.items():
        state[name] = x.half() if x.is_floating_point() else x
    torch.save(dict(state_dict=state), path)
    content = path.read_bytes()
    for i in range(0, len(content), PIECE):
        piece = s.out / f'backbone.pth.{i // PIECE}'
        piece.write_bytes(content[i : i + PIECE])


ORDER = tests, step, loss, recipe, run, data, compiled, mini
PARTS = {part.__name__: part for part in ORDER}


def main() -> None:
    """Run the parts, whatever happens to each."""
    s = Session(parse_args())
    for name in s.args.parts:
        begin, state, s.part = time.monotonic(), 'done', name
        s.reserve *= name != 'mini'
        try:
            if s.left() < 15:
                raise Skip('no time is left')
            PARTS[name](s)
        except Exception as error:
            with s.log.open('a', encoding='utf-8') as file:
                traceback.print_exc(file=file)
            skipped = isinstance(error, Skip)
            state = f'{"not run" if skipped else "failed"}: {error}'
            s.find(f'part `{name}`', measured=state)
        s.write()
        took = time.monotonic() - begin
        print(f'{name}: {state}, {took:.0f} s, {s.left():.0f} s left')
        sys.stdout.flush()
    print((s.out / 'gpu.md').read_text('utf-8'))


if __name__ == '__main__':
    main()
