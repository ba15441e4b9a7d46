# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Checkpoints that strangers may send. None is stored, all are made here."""
import io
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from enum import Enum
from pathlib import Path
from typing import Callable, Dict, Iterator, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Verdict(Enum):
    """What must become of a file."""
    CODE = 'wants to run code: refused'
    REFUSED = 'cannot be a checkpoint: refused'
    ODD = 'may load, or be refused'


class Case(NamedTuple):
    name: str
    data: bytes
    verdict: Verdict


class Call:
    """Unpickling one calls a function of the attacker's choice."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Pickle wants functions that can be called."""


class Weights(dict):
    """A state dict of a type that the reader does not have."""


class Scaled(torch.Tensor):
    """A subclass of Tensor."""


def calls(canary: Path) -> Dict[str, Call]:
    """Calls that write the file ``canary``, by name."""
    shell = f'touch {canary}'
    source = f"open(r'{canary}', 'w').close()"
    evaluated = f"open(r'{canary}', 'w')"

    # Imported here: naming them must not import them for the reader.
    import cProfile
    import functools
    import importlib
    import operator
    import os
    import runpy
    import shutil
    import subprocess
    import timeit

    import torch.utils.collect_env
    from mmengine.config import Config

    inner = pickle.dumps(Call(os.mkdir, str(canary)))
    nested = io.BytesIO()
    torch.save(Call(os.mkdir, str(canary)), nested)
    # From an allowed class to the builtins of its module.
    walk = Call(
        getattr,
        Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__'),
        'get')
    found = {
        'os.system':
        Call(os.system, shell),
        'subprocess.Popen':
        Call(subprocess.Popen, ['touch', str(canary)]),
        'subprocess.call':
        Call(subprocess.call, ['touch', str(canary)]),
        'eval':
        Call(eval, evaluated),
        'exec':
        Call(exec, source),
        'compile':
        Call(eval, Call(compile, evaluated, 'x', 'eval')),
        'open':
        Call(open, str(canary), 'w'),
        'mkdir':
        Call(os.mkdir, str(canary)),
        'shutil':
        Call(shutil.copy, __file__, str(canary)),
        'import':
        Call(Call(getattr, Call(__import__, 'os'), 'mkdir'), str(canary)),
        'importlib':
        Call(
            Call(getattr, Call(importlib.import_module, 'os'), 'mkdir'),
            str(canary)),
        'runpy':
        Call(runpy._run_code, source, {}),
        'timeit':
        Call(timeit.timeit, source, 'pass', timeit.default_timer, 1),
        'cProfile':
        Call(cProfile.run, source),
        'partial':
        Call(functools.partial(os.mkdir, str(canary))),
        'partial of the file':
        Call(Call(functools.partial, os.mkdir, str(canary))),
        'attrgetter':
        Call(
            Call(operator.attrgetter('mkdir'), Call(__import__, 'os')),
            str(canary)),
        'methodcaller':
        Call(
            operator.methodcaller('mkdir', str(canary)),
            Call(__import__, 'os')),
        'map':
        Call(list, Call(map, os.mkdir, [str(canary)])),
        'pathlib':
        Call(Path.touch, canary),
        'pickle.loads':
        Call(pickle.loads, inner),
        'torch.load':
        Call(
            functools.partial(torch.load, weights_only=False),
            Call(io.BytesIO, nested.getvalue())),
        'torch.storage':
        Call(torch.storage._load_from_bytes, nested.getvalue()),
        'torch.collect_env':
        Call(torch.utils.collect_env.run, shell),
        'numpy.save':
        Call(np.ndarray.tofile, np.zeros(1), str(canary)),
        'config':
        Call(Config.fromstring, source, '.py'),
        'walk from HistoryBuffer':
        Call(Call(getattr, Call(walk, '__builtins__'), 'get'), 'exec'),
    }
    # The walk ends with exec itself; here it is called.
    found['walk from HistoryBuffer'] = Call(found['walk from HistoryBuffer'],
                                            source)
    if sys.platform == 'linux':
        import posix
        found['posix.system'] = Call(posix.system, shell)
    return found


def saved(content, **kwargs) -> bytes:
    """A file of torch.save."""
    stream = io.BytesIO()
    torch.save(content, stream, **kwargs)
    return stream.getvalue()


def archive(program: bytes,
            records: Dict[str, bytes] = {},
            change: Callable = lambda archive: None,
            compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file like torch.save's, of any pickle and records."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, 'w',
                                                    compression) as file:
        warnings.simplefilter('ignore')  # duplicate names are meant
        file.writestr('archive/data.pkl', program)
        file.writestr('archive/byteorder', b'little')
        for name, data in records.items():
            file.writestr(name, data)
        file.writestr('archive/version', b'3\n')
        change(file)
    return stream.getvalue()


