# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from functools import partial

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from mmpretrain.structures import DataSample

from mmdensecl.models import (
    DSC,
    BackboneSimilarity,
    BalancedSimilarity,
    DenseCL,
    InfoNCE,
    KMeansCategoryHead,
    MoCoV2,
    NearestNeighbors,
    PrototypeCategoryHead,
)
from mmdensecl.registry import MODELS

BOTH = pytest.mark.parametrize('name', ['DenseCL', 'MoCoV2'])
RULES = (
    'BackboneSimilarity',
    'ProjectionSimilarity',
    'MutualNearestNeighbor',
    'RandomMatch',
    'GeometricMatch',
)


def random_views(batch=2, size=32):
    return [torch.randn(batch, 3, size, size) for _ in range(2)]


def samples_with(*views):
    """Data samples that carry the given pairs of crops."""
    samples = [DataSample() for _ in views]
    for sample, rows in zip(samples, views, strict=True):
        sample.set_metainfo(dict(views=rows))
    return samples


OVERLAP = [[0, 0, 40, 40, 0], [20, 10, 40, 40, 1]]
NO_OVERLAP = [[0, 0, 40, 40, 0], [400, 0, 40, 40, 0]]


def assert_trains(model, views=None, data_samples=None):
    """One step, with a finite gradient into every query parameter."""
    outputs = model.loss(views or random_views(), data_samples)
    total, _ = model.parse_losses(outputs)
    total.backward()
    for name, x in model.named_parameters():
        if name.startswith('encoder_k.'):
            assert x.grad is None
        else:
            assert torch.isfinite(x.grad).all(), name
    assert any(x.grad.abs().sum() > 0 for x in model.backbone.parameters())
    for name, x in outputs.items():
        assert torch.isfinite(x), name
        assert x.dim() == 0
        assert ('loss' in name) == x.requires_grad
    return outputs


class TestStep:
    def test_match_acc_where_views_are_known(self, build_tiny):
        model = build_tiny()
        assert 'match_acc' not in model.loss(random_views())
        outputs = model.loss(random_views(), samples_with(OVERLAP, OVERLAP))
        assert 0 <= outputs['match_acc'] <= 100
        assert 0 < outputs['match_coverage'] <= 100
        outputs = model.loss(
            random_views(), samples_with(NO_OVERLAP, NO_OVERLAP)
        )
        assert outputs['match_acc'] == 0

    def test_a_single_cell_is_told(self, build_tiny):
        """Whose matches are all right, and mean nothing."""
        model = build_tiny(num_grid=1)
        with pytest.warns(UserWarning, match='is a single cell'):
            model.loss(random_views())


class TestVariants:
    @pytest.mark.parametrize('rule', RULES)
    @pytest.mark.parametrize('num_grid', [None, 3])
    def test_correspondence(self, build_tiny, rule, num_grid):
        model = build_tiny(
            num_grid=num_grid, correspondence=dict(type=f'mmdensecl.{rule}')
        )
        assert type(model.correspondence).__name__ == rule
        assert_trains(model, None, samples_with(OVERLAP, OVERLAP))

    def test_geometric_match_without_overlap(self, build_tiny):
        """A dense loss of zero that can be differentiated."""
        model = build_tiny(
            correspondence=dict(type='mmdensecl.GeometricMatch')
        )
        outputs = assert_trains(
            model, None, samples_with(NO_OVERLAP, NO_OVERLAP)
        )
        assert outputs['loss_dense'] == 0
        assert outputs['match_acc'] == 0
        assert outputs['match_coverage'] == 0
        for x in model.neck.mlp2.parameters():
            assert (x.grad == 0).all()

    @BOTH
    def test_autocast(self, build_tiny, name):
        model = build_tiny(name)
        views = random_views(4)
        state = {k: x.clone() for k, x in model.state_dict().items()}
        plain = model.loss(views)
        model.load_state_dict(state)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outputs = assert_trains(model, views)
        for key, x in outputs.items():
            assert x.dtype == torch.float32
            if 'loss' in key:
                assert x.item() == pytest.approx(plain[key].item(), rel=0.1)
        norms = model.queue.negatives.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(8))

    def test_matches_are_made_in_full_precision(self, build_tiny):
        """Also under AMP, where bmm would round to half."""
        model, seen = build_tiny(), []

        class Spy(type(model.correspondence)):
            def __call__(self, query, key, views=None):
                seen.append(
                    (
                        torch.is_autocast_enabled('cpu'),
                        query.backbone_feats.dtype,
                    )
                )
                return super().__call__(query, key, views)

        model.correspondence = Spy()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            model.loss(random_views())
        assert seen == [(False, torch.float32)]


