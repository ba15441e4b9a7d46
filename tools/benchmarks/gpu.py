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

import measure
import torch
from mmengine.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRELOAD = [
    'torch._dynamo', 'mmengine.runner', 'mmpretrain.models',
    'mmpretrain.datasets', 'mmdensecl.models', 'mmdensecl.datasets',
    'mmdensecl.engine', 'matplotlib.pyplot', 'pytest'
]
SUMMARY = 'On a GPU'
NOT_RUN = 'GPU: not run'
PEER = 'mmpretrain DenseCL'
BFLOAT16 = 'configs/densecl_r50_8xb32-coslr-200e_amp.py'
DEVICE_VIEWS = 'configs/densecl_r50_8xb32-coslr-200e_fast.py'
PUBLISHED = 'configs/densecl_r50_8xb32-coslr-800e_coco.py'
MINI = 'configs/mini/densecl_r18w16_1xb64-coslr-11e.py'
# The authors' log of COCO, 800 epochs: weighted losses, global and dense.
AUTHORS = {50: '4.29 / 4.39', 100: '4.84 / 4.75', 150: '4.96 / 4.79',
           200: '4.98 / 4.78'}
PIECE = 15 * 2**20  # bytes
# mmpretrain's own recipe on a folder, with our cast to bfloat16.
MMPRETRAIN = f"""
_base_ = ('{Path(find_spec('mmpretrain').origin).parent}/.mim/configs/densecl/'
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
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--out', type=Path, default=os.environ.get('OUT', 'work_dirs/gpu'),
        help='folder for gpu.md, gpu.log and the backbone')
    add('--minutes', type=float, default=9, help='after which all has ended')
    add('--tiny', action='store_true', help='small and short')
    add('--parts', nargs='+', choices=PARTS, default=[*PARTS], metavar='PART')
    add('--data', type=Path, help='images, or .tar shards of them, to train '
        'on; by default gpu_data, else drawn ones')
    add('--mini', default=MINI, help='config of the part of that name')
    add('--mini-options', nargs='+', default=[], metavar='KEY=VALUE',
        help='settings of it, as of tools/train.py --cfg-options')
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
    if script.endswith('.py'):
        runpy.run_path(script, run_name='__main__')
    else:
        runpy.run_module(script, run_name='__main__')


def touch_gpu() -> None:
    torch.ones(8, device='cuda').sum().item()


def last_line(text: str) -> str:
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    return lines[-1][:300].replace('|', '/') if lines else 'no output'


def scalars(folder: Path) -> list[dict]:
    """The rows of a run's log; its last line may not be whole yet."""
    text = ''.join(x.read_text('utf-8') for x in folder.glob('*/*/scalars.json'))
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
        self.context = multiprocessing.get_context('forkserver')
        self.context.set_forkserver_preload(PRELOAD)
        if self.cuda:  # may a fork use it?
            process = self.context.Process(target=touch_gpu)
            process.start()
            process.join(60)
            if process.exitcode != 0:
                self.context = multiprocessing.get_context('spawn')
        self.workers = max(1, min(14, len(os.sched_getaffinity(0)) - 2))
        self.steps: dict[int, float] = {}  # seconds of a step, by batch
        # By title: the command, and the rows of a table.
        self.tables: dict[str, tuple[str, list[dict]]] = {SUMMARY: ('', [])}

    def left(self) -> float:
        """Seconds for this part; the last one keeps its own.

        And 20 are for what comes before this object, and after the parts.
        """
        return self.end - time.monotonic() - 20 - self.reserve

    def find(self, what: str, baseline: str, target: str, measured: str,
             how: str) -> None:
        """A row of the first table; only a GPU at full size measures."""
        if not self.cuda:
            measured = NOT_RUN
        elif self.tiny:
            measured += ' (--tiny)'
        row = dict(what=what, baseline=baseline, target=target,
                   measured=measured, command=f'`{how}`')
        self.tables[SUMMARY][1].append(row)

    def write(self) -> None:
        """All that is known so far, as Markdown."""
        git = subprocess.run(['git', 'describe', '--always', '--dirty'],
                             cwd=ROOT, capture_output=True, text=True).stdout
        device = torch.cuda.get_device_name() if self.cuda else NOT_RUN
        where = (f'{device}, {os.cpu_count()} CPU cores, torch '
                 f'{torch.__version__}, commit '
                 f'{self.args.commit or git.strip() or "unknown"}, '
                 f'{time.strftime("%Y-%m-%d")}')
        with (self.out / 'gpu.md').open('w', encoding='utf-8') as file:
            for title, (how, rows) in self.tables.items():
                first = title == SUMMARY
                print('##' if first else '###', title, file=file)
                print(f'\n{where}\n' if first else f'\n`{how}`\n', file=file)
                print(measure.markdown(rows) + '\n' if rows else '', file=file)

    def command(self, script: str, argv: list) -> str:
        words = ' '.join(
            f'"{x}"' if ' ' in str(x) else str(x) for x in (script, *argv))
        for folder in (f'{ROOT}/', f'{self.scratch}/'):
            words = words.replace(folder, '')
        return f'python {words}'

    def run(self, script: str, argv: list, seconds: float, until=None,
            save: bool = False) -> str:
        """Run a script until it ends, or is enough; what it printed."""
        argv = [str(x) for x in argv]
        place = self.log.stat().st_size
        with self.log.open('a', encoding='utf-8') as file:
            file.write(f'\n$ {self.command(script, argv)}\n')
        if script.endswith('.py'):
            script = str(ROOT / script)
        process = self.context.Process(
            target=child, args=(script, argv, str(self.log)))
        process.start()
        seconds = min(seconds * self.args.minutes / 9, self.left())
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
        with self.log.open('rb') as file:
            file.seek(place)
            text = file.read().decode(errors='replace')
        if until is None and (late or process.exitcode):
            why = f'stopped after {seconds:.0f} s' if late else 'failed'
            raise RuntimeError(f'{why}: {last_line(text)}')
        return text

    def bench(self, name: str, argv: list, seconds: float) -> list[dict]:
        """Run a script of this folder; its rows become a table."""
        script, out = f'tools/benchmarks/{name}.py', self.scratch / 'x.json'
        self.run(script, [*argv, '--out', out], seconds)
        content = json.loads(out.read_text('utf-8'))
        rows = content['rows']
        self.tables[content['title']] = self.command(script, argv), rows
        return rows

    def train(self, name: str, config: str, batch: int, images: Path,
              interval: int, until: float, seconds: float, options=(),
              flags=(), save: bool = False) -> tuple[str, list[dict]]:
        """Train up to an iteration or a time; command, and the log's rows."""
        options = {
            'train_dataloader.batch_size': batch,
            'train_dataloader.num_workers': self.workers,
            'train_dataloader.dataset.data_root': images,
            'default_hooks.logger.interval': interval,
            'log_processor.window_size': interval,
            'env_cfg.cudnn_benchmark': True,
            **dict(options)
        }
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
    argv = ['-m', 'gpu', 'tests/gpu', '-q', '-rs', '-W', 'ignore']
    try:
        found = last_line(s.run('pytest', argv, 100))
    except RuntimeError as error:
        failed = re.findall('^FAILED .*::(.*)', s.log.read_text('utf-8'), re.M)
        found = '; '.join([str(error), *failed]).replace('|', '/')
    s.find('tests that need a GPU', '', 'all pass', found,
           'pytest -m gpu tests/gpu')


