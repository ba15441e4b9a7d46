# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a checkpoint asks for, found out without unpickling it.

``torch.load(weights_only=True)`` runs none of a stranger's code, but does what
it allows as often and as large as the file says: a hundred bytes take all
memory, or all day. A scan knows before.
"""
import io
import os
import pickletools
import re
import zipfile
from typing import Any, BinaryIO, Dict, List, Sequence, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# What torch.save writes of tensors, numbers, strings and containers, and
# mmengine of its log history: each "module name".
CALLED = frozenset(
    ('collections OrderedDict', 'collections Counter',
     'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_tensor_v3',
     'torch._utils _rebuild_tensor', 'torch._utils _rebuild_parameter',
     'torch Size', 'torch device', 'builtins set', 'builtins complex',
     'builtins getattr', '_codecs encode',
     'mmengine.logging.history_buffer HistoryBuffer', 'numpy dtype',
     'numpy.core.multiarray _reconstruct',
     'numpy._core.multiarray _reconstruct', 'numpy.core.multiarray scalar',
     'numpy._core.multiarray scalar'))
STORAGE = re.compile(r'torch(\.cuda|\.storage)? [A-Za-z0-9]*Storage')
NAMED = frozenset(
    ('numpy ndarray',
     *(f'torch {name}'
       for name, x in vars(torch).items() if isinstance(x, torch.dtype))))

# What torch.save's pickles consist of: what an operation does, and how many
# items it takes; 0: all above the last mark.
OPERATIONS = dict(
    PROTO=('none', 0),
    STOP=('none', 0),
    MARK=('mark', 0),
    GLOBAL=('name', 0),
    REDUCE=('call', 2),
    NEWOBJ=('call', 2),
    BUILD=('build', 1),
    BINPERSID=('storage', 1),
    TUPLE=('tuple', 0),
    TUPLE1=('tuple', 1),
    TUPLE2=('tuple', 2),
    TUPLE3=('tuple', 3),
    APPEND=('append', 1),
    APPENDS=('append', 0),
    SETITEM=('set', 2),
    SETITEMS=('set', 0),
    **dict.fromkeys(('BINPUT', 'LONG_BINPUT'), ('put', 0)),
    **dict.fromkeys(('BINGET', 'LONG_BINGET'), ('get', 0)),
    **dict.fromkeys(
        ('NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2',
         'BINFLOAT', 'LONG1', 'BINUNICODE', 'SHORT_BINSTRING', 'EMPTY_TUPLE',
         'EMPTY_LIST', 'EMPTY_DICT', 'EMPTY_SET'), ('push', 0)))

MOST_OPERATIONS = 1_000_000  # one of a ResNet-50 has 20 000
MOST_DEPTH = 100
# Calls may handle this many times what the file holds; strings are taken into
# arrays and those into objects, once each.
MOST_WORK, FREE_WORK = 16, 1 << 20


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint that asks for more than tensors and plain values."""


class _Value:
    """What is known of an object that the pickle would make.

    Args:
        weight (int): How much it holds, as often as it is in there.
        depth (int): How deep it is nested.
        word (str): A literal, the name of a global, or the second item of a
            pair.
    """
    __slots__ = 'weight', 'depth', 'word'

    def __init__(self,
                 weight: int = 1,
                 depth: int = 0,
                 word: Any = '') -> None:
        self.weight, self.depth, self.word = weight, depth, word

    def take(self, items: Sequence['_Value']) -> '_Value':
        """Put items into it."""
        # A few operations double a weight, again and again.
        self.weight = min(self.weight + sum(x.weight for x in items), 1 << 60)
        self.depth = max([self.depth, *(x.depth + 1 for x in items)])
        if self.depth > MOST_DEPTH:
            raise ValueError(f'it is nested more than {MOST_DEPTH} deep')
        return self


def scan_file(path: str) -> None:
    """Look through a file that torch.load is to read.

    Args:
        path (str): The file.

    Raises:
        UnsafeCheckpointError: It asks for something that is no part of a
            checkpoint.
        ValueError: Or for more than such a file can need, or is none.
    """
    with open(path, 'rb') as file:
        head = file.read(4)
        file.seek(0)
        if head == b'PK\x03\x04':
            _scan_archive(file, os.path.getsize(path))
        elif head[:1] == b'\x80':
            # torch.save before 1.6: magic number, protocol, machine, content
            # and the keys of what follows. Some other pickle has one.
            for _ in range(5):
                scan_pickle(file)
                if not file.peek(1):
                    break
        else:
            raise ValueError('it begins neither as a zip archive nor as a '
                             'pickle')


