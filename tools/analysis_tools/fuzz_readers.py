# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Give the readers of files damaged and made-up ones, for a while.

Each may load a file or refuse it by an error that its docstring names. All
else is a finding: another error, a process that dies, more than 10 seconds or
1 GiB. The file that led to it is kept.

    python tools/analysis_tools/fuzz_readers.py --minutes 10 --only backbone
"""
import argparse
import io
import json
import logging
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from torchvision.models import resnet18

from mmdensecl.checkpoint import UnsafeCheckpointError
from mmdensecl.datasets import (UnlabeledDataset, UnlabeledList, UnlabeledLMDB,
                                UnlabeledShards)
from mmdensecl.datasets.unlabeled import UnreadableImageError
from mmdensecl.transfer import read_backbone

MOST_SECONDS, MOST_MEMORY = 10, 1 << 30
ROUND = 200  # examples that one process tries
Files = st.SearchStrategy  # of bytes


class Target(NamedTuple):
    """A reader, and what it is given.

    Attributes:
        read (Callable): Takes the path of a file.
        errors (tuple): That it may raise.
        files (Callable): Makes the strategy.
        may_die (bool): Whether its docstring says so. Defaults to False.
    """
    read: Callable[[str], Any]
    errors: Tuple[type, ...]
    files: Callable[[], Files]
    may_die: bool = False


@st.composite
def damaged(draw: Callable, originals: List[bytes]) -> bytes:
    """One of some files with bytes changed, cut out, put in or moved."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((1, 2, 4, 8, 64, 512, 4096)))
        piece = draw(
            st.one_of(
                st.binary(max_size=length),
                st.sampled_from(
                    (b'\0', b'\xff', b'\x7f')).map(lambda x: x * length),
                st.integers(0, len(data)).map(
                    lambda start: bytes(data[start:start + length]))))
        kind = draw(st.sampled_from(('change', 'insert', 'cut', 'end')))
        if kind == 'change':
            data[place:place + len(piece)] = piece
        elif kind == 'insert':
            data[place:place] = piece
        elif kind == 'cut':
            del data[place:place + length]
        else:
            del data[place:]
    return bytes(data)


def saved(content: Any, **kwargs) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **kwargs)
    return stream.getvalue()