def step(s: Session) -> None:
    sizes = [(2, 64, 1)] if s.tiny else [(32, 224, 7), (256, 224, 7)]
    for batch, size, rounds in sizes:
        argv = ['--batch', batch, '--size', size, '--rounds', rounds,
                '--precision', 'bfloat16', '--baselines', 'mmpretrain MoCo-v2']
        rows = s.bench('benchmark_step', argv, 90)
        ours = {row['what']: row for row in rows}['mmdensecl DenseCL']
        s.steps[batch] = ours['seconds']
        for what, baseline, target, column in (
            ('step', PEER, '0.7x', 'to_mmpretrain_DenseCL'),
            ('peak memory of a step', PEER, '0.6x', 'memory_ratio'),
            ('step', 'both encoders alone', '1.2x', 'to_encoders_alone'),
            ('step', 'our MoCo-v2', '1.03x', 'to_MoCo-v2')):
            s.find(f'{what}, batch {batch}, bfloat16', baseline, target,
                   f'{ours[column]:.2f}x',
                   f'benchmark_step.py --batch {batch} --precision bfloat16')


def loss(s: Session) -> None:
    for batch in (2, ) if s.tiny else (32, 256):
        argv = ['--batch', batch, '--precision', 'bfloat16']
        argv += ['--queue-len', 4096, '--rounds', 1] if s.tiny else []
        ours, *_ = s.bench('benchmark_loss', argv, 40)
        for what, target, column in (
            ('time', '0.5x', 'time_ratio'),
            ('extra memory', '1/20 = 0.05x', 'memory_ratio')):
            s.find(f'dense loss, batch {batch}: {what}', 'mmpretrain', target,
                   f'{ours[column]:.3g}x',
                   f'benchmark_loss.py --batch {batch} --precision bfloat16')


