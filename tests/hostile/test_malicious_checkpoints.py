# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Every entrance for checkpoints, against every file of corpus.py."""
import argparse
import functools
import http.server
import json
import pickle
import resource
import runpy
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from corpus import Verdict, calls, corpus
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import CheckpointLoader, Runner
from torchvision.models import resnet18

import mmdensecl
from mmdensecl.checkpoint import UnsafeCheckpointError, load_from_local
from mmdensecl.transfer import PretrainedBackbone, read_backbone

ROOT = Path(__file__).parents[2]
REFUSALS = UnsafeCheckpointError, ValueError, FileNotFoundError
# Of the processor: other jobs must not count.
MOST_SECONDS, MOST_MEMORY = 20, 1 << 30


class Linear(BaseModel):
    """The least that a Runner trains."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, **_):
        return dict(loss=self.weight.sum())


@pytest.fixture(scope='module')
def canary(tmp_path_factory):
    """What attackers write; the files come beside it."""
    return tmp_path_factory.mktemp('corpus') / 'canary'


@functools.lru_cache()
def all_cases(canary):
    return tuple(corpus(canary))


@pytest.fixture(scope='module')
def runner(tmp_path_factory):
    return Runner(
        Linear(),
        str(tmp_path_factory.mktemp('runner')),
        train_dataloader=dict(
            dataset=list(range(4)),
            sampler=dict(type='DefaultSampler'),
            batch_size=1),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
        log_level='ERROR',
        default_scope='mmengine')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a folder ``www``."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    (tmp_path / 'www').mkdir()

    class Silent(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *_):
            pass

    handler = functools.partial(Silent, directory=str(tmp_path / 'www'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{found.server_port}'
        found.shutdown()


def pretrained(path):
    module = BaseModule(dict(type='Pretrained', checkpoint=str(path)))
    module.weight = torch.nn.Parameter(torch.zeros(4))
    module.init_weights()


ENTRANCES = {
    'load_from_local, mmap':
    functools.partial(load_from_local, mmap=True),
    'CheckpointLoader':
    lambda path: CheckpointLoader.load_checkpoint(str(path), 'cpu', 'silent'),
    'read_backbone':
    read_backbone,
    'read_backbone, prefix':
    functools.partial(read_backbone, prefix='backbone.'),
    'load_backbone':
    mmdensecl.load_backbone,
    'PretrainedBackbone':
    lambda path: PretrainedBackbone(path)(torch.nn.BatchNorm2d(4)),
}


def is_small(case):
    """Not one of those that cost a second in every test."""
    return len(case.data) < 100_000


def is_typical(case):
    """One of some of each kind: the way to the loader is tried, not that."""
    return case.name.startswith(('os.system', 'exec', 'bare', 'TorchScript'))


def try_all(entrance, canary, exact=True, choose=is_small):
    """What is wrong with an entrance, by the names of the files.

    Args:
        entrance (Callable): Takes the path of a file.
        canary (Path): The fixture.
        exact (bool): Whether odd files that are not loaded must get an error
            of ours; a host has others. Defaults to True.
        choose (Callable): Which cases. Defaults to most.
    """
    wrong = {}
    cases = list(filter(choose, all_cases(canary)))
    assert len(cases) >= 10
    for number, case in enumerate(cases):
        path = canary.with_name(f'{number}.pth')
        path.write_bytes(case.data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        try:
            entrance(path)
            error = None
        except Exception as raised:
            error = raised
        seconds = time.process_time() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        path.unlink(missing_ok=True)
        if canary.exists():
            canary.unlink() if canary.is_file() else canary.rmdir()
            wrong[case.name] = 'ran its code'
        elif case.verdict is not Verdict.ODD and not isinstance(
                error, REFUSALS):
            wrong[case.name] = f'was not refused: {error!r}'
        elif exact and not (error is None or isinstance(error, REFUSALS)):
            wrong[case.name] = f'another error: {error!r}'
        elif error is not None and '\x1b' in str(error):
            wrong[case.name] = f'writes to the terminal: {error!r}'
        elif isinstance(error, REFUSALS) and len(str(error)) > 2000:
            wrong[case.name] = 'a message of many pages'
        elif seconds > MOST_SECONDS or grown * 1024 > MOST_MEMORY:
            wrong[case.name] = f'{seconds:.0f} s, {grown >> 10} MiB'
    return wrong


def test_all_files(canary):
    assert try_all(load_from_local, canary, choose=lambda case: True) == {}


@pytest.mark.parametrize('entrance', ENTRANCES.values(), ids=ENTRANCES)
def test_functions(entrance, canary):
    assert try_all(entrance, canary) == {}


def is_code(case):
    return case.verdict is Verdict.CODE


def test_torch_would_run_nothing_either(canary, monkeypatch):
    """Two gates: the scan, and torch's own behind it."""
    monkeypatch.setattr('mmdensecl.checkpoint.scan_file', lambda path: None)
    wrong = try_all(load_from_local, canary, choose=is_code)
    # Those are good to torch, which does not look at the bad part.
    assert wrong.keys() <= {
        'data.pkl twice', 'data.pkl twice, the first bad', 'bad in good'
    }
    assert 'ran its code' not in wrong.values()


@pytest.mark.parametrize('entrance', ['load_checkpoint', 'resume'])
def test_runner(runner, entrance, canary):
    """What load_from, --resume and tools/test.py call."""
    function = getattr(runner, entrance)
    assert try_all(lambda path: function(str(path)), canary, exact=False) == {}


def test_pretrained_of_mmengine(canary):
    assert try_all(pretrained, canary, exact=False) == {}