def _scan_archive(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = [record.filename for record in records]
        if any(name.endswith('/constants.pkl') for name in names):
            raise UnsafeCheckpointError('it is a TorchScript archive, which '
                                        'holds a program')
        if len(set(names)) < len(names):
            raise ValueError('it has two records of one name')
        # Of compressed ones too, which torch.save never writes.
        total = sum(record.file_size for record in records)
        if total > size:
            raise ValueError(f'its records claim {total} bytes together')
        for name in names:
            if name.endswith('data.pkl'):
                scan_pickle(io.BytesIO(archive.read(name)))


def scan_pickle(stream: BinaryIO) -> None:
    """Go through a pickle as torch's unpickler would, and make nothing.

    Args:
        stream (BinaryIO): Is left behind the pickle.

    Raises:
        UnsafeCheckpointError: It asks for something that is no part of a
            checkpoint.
        ValueError: Or for more than it can need, or is not whole.
    """
    machine = _Machine()
    begin, work = stream.tell(), 0
    try:
        for count, (op, arg, _) in enumerate(pickletools.genops(stream)):
            if count >= MOST_OPERATIONS:
                raise ValueError(
                    f'its pickle has more than {MOST_OPERATIONS} operations')
            work += machine.step(op.name, arg)
            if work > FREE_WORK and work > FREE_WORK + MOST_WORK * (
                    stream.tell() - begin):
                raise ValueError('its pickle repeats itself out of proportion '
                                 'to its length')
    except (IndexError, KeyError) as error:
        raise ValueError('its pickle takes what it has not put') from error


class _Machine:
    """Stack and memory of an unpickler."""

    def __init__(self) -> None:
        self.stack: List[_Value] = []
        self.outer: List[List[_Value]] = []  # stacks below the marks
        self.memo: Dict[int, _Value] = {}

    def pop(self, count: int) -> List[_Value]:
        """The last ``count`` items; all above the last mark if 0."""
        if count == 0:
            items, self.stack = self.stack, self.outer.pop()
        elif count > len(self.stack):
            raise IndexError
        else:
            items = self.stack[-count:]
            del self.stack[-count:]
        return items

    def step(self, name: str, arg: Any) -> int:
        """Do an operation; returns what it costs."""
        if name not in OPERATIONS or (name == 'PROTO' and arg != 2):
            raise UnsafeCheckpointError(
                'it is a pickle of another protocol than 2, which torch.save '
                'writes')
        kind, count = OPERATIONS[name]
        if kind == 'put':
            self.memo[arg] = self.stack[-1]
        elif kind == 'get':
            self.stack.append(self.memo[arg])
        elif kind == 'push':
            text = arg if isinstance(arg, (str, bytes)) else ''
            self.stack.append(_Value(1 + len(text), word=text))
        elif kind == 'name':
            self.stack.append(_Value(word=_check_global(arg)))
        elif kind == 'mark':
            self.outer.append(self.stack)
            self.stack = []
        elif kind == 'tuple':
            items = self.pop(count)
            word = items[1].word if len(items) == 2 else ''
            self.stack.append(_Value(word=word).take(items))
        elif kind == 'append':
            items = self.pop(count)
            self.stack[-1].take(items)
        elif kind == 'set':
            items = self.pop(count)
            self.stack[-1].take(items)
            return sum(key.weight for key in items[::2])  # they are hashed
        elif kind == 'call':
            function, args = self.pop(2)
            _check_call(function.word, args.word)
            self.stack.append(_Value(args.weight, args.depth))
            return args.weight
        elif kind == 'build':
            (state, ) = self.pop(1)
            self.stack[-1].take([state])
            return state.weight
        elif kind == 'storage':
            self.pop(1)
            self.stack.append(_Value())
        return 0


def _check_global(name: str) -> str:
    name = re.sub('^__builtin__ ', 'builtins ', name)  # Python 2's
    if not (name in CALLED or name in NAMED or STORAGE.fullmatch(name)):
        raise UnsafeCheckpointError(f'it asks for {show(name)}')
    return name


def _check_call(function: Union[str, bytes], word: Union[str, bytes]) -> None:
    if function not in CALLED:
        raise UnsafeCheckpointError(
            f'it calls {show(str(function)) or "what is no function"}')
    # Other codecs make more of a text than there was.
    if function == '_codecs encode' and word != 'latin1':
        raise UnsafeCheckpointError('it encodes text by a codec of its choice')


def show(name: str) -> str:
    """A stranger's name as it may stand in a message."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= 500 else f'{shown[:500]}...'


def check_contents(content: Any, size: int) -> None:
    """See that what was loaded can have been in the file.

    A tensor that repeats one number, or memory that was never written, takes
    no room until somebody copies it.

    Args:
        content (Any): What was loaded.
        size (int): Bytes of the file.

    Raises:
        ValueError: A tensor is larger than the file, or has a name that
            would spoil a message; or a dictionary is more than that.
    """
    todo, seen = [content], set()
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            _check_size(x.numel() * x.element_size(), size)
        elif isinstance(x, np.ndarray):
            _check_size(x.nbytes, size)
        elif isinstance(x, dict):
            # They would stand in for its methods.
            extra = getattr(x, '__dict__', {}).keys() - {'_metadata'}
            if extra:
                raise ValueError('a dictionary has attributes, such as "'
                                 f'{show(str(min(extra, key=str)))}"')
            for key, value in dict.items(x):
                if isinstance(value, torch.Tensor) and isinstance(
                        key, str) and show(key) != key:
                    raise ValueError(f'a tensor is named "{show(key)}"')
                todo.append(value)
        elif isinstance(x, (list, tuple, set)):
            todo.extend(x)
        elif isinstance(x, HistoryBuffer):
            todo.extend(vars(x).values())


def _check_size(claimed: int, size: int) -> None:
    if claimed > size:
        raise ValueError(f'a tensor claims {claimed} bytes')
