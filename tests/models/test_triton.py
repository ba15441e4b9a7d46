# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The Triton kernel: on a GPU, else in Triton's interpreter on the CPU."""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from mmdensecl.models.modules import l2_normalize

triton = pytest.importorskip('triton', reason='Triton is on Linux only')
from mmdensecl.models.losses import queue_statistics_triton as module  # noqa

ON_GPU = torch.cuda.is_available()
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [
    FLOAT32, FLOAT16,
    pytest.param(
        BFLOAT16,
        marks=pytest.mark.skipif(
            not ON_GPU,
            reason="Triton's interpreter multiplies the bits of bfloat16 as "
            'if they were integers'))
]
# Queries, channels and keys: fewer than a block of each; a block of each;
# several, the last one short; several blocks of channels and a short one.
SIZES = [(1, 1, 1), (5, 8, 7), (64, 32, 64), (300, 128, 200), (33, 96, 65),
         (130, 200, 100), (64, 256, 130)]


def mend_interpreter():
    """Let Triton 3.6 loop under numpy 2.4, like triton-lang/triton#9172.

    The bound of a loop is an array of one number to the interpreter, and
    numpy no longer makes an int of that.
    """
    from triton.runtime import interpreter
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, '__index__',
                       lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


@pytest.fixture(scope='module')
def queue_statistics():
    """The function under test, from and to tensors on the CPU."""
    if ON_GPU:

        def on_gpu(query, queue, with_mean=True):
            result = module.queue_statistics_triton(query.cuda(), queue.cuda(),
                                                    with_mean)
            return [None if part is None else part.cpu() for part in result]

        yield on_gpu
        return

    # Triton reads the variable when it is imported, for good: a process of
    # its own, which other tests do not notice.
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(
            1, multiprocessing.get_context('spawn'), mend_interpreter) as pool:
        patch.setenv('TRITON_INTERPRET', '1')

        def interpreted(query, queue, with_mean=True):
            return pool.submit(module.queue_statistics_triton, query, queue,
                               with_mean).result()

        yield interpreted


def expected_statistics(query, queue):
    """Row by row as the docstring says it, in float64."""
    queue = queue.double()
    peaks, totals, means = [], [], []
    for row in query.double():
        logits = torch.stack([(row * key).sum() for key in queue])
        weights = torch.exp(logits - logits.max())
        peaks.append(logits.max())
        totals.append(weights.sum())
        means.append((weights[:, None] * queue).sum(dim=0))
    return torch.stack(peaks), torch.stack(totals), torch.stack(means)


def random_input(num_rows, channels, queue_len, dtype, temperature=0.2):
    query = l2_normalize(torch.randn(num_rows, channels)) / temperature
    queue = l2_normalize(torch.randn(queue_len, channels))
    return query.to(dtype), queue.to(dtype)


def check(result, query, queue, tolerance=1e-5):
    peak, total, mean = result
    assert {part.dtype for part in result} == {FLOAT32}
    right_peak, right_total, right_mean = expected_statistics(query, queue)
    torch.testing.assert_close(
        peak.double(), right_peak, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        total.double(), right_total, rtol=tolerance, atol=0)
    # No weight of half-precision input is off by more than half a step.
    rounding = 0 if query.dtype == FLOAT32 else torch.finfo(query.dtype).eps
    torch.testing.assert_close(
        mean.double() / right_total[:, None],
        right_mean / right_total[:, None],
        rtol=0,
        atol=tolerance + rounding / 2 * queue.abs().max().item())


class TestStatistics:

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    @pytest.mark.parametrize('size', SIZES, ids=str)
    def test_against_loop(self, queue_statistics, size, dtype):
        query, queue = random_input(*size, dtype)
        check(queue_statistics(query, queue), query, queue)

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_without_mean(self, queue_statistics, dtype):
        query, queue = random_input(33, 40, 150, dtype)
        peak, total, mean = queue_statistics(query, queue, with_mean=False)
        assert mean is None
        torch.testing.assert_close(
            peak.double() + total.double().log(),
            torch.logsumexp(query.double() @ queue.double().t(), dim=1),
            rtol=1e-5,
            atol=1e-5)

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_large_logits(self, queue_statistics, dtype):
        """Up to 100: whoever does not subtract the peak first overflows."""
        query, queue = random_input(5, 64, 150, dtype, temperature=0.01)
        queue[120] = query[2] / 100
        result = queue_statistics(query, queue)
        assert result[0].max() > 99
        # One rounding of a logit of 100 moves its weight by 8e-6.
        check(result, query, queue, tolerance=1e-4)

    @pytest.mark.parametrize('hot', [0, 63, 64, 149])
    def test_hot_key(self, queue_statistics, hot):
        """The peak in the first block, the last one, another split."""
        query, queue = random_input(4, 16, 150, FLOAT32)
        queue[hot] = 5 * query[0]
        check(queue_statistics(query, queue), query, queue, tolerance=1e-4)

    def test_equal_rows(self, queue_statistics):
        row = torch.tensor([0.5, -0.25, 1.])
        peak, total, mean = queue_statistics(
            row.expand(3, -1), row.expand(100, -1))
        assert peak.tolist() == [1.3125] * 3
        assert total.tolist() == [100.] * 3
        assert mean.tolist() == [[50., -25., 100.]] * 3

    def test_strided_query(self, queue_statistics):
        query, queue = random_input(6, 12, 70, FLOAT32)
        check(
            queue_statistics(query.t().contiguous().t(), queue), query, queue)

    def test_nan_is_seen(self, queue_statistics):
        """In the row that holds one; with a bad key, in all rows."""
        query, queue = random_input(5, 8, 150, FLOAT32)
        query[1, 3] = torch.nan
        _, total, _ = queue_statistics(query, queue)
        assert total.isnan().tolist() == [False, True, False, False, False]
        queue[140, 0] = torch.nan
        _, total, _ = queue_statistics(query, queue)
        assert total.isnan().all()