class TestMaps:
    """Whole steps of other backbones: transfer/test_backbone_families.py."""

    CONVNEXT = dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32]),
        gap_before_final_norm=False,
    )

    @classmethod
    def build(cls, cfg, **changes):
        cfg.update(backbone={**cls.CONVNEXT, **changes})
        cfg['neck']['in_channels'] = 32
        model = MODELS.build(cfg)
        model.init_weights()
        return model.train()

    @BOTH
    def test_of_several_the_last(self, tiny_cfg, name):
        """The others change nothing, but each parameter has a gradient."""
        views, results = random_views(size=64), []
        for indices in ((3,), (0, 2, 3)):
            torch.manual_seed(1)
            # Norms at the output of each stage, which the last does not use.
            model = self.build(tiny_cfg(name), out_indices=indices)
            with torch.no_grad():
                model.backbone.norm3.weight.mul_(2)
                model.encoder_k.backbone.norm3.weight.mul_(2)
            outputs = assert_trains(model, views)
            results.append(outputs['loss_global'].item())
            trained = [x for x in model.parameters() if x.requires_grad]
            assert all(x.grad is not None for x in trained)
        assert results[0] == results[1]

    def test_none(self, tiny_cfg):
        model = self.build(tiny_cfg(), gap_before_final_norm=True)
        with pytest.raises(
            ValueError,
            match='gave 2-D features, the dense branch needs a map .*'
            "gap_before_final_norm=False.*out_type='featmap'",
        ):
            model.loss(random_views(size=64))


class TestCheckpoint:
    @BOTH
    def test_round_trip(self, build_tiny, name, tmp_path):
        """The next step is the same to the last bit."""
        model = build_tiny(name, momentum=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):  # past the end of the queue
            optimizer.zero_grad()
            assert_trains(model, random_views(3))
            optimizer.step()
        torch.save(model.state_dict(), tmp_path / 'model.pth')
        torch.manual_seed(99)
        fresh = build_tiny(name, momentum=0.1)
        fresh.load_state_dict(torch.load(tmp_path / 'model.pth'))
        views = random_views(3)
        outputs, again = model.loss(views), fresh.loss(views)
        assert list(outputs) == list(again)
        for key, x in outputs.items():
            assert torch.equal(x, again[key]), key
        for key, x in model.state_dict().items():
            assert torch.equal(x, fresh.state_dict()[key]), key

    @BOTH
    def test_both_encoders_start_from_a_bare_backbone(self, build_tiny, name):
        """mmengine loads after init_weights, and with strict=False."""
        source, model = build_tiny(name), build_tiny(name)
        neck = {k: v.clone() for k, v in model.neck.state_dict().items()}
        bare = {
            f'backbone.{k}': v + 1
            for k, v in source.backbone.state_dict().items()
        }
        model.load_state_dict(dict(bare), strict=False)
        for part in (model.backbone, model.encoder_k.backbone):
            for key, x in part.state_dict().items():
                assert torch.equal(x, bare[f'backbone.{key}'])
        for part in (model.neck, model.encoder_k.neck):
            for key, x in part.state_dict().items():
                assert torch.equal(x, neck[key])

    @BOTH
    def test_queue_length_mismatch(self, build_tiny, name):
        """Also as mmengine loads: strict=False, errors become warnings."""
        state = build_tiny(name, queue_len=16).state_dict()
        model = build_tiny(name)
        for load in (
            lambda: model.load_state_dict(state, strict=False),
            lambda: load_state_dict(model, state, strict=False),
        ):
            with pytest.raises(ValueError, match=r'\(16, 4\).*queue_len=16'):
                load()


