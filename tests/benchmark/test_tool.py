# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""tools/benchmark.py: what it refuses, before anything is run."""
import fcntl
import json
import shutil

import pytest
import torch


@pytest.fixture
def run(tool, place):
    """Function that calls the tool to run the suite."""

    def call(*args):
        return tool('run', place / 'tiny.py', '--data-root', place / 'data',
                    '--work-dir', place / 'out', *args)

    return call


def runs(place):
    return sorted(path.parent.parent.name + '/' + path.parent.name
                  for path in place.glob('out/tiny/seg/frozen/*/*/calls'))


def test_run_and_report(run, tool, place, weights):
    code, text = run('--checkpoint', f'ours={weights}')
    assert code == 0 and 'finished seg/frozen/ours/seed0' in text
    assert runs(place) == ['ours/seed0', 'random/seed0']
    code, again = tool('report', place / 'out' / 'tiny')
    assert code == 0 and 'Segmentation' in again


@pytest.mark.parametrize('flag', [(), ('--dry-run', )])
class TestWhatCannotShareATable:

    def test_other_seeds(self, run, place, flag):
        """Seed 0 has run on other data, and this call will not repeat it."""
        assert run('--tasks', 'seg')[0] == 0
        shutil.move(place / 'out/tiny/seg/frozen/random/seed0',
                    place / 'out/tiny/seg/frozen/random/seed1')
        self.rename(place, seed=1)
        (place / 'data' / 'coco' / 'new.txt').write_text('more')
        code, text = run('--tasks', 'seg', '--protocol', 'frozen', *flag)
        assert code == 2 and 'DifferentSettingsError' in text
        assert '--redo' in text and '--work-dir' in text
        assert runs(place) == ['random/seed1']

    def rename(self, place, **changes):
        folder = place / 'out' / 'tiny'
        path = folder / 'seg/frozen/random/seed1/result.json'
        path.write_text(
            json.dumps({
                **json.loads(path.read_text()),
                **changes
            }))
        path = folder / 'suite.json'
        suite = json.loads(path.read_text())
        suite['seeds'] = [0, 1]
        for entry in suite['runs']:
            if entry['protocol'] == 'frozen':
                entry.update(seed=1, folder='seg/frozen/random/seed1')
        path.write_text(json.dumps(suite))

    def test_other_rows(self, run, place, weights, flag):
        assert run('--tasks', 'seg', '--protocol', 'frozen')[0] == 0
        (place / 'data' / 'coco' / 'new.txt').write_text('more')
        more = ('--checkpoint', f'ours={weights}', '--tasks', 'seg',
                '--protocol', 'frozen')
        code, text = run('--no-random', *more, *flag)
        assert code == 2 and 'in seg/frozen/ours/seed0' in text
        assert runs(place) == ['random/seed0']
        # Named along, the odd one is repeated.
        if not flag:
            code, text = run('--redo', *more)
            assert code == 0 and 'discarding seg/frozen/random/seed0' in text
            assert runs(place) == ['ours/seed0', 'random/seed0']

    def test_refused_before_anything_is_discarded(self, run, place, weights,
                                                  flag):
        both = ('--checkpoint', f'ours={weights}', '--tasks', 'seg',
                '--protocol', 'frozen')
        assert run(*both)[0] == 0
        (place / 'data' / 'coco' / 'new.txt').write_text('more')
        code, text = run('--no-random', '--redo', *both, *flag)
        assert code == 2 and 'discarding' not in text
        assert (place / 'out/tiny/seg/frozen/ours/seed0/result.json').exists()


class TestRows:

    def test_random_is_taken(self, run, weights):
        for more in ((), ('--no-random', )):
            code, text = run('--checkpoint', f'random={weights}', *more)
            assert code == 2 and 'that of random weights' in text

    def test_the_same_weights_twice(self, run, place, weights):
        copy = place / 'copy.pth'
        shutil.copy(weights, copy)
        code, text = run('--checkpoint', f'a={weights}', f'b={copy}')
        assert code == 2 and '"a" and "b" are the same weights' in text

    def test_weights_that_could_run_code(self, run, place):
        path = place / 'unsafe.pth'
        torch.save(dict(state_dict=TestRows), path)
        code, text = run('--checkpoint', f'a={path}')
        assert code == 2 and 'UnsafeCheckpointError' in text


class TestMessages:

    def test_busy(self, run, place):
        (place / 'out' / 'tiny').mkdir(parents=True)
        with open(place / 'out' / 'tiny' / '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, text = run()
        assert code == 2 and 'Another benchmark is running' in text

    def test_options(self, run):
        code, text = run('--cfg-options', 'randomness.seed=7')
        assert code == 2 and 'use --seeds' in text

    def test_no_place_for_weights(self, run, place):
        path = place / 'seg.py'
        path.write_text(path.read_text().replace('PretrainedBackbone',
                                                 'Other'))
        code, text = run()
        assert code == 2 and text.startswith('KeyError: --pretrained none')

    def test_a_broken_result(self, run, tool, place):
        assert run('--tasks', 'det')[0] == 0
        path = place / 'out/tiny/det/finetune/random/seed0/result.json'
        path.write_text('{')
        code, text = tool('report', place / 'out' / 'tiny')
        assert code == 2 and 'is not valid JSON' in text

    def test_nowhere_to_write(self, run, tool, place):
        assert run('--tasks', 'det')[0] == 0
        code, text = tool('report', place / 'out' / 'tiny', '--out',
                          place / 'tiny.py')
        assert code == 2 and 'FileExistsError' in text
