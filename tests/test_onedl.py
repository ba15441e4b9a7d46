# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmdensecl import onedl


@pytest.mark.parametrize(
    'installed, module, name',
    [
        ('mmsegmentation', 'mmseg', 'mmsegmentation'),
        ('onedl-mmsegmentation', 'mmseg', 'mmseg'),
        ('nothing', None, 'mmsegmentation'),
    ],
)
def test_where_configs_of_mmseg_are(installed, module, name, monkeypatch):

    def version(package):
        if package != installed:
            raise onedl.PackageNotFoundError(package)

    monkeypatch.setattr(onedl, 'version', version)
    monkeypatch.setattr(onedl, 'find_spec', lambda name: name == module)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    onedl.let_configs_name_mmseg()
    assert MODULE2PACKAGE['mmseg'] == name


def test_a_config_finds_its_base(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmseg')
    path = tmp_path / 'a.py'
    path.write_text("_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'\n")
    assert Config.fromfile(path).model.type == 'EncoderDecoder'