def test_other_loading_is_forced(canary, monkeypatch):
    """As users of mmengine 0.10.7 with torch 2.6 often set it."""
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    entrance = ENTRANCES['CheckpointLoader']
    assert try_all(entrance, canary) == {}


class TestAddresses:
    """All prefixes of mmengine's CheckpointLoader."""

    stored = {}  # mmengine keeps the first client

    def load(self, address):
        return CheckpointLoader.load_checkpoint(address, 'cpu', 'silent')

    def test_http(self, canary, server, tmp_path):

        def entrance(path):
            number = len(list((tmp_path / 'www').iterdir()))
            path.rename(tmp_path / 'www' / f'{number}.pth')
            self.load(f'{server}/{number}.pth')

        assert try_all(entrance, canary, choose=is_typical) == {}

    @pytest.mark.parametrize('zoo, list_of_names', [
        ('torchvision', 'get_torchvision_models'),
        ('modelzoo', 'get_torchvision_models'),
        ('mmcls', 'get_mmcls_models'),
        ('open-mmlab', 'get_external_models'),
        ('openmmlab', 'get_external_models'),
    ])
    def test_zoo(self, canary, server, tmp_path, monkeypatch, zoo,
                 list_of_names):
        names = {}
        monkeypatch.setattr(f'mmdensecl.checkpoint.{list_of_names}',
                            lambda: names)

        def entrance(path):
            number = len(names)
            path.rename(tmp_path / 'www' / f'{number}.pth')
            names[f'name{number}'] = f'{server}/{number}.pth'
            self.load(f'{zoo}://name{number}')

        assert try_all(entrance, canary, choose=is_typical) == {}
        with pytest.raises(ValueError, match=f'no "other" in {zoo}://'):
            self.load(f'{zoo}://other')

    def test_own_list(self, canary, tmp_path, monkeypatch):
        """``open_mmlab.json`` of the user may name local files."""
        monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))

        def entrance(path):
            (tmp_path / 'open_mmlab.json').write_text(
                json.dumps(dict(mine=path.name)))
            self.load('open-mmlab://mine')

        assert try_all(entrance, canary, choose=is_typical) == {}

    def test_good_files_arrive(self, server, tmp_path, monkeypatch):
        state = {'backbone.a': torch.ones(1), 'head.b': torch.ones(1)}
        torch.save(dict(state_dict=state), tmp_path / 'www' / 'a.pth')
        monkeypatch.setattr('mmdensecl.checkpoint.get_mmcls_models',
                            lambda: dict(a=f'{server}/a.pth'))
        assert list(self.load('mmcls://a')['state_dict']) == ['a']
        monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
        (tmp_path / 'open_mmlab.json').write_text(
            json.dumps(dict(a='www/a.pth')))
        found = self.load('openmmlab://a')['state_dict']
        assert list(found) == list(state)

    @pytest.mark.parametrize('prefix',
                             ['s3://', 'petrel://', 'one:s3://bucket/'])
    def test_object_storage(self, canary, monkeypatch, prefix):
        data = self.stored

        class Client:

            def __init__(self, **_):
                self.Get = data.get
                self.contains = data.__contains__

        package = types.ModuleType('petrel_client')
        package.client = types.ModuleType('petrel_client.client')
        package.client.Client = Client
        monkeypatch.setitem(sys.modules, 'petrel_client', package)
        monkeypatch.setitem(sys.modules, 'petrel_client.client',
                            package.client)

        def entrance(path):
            # The client knows one prefix for both.
            name = f'{prefix}{path.name}'.replace('petrel:', 's3:')
            data[name] = path.read_bytes()
            self.load(f'{prefix}{path.name}')

        assert try_all(entrance, canary, choose=is_typical) == {}

    def test_pavi(self):
        with pytest.raises(ValueError, match='Download it'):
            self.load('pavi://model')

    @pytest.mark.parametrize('address', ['file:///x.pth', 'jhu://resnet50'])
    def test_no_such_prefix(self, address):
        with pytest.raises(FileNotFoundError, match='http'):
            self.load(address)


def test_publish_backbone(canary):
    tool = runpy.run_path(
        str(ROOT / 'tools/model_converters/publish_backbone.py'))
    assert try_all(
        lambda path: tool['publish'](argparse.Namespace(
            checkpoint=str(path),
            prefix='',
            to='safetensors',
            out=str(canary.with_name('out')))), canary) == {}


def test_get_model(canary):
    from mmpretrain import get_model
    assert try_all(
        lambda path: get_model('resnet18_8xb32_in1k', pretrained=str(path)),
        canary,
        choose=is_typical) == {}


def test_the_attacks_would_work(canary):
    """So that the tests above can fail."""
    for name, call in calls(canary).items():
        try:
            pickle.loads(pickle.dumps(call))
        except Exception:  # after it has run
            pass
        end = time.monotonic() + 10
        while not canary.exists() and time.monotonic() < end:
            time.sleep(.01)  # Popen does not wait
        assert canary.exists(), name
        canary.rmdir() if canary.is_dir() else canary.unlink()


def test_an_oversized_architecture(tmp_path):
    """Few numbers under the names of a large ResNet."""
    state = {
        name: torch.ones(1)
        for name in resnet18().state_dict() if not name.startswith('fc')
    }
    for name in ('layer1.0.conv1.weight', 'layer1.0.conv2.weight'):
        state[name] = torch.ones(1024, 1024, 1, 1)
    torch.save(state, tmp_path / 'wide.pth')
    with pytest.raises(ValueError, match='no whole ResNet-18'):
        mmdensecl.load_backbone(tmp_path / 'wide.pth')