def archive(pickled: bytes) -> bytes:
    """A checkpoint of any pickle, over one record of numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as file:
        file.writestr('archive/data.pkl', pickled)
        file.writestr('archive/data/0', bytes(256))
        file.writestr('archive/version', b'3\n')
    return stream.getvalue()


def pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return next(
            file.read(x) for x in file.namelist() if x.endswith('data.pkl'))


def checkpoints() -> Files:
    """Damaged ones, damaged pickles in whole ones, and made-up contents."""
    weights = {
        k: v.flatten()[:8].reshape([-1] + [1] * (v.dim() - 1)).clone()
        for k, v in resnet18().state_dict().items()
    }
    buffer = HistoryBuffer()
    buffer.update(1.)
    training = dict(
        meta=dict(epoch=1, iter=2, cfg='model = dict()'),
        state_dict={
            f'backbone.{k}': v
            for k, v in weights.items()
        },
        optimizer=dict(state={0: dict(momentum_buffer=torch.ones(2))}),
        message_hub=dict(log_scalars=dict(loss=buffer)))
    small = dict(state_dict={'backbone.conv1.weight': torch.ones(2, 3, 1, 1)})
    whole = [
        saved(small),
        saved(training),
        saved(small, _use_new_zipfile_serialization=False),
        safetensors.torch.save(weights),
        safetensors.torch.save({'conv1.weight': torch.ones(2)}),
    ]
    pickles = [pickle_of(x) for x in whole[:2]]
    names = st.sampled_from([
        'state_dict', 'model', 'module', 'backbone', 'encoder_q.0',
        'encoder_k', 'conv1.weight', 'layer1.0.conv1.weight',
        'layer1.0.conv2.weight', 'layer1.0.conv3.weight',
        'layer2.0.downsample.1.weight', 'roi_head.shared_head', 'stem.0.weight'
    ]) | st.text(max_size=5) | st.integers()
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64,
             torch.bool, torch.complex64, torch.float8_e5m2)
    tensors = st.builds(lambda size, kind: torch.ones(size).to(kind),
                        st.lists(st.integers(0, 3), max_size=5),
                        st.sampled_from(kinds))
    contents = st.recursive(
        tensors | st.none() | st.integers() | st.text(max_size=5)
        | st.floats(),
        lambda inner: st.dictionaries(names, inner, max_size=5) | st.lists(
            inner, max_size=3),
        max_leaves=12)
    return st.one_of(
        damaged(whole),
        damaged(pickles).map(archive), contents.map(saved),
        st.dictionaries(
            names.filter(lambda x: isinstance(x, str)), tensors,
            max_size=5).map(safetensors.torch.save),
        st.binary(max_size=100).map(lambda x: b'\x80\x02' + x),
        st.binary(max_size=100))


def lists() -> Files:
    """List files: lines, and bytes."""
    lines = st.text(max_size=20) | st.sampled_from([
        'a.jpg 1', 'a.jpg,-3', ' ' * 50_000 + 'x', '1 ' * 5_000 + 'x',
        'a\0.jpg', '../' * 50 + 'etc/passwd', '/dev/zero', 'x' * 5000, '.',
        '\ufeff'
    ])
    return st.one_of(
        st.lists(lines).map(lambda x: '\n'.join(x).encode()),
        damaged([b'a.jpg 0\nb/c.png\t1\r\n\xc3\xa4.webp\n']),
        st.binary(max_size=200))


def databases() -> Files:
    """Damaged LMDBs: of one page, of several, with values of many pages."""
    import lmdb
    whole = []
    for count, size in ((0, 0), (3, 10), (200, 10), (3, 20_000)):
        with tempfile.TemporaryDirectory() as folder:
            with lmdb.open(folder, map_size=1 << 24) as env:
                with env.begin(write=True) as transaction:
                    for i in range(count):
                        transaction.put(f'{i:05d}.png'.encode(), bytes(size))
            whole.append(Path(folder, 'data.mdb').read_bytes())
    return damaged(whole) | st.binary(max_size=200)


def tars() -> Files:
    """Damaged tar files of all of Python's formats."""
    whole = []
    for style in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT,
                  tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode='w', format=style) as tar:
            for name in ('a.jpg', 'a.txt', 'ä/b.png', 'c' * 90 + '/d.jpg'):
                info = tarfile.TarInfo(name)
                info.size = 100
                tar.addfile(info, io.BytesIO(bytes(100)))
        whole.append(stream.getvalue()[:8192])
        whole.append(stream.getvalue())
    return damaged(whole) | st.binary(max_size=200)


def read_all(dataset: UnlabeledDataset) -> None:
    """What training does with a data set, but for decoding."""
    for info in dataset.data_list:
        try:
            dataset.read(info)
        except (UnreadableImageError, OSError):  # it is skipped and counted
            pass


TARGETS = dict(
    backbone=Target(read_backbone,
                    (ValueError, UnsafeCheckpointError, FileNotFoundError),
                    checkpoints),
    list=Target(
        lambda path: read_all(UnlabeledList(path, os.path.dirname(path))),
        (ValueError, FileNotFoundError), lists),
    lmdb=Target(
        lambda path: read_all(UnlabeledLMDB(path)),
        (ValueError, FileNotFoundError),
        databases,
        may_die=True),
    shards=Target(lambda path: read_all(UnlabeledShards(path)),
                  (ValueError, FileNotFoundError), tars))