# Pieces of pickles that no pickler writes.


def number(n: int) -> bytes:
    if -2**31 <= n < 2**31:
        return b'J' + struct.pack('<i', n)
    data = n.to_bytes(n.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(data)]) + data


def text(value: str) -> bytes:
    data = value.encode('utf-8', 'surrogatepass')
    return b'X' + struct.pack('<I', len(data)) + data


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def pair(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


def put(place: int) -> bytes:
    return b'r' + struct.pack('<I', place)


def get(place: int) -> bytes:
    return b'j' + struct.pack('<I', place)


def program(body: bytes) -> bytes:
    return b'\x80\x02' + body + b'.'


def dictionary(**items: bytes) -> bytes:
    return b'}(' + b''.join(text(k) + v for k, v in items.items()) + b'u'


def tensor(size=(4, ), stride=(1, ), offset=0, numel=4, key='0') -> bytes:
    """A tensor over the record ``data/key``."""
    storage = pair(
        text('storage'), name('torch.FloatStorage'), text(key), text('cpu'),
        number(numel)) + b'Q'
    return name('torch._utils._rebuild_tensor_v2') + pair(
        storage, number(offset), pair(*map(number, size)),
        pair(*map(number, stride)), b'\x89',
        name('collections.OrderedDict') + b')R') + b'R'


def bytes_of_file(data: bytes) -> bytes:
    return name('_codecs.encode') + pair(
        text(data.decode('latin1')), text('latin1')) + b'R'


def one_tensor(**kwargs) -> bytes:
    data = {'archive/data/0': np.ones(4, np.float32).tobytes()}
    return archive(program(dictionary(weight=tensor(**kwargs))), data)


def object_array() -> bytes:
    """Only names of the allow-list: objects are pointers from the file.

    A copied float64 is given an object sub-dtype by its __setstate__.
    """
    objects = name('numpy.dtype') + pair(text('O')) + b'R'
    kind = (
        name('numpy.dtype') + pair(text('f8'), b'\x89', b'\x88') + b'R' + pair(
            number(3), text('<'), pair(objects, pair(number(1))), b'N', b'N',
            number(-1), number(-1), number(0)) + b'b')
    return name('numpy._core.multiarray._reconstruct') + pair(
        name('numpy.ndarray'), pair(
            number(0)), bytes_of_file(b'b')) + b'R' + pair(
                number(1), pair(number(4)), kind, b'\x89',
                bytes_of_file(b'A' * 32)) + b'b'


def array(shape, data: bytes) -> bytes:
    return name('numpy._core.multiarray._reconstruct') + pair(
        name('numpy.ndarray'), pair(number(0)),
        bytes_of_file(b'b')) + b'R' + pair(
            number(1), pair(*map(number, shape)),
            name('numpy.dtype') + pair(text('f8'), b'\x89', b'\x88') + b'R',
            b'\x89', bytes_of_file(data)) + b'b'


def laughs(make: bytes, count: int = 60) -> bytes:
    """Each level holds the one below it twice."""
    body = make + put(0)
    for i in range(count):
        body += b'}(' + text('a') + get(i) + text('b') + get(i) + b'u' + put(
            i + 1)
    return body


def deep_dictionaries(count: int) -> bytes:
    """Linked from the top down, so that no level looks deep when it is."""
    body = b''.join(b'}' + put(i) for i in range(count))
    for i in range(count - 1):
        body += get(i) + text('a') + get(i + 1) + b's'
    return body + get(0)


def odd_names() -> Iterator[str]:
    yield from ('../../weight', '/etc/passwd', '<script>alert(1)</script>',
                '\x1b[2J\x1b]0;owned\x07', 'line\nbreak', '\ud800', '', '.',
                '..', 'x' * 100_000, 'conv1.weight\0', '%s%n', '{0.__class__}',
                '\u202egnp.exe')


def with_code(canary: Path) -> Iterator[Case]:
    """Files that write the canary where they are unpickled."""
    for what, call in calls(canary).items():
        content = dict(state_dict=dict(weight=call))
        yield Case(f'{what}, zip', saved(content), Verdict.CODE)
        yield Case(f'{what}, legacy',
                   saved(content, _use_new_zipfile_serialization=False),
                   Verdict.CODE)
    call = calls(canary)['mkdir']
    content = dict(state_dict=dict(weight=call))
    for protocol in range(6):
        yield Case(f'bare pickle, protocol {protocol}',
                   pickle.dumps(content, protocol), Verdict.CODE)
        yield Case(f'zip, protocol {protocol}',
                   archive(pickle.dumps(content, protocol)), Verdict.CODE)
    yield Case(
        'legacy, in the magic number',
        pickle.dumps(call, 2) +
        saved({}, _use_new_zipfile_serialization=False), Verdict.CODE)
    buffer = HistoryBuffer()
    buffer._statistics_methods = dict(mean=call)
    yield Case('statistics of a HistoryBuffer', saved(buffer), Verdict.CODE)
    system = name('posix.mkdir')
    attack = system + pair(text(str(canary))) + b'R'
    for what, body in {
            'attribute of an OrderedDict':
            name('collections.OrderedDict') + b')R' +
            dictionary(items=attack) + b'b',
            'state of a HistoryBuffer':
            name('mmengine.logging.history_buffer.HistoryBuffer') + b')\x81' +
            dictionary(mean=attack) + b'b',
            'hooks of a tensor':
            dictionary(a=tensor(), b=attack),
            'key':
            b'}' + attack + b'Ns',
            'python 2 name':
            name('__builtin__.exec') + pair(text(f"open(r'{canary}', 'w')")) +
            b'R',
            'INST':
            b'(' + text(str(canary)) + b'iposix\nmkdir\n',
            'OBJ':
            b'(' + system + text(str(canary)) + b'o',
            'STACK_GLOBAL':
            b'\x8c\x05posix\x8c\x05mkdir\x93' + pair(text(str(canary))) + b'R',
            'EXT':
            b'\x82\x01' + pair(text(str(canary))) + b'R',
            'a dotted name':
            b'ccollections\nOrderedDict.__init__.__globals__\n',
            'walk over torch':
            name('torch._utils.importlib') + b'0' + attack,
            'rebuild of a stranger':
            name('torch._tensor._rebuild_from_type_v2') +
            pair(system, name('torch.Tensor'), pair(text(str(canary))), b'N') +
            b'R',
            'sparse rebuild':
            name('torch._utils._rebuild_sparse_tensor') + pair(attack, b')') +
            b'R',
    }.items():
        yield Case(what, archive(program(body)), Verdict.CODE)
    bad = saved(content)
    yield Case(
        'data.pkl twice',
        archive(
            pickle.dumps({}, 2),
            {'archive/data.pkl': pickle.dumps(content, 2)}), Verdict.CODE)
    yield Case(
        'data.pkl twice, the first bad',
        archive(
            pickle.dumps(content, 2),
            {'archive/data.pkl': pickle.dumps({}, 2)}), Verdict.CODE)
    yield Case(
        'TorchScript',
        archive(
            pickle.dumps({}, 2), {
                'archive/constants.pkl': pickle.dumps(content, 2),
                'archive/code/__torch__.py': b'import os'
            }), Verdict.CODE)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as tar:
        for part in ('storages', 'tensors', 'pickle'):
            data = pickle.dumps(call, 2)
            info = tarfile.TarInfo(part)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    yield Case('tar', stream.getvalue(), Verdict.CODE)
    yield Case(
        'bad in good',
        archive(
            pickle.dumps({}, 2), {
                'archive/bad.pth': bad,
                'archive/bad/data.pkl': pickle.dumps(content, 2)
            }), Verdict.CODE)
    yield Case('pickle before an archive',
               pickle.dumps(call, 2) + saved({}), Verdict.CODE)


def impossible() -> Iterator[Case]:
    """Files that claim more than they hold, or are not whole."""
    good = saved(dict(state_dict=dict(weight=torch.rand(64, 64))))
    old = saved(
        dict(weight=torch.rand(64, 64)), _use_new_zipfile_serialization=False)
    huge = {'archive/data/0': bytes(1 << 22)}

    def claim(file):
        file.filelist[2].file_size = file.filelist[2].compress_size = 1 << 40

    def overlap(file):
        for i in range(1, 2000):
            record = zipfile.ZipInfo(f'archive/data/{i}')
            for key in ('header_offset', 'CRC', 'compress_size', 'file_size'):
                setattr(record, key, getattr(file.filelist[2], key))
            file.filelist.append(record)

    shared = b'}(' + b''.join(
        text(str(i)) + tensor((1 << 20, ), numel=1 << 20, key=str(i))
        for i in range(2000)) + b'u'
    # Each is pushed on the ones before, for there is no way to drop one.
    chain = text('a' * 100) + put(0) + bytes_of_file(b'a' * 100) + put(1)
    for _ in range(40):
        chain += name('_codecs.encode') + pair(get(1), text('hex')) + b'R'
        chain += put(1)
    copies = text('a' * (1 << 20)) + put(0) + b']('
    copies += (name('_codecs.encode') + get(0) + text('latin1') +
               b'\x86R') * 4000 + b'e'
    tuples = b')' + put(0)
    for _ in range(60):
        tuples += get(0) + get(0) + b'\x86' + put(0)
    files = {
        'one number, seen as 16 GiB':
        one_tensor(size=(1 << 32, ), stride=(0, )),
        'storage larger than its record':
        one_tensor(size=(1 << 32, ), numel=1 << 32),
        'storage a little larger than its record':
        one_tensor(size=(512, ), numel=512),
        'view outside the storage':
        one_tensor(size=(1 << 20, )),
        'offset outside the storage':
        one_tensor(offset=1 << 40),
        'negative offset':
        one_tensor(offset=-4),
        'negative stride':
        one_tensor(stride=(-1, )),
        'negative size':
        one_tensor(size=(-4, )),
        'size overflows':
        one_tensor(size=(1 << 62, 8), stride=(8, 1)),
        'stride overflows':
        one_tensor(size=(3, 2), stride=(1 << 62, 1 << 61)),
        'negative storage':
        one_tensor(numel=-4),
        'no record':
        one_tensor(key='../../../../etc/passwd'),
        'compressed records':
        archive(
            program(dictionary(weight=tensor((1 << 20, ), numel=1 << 20))),
            huge,
            compression=zipfile.ZIP_DEFLATED),
        'record of a terabyte':
        archive(program(b'}'), {'archive/data/0': b'1234'}, claim),
        'records on top of each other':
        archive(program(shared), huge, overlap),
        'bytearray':
        archive(
            program(name('builtins.bytearray') + pair(number(1 << 33)) +
                    b'R')),
        'FloatTensor':
        archive(
            program(name('torch.FloatTensor') + pair(number(1 << 33)) + b'R')),
        'storage without a file':
        archive(
            program(
                name('torch.storage.UntypedStorage') + pair(number(1 << 40)) +
                b'R')),
        'ndarray':
        archive(
            program(
                name('numpy.ndarray') + pair(pair(number(1 << 40))) + b'R')),
        'empty array of 8 GiB':
        archive(
            program(
                name('numpy._core.multiarray._reconstruct') + pair(
                    name('numpy.ndarray'), pair(number(1 << 33)),
                    bytes_of_file(b'b')) + b'R')),
        'array larger than its bytes':
        archive(program(array((1 << 30, ), b'12345678'))),
        'array whose size overflows':
        archive(program(array((1 << 32, 1 << 32), b''))),
        'array of negative size':
        archive(program(array((-1, ), b'12345678'))),
        'objects from bytes':
        archive(program(object_array())),
        'codecs that double':
        archive(program(chain)),
        'copies of a string':
        archive(program(copies)),
        'hash of a tree of tuples':
        archive(program(tuples + b'}' + get(0) + b'Ns')),
        'hash of a deep tuple':
        archive(program(b'}' + b')' + b'\x85' * 1_000_000 + b'Ns')),
        'deep tuple':
        archive(program(b')' + b'\x85' * 1_000_000)),
        'deep lists':
        archive(program(b']' * 10_000 + b'a' * 9_999)),
        'attribute of a tree':
        archive(
            program(
                name('builtins.getattr') + pair(laughs(b'}'), text('x')) +
                b'R')),
        'dtype of a tree':
        archive(program(name('numpy.dtype') + pair(laughs(b'}')) + b'R')),
        'millions of lists':
        archive(program(b'(' + b']' * 1_000_001 + b't')),
        'stack empty':
        archive(program(b'R')),
        'no mark':
        archive(program(b't')),
        'memory empty':
        archive(program(get(7))),
        'string longer than the file':
        archive(b'\x80\x02X\xff\xff\xff\xff.'),
        'long number':
        archive(b'\x80\x02\x8b\xff\xff\xff\x7f.'),
        'a dictionary with methods of its own':
        archive(
            program(
                name('collections.OrderedDict') + b')R' +
                dictionary(items=name('torch.Size')) + b'b')),
        'no end':
        archive(b'\x80\x02}'),
        'empty pickle':
        archive(b''),
        'no data.pkl':
        archive(program(b'}')).replace(b'data.pkl', b'data.pkx'),
        'other byte order':
        archive(program(b'}')).replace(b'little', b'middle'),
        'empty':
        b'',
        'empty archive':
        b'PK\x05\x06' + bytes(18),
        'text':
        b'<html>404 not found</html>',
        'zeros':
        bytes(10_000),
        'a name that leaves the terminal':
        saved({'\x1b[2J\x1b]0;owned\x07': torch.ones(1)}),
        'a name of a megabyte':
        saved({'x' * (1 << 20): torch.ones(1)}),
    }
    for share in (1, 10, 50, 90, 99):
        files[f'{share}% of a file'] = good[:len(good) * share // 100]
        files[f'{share}% of a legacy file'] = old[:len(old) * share // 100]
    for what, data in files.items():
        yield Case(what, data, Verdict.REFUSED)


def odd(canary: Path) -> Iterator[Case]:
    """Files that are strange, but hurt nobody."""
    source = f"open(r'{canary}', 'w').close()"
    weight = dict(weight=torch.ones(4))
    link = zipfile.ZipInfo('archive/link')
    link.external_attr = 0o120777 << 16
    states = {
        # mmengine's Runner runs the first when it resumes.
        'config of an old file':
        dict(
            meta=dict(config=source, cfg=source, epoch=1, iter=1),
            state_dict=weight,
            message_hub=dict(
                log_scalars={}, runtime_info=dict(cfg=source),
                resumed_keys={})),
        'list': [1],
        'tensor':
        torch.ones(2),
        'text':
        'text',
        'nothing':
        None,
        'HistoryBuffer':
        HistoryBuffer(),
        'Counter':
        Counter(a=1),
        'OrderedDict':
        OrderedDict(state_dict=OrderedDict(weight)),
        'NaN':
        dict(weight=torch.tensor([float('nan'), float('inf')])),
        'integers':
        dict(weight=torch.ones(4, dtype=torch.int64)),
        'complex':
        dict(weight=torch.ones(4, dtype=torch.complex64)),
        'byte floats':
        dict(weight=torch.ones(4).to(torch.float8_e4m3fn)),
        'bfloat16':
        dict(weight=torch.ones(4).bfloat16()),
        'no numbers':
        dict(weight=torch.ones(0, 4)),
        'scalar': {
            'layer1.0.conv1.weight': torch.tensor(1.),
            'layer1.0.conv2.weight': torch.tensor(1.),
            'conv1.weight': torch.tensor(1.)
        },
        'other keys': {
            1: torch.ones(1),
            (1, 2): torch.ones(1),
            b'x': torch.ones(1),
            None: torch.ones(1)
        },
        'state dict is no dictionary':
        dict(state_dict=[1], meta=[2]),
        'state dict of strings':
        dict(state_dict=dict(weight='text')),
        'names': {
            x: torch.ones(1)
            for x in odd_names() if x.isprintable() and len(x) < 100
        },
        'many layers': {
            f'layer{i}.0.conv1.weight': torch.ones(1)
            for i in range(1000)
        },
        'sparse':
        dict(weight=torch.eye(3).to_sparse()),
        'meta':
        dict(weight=torch.ones(3, device='meta')),
        'subclass':
        dict(weight=torch.ones(3).as_subclass(Scaled)),
        'state dict of a class':
        Weights(weight),
        'objects':
        np.array([{}, None]),
        'records':
        np.zeros(2, [('a', 'O'), ('b', 'f4')]),
        'long number':
        dict(epoch=1 << 1000),
    }
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of prototypes
        states['nested'] = dict(
            weight=torch.nested.nested_tensor([torch.ones(2),
                                               torch.ones(3)]))
        states['quantised'] = dict(
            weight=torch.quantize_per_tensor(
                torch.ones(3), .1, 0, torch.qint8))
    for what, content in states.items():
        yield Case(what, saved(content), Verdict.ODD)
    shuttle = b'}' + put(0) + text('a') + get(0) + b's'
    for what, data in {
            'dictionary inside itself':
            archive(program(shuttle)),
            'tree of one dictionary':
            archive(
                program(laughs(dictionary(weight=tensor()))),
                {'archive/data/0': bytes(16)}),
            'deep dictionaries':
            archive(program(deep_dictionaries(5_000))),
            'names that leave the archive':
            archive(
                program(b'}'), {
                    '../../../tmp/x': b'1',
                    '/etc/x': b'2',
                    'archive/../x': b'3',
                    'C:\\x': b'4'
                }),
            'symbolic link':
            archive(
                program(b'}'),
                change=lambda file: file.writestr(link, '/etc/passwd')),
            'something behind the end':
            saved({}) + b'x' * 100,
    }.items():
        yield Case(what, data, Verdict.ODD)


def corpus(canary: Path) -> Iterator[Case]:
    """All of them.

    Args:
        canary (Path): A file or folder that is there after one of them could
            run its code.
    """
    yield from with_code(canary)
    yield from impossible()
    yield from odd(canary)
