# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Every entrance for checkpoints, against about ten kinds of hostile file."""

import argparse
import json
import os
import pickle
import runpy
import struct
import zipfile

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import CheckpointLoader, Runner
from runs import ROOT, TOOLS, prepare, tool

import mmdensecl
from mmdensecl.checkpoint import (
    UnsafeCheckpointError,
    register_checkpoint_loader,
)
from mmdensecl.engine.resume import ResumeError, prepare_resume
from mmdensecl.testing import write_pictures
from mmdensecl.transfer import PretrainedBackbone, read_backbone

REFUSALS = UnsafeCheckpointError, ValueError, FileNotFoundError


class Call:
    """Unpickling one calls a function of the attacker's choice."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Pickle wants functions that can be called."""


def attack(canary):
    return Call(os.mkdir, str(canary))


def rewrite(path, program, **records):
    """Replace the pickle of a file of torch.save; add records."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as source:
        content = {name: source.read(name) for name in source.namelist()}
    for name in content:
        if name.endswith('data.pkl'):
            content[name] = program
            folder = name[: -len('data.pkl')]
    content.update({folder + name: data for name, data in records.items()})
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as target:
        for name, data in content.items():
            target.writestr(name, data)


def reduce(path, canary):
    torch.save(attack(canary), path)


def in_meta(path, canary):
    content = dict(message_hub={}, optimizer={})
    content['meta'] = dict(epoch=1, iter=1, seed=attack(canary))
    content['state_dict'] = dict(weight=torch.ones(4))
    torch.save(content, path)


def legacy(path, canary):
    content = dict(state_dict=dict(weight=attack(canary)))
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(path, canary):
    path.write_bytes(pickle.dumps(attack(canary)))


def torchscript(path, canary):
    program = pickle.dumps(attack(canary), 2)
    rewrite(path, program, **{'constants.pkl': program})


def walk_from_an_allowed_class(path, canary):
    """From HistoryBuffer's methods to the builtins, by getattr alone."""
    scope = Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__')
    torch.save(dict(a=Call(Call(getattr, scope, 'get'), 'os')), path)


def object_array(path, canary):
    """An array of objects whose pointers are bytes of the file.

    Only names of the allow-list occur in it: a copied float64 is given an
    object sub-dtype by its `__setstate__`.
    """

    def integer(n):
        return b'J' + struct.pack('<i', n)

    def text(value):
        return b'X' + struct.pack('<I', len(value)) + value

    def raw(data):
        return b'c_codecs\nencode\n' + text(data) + text(b'latin1') + b'\x86R'

    parts = b'cnumpy\ndtype\n(' + text(b'O') + b'tR'
    parts = b'(' + parts + b'(' + integer(1) + b'tt'
    dtype = b'cnumpy\ndtype\n(' + text(b'f8') + b'\x89\x88tR('
    dtype += integer(3) + text(b'<') + parts + b'NN' + 2 * integer(-1)
    dtype += integer(0) + b'tb'
    array = b'cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n('
    array += integer(0) + b't' + raw(b'b') + b'tR('
    state = integer(1) + b'(' + integer(4) + b't' + dtype
    state += b'\x89' + raw(b'A' * 32) + b'tb.'
    rewrite(path, b'\x80\x02' + array + state)


def truncated(path, canary):
    torch.save(dict(weight=torch.rand(1000)), path)
    path.write_bytes(path.read_bytes()[:-500])


def web_page(path, canary):
    path.write_text('<html>404 not found</html>')


def folder_link(path, canary):
    path.symlink_to('/etc')


def huge_safetensors(path, canary):
    """A header that claims more than any memory."""
    claim = dict(dtype='F32', shape=[1 << 40], data_offsets=[0, 1 << 42])
    header = json.dumps(dict(weight=claim)).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header)


SAVED_CODE = [reduce, in_meta, legacy, bare_pickle]
SAVED_CODE += [walk_from_an_allowed_class, object_array]
HOSTILE = [*SAVED_CODE, torchscript]
HOSTILE += [truncated, web_page, folder_link, huge_safetensors]


