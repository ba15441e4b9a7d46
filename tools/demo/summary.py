# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Say what a demo run has learnt, against the same model untrained.

Prints a table and draws the strongest mutual matches between two views of a
few pictures, before and after. Both encoders see the same views.
"""
import argparse
import logging
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict, set_random_seed
from rich.console import Console
from rich.table import Table

from mmdensecl.benchmark.results import log_rows
from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import find_resumable
from mmdensecl.models.correspondence import BackboneSimilarity
from mmdensecl.models.modules import Features
from mmdensecl.models.correspondence import locate_positions, stack_views
from mmdensecl.models.metrics import feature_std, match_metrics
from mmdensecl.registry import DATASETS, MODELS
from mmdensecl.visualization import draw_matches, legend, strongest_matches

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

BATCH = 32
DRAWN_SIZE = 192
MARGIN = 2  # of 12 x 12 cells, marked by zero padding
ROWS = (
    ('match_acc', 'matches within one cell of the true spot', '{:.1f}%'),
    ('match_coverage', 'distinct cells matched', '{:.1f}%'),
    ('retrieval', f'own other view found among {BATCH}', '{:.1f}%'),
    ('feat_std', 'feature spread (1 isotropic, 0 collapsed)', '{:.2f}'),
)
UNSEEN_EPOCH = 10**6  # views that training never drew


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='folder of the run')
    parser.add_argument(
        '--pictures', type=int, default=3, help='pictures to draw')
    return parser.parse_args()


def latest_config(work_dir: Path) -> Config:
    """The config that mmengine dumped into the work_dir."""
    configs = list(work_dir.glob('*.py'))
    if not configs:
        raise FileNotFoundError(f'There is no dumped config in "{work_dir}"; '
                                'did tools/train.py start there?')
    return Config.fromfile(max(configs, key=lambda p: p.stat().st_mtime))


def build_models(cfg: Config, checkpoint: Path) -> Dict[str, torch.nn.Module]:
    """The model freshly initialised, and as it is now."""
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


def encode(model, batch: dict) -> Tuple[Features, Features, torch.Tensor]:
    """Both views by the query encoder, and their crop coordinates."""
    data = model.data_preprocessor(batch, False)
    query, key = (
        model.encode(model.backbone, model.neck, x) for x in data['inputs'])
    return query, key, stack_views(data['data_samples'], query.global_proj.device)


@torch.no_grad()
def measure(model, batches: List[dict]) -> Dict[str, float]:
    """Mean of the label-free measures over batches of unseen views."""
    sums: Dict[str, float] = {}
    for batch in batches:
        query, key, views = encode(model, batch)
        match = BackboneSimilarity()(query, key, views)
        values = match_metrics(match, query, key, views)
        values['feat_std'] = feature_std(query.global_proj)
        # Which picture of the batch is most like mine, by its other view?
        nearest = (query.global_proj @ key.global_proj.t()).argmax(dim=1)
        own = torch.arange(len(nearest), device=nearest.device)
        values['retrieval'] = 100 * (nearest == own).float().mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.) + float(value) / len(batches)
    return sums


def unseen_batches(cfg: Config, count: int) -> List[dict]:
    """Batches spread over the data set, so that each mixes photographs."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.set_epoch(UNSEEN_EPOCH)
    step = max(1, len(dataset) // BATCH)
    return [
        default_collate([
            dataset[(offset + i * step) % len(dataset)] for i in range(BATCH)
        ]) for offset in range(min(step, count))
    ]


def training_curve(work_dir: Path) -> List[dict]:
    """What was logged, over all starts of the run, in order of steps."""
    rows = {row['step']: row for row in log_rows(work_dir)}
    return [rows[step] for step in sorted(rows)]


@torch.no_grad()
def draw(models, batch: dict, count: int, path: Path) -> None:
    """One row untrained, one trained, a column a picture."""
    figure, axes = plt.subplots(
        2,
        count,
        figsize=(4.6 * count, 5.4),
        squeeze=False,
        layout='constrained')
    for row, (name, model) in enumerate(models.items()):
        query, key, views = encode(model, batch)
        there = locate_positions(views[:, 0], views[:, 1], query.shape, key.shape)
        # From each stretch of the batch the picture whose views overlap most.
        overlap = there.inside.float().mean(dim=1)
        chosen = [
            int(stretch[overlap[stretch].argmax()])
            for stretch in torch.arange(len(overlap)).tensor_split(count)
        ]
        for column, i in enumerate(chosen):
            matches = strongest_matches(query, key, i, views, margin=MARGIN)
            ax = axes[row, column]
            draw_matches(ax, batch['inputs'][0][i], batch['inputs'][1][i],
                         matches)
            ax.set_title(f'{name}: {int(matches.right.sum())} of '
                         f'{len(matches.right)} right, similarity '
                         f'{matches.similarity.mean():.2f}')
    legend(figure)
    figure.suptitle(
        'Strongest mutual matches between two views, before and '
        'after pre-training (without the two outer rings of cells)')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    logging.disable(logging.INFO)  # mmengine's list of initialised tensors
    cfg = latest_config(args.work_dir)
    init_default_scope(cfg.default_scope)
    checkpoint = find_resumable(args.work_dir)
    if checkpoint is None:
        raise FileNotFoundError(
            f'"{args.work_dir}" holds no checkpoint yet; the demo saves one '
            'an epoch. Run it again to go on.')
    models = build_models(cfg, checkpoint)

    batches = unseen_batches(cfg, 6)
    results = {name: measure(m, batches) for name, m in models.items()}

    table = Table(title='What was learnt (on views that training never drew)')
    for header in ('', 'untrained', 'trained'):
        table.add_column(header, justify='right' if header else 'left')
    for key, label, form in ROWS:
        table.add_row(label, *(form.format(r[key]) for r in results.values()))
    curve = training_curve(args.work_dir)
    peak = max(curve, key=lambda row: row['loss'])
    for key, label in (('loss', 'training loss'), ('loss_global',
                                                   '  of it global, weighted'),
                       ('loss_dense', '  of it dense, weighted')):
        table.add_row(f'{label} (highest, last)', f'{peak[key]:.2f}',
                      f'{curve[-1][key]:.2f}')
    picture = args.work_dir / 'matches.png'
    # Larger views for the eye: the encoders are convolutional.
    for transform in cfg.train_dataloader.dataset.pipeline:
        if transform['type'] == 'mmdensecl.TwoViews':
            transform['size'] = DRAWN_SIZE
    draw(models, unseen_batches(cfg, 1)[0], args.pictures, picture)
    console = Console()
    console.print(table)
    console.print(f'checkpoint  {checkpoint}', soft_wrap=True)
    console.print(f'picture     {picture}', soft_wrap=True)


if __name__ == '__main__':
    main()