def data(s: Session) -> None:
    number, rounds = (2, 1) if s.tiny else (96, 3)
    argv = ['--num-images', number, '--rounds', rounds]
    for row in s.bench('benchmark_data', argv, 60):
        if row['what'].startswith('mmdensecl'):
            s.find(f'two views: {row["what"]}', 'mmpretrain', '',
                   f'{row["images_a_second"]:.0f} images a second, '
                   f'{row["speed_ratio"]:.1f}x', 'benchmark_data.py')


def run(s: Session) -> None:
    theirs = s.scratch / 'mmpretrain_densecl.py'
    theirs.write_text(MMPRETRAIN, 'utf-8')
    small, large = (2, 2) if s.tiny else (32, 256)
    few, many = min(4, s.workers), s.workers
    interval, until = (1, 2) if s.tiny else (10, 40)
    seconds, table = {}, []
    title = 'A run of ResNet-50 in bfloat16: Runner, hooks and logging'
    for i, (config, batch, workers) in enumerate([
        (BFLOAT16, small, many), (BFLOAT16, large, many),
        (DEVICE_VIEWS, large, many), (BFLOAT16, large, few),
        (DEVICE_VIEWS, large, few), (theirs, large, many)]):
        options = {'train_dataloader.num_workers': workers}
        if config is DEVICE_VIEWS:  # alone
            options['model.compile_encoders'] = False
            options['model.channels_last'] = False
        name = {BFLOAT16: 'mmdensecl', DEVICE_VIEWS: 'mmdensecl, device views'}
        row = dict(what=name.get(config, PEER), batch=batch, workers=workers)
        try:
            how, rows = s.train(f'run{i}', str(config), batch,
                                s.photographs(), interval, until, 60, options)
        except RuntimeError as error:
            s.find(f'run: {row}', '', '', str(error), 'gpu.sh --parts run')
            continue
        rows = [x for x in rows if x['step'] > interval] or rows
        taken = seconds[config, batch, workers] = median(
            x['time'] for x in rows)
        waiting = median(x['data_time'] for x in rows)
        table.append(dict(
            row, seconds=taken, images_a_second=batch / taken,
            waiting_for_data=waiting, peak_MiB=rows[-1].get('memory', 0)))
        s.tables[title] = how, table

    def compare(what, baseline, target, ours, theirs):
        if ours and theirs:
            s.find(what, baseline, target, f'{ours / theirs:.2f}x',
                   'gpu.sh --parts step run')

    for workers in (many, few):
        compare(f'time of a run, views by {workers} workers',
                'views on the device', '1.3x or more',
                seconds.get((BFLOAT16, large, workers)),
                seconds.get((DEVICE_VIEWS, large, workers)))
    compare(f'time of a run, batch {large}', PEER, '',
            seconds.get((BFLOAT16, large, many)),
            seconds.get((theirs, large, many)))
    for batch in dict.fromkeys([small, large]):
        compare(f'time of a run, batch {batch}', 'bare step', '1.03x',
                seconds.get((BFLOAT16, batch, many)), s.steps.get(batch))


def compiled(s: Session) -> None:
    if not s.cuda:
        raise Skip('torch.compile is meant for GPUs')
    configs = s.scratch / 'channels_last.py', s.scratch / 'compiled.py'
    configs[0].write_text(CHANNELS_LAST, 'utf-8')
    configs[1].write_text(COMPILED, 'utf-8')
    argv = ['--batch', 4 if s.tiny else 256, '--rounds', 3, '--precision',
            'bfloat16', '--baselines', 'DenseCL', '--configs', *configs]
    rows = s.bench('benchmark_step', argv, 150)
    seconds = {row['what'].split()[-1]: row['seconds'] for row in rows
               if row['what'].startswith('mmdensecl')}
    for fast, slow in (('channels_last', 'DenseCL'),
                       ('compiled', 'channels_last')):
        s.find(fast, slow, '1.3x as fast',
               f'{seconds[slow] / seconds[fast]:.2f}x',
               'gpu.sh --parts compiled')


