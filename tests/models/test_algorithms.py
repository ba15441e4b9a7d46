# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from mmpretrain.structures import DataSample

from mmdensecl.models import DenseCL, MoCoV2
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
    @BOTH
    def test_outputs(self, build_tiny, name):
        model = build_tiny(name)
        outputs = assert_trains(model)
        common = {
            'loss_global',
            'global_pos_sim',
            'global_neg_sim',
            'global_acc',
            'feat_std',
            'queue_fill',
        }
        dense = {
            'loss_dense',
            'dense_pos_sim',
            'dense_neg_sim',
            'dense_acc',
            'position_r2',
            'match_coverage',
        }
        assert set(outputs) == (common if name == 'MoCoV2' else common | dense)
        assert 0 <= outputs['global_acc'] <= 100

    def test_the_objective_is_the_sum_of_the_losses(self, build_tiny):
        """mmengine sums whatever has "loss" in its name."""
        model = build_tiny()
        outputs = model.loss(random_views(), samples_with(OVERLAP, OVERLAP))
        total, _ = model.parse_losses(outputs)
        assert total == outputs['loss_global'] + outputs['loss_dense']

    def test_match_acc_where_views_are_known(self, build_tiny):
        model = build_tiny()
        assert 'match_acc' not in model.loss(random_views())
        outputs = model.loss(random_views(), samples_with(OVERLAP, OVERLAP))
        assert 0 <= outputs['match_acc'] <= 100
        outputs = model.loss(
            random_views(), samples_with(NO_OVERLAP, NO_OVERLAP)
        )
        assert outputs['match_acc'] == 0

    def test_lambda_mixes(self, build_tiny):
        """(1 - lambda) of the one, lambda of the other."""
        model, views = build_tiny(momentum=0.0), random_views()
        state = {k: x.clone() for k, x in model.state_dict().items()}
        values = {}
        for loss_lambda in (0.0, 0.25, 1.0):
            model.load_state_dict(state)
            model.loss_lambda = loss_lambda
            outputs = model.loss(views)
            values[loss_lambda] = (
                outputs['loss_global'].item(),
                outputs['loss_dense'].item(),
            )
        whole_global, whole_dense = values[0.0][0], values[1.0][1]
        assert whole_global > 0 and whole_dense > 0
        assert values[0.0][1] == values[1.0][0] == 0
        assert values[0.25] == pytest.approx(
            (0.75 * whole_global, 0.25 * whole_dense)
        )

    @BOTH
    def test_key_encoder_is_used(self, build_tiny, name):
        """Each of its parts moves the loss that depends on it."""
        model, views = build_tiny(name, momentum=0.0), random_views()
        state = {k: x.clone() for k, x in model.state_dict().items()}

        def losses(part=None):
            model.load_state_dict(state)
            if part is not None:
                torch.manual_seed(1)
                with torch.no_grad():
                    for x in model.encoder_k.get_submodule(part).parameters():
                        x.add_(torch.randn_like(x))
            outputs = model.loss(views)
            return [
                x.item() for n, x in sorted(outputs.items()) if 'loss' in n
            ]

        plain = losses()
        assert losses() == plain
        parts = {
            'backbone': (True, True),
            'neck.mlp': (False, True),
            'neck.mlp2': (True, False),
        }
        if name == 'MoCoV2':
            parts = {'backbone': (True,), 'neck.mlp': (True,)}
        for part, moved in parts.items():  # loss_dense, loss_global
            changes = [
                abs(a - b) > 1e-4
                for a, b in zip(losses(part), plain, strict=True)
            ]
            assert tuple(changes) == moved, part

    @BOTH
    def test_momentum_update_comes_before_the_keys(self, build_tiny, name):
        """With momentum 1 the keys are the query encoder's own."""
        with pytest.warns(UserWarning, match='momentum=1'):
            model = build_tiny(name, momentum=1.0)
        with torch.no_grad():
            for x in model.encoder_k.parameters():
                x.add_(torch.randn_like(x))
        view = torch.randn(3, 3, 32, 32)
        outputs = model.loss([view, view])
        assert outputs['global_pos_sim'].item() == pytest.approx(1, abs=1e-5)

    @BOTH
    def test_a_batch_is_not_among_its_own_negatives(self, build_tiny, name):
        """The keys of one step are the negatives of the next only."""
        model = build_tiny(name, queue_len=2, momentum=0.0)
        model.eval()
        view = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            first = model.loss([view, view])
            second = model.loss([view, view])
        assert first['queue_fill'] == 0
        assert first['global_neg_sim'] < 0.9999
        assert second['queue_fill'] == 100
        assert second['global_neg_sim'].item() == pytest.approx(1, abs=1e-5)

    def test_no_gradient_into_keys_or_queues(self, build_tiny):
        model = build_tiny()
        encoded = []
        encode_key = model.encode_key
        model.encode_key = lambda x: (
            encoded.append(encode_key(x)) or encoded[-1]
        )
        assert_trains(model)
        (key,) = encoded
        assert not any(
            x.requires_grad
            for x in (
                key.global_proj,
                key.dense_proj,
                key.dense_proj_mean,
                key.backbone_feats,
            )
        )
        assert not model.queue.negatives.requires_grad
        assert not model.dense_queue.negatives.requires_grad

    @BOTH
    def test_key_statistics_are_its_own(self, build_tiny, name):
        """Batch norm of each encoder sees its own view alone."""
        model = build_tiny(name)
        views = random_views()
        views[1] = 5 * views[1] + 3
        model.loss(views)
        query = model.backbone.bn1
        key = model.encoder_k.backbone.bn1
        assert query.num_batches_tracked == key.num_batches_tracked == 1
        assert key.running_var.mean() > 2 * query.running_var.mean()

    @BOTH
    def test_init_weights_equals_the_encoders(self, build_tiny, name):
        model = build_tiny(name)
        key = model.encoder_k
        for own, module in (
            (key.backbone, model.backbone),
            (key.neck, model.neck),
        ):
            for a, b in zip(
                own.parameters(), module.parameters(), strict=True
            ):
                assert torch.equal(a, b)

    @BOTH
    def test_train_step(self, build_tiny, name):
        """Through mmengine, as a Runner calls it."""
        from mmengine.optim import OptimWrapper

        model = build_tiny(name)
        before = model.backbone.conv1.weight.detach().clone()
        optimizer = torch.optim.SGD(
            (x for x in model.parameters() if x.requires_grad), lr=0.1
        )
        data = dict(
            inputs=random_views(), data_samples=samples_with(OVERLAP, OVERLAP)
        )
        log = model.train_step(data, OptimWrapper(optimizer))
        parts = [x for n, x in log.items() if n.startswith('loss_')]
        assert log['loss'].item() == pytest.approx(float(sum(parts)))
        assert not torch.equal(model.backbone.conv1.weight, before)

    @BOTH
    def test_loss_falls(self, build_tiny, name):
        """One pair of views against queues that stay as they are."""
        model, views = build_tiny(name, momentum=0.0), random_views(4)
        model.enqueue = lambda key: None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        totals = []
        for _ in range(10):
            total, _ = model.parse_losses(model.loss(views))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        assert totals[-1] < 0.95 * totals[0]


