# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report of a made-up suite says what was put into it."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from made_up import write_results
from PIL import Image

from mmdensecl.benchmark.report import write_report
from mmdensecl.benchmark.results import ResultsError, load_results, write_json

RANDOM, OURS = (9.0, 10.0, 11.0), (14.3, 15.0, 16.0)
MIOU = dict(key='mIoU', name='mIoU', scale=1.0, unit='%', better='higher')
LOSS = dict(MIOU, key='mae', name='MAE', unit='', better='lower')
PUBLISHED = dict(mode='frozen', metric='mIoU', source='Wang et al.', over=None)


class Elements(HTMLParser):
    """Of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def report(folder, metric=MIOU, **kwargs):
    """The report as Markdown."""
    write_results(folder, [metric], **kwargs)
    return write_report(folder)['report.md'].read_text()


def test_in_every_form(tmp_path):
    text = report(tmp_path, random=RANDOM, ours=OURS)
    shown = '15.1 ± 0.9', '+5.1 (4.7 to 5.5)'
    assert f'| ours | 1 x 3 | **{shown[0]}** | {shown[1]} |\n' in text
    assert '| random | 3 draws | 10.0 ± 1.0 | – |\n' in text
    sentence = 'VOC segmentation, frozen, mIoU against random, in points: '
    sentence += f'ours {shown[1]}.'
    page = (tmp_path / 'report/report.html').read_text()
    assert sentence in text and sentence in page
    for words in (f'<strong>{shown[0]}</strong>', f'{shown[1]}</td>'):
        assert words in page
    values = pd.read_csv(tmp_path / 'report/report.csv')
    names = 'method task mode pretrain_seed seed metric value'
    assert values.columns.tolist() == names.split()
    assert values['value'].tolist() == [*RANDOM, *OURS]
    summary = pd.read_csv(tmp_path / 'report/summary.csv')
    assert summary['low'][1] == pytest.approx(4.6697347)
    assert summary.loc[1, ['method', 'verdict', 'best']].tolist() == [
        'ours',
        'above',
        True,
    ]


def test_never_more_than_is_known(tmp_path):
    text = report(tmp_path / 'a', random=RANDOM, ours=(9.5, 10.6, 10.8))
    words = '+0.3 (−0.8 to 1.4), not told apart'
    assert f'| {words} |' in text and f'ours {words}.' in text
    assert '**' not in text
    text = report(tmp_path / 'b', random=RANDOM[:1], ours=OURS[:1])
    assert '| ours | 1 x 1 | 14.3 | +5.3, not told apart |' in text
    assert '| random | 1 draw |' in text
    note = 'No method has a second pre-training'
    text = report(tmp_path / 'c', random=RANDOM, ours=RANDOM, notes=['no sky'])
    assert 'ours and random are equal to the last digit' in text
    assert note in text and '* no sky' in text
    two = ((14.0, 15.0, 16.0), (15.0, 16.0, 17.0))
    text = report(tmp_path / 'd', random=RANDOM, ours=two)
    assert note not in text and '| ours | 2 x 3 |' in text


def test_runs_without_a_result(tmp_path):
    write_results(tmp_path, [LOSS], random=RANDOM, ours=OURS)
    text = write_report(tmp_path)['report.md'].read_text()
    assert '| random | 3 draws | **10.0 ± 1.0** |' in text  # lower is better
    assert 'MAE (lower is better) against random: ours +5.1' in text
    path = tmp_path / 'seg/frozen/ours/0_1/result.json'
    path.unlink()
    write_json(path.with_name('failed.json'), dict(reason='full', tail='x'))
    text = write_report(tmp_path)['report.md'].read_text()
    assert '| ours | 1 x 2 |' in text and 'reason: full' in text
    assert 'seg/frozen/ours/0_1 failed; its seed counts for no' in text


def test_published_numbers_stay_apart(tmp_path):
    published = [
        dict(PUBLISHED, method='ours', value=69.4),
        dict(PUBLISHED, method='BYOL', value=1.8, over='MoCo-v2'),
        dict(PUBLISHED, method='SwAV', value=70.1, mode='finetune'),
    ]
    text = report(tmp_path, published=published, random=RANDOM, ours=OURS)
    row = '| ours | 1 x 3 | **15.1 ± 0.9** | +5.1 (4.7 to 5.5) |'
    assert (
        'mIoU, published |' in text and f'{row} 69.4 (Wang et al.) |' in text
    )
    row = '| BYOL | – | – | – | +1.8 over MoCo-v2 (Wang et al.) |'
    assert row in text and 'SwAV' not in text
    for path in tmp_path.rglob('*.csv'):
        assert (
            '69.4' not in path.read_text() and 'BYOL' not in path.read_text()
        )


def test_page_needs_nothing_else(tmp_path):
    write_results(tmp_path, [MIOU], random=RANDOM, ours=OURS)
    for name in ('random/<NA>_0', 'ours/0_0'):
        folder = tmp_path / 'seg/frozen' / name
        for i in (3, 20):
            path = folder / 'predictions' / f'{i:05d}_pred.png'
            path.parent.mkdir(exist_ok=True)
            Image.new('RGB', (640, 480), (200, 30, 30)).save(path)
        log = folder / '20260101_000000/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        rows = [dict(loss=1 / i, step=i) for i in range(1, 5)]
        lines = [json.dumps(x) for x in (*rows, dict(mIoU=5.0, step=4))]
        log.write_text('\n'.join(lines) + '\n{"loss": 1.0, "st')
    path = tmp_path / 'seg/frozen/ours/0_0/predictions/00020_pred.png'
    path.write_bytes(b'\x89PNG cut')
    suite = json.loads((tmp_path / 'suite.json').read_text())
    write_json(tmp_path / 'suite.json', dict(suite, title='<script>x'))
    page = write_report(tmp_path)['report.html'].read_text()
    found = Elements(page).found
    assert not {tag for tag, _ in found} & {'script', 'link', 'iframe'}
    images = [x for tag, x in found if tag == 'img']
    methods = ['ground truth', 'random', 'ours'] * 2
    assert [x['alt'] for x in images] == ['Curves', *methods]
    assert images[0]['src'].startswith('data:image/png;base64,')
    shown = [x['src'].startswith('data:image/jpeg') for x in images[1:]]
    assert shown == [False, True, True, False, True, False]
    assert {x['src'] for x in images if x['src'][:5] != 'data:'} == {''}


@pytest.mark.parametrize('text', ['', '{"schema": 1', '[1]', '{}'])
def test_broken_files_are_named(tmp_path, text):
    with pytest.raises(FileNotFoundError, match='benchmark.py run'):
        load_results(tmp_path)
    write_results(tmp_path, [MIOU], random=RANDOM, ours=OURS)
    (tmp_path / 'suite.json').write_text(text)
    with pytest.raises(ResultsError, match=re.escape(str(tmp_path))):
        load_results(tmp_path)