class Linear(BaseModel):
    """The least that a Runner trains."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, **_):
        return dict(loss=self.weight.sum())


@pytest.fixture(scope='module')
def runner(tmp_path_factory):
    register_checkpoint_loader()
    return Runner(
        Linear(),
        str(tmp_path_factory.mktemp('runner')),
        train_dataloader=dict(
            dataset=list(range(4)),
            sampler=dict(type='DefaultSampler'),
            batch_size=1,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        log_level='ERROR',
        default_scope='mmengine',
    )


def resume_of_a_config(path):
    prepare_resume(Config(dict(work_dir='work', load_from=str(path))))


def pretrained_of_mmengine(path):
    module = BaseModule(dict(type='Pretrained', checkpoint=str(path)))
    module.weight = torch.nn.Parameter(torch.zeros(4))
    module.init_weights()


def publish(path):
    script = TOOLS / 'model_converters/publish_backbone.py'
    args = dict(checkpoint=str(path), out=str(path.with_name('out')))
    runpy.run_path(str(script))['publish'](
        argparse.Namespace(prefix='', to='safetensors', **args)
    )


# What takes a file: functions, and methods of a Runner.
ENTRANCES = dict(
    CheckpointLoader=lambda path: CheckpointLoader.load_checkpoint(
        str(path), 'cpu', 'silent'
    ),
    read_backbone=read_backbone,
    load_backbone=mmdensecl.load_backbone,
    PretrainedBackbone=lambda path: PretrainedBackbone(path)(
        torch.nn.BatchNorm2d(4)
    ),
    prepare_resume=resume_of_a_config,
    Pretrained=pretrained_of_mmengine,
    publish_backbone=publish,
    load_from='load_checkpoint',
    resume='resume',
)


@pytest.mark.parametrize('entrance', ENTRANCES.values(), ids=ENTRANCES)
@pytest.mark.parametrize('make', HOSTILE)
def test_is_refused(make, entrance, tmp_path, runner, monkeypatch):
    # Set by users of mmengine 0.10.7 against its errors of resuming.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    path, canary = tmp_path / 'bad.pth', tmp_path / 'canary'
    make(path, canary)
    if isinstance(entrance, str):
        method = getattr(runner, entrance)
        entrance = lambda path: method(str(path))  # noqa: E731
    with pytest.raises(REFUSALS) as error:
        entrance(path)
    assert not canary.exists()
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
    assert 'weights_only=False' not in str(error.value)
    if make in SAVED_CODE:
        assert isinstance(error.value, (UnsafeCheckpointError, ResumeError))
        assert 'could run code' in str(error.value)


@pytest.mark.parametrize('content', ['a text', [1], dict(state_dict=[1])])
@pytest.mark.parametrize(
    'entrance', [read_backbone, mmdensecl.load_backbone, resume_of_a_config]
)
def test_no_tensors(content, entrance, tmp_path):
    torch.save(content, tmp_path / 'bad.pth')
    words = 'bad.pth" (is no checkp|holds no|lac|cannot be resumed)'
    with pytest.raises(ValueError, match=words):
        entrance(tmp_path / 'bad.pth')


def test_the_config_of_a_checkpoint_is_not_run(tmp_path, runner):
    """mmengine's Runner.resume would run this text as Python."""
    canary = tmp_path / 'canary'
    code = f"import os\nos.mkdir(r'{canary}')"
    content = dict(
        meta=dict(epoch=0, iter=0, seed=None, config=code),
        state_dict=Linear().state_dict(),
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        optimizer=torch.optim.SGD(Linear().parameters(), 0.1).state_dict(),
    )
    torch.save(content, tmp_path / 'a.pth')
    runner.resume(str(tmp_path / 'a.pth'))
    assert not canary.exists()


def test_the_attack_would_work(tmp_path):
    """So that the tests above can fail."""
    canary = tmp_path / 'canary'
    in_meta(tmp_path / 'bad.pth', canary)
    torch.load(tmp_path / 'bad.pth', weights_only=False)
    assert canary.exists()


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp('hostile'))
    write_pictures(folder / 'labelled' / 'a', 1)
    (folder / 'pretrained.py').write_text("""
_base_ = './tiny.py'
data_root = 'pictures'
train_dataloader = dict(dataset=dict(data_root=data_root))
model = dict(backbone=dict(init_cfg=[dict(
    type='mmdensecl.PretrainedBackbone', checkpoint='')]))
""")
    (folder / 'knn.py').write_text(f"""
_base_ = '{ROOT}/configs/benchmarks/mmpretrain/resnet50_knn_in1k.py'
part = dict(num_workers=0, dataset=dict(
    data_root='labelled', split='', data_prefix='', classes=['a']))
test_dataloader = part
test_cfg = dict(train_dataloader=part)
""")
    in_meta(folder / 'bad.pth', folder / 'canary')
    return folder


@pytest.mark.parametrize(
    'command',
    [
        'train.py tiny.py --resume bad.pth --cfg-options data_root=pictures',
        'train.py tiny.py --cfg-options data_root=pictures load_from=bad.pth',
        'train.py pretrained.py --pretrained bad.pth',
        'test.py knn.py bad.pth',
        'model_converters/publish_backbone.py bad.pth out',
    ],
)
def test_tools(workplace, command):
    env = dict(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1')
    done = tool(command, workplace, env, check=False)
    assert not (workplace / 'canary').exists()
    assert done.returncode != 0
    assert 'could run code' in done.stdout
    assert 'Traceback' not in done.stdout