class TestVariants:
    @pytest.mark.parametrize('num_grid', [1, 3, 5, 7, 9, None])
    def test_num_grid(self, build_tiny, num_grid):
        """On a map of 4 x 4, so that matching pools like the loss."""
        model = build_tiny(num_grid=num_grid)
        outputs = assert_trains(model, None, samples_with(OVERLAP, OVERLAP))
        assert 0 < outputs['match_coverage'] <= 100

    def test_map_that_is_not_square(self, build_tiny):
        views = [torch.randn(2, 3, 32, 64) for _ in range(2)]
        for num_grid in (None, 3):
            assert_trains(build_tiny(num_grid=num_grid), views)

    @pytest.mark.parametrize('rule', RULES)
    @pytest.mark.parametrize('num_grid', [None, 3])
    def test_correspondence(self, build_tiny, rule, num_grid):
        model = build_tiny(
            num_grid=num_grid, correspondence=dict(type=f'mmdensecl.{rule}')
        )
        assert type(model.correspondence).__name__ == rule
        assert_trains(model, None, samples_with(OVERLAP, OVERLAP))

    def test_default_rule_is_by_backbone(self, build_tiny):
        rule = build_tiny().correspondence
        assert type(rule).__name__ == 'BackboneSimilarity'

    def test_rules_decide_the_positives(self, build_tiny):
        """The same step, but for the rule, has another dense loss."""
        losses = {}
        for rule in RULES:
            torch.manual_seed(0)
            model = build_tiny(
                correspondence=dict(type=f'mmdensecl.{rule}'), momentum=0.0
            )
            torch.manual_seed(1)
            outputs = model.loss(random_views(4), samples_with(*[OVERLAP] * 4))
            losses[rule] = outputs['loss_dense'].item()
            losses.setdefault('global', outputs['loss_global'].item())
            assert losses['global'] == outputs['loss_global'].item()
        assert len(set(losses.values())) == 1 + len(RULES)
        # The nearest by projection are the easiest.
        assert losses['ProjectionSimilarity'] < min(
            losses['BackboneSimilarity'], losses['RandomMatch']
        )

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

    def test_geometric_match_counts_only_overlap(self, build_tiny):
        """A pair without overlap changes nothing for the other."""
        model = build_tiny(
            correspondence=dict(type='mmdensecl.GeometricMatch'), momentum=0.0
        )
        model.eval()
        state = {k: x.clone() for k, x in model.state_dict().items()}
        views = random_views(2)
        with torch.no_grad():
            both = model.loss(views, samples_with(OVERLAP, NO_OVERLAP))
            model.load_state_dict(state)
            alone = model.loss([x[:1] for x in views], samples_with(OVERLAP))
        torch.testing.assert_close(both['loss_dense'], alone['loss_dense'])
        assert alone['loss_dense'] > 0

    @pytest.mark.parametrize('form', ['stream', 'reference'])
    @BOTH
    def test_both_forms_of_the_loss_train(self, build_tiny, name, form):
        loss = dict(type='mmdensecl.InfoNCE', form=form)
        head = dict(type='mmdensecl.ContrastiveHead', loss=loss)
        assert_trains(build_tiny(name, head=head))

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

    @BOTH
    def test_batch_sizes(self, build_tiny, name):
        """Not a divisor, larger than the queue, a small last one."""
        model = build_tiny(name, queue_len=5)
        enqueued = 0
        for size in (3, 3, 7, 2):
            assert_trains(model, random_views(size))
            model.zero_grad()
            enqueued += size
            assert model.queue.pointer == enqueued % 5
            assert model.queue.fill == min(1, enqueued / 5)
            if name == 'DenseCL':
                assert model.dense_queue.pointer == enqueued % 5
                assert not torch.equal(
                    model.queue.negatives, model.dense_queue.negatives
                )

    @BOTH
    def test_batch_of_one(self, build_tiny, name):
        assert_trains(build_tiny(name), random_views(1))