def finding(target: Target, path: Path) -> str:
    """Read a file; says what is wrong with that, or ''."""
    import resource  # not on Windows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    try:
        target.read(str(path))
    except target.errors:
        pass
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (f'{type(error).__name__} at {Path(place.filename).name}:'
                f'{place.lineno}')
    seconds = time.process_time() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > MOST_SECONDS:
        return 'takes too long'
    return 'takes too much memory' if grown * 1024 > MOST_MEMORY else ''


def try_some(name: str, number: int, end: float, folder: Path) -> None:
    """A round in a process of its own; leaves ``round.json`` in the folder."""
    target = TARGETS[name]
    found: Dict[str, str] = {}
    count = 0
    os.environ['MMDENSECL_LISTINGS'] = ''

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck))
    @given(target.files())
    def try_one(data: bytes) -> None:
        nonlocal count
        # One in any case: before the first, hypothesis may take its time.
        if count and time.time() > end:
            return
        count += 1
        # Is there afterwards if this process dies.
        path = folder / f'{name}.input'
        path.write_bytes(data)
        (folder / 'count').write_text(str(count), encoding='utf-8')
        wrong = finding(target, path)
        if wrong and wrong not in found:
            found[wrong] = data.hex()

    try_one()
    (folder / 'round.json').write_text(
        json.dumps(dict(found=found)), encoding='utf-8')


def fuzz(name: str, minutes: float, first_seed: int, out: Path) -> dict:
    """Try a reader for some time.

    Args:
        name (str): A key of ``TARGETS``.
        minutes (float): How long.
        first_seed (int): Of the first round; each has the next one.
        out (Path): Where files that led to a finding are kept.

    Returns:
        dict: Number of ``examples``, of processes that ``died``, and
        ``findings`` with the files that are kept.
    """
    end = time.time() + 60 * minutes
    examples = died = 0
    findings: Dict[str, str] = {}
    number = first_seed
    while time.time() < end:
        with tempfile.TemporaryDirectory() as folder:
            process = multiprocessing.get_context('fork').Process(
                target=try_some, args=(name, number, end, Path(folder)))
            process.start()
            process.join(max(0, end - time.time()) + 120)
            hangs = process.is_alive()
            if hangs:
                process.kill()
                process.join()
            counter = Path(folder, 'count')
            if counter.exists():
                examples += int(counter.read_text(encoding='utf-8'))
            result = Path(folder, 'round.json')
            if result.exists():
                text = result.read_text(encoding='utf-8')
                found = json.loads(text)['found']
            elif not hangs and process.exitcode < 0 and TARGETS[name].may_die:
                died, found = died + 1, {}
            else:
                what = 'hangs' if hangs else f'exit status {process.exitcode}'
                data = Path(folder, f'{name}.input').read_bytes()
                found = {what: data.hex()}
            for what, data in found.items():
                if what not in findings:
                    out.mkdir(parents=True, exist_ok=True)
                    path = out / f'{name}-{number}-{len(findings)}.bin'
                    path.write_bytes(bytes.fromhex(data))
                    findings[what] = str(path)
        number += 1
    return dict(examples=examples, died=died, findings=findings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--minutes', type=float, default=10, help='for each reader')
    parser.add_argument('--only', choices=list(TARGETS), help='one reader')
    parser.add_argument(
        '--seed', type=int, help='by default another one each time')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/fuzz'),
        help='folder for the files that led to a finding')
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # the readers say what they find
    first = int(time.time()) if args.seed is None else args.seed
    failed = False
    for name in [args.only] if args.only else TARGETS:
        result = fuzz(name, args.minutes, first, args.out)
        died = f', {result["died"]} ended the process' * bool(result['died'])
        print(
            f'{name}: {result["examples"]} files{died}, '
            f'{len(result["findings"])} findings, seed {first}',
            flush=True)
        for what, path in result['findings'].items():
            print(f'  {what}: {path}')
            failed = True
    sys.exit(failed)


if __name__ == '__main__':
    main()