class TestArguments:

    @pytest.mark.parametrize('types', [(FLOAT32, FLOAT16),
                                       (torch.float64, torch.float64)])
    def test_types(self, types):
        with pytest.raises(ValueError, match=f'got {types[0]} and {types[1]}'):
            module.queue_statistics_triton(
                torch.ones(2, 4, dtype=types[0]),
                torch.ones(3, 4, dtype=types[1]), True)

    @pytest.mark.parametrize('channels', [(4, 5), (257, 257)])
    def test_channels(self, channels):
        with pytest.raises(ValueError, match=rf'got \(2, {channels[0]}\)'):
            module.queue_statistics_triton(
                torch.ones(2, channels[0]), torch.ones(3, channels[1]), True)


@pytest.mark.parametrize('matmul, expected', [
    (dict(allow_tf32=False), 'ieee'),
    (dict(allow_tf32=True), 'tf32'),
    (dict(fp32_precision='none'), 'ieee'),
    (dict(fp32_precision='ieee'), 'ieee'),
    (dict(fp32_precision='tf32'), 'tf32'),
])
def test_float32_precision(monkeypatch, matmul, expected):
    """Each torch has one of the two settings that can always be read."""
    monkeypatch.setattr(torch.backends.cuda, 'matmul',
                        SimpleNamespace(**matmul))
    assert module.float32_precision() == expected


@pytest.mark.parametrize(
    'row_blocks, queue_blocks, max_splits, expected',
    [
        # 260 programs in 264 slots; 21 splits would take a second round.
        (13, 1024, 41, 52),
        # 490 programs are nearer to two rounds than 98, 196, 294 or 392.
        (98, 1024, 5, 205),
        # One block of queries has all slots for itself.
        (1, 1024, 2048, 4),
        # No more splits than blocks.
        (1, 3, 2048, 1),
        # Too many queries for a second partial mean.
        (1000, 1024, 0, 1024),
    ])
def test_split_length(row_blocks, queue_blocks, max_splits, expected):
    length = module.split_length(row_blocks, queue_blocks, 264, max_splits)
    assert length == expected


@pytest.mark.slow
@pytest.mark.parametrize('architecture', [80, 90])
@pytest.mark.parametrize(
    'dtype, channels', [(FLOAT32, 128), (BFLOAT16, 128), (BFLOAT16, 256)],
    ids=str)
def test_compiles(dtype, channels, architecture, monkeypatch, tmp_path,
                  capsys):
    """To machine code, without a GPU, with nothing spilled."""
    # The compiler's interface is not the same in older ones.
    pytest.importorskip('triton', minversion='3.6')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    if not isinstance(module.partial_statistics, triton.JITFunction):
        pytest.skip('TRITON_INTERPRET is set')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('TRITON_DUMP_PTXAS_LOG', '1')
    sizes = module.block_sizes(dtype, 1568, channels)
    options = {key: sizes.pop(key) for key in ('num_warps', 'num_stages')}
    constants = dict(sizes, D=channels, WITH_MEAN=True, PRECISION='ieee')
    names = module.partial_statistics.arg_names
    pointer = {FLOAT32: '*fp32', BFLOAT16: '*bf16'}[dtype]
    signature = {
        **dict.fromkeys(names, 'i32'), 'query_ptr': pointer,
        'queue_ptr': pointer,
        'peak_ptr': '*fp32',
        'total_ptr': '*fp32',
        'mean_ptr': '*fp32',
        **dict.fromkeys(constants, 'constexpr')
    }
    # As a launch finds it: PyTorch aligns the tensors.
    aligned = {
        (i, ): [['tt.divisibility', 16]]
        for i, name in enumerate(names) if name.endswith('_ptr')
    }
    kernel = triton.compile(
        ASTSource(module.partial_statistics, signature, constants, aligned),
        target=GPUTarget('cuda', architecture, 32),
        options=options)
    assert kernel.asm['cubin'].startswith(b'\x7fELF')
    assert kernel.metadata.shared <= 99 * 1024
    log = capsys.readouterr().out
    assert '0 bytes spill stores, 0 bytes spill loads' in log
