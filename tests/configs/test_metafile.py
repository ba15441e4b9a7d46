# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from pathlib import Path

import yaml
from mmengine.config import Config
from modelindex.load_model_index import load

ROOT = Path(__file__).parents[2]


def entries():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    for name in index['Import']:
        yield from yaml.safe_load((ROOT / name).read_text())['Models']


def test_the_index_is_valid():
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert {c.name for c in index.collections} == {'DSC', 'DenseCL', 'MoCoV2'}


def test_entries_say_what_their_configs_say():
    models = list(entries())
    assert len(models) == 12
    for model in models:
        cfg = Config.fromfile(ROOT / model['Config'])
        assert Path(model['Config']).stem == model['Name']
        metadata = model['Metadata']
        assert metadata['Epochs'] == cfg.train_cfg.max_epochs
        assert metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size
        on_coco = 'coco' in cfg.train_dataloader.dataset.data_root
        assert metadata['Training Data'].startswith('COCO') == on_coco
        assert cfg.model.type == f'mmdensecl.{model["In Collection"]}'