# Small versions, 64 pixels, and the channels of their last map.
BACKBONES = dict(
    ResNet=(dict(type='mmpretrain.ResNet', depth=18, base_channels=8), 64),
    ResNeXt=(
        dict(type='mmpretrain.ResNeXt', depth=50, groups=4, base_channels=8),
        256,
    ),
    ConvNeXt=(
        dict(
            type='mmpretrain.ConvNeXt',
            arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32]),
            gap_before_final_norm=False,
        ),
        32,
    ),
    Swin=(
        dict(
            type='mmpretrain.SwinTransformer',
            arch=dict(
                embed_dims=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4]
            ),
            img_size=64,
            window_size=2,
        ),
        96,
    ),
    ViT=(
        dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(
                embed_dims=24,
                num_layers=2,
                num_heads=2,
                feedforward_channels=32,
            ),
            img_size=64,
            out_type='featmap',
        ),
        24,
    ),
)


class TestBackbones:
    @staticmethod
    def build(name, tiny_cfg, **changes):
        backbone, channels = BACKBONES[name]
        neck = dict(
            type='mmdensecl.DenseCLNeck',
            in_channels=channels,
            hid_channels=8,
            out_channels=4,
        )
        model = MODELS.build(
            tiny_cfg(backbone={**backbone, **changes}, neck=neck)
        )
        model.init_weights()
        return model.train()

    @pytest.mark.parametrize('name', BACKBONES)
    def test_trains(self, name, tiny_cfg):
        model = self.build(name, tiny_cfg)
        assert_trains(model, random_views(size=64))

    @pytest.mark.parametrize('name', ['DenseCL', 'MoCoV2'])
    def test_of_several_maps_the_last(self, tiny_cfg, name):
        """The others change nothing, but each parameter has a gradient."""
        views, results = random_views(size=64), []
        for indices in ((3,), (0, 2, 3)):
            torch.manual_seed(1)
            cfg = tiny_cfg(name)
            # Norms at the output of each stage, which the last does not use.
            cfg['backbone'] = dict(
                **BACKBONES['ConvNeXt'][0], out_indices=indices
            )
            cfg['neck']['in_channels'] = 32
            model = MODELS.build(cfg)
            model.init_weights()
            with torch.no_grad():
                model.backbone.norm3.weight.mul_(2)
                model.encoder_k.backbone.norm3.weight.mul_(2)
            outputs = assert_trains(model.train(), views)
            results.append(float(outputs['loss_global']))
            trained = [x for x in model.parameters() if x.requires_grad]
            assert all(x.grad is not None for x in trained)
        assert all(x == x for x in results)

    @pytest.mark.parametrize(
        'name, changes',
        [
            ('ConvNeXt', dict(gap_before_final_norm=True)),
            ('ViT', dict(out_type='cls_token')),
        ],
    )
    def test_exception(self, name, changes, tiny_cfg):
        model = self.build(name, tiny_cfg, **changes)
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

    def test_queues_start_apart(self, build_tiny):
        model = build_tiny()
        assert not torch.equal(
            model.queue.negatives, model.dense_queue.negatives
        )

    def test_queues_are_saved(self, build_tiny):
        names = set(build_tiny().state_dict())
        assert {
            'queue.keys',
            'queue.enqueued',
            'dense_queue.keys',
            'dense_queue.enqueued',
        } <= names

    def test_backbone_only_checkpoint(self, build_tiny):
        """Weights without queues still load, not strictly."""
        model = build_tiny()
        state = {
            name: x
            for name, x in model.state_dict().items()
            if name.startswith('backbone.')
        }
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert 'queue.keys' in missing


