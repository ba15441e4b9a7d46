# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmdensecl.engine import (
    BFloat16OptimWrapper,
    bfloat16,
    use_mixed_precision,
)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def model():
    return torch.nn.Linear(4, 3)


class TestBFloat16OptimWrapper:
    def test_a_step(self, model):
        """The forward pass is in bfloat16, weights and updates are not."""
        wrapper = BFloat16OptimWrapper(sgd(model))
        before = model.weight.detach().clone()
        with wrapper.optim_context(model):
            out = model(torch.ones(2, 4))
        assert out.dtype == torch.bfloat16
        assert model(torch.ones(2, 4)).dtype == torch.float32
        wrapper.update_params(out.float().sum())
        torch.testing.assert_close(model.weight, before - 0.2)
        assert model.weight.grad is None  # freed, not filled with zeros

    def test_gpu_without_it(self, model, monkeypatch):
        without_bfloat16(monkeypatch)
        with pytest.raises(RuntimeError, match='V100 has no bfloat16.*Amp'):
            BFloat16OptimWrapper(sgd(model))

    @pytest.mark.parametrize(
        'native, dtype', [(True, torch.bfloat16), (False, torch.float32)]
    )
    def test_auto(self, model, monkeypatch, capsys, native, dtype):
        """It follows the processor, and says so."""
        MMLogger.get_instance(f'auto-{native}')
        monkeypatch.setattr(
            bfloat16, 'native_bfloat16', lambda: (native, 'a CPU')
        )
        wrapper = BFloat16OptimWrapper(sgd(model), enabled='auto')
        with wrapper.optim_context(model):
            assert model(torch.ones(2, 4)).dtype == dtype
        name = str(dtype).removeprefix('torch.')
        assert f'Precision: {name} (auto, on a CPU)' in capsys.readouterr().out


def without_bfloat16(monkeypatch):
    monkeypatch.setattr(bfloat16, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'V100')
    monkeypatch.setattr(
        torch.cuda, 'is_bf16_supported', lambda including_emulation: False
    )


class TestUseMixedPrecision:
    @staticmethod
    def changed(auto=False, **wrapper):
        cfg = Config(dict(optim_wrapper=dict(optimizer=dict(), **wrapper)))
        use_mixed_precision(cfg, auto)
        return cfg.optim_wrapper

    def test_where_there_is_bfloat16(self):
        wrapper = self.changed(type='OptimWrapper', clip_grad=dict(max_norm=1))
        assert wrapper.type == 'mmdensecl.BFloat16OptimWrapper'
        assert wrapper.clip_grad.max_norm == 1
        assert self.changed().type == 'mmdensecl.BFloat16OptimWrapper'

    def test_where_there_is_none(self, monkeypatch):
        without_bfloat16(monkeypatch)
        wrapper = self.changed(type='OptimWrapper')
        assert wrapper.type == 'AmpOptimWrapper'
        assert wrapper.loss_scale == 'dynamic'

    @pytest.mark.parametrize('before', ['OptimWrapper', 'AmpOptimWrapper'])
    def test_auto(self, before):
        wrapper = self.changed(auto=True, type=before)
        assert wrapper.type == 'mmdensecl.BFloat16OptimWrapper'
        assert wrapper.enabled == 'auto'

    def test_other_settings(self):
        ours = 'mmdensecl.BFloat16OptimWrapper'
        assert self.changed(type=ours, enabled='auto').enabled is True
        wrapper = self.changed(type='AmpOptimWrapper', loss_scale=8.0)
        assert (wrapper.type, wrapper.loss_scale) == ('AmpOptimWrapper', 8.0)

    def test_unknown_wrapper(self):
        with pytest.raises(ValueError, match='cannot replace .*type=Apex'):
            self.changed(type='ApexOptimWrapper')