def recipe(s: Session) -> None:
    batch, interval, until = (4, 1, 2) if s.tiny else (256, 50, 250)
    sources = (ROOT / 'mmdensecl/models').rglob('*.py')
    known = any('virtual_ranks' in x.read_text('utf-8') for x in sources)
    options = {'model.virtual_ranks': 2 if s.tiny else 8} if known else {}
    how, rows = s.train('recipe', PUBLISHED, batch, s.images(), interval,
                        until, 170, options)
    table = []
    for row in rows:
        ours = f'{row["loss_global"]:.2f} / {row["loss_dense"]:.2f}'
        theirs = AUTHORS.get(row['step'], '?')
        table.append(dict(iteration=row['step'], ours=ours, authors=theirs,
                          seconds=row['time']))
        s.find(f'weighted losses, iteration {row["step"]}',
               f"authors' log of COCO: {theirs}", '', ours,
               'gpu.sh --parts recipe')
    s.tables['The published recipe: weighted losses, global / dense'] = (how,
                                                                         table)


def mini(s: Session) -> None:
    """Train with the time that is left, and keep the backbone."""
    options = dict(x.split('=', 1) for x in s.args.mini_options)
    own = Config.fromfile(s.args.mini).train_dataloader.batch_size
    batch = int(options.pop('train_dataloader.batch_size', own))
    images = sum(x.suffix.lower() in ('.jpg', '.jpeg', '.png')
                 for x in s.images().rglob('*'))
    args = s.args.mini, batch, s.images(), 1 if s.tiny else 20
    flags = ['--amp'] if s.cuda else []
    start = time.monotonic()
    _, rows = s.train('speed', *args, 2 if s.tiny else 60, 45, options, flags)
    seconds = rows[-1]['time']
    startup = time.monotonic() - start - rows[-1]['step'] * seconds
    budget = 5 if s.tiny else s.left() - 25
    epochs = 0.9 * (budget - startup) / seconds // max(1, images // batch)
    epochs = max(1, int(epochs))
    options['train_cfg.max_epochs'] = epochs
    options['param_scheduler.T_max'] = epochs
    how, rows = s.train('mini', *args, float('inf'), budget, options, flags,
                        save=True)
    s.tables[f'The mini network, {epochs} epochs of {images} images'] = (
        how, [{k: row[k] for k in ('step', 'loss', 'time')}
              for row in rows[::len(rows) // 10 + 1]])
    (s.out / 'mini_scalars.json').write_text(
        ''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
    newest = max((s.scratch / 'mini').glob('*.pth'),
                 key=lambda x: x.stat().st_mtime)
    s.run('tools/model_converters/publish_backbone.py',
          [newest, s.scratch / 'backbone'], 30)
    path, = s.scratch.glob('backbone-*.pth')
    backbone = torch.load(path, weights_only=True)['state_dict']
    torch.save(dict(state_dict={
        k: v.half() if v.is_floating_point() else v
        for k, v in backbone.items()}), path)
    content = path.read_bytes()
    for i in range(0, len(content), PIECE):
        (s.out / f'backbone.pth.{i // PIECE}').write_bytes(
            content[i:i + PIECE])


PARTS = {f.__name__: f
         for f in (tests, step, loss, recipe, run, data, compiled, mini)}


def main() -> None:
    s = Session(parse_args())
    for name in s.args.parts:
        begin, state = time.monotonic(), 'done'
        s.reserve *= name != 'mini'
        try:
            if s.left() < 15:
                raise Skip('no time is left')
            PARTS[name](s)
        except Skip as error:
            state = f'not run: {error}'
        except Exception as error:
            with s.log.open('a', encoding='utf-8') as file:
                traceback.print_exc(file=file)
            state = f'failed: {error}'
        if state != 'done':
            s.find(f'part `{name}`', '', '', '', f'gpu.sh --parts {name}')
            s.tables[SUMMARY][1][-1]['measured'] = state
        s.write()
        print(f'{name}: {state}, {time.monotonic() - begin:.0f} s, '
              f'{s.left():.0f} s left', flush=True)
    print((s.out / 'gpu.md').read_text('utf-8'))


if __name__ == '__main__':
    main()