class TestArguments:
    @BOTH
    @pytest.mark.parametrize(
        'inputs, got',
        [
            (torch.zeros(2, 3, 32, 32), 'one tensor'),
            ([torch.zeros(2, 3, 32, 32)] * 3, '3'),
            ([torch.zeros(2, 3, 32, 32)], '1'),
        ],
    )
    def test_two_views(self, build_tiny, name, inputs, got):
        with pytest.raises(
            ValueError,
            match=f'got {got}. End the pipeline with mmdensecl.TwoViews',
        ):
            build_tiny(name).loss(inputs)

    def test_geometric_match_needs_views(self, build_tiny):
        model = build_tiny(
            correspondence=dict(type='mmdensecl.GeometricMatch')
        )
        with pytest.raises(ValueError, match='needs the crop coordinates'):
            model.loss(random_views())

    @BOTH
    @pytest.mark.parametrize('queue_len', [0, -4, 'Auto', 2.5, None])
    def test_queue_len(self, build_tiny, name, queue_len):
        with pytest.raises(ValueError, match=f'got .*{queue_len}'):
            build_tiny(name, queue_len=queue_len)

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

    @pytest.mark.parametrize('loss_lambda', [-0.1, 1.1])
    def test_loss_lambda(self, build_tiny, loss_lambda):
        with pytest.raises(
            ValueError, match=rf'in \[0, 1\], got {loss_lambda}'
        ):
            build_tiny(loss_lambda=loss_lambda)

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


class TestDataPreprocessor:
    def test_dict_without_a_type(self, build_tiny):
        model = build_tiny(
            data_preprocessor=dict(mean=[1.0, 2.0, 3.0], std=[1.0] * 3)
        )
        assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]

    def test_module(self, build_tiny):
        module = build_tiny().data_preprocessor
        assert build_tiny(data_preprocessor=module).data_preprocessor is module