class TestArguments:
    def test_two_views(self, build_tiny):
        for inputs, got in (
            (torch.zeros(2, 3, 32, 32), 'one tensor'),
            ([torch.zeros(2, 3, 32, 32)] * 3, '3'),
        ):
            with pytest.raises(
                ValueError,
                match=f'got {got}. End the pipeline with mmdensecl.TwoViews',
            ):
                build_tiny().loss(inputs)

    @pytest.mark.parametrize('build, message', [
        (dict(queue_len=0), 'queue_len .* got 0'),
        (dict(queue_len='Auto'), "queue_len .* got 'Auto'"),
        (dict(virtual_ranks=2.5), 'virtual_ranks .* got 2.5'),
        (dict(momentum=1.5), r'momentum must be in \[0, 1\], got 1.5'),
        (dict(channels_last='no'), "channels_last must be .* got 'no'"),
        (dict(compile_encoders='max'), "compile_encoders .* got 'max'"),
        (dict(loss_lambda=-0.1), r'loss_lambda .*\[0, 1\], got -0.1'),
        (dict(dense_negatives='all'), "dense_negatives .* got 'all'"),
        (dict(cells_per_image=0), 'cells_per_image .* least 1, got 0'),
        (dict(feat_dim=0), 'dim must be at least 1, got 0'),
        (dict(num_grid=0), 'num_grid must be at least 1, got 0'),
        (partial(DSC, category_weight=-1), 'category_weight .* got -1'),
        (partial(DSC, num_samples=0), 'num_samples must .* got 0'),
        (partial(NearestNeighbors, k=0), 'k must be at least 1, got 0'),
        (partial(BackboneSimilarity, weight_power=-1), 'weight_power .*-1'),
        (partial(BalancedSimilarity, epsilon=0), 'epsilon .* above 0'),
        (partial(BalancedSimilarity, num_iters=0), 'num_iters .* least 1'),
        (partial(KMeansCategoryHead, num_clusters=1), 'num_clusters .* 2'),
        (partial(PrototypeCategoryHead, temperature=0), 'temperature .*0'),
        (partial(InfoNCE, temperature=0), 'temperature must be above 0'),
    ])  # fmt: skip
    def test_values(self, build_tiny, tiny_cfg, build, message):
        with pytest.raises(ValueError, match=message):
            if isinstance(build, dict):
                build_tiny(**build)
            elif build.func is DSC:
                category = dict(type='mmdensecl.KMeansCategoryHead')
                cfg = tiny_cfg(category=category, **build.keywords)
                MODELS.build({**cfg, 'type': 'mmdensecl.DSC'})
            else:
                build()

    @BOTH
    def test_auto_queue_len(self, build_tiny, name, monkeypatch):
        monkeypatch.setattr('mmdensecl.models.moco.DEFAULT_QUEUE_LEN', 32)
        model = build_tiny(name, queue_len='auto')
        with pytest.raises(RuntimeError, match='mmdensecl.QueueLengthHook'):
            model.loss(random_views())
        model.set_queue_len(6)
        assert_trains(model)
        queues = {
            n: len(x)
            for n, x in model.state_dict().items()
            if n.endswith('queue.keys')
        }
        expected = {'queue.keys': 6}
        if name == 'DenseCL':
            expected['dense_queue.keys'] = 6
        assert queues == expected

    @BOTH
    def test_published_defaults(self, tiny_cfg, name):
        cfg = tiny_cfg(name)
        for key in ('queue_len', 'feat_dim'):
            del cfg[key]
        cfg['neck'].update(out_channels=128)
        model = MODELS.build(cfg)
        assert model.queue.negatives.shape == (65536, 128)
        assert model.encoder_k.momentum == 0.001
        assert model.head.loss_module.temperature == 0.2
        if name == 'DenseCL':
            assert model.dense_queue.negatives.shape == (65536, 128)
            assert model.loss_lambda == 0.5
        assert isinstance(model, MoCoV2)
        assert isinstance(model, DenseCL) == (name == 'DenseCL')
