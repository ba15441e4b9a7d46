# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Say what a demo run has learnt, against the same model untrained.

Prints a table and draws all mutual nearest neighbours between two views of
three photographs, before and after. The views are of the regions that are for
scoring, which training never saw; both models see the same.
"""
import argparse
import logging
from pathlib import Path

import matplotlib
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict, set_random_seed
from photographs import PHOTOGRAPHS, VAL, load_region
from PIL import ImageOps
from rich.console import Console
from rich.table import Table

from mmdensecl.checkpoint import load_from_local
from mmdensecl.datasets.transforms import PackViews, TwoViews
from mmdensecl.engine import find_resumable
from mmdensecl.models.correspondence import (BackboneSimilarity,
                                             locate_positions, stack_views)
from mmdensecl.models.metrics import feature_std, match_metrics
from mmdensecl.models.modules import Features
from mmdensecl.registry import MODELS
from mmdensecl.visualization import draw_matches, legend, strongest_matches

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# Larger than in training, for a finer grid: the encoders are convolutional.
SIZE = 192
DRAWS = 6
ROWS = dict(
    match_acc=('matches within one cell of the true position', '{:.1f}%'),
    match_coverage=('distinct cells matched', '{:.1f}%'),
    retrieval=(f'own other view found among {len(PHOTOGRAPHS)}', '{:.1f}%'),
    feat_std=('feature spread (1 isotropic, 0 collapsed)', '{:.2f}'))


def latest_config(work_dir: Path) -> Config:
    """Read the config that mmengine dumped into the work_dir."""
    configs = list(work_dir.glob('*.py'))
    if not configs:
        raise FileNotFoundError(f'There is no dumped config in "{work_dir}"; '
                                'did tools/train.py start there?')
    return Config.fromfile(max(configs, key=lambda p: p.stat().st_mtime))


def build_models(cfg: Config,
                 checkpoint: Path) -> dict[str, torch.nn.Module]:
    """Build the model freshly initialised, and as it is now."""
    models = {}
    for name in ('untrained', 'trained'):
        set_random_seed(cfg.randomness.seed)
        model = MODELS.build(cfg.model)
        if name == 'trained':
            state = load_from_local(checkpoint, 'cpu')['state_dict']
            model.set_queue_len(len(state['queue.keys']))
            load_state_dict(model, state, strict=True)
        else:
            model.init_weights()
        models[name] = model.train()  # batch statistics, fair to both
    return models


def unseen_batches() -> list[dict]:
    """Two views of each photograph's region for scoring, a few times."""
    draw, pack = TwoViews(size=SIZE), PackViews()
    batches = []
    for number in range(DRAWS):
        views = []
        for index, name in enumerate(PHOTOGRAPHS):
            region = load_region(name, VAL)
            square = ImageOps.fit(region, [min(region.size)] * 2)
            results = dict(
                img=square,
                img_path=name,
                sample_idx=index,
                seed=number * len(PHOTOGRAPHS) + index)
            views.append(pack(draw(results)))
        batches.append(default_collate(views))
    return batches


@torch.no_grad()
def encode(model: torch.nn.Module,
           batch: dict) -> tuple[Features, Features, torch.Tensor]:
    """Both views by the query encoder, and their crop coordinates."""
    data = model.data_preprocessor(batch, False)
    query, key = (
        model.encode(model.backbone, model.neck, x) for x in data['inputs'])
    return query, key, stack_views(data['data_samples'],
                                   query.global_proj.device)


def measure(model: torch.nn.Module, batches: list[dict]) -> dict[str, float]:
    """Mean of the label-free measures over batches."""
    rows = []
    for batch in batches:
        query, key, views = encode(model, batch)
        match = BackboneSimilarity()(query, key, views)
        values = match_metrics(match, query, key, views)
        values['feat_std'] = feature_std(query.global_proj)
        # Which image of the batch is most like mine, by its other view?
        nearest = (query.global_proj @ key.global_proj.t()).argmax(dim=1)
        own = torch.arange(len(nearest), device=nearest.device)
        values['retrieval'] = 100 * (nearest == own).float().mean()
        rows.append(values)
    return {
        name: torch.stack([row[name].float() for row in rows]).mean().item()
        for name in rows[0]
    }


def draw(models: dict[str, torch.nn.Module], batch: dict, count: int,
         path: Path) -> None:
    """Draw one row untrained, one trained, a column an image."""
    figure, axes = plt.subplots(
        2,
        count,
        figsize=(4.6 * count, 5.4),
        squeeze=False,
        layout='constrained')
    for row, (name, model) in zip(axes, models.items()):
        query, key, views = encode(model, batch)
        there = locate_positions(views[:, 0], views[:, 1], query.shape,
                                 key.shape)
        # From each stretch of the batch the image whose views overlap most.
        overlap = there.inside.float().mean(dim=1)
        chosen = [
            int(stretch[overlap[stretch].argmax()])
            for stretch in torch.arange(len(overlap)).tensor_split(count)
        ]
        for ax, i in zip(row, chosen):
            matches = strongest_matches(
                query, key, i, views, top=len(there.inside[i]))
            draw_matches(ax, batch['inputs'][0][i], batch['inputs'][1][i],
                         matches)
            ax.set_title(f'{name}: {int(matches.right.sum())} of '
                         f'{len(matches.right)} right')
    legend(figure, unknown=False)
    figure.suptitle('All mutual nearest neighbours between two views of '
                    'regions that training never saw')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='folder of the run')
    parser.add_argument(
        '--images', type=int, default=3, help='photographs to draw')
    args = parser.parse_args()
    logging.disable(logging.INFO)  # mmengine's list of initialised tensors
    cfg = latest_config(args.work_dir)
    init_default_scope(cfg.default_scope)
    checkpoint = find_resumable(args.work_dir)
    if checkpoint is None:
        raise FileNotFoundError(
            f'"{args.work_dir}" holds no checkpoint yet; the demo saves one '
            'an epoch. Run it again to go on.')
    models = build_models(cfg, checkpoint)
    batches = unseen_batches()
    results = {name: measure(m, batches) for name, m in models.items()}

    table = Table(title='What was learnt (on regions that training never saw)')
    for header in ('', *models):
        table.add_column(header, justify='right' if header else 'left')
    for key, (label, form) in ROWS.items():
        table.add_row(label, *(form.format(r[key]) for r in results.values()))
    image = args.work_dir / 'matches.png'
    draw(models, batches[0], args.images, image)
    console = Console()
    console.print(table)
    console.print(f'checkpoint  {checkpoint}', soft_wrap=True)
    console.print(f'image       {image}', soft_wrap=True)


if __name__ == '__main__':
    main()
