"""The kernels over logits against float64, under every instruction set, with derived error bounds.

eps is fp32's. An exponential of u carries the rounding of u itself, |u| eps / 2, in any
implementation; sums and the last logarithm add a few eps. The bounds below are those, times small
constants; torch's softmax obeys them too.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrlhf.ops import kl as kl_op
from fastrlhf.ops import logits_kl, logprobs
from fastrlhf.ops import logprob_kernels as logprob_op
from fastrlhf.ops.layouts import SoftmaxStatistic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 3, 123, 252, 507, 511, 513, 2047, 2049, 4100, 50257)
EPS = torch.finfo(torch.float32).eps
ROW_MAX, ROW_SUM = SoftmaxStatistic.ROW_MAX, SoftmaxStatistic.ROW_SUM


def make(
    n: int, v: int, dtype: torch.dtype, shift: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = (torch.randn(1, n, v, generator=g) * 3 + shift).to(dtype)
    return rows, torch.randint(0, v, (n,), generator=g)


def exact(rows: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    x = rows[0].double() / temperature
    logp = torch.log_softmax(x, -1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    return logp.gather(-1, labels[:, None])[:, 0], entropy, torch.logsumexp(x, -1)


def finish(
    cpu: SimpleNamespace, rows: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, ...]:
    stats = cpu.logprob_statistics(rows, labels, None, temperature, 0, rows.shape[-1])
    return logprob_op.finish_statistics(stats, None, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_statistics_are_as_close_to_float64_as_torch(
    cpu: SimpleNamespace, v: int, dtype: torch.dtype
) -> None:
    rows, labels = make(5, v, dtype)
    want = exact(rows, labels)
    x = rows[0].float()
    logp = torch.log_softmax(x, -1)
    theirs = (
        logp.gather(-1, labels[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        torch.logsumexp(x, -1),
    )
    for ours, torchs, truth in zip(finish(cpu, rows, labels), theirs, want, strict=True):
        error, their_error = (ours - truth).abs().max(), (torchs - truth).abs().max()
        assert error <= their_error + 4 * EPS * truth.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shift", "temperature"), [(1e3, 1.0), (-1e3, 1.0), (0.0, 0.7), (1e3, 2.5), (0.0, 1e-3)]
)
def test_statistics_far_from_zero_and_at_other_temperatures(
    cpu: SimpleNamespace, shift: float, temperature: float, dtype: torch.dtype
) -> None:
    rows, labels = make(4, 507, dtype, shift)
    want = exact(rows, labels, temperature)
    for ours, truth in zip(finish(cpu, rows, labels, temperature), want, strict=True):
        assert ((ours - truth).abs() <= 4 * EPS * (truth.abs() + want[1] + 1)).all()


def gradient(
    rows: Tensor, labels: Tensor, grads: tuple[Tensor, ...], temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient in float64 and the bound on the error of fp32 arithmetic, per element."""
    g_lp, g_h, g_lse = (g.double()[:, None] for g in grads)
    logp = torch.log_softmax(rows[0].double() / temperature, -1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1, keepdim=True)
    hit = torch.zeros_like(p).scatter_(1, labels[:, None], 1.0)
    inner = torch.where(p > 0, p * (logp + entropy), 0.0)
    d = (g_lp * (hit - p) + g_lse * p - g_h * inner) / temperature
    size = p * (
        g_lp.abs() + g_lse.abs() + g_h.abs() * (1 + entropy + torch.where(p > 0, logp.abs(), 0.0))
    )
    steps = 4 + torch.where(p > 0, logp.abs(), 0.0)
    return d, (size * steps + hit * g_lp.abs()) * EPS / temperature


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("v", "temperature"), [(1, 1.0), (123, 1.0), (507, 0.7), (513, 1.0), (4100, 2.0), (50257, 1.0)]
)
def test_backward_against_float64_out_of_place_and_in_place(
    cpu: SimpleNamespace, v: int, temperature: float, dtype: torch.dtype
) -> None:
    rows, labels = make(4, v, dtype)
    grads = tuple(torch.randn(4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    stats = cpu.logprob_statistics(rows, labels, None, temperature, 0, v)
    _, entropy, _ = logprob_op.finish_statistics(stats, None, temperature)
    out = torch.full_like(rows, torch.nan)
    arguments = (
        labels,
        None,
        stats[ROW_MAX].clone(),
        stats[ROW_SUM].clone(),
        entropy,
        *grads,
        temperature,
        0,
        v,
    )
    cpu.logprob_backward(rows, *arguments, out)
    want, bound = gradient(rows, labels, grads, temperature)
    ulp = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal * ulp  # half of what rounding to a subnormal loses
    assert ((out[0].double() - want).abs() <= 0.51 * ulp * want.abs() + bound + tiny).all()

    again = rows.clone()
    cpu.logprob_backward(again, *arguments, again)
    assert torch.equal(again, out)


def test_large_outputs_are_the_same_in_place(cpu: SimpleNamespace) -> None:
    # From 1 MiB on, pages are populated before a thread writes its rows; rows of 50,257 begin at
    # any alignment.
    for dtype in DTYPES:
        rows, labels = make(100, 50257, dtype)
        stats = cpu.logprob_statistics(rows, labels, None, 1.0, 0, 50257)
        ones = torch.ones(100)
        arguments = (
            labels,
            None,
            stats[ROW_MAX].clone(),
            stats[ROW_SUM].clone(),
            None,
            ones,
            None,
            None,
            1.0,
            0,
            50257,
        )
        out = torch.empty_like(rows)
        cpu.logprob_backward(rows, *arguments, out)
        cpu.logprob_backward(rows, *arguments, rows)
        assert torch.equal(out, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_never_read(cpu: SimpleNamespace, dtype: torch.dtype) -> None:
    rows, labels = make(6, 252, dtype)
    mask = torch.tensor([True, False, True, False, False, True])
    dirty = rows.clone()
    dirty[0, ~mask] = torch.nan
    dirty[0, 1] = torch.inf
    dirty_labels = torch.where(mask, labels, -100)
    clean = cpu.logprob_statistics(rows, labels, None, 1.0, 0, 252)
    stats = cpu.logprob_statistics(dirty, dirty_labels, mask, 1.0, 0, 252)
    assert torch.equal(stats[:, mask], clean[:, mask])
    assert stats.isfinite().all() and (stats[ROW_SUM] > 0).all()
    out = torch.full_like(rows, 7.0)
    upstream = torch.where(mask, 1.0, torch.nan)
    per_token = (stats[ROW_MAX].clone(), stats[ROW_SUM].clone(), None, upstream, None, None)
    cpu.logprob_backward(dirty, dirty_labels, mask, *per_token, 1.0, 0, 252, out)
    assert (out[0, ~mask] == 0).all() and out.isfinite().all() and out[0, mask].any()

    none = torch.zeros(6, dtype=torch.bool)
    assert cpu.logprob_statistics(dirty, dirty_labels, none, 1.0, 0, 252).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_probability_zero(cpu: SimpleNamespace, dtype: torch.dtype) -> None:
    rows, labels = make(3, 2100, dtype)
    rows[0, :, 5:1500] = -torch.inf
    rows[0, 1, :2048] = -torch.inf  # a full block
    labels = torch.tensor([2, 2099, 10])
    want = exact(rows, labels)
    for temperature in (1.0, 0.5):
        want = exact(rows, labels, temperature)
        ours = finish(cpu, rows, labels, temperature)
        assert ours[0][2] == -torch.inf
        for got, truth in zip(ours, want, strict=True):
            torch.testing.assert_close(got[:2].double(), truth[:2], rtol=8 * EPS, atol=8 * EPS)
        stats = cpu.logprob_statistics(rows, labels, None, temperature, 0, 2100)
        out, g = torch.empty_like(rows), torch.ones(3)
        per_token = (stats[ROW_MAX].clone(), stats[ROW_SUM].clone(), ours[1], g, g, g)
        cpu.logprob_backward(rows, labels, None, *per_token, temperature, 0, 2100, out)
        assert out.isfinite().all() and (out[0, 0, 5:1500] == 0).all()


def test_nan_on_a_row_that_counts_is_not_hidden(cpu: SimpleNamespace) -> None:
    for at in (0, 700, 2100, 2199):
        rows, labels = make(2, 2200, torch.float32)
        rows[0, 0, at] = torch.nan
        stats = cpu.logprob_statistics(rows, labels, None, 1.0, 0, 2200)
        assert stats[:3, 0].isnan().all() and stats[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_padding_and_labels_elsewhere(cpu: SimpleNamespace, dtype: torch.dtype) -> None:
    rows, _ = make(4, 130, dtype)
    rows[..., 100:] = torch.nan  # padding
    labels = torch.tensor([0, 1040, 1099, 1100])  # this shard holds 1000 .. 1099
    stats = cpu.logprob_statistics(rows, labels, None, 1.0, 1000, 100)
    want = logprob_op._statistics_torch(rows, labels, None, 1.0, 1000, 100)
    torch.testing.assert_close(stats, want, rtol=4 * EPS, atol=4 * EPS)
    assert stats[SoftmaxStatistic.TARGET].isinf().tolist() == [True, False, False, True]
    out, g = torch.full_like(rows, 7.0), torch.ones(4)
    cpu.logprob_backward(
        rows,
        labels,
        None,
        stats[ROW_MAX].clone(),
        stats[ROW_SUM].clone(),
        None,
        g,
        None,
        None,
        1.0,
        1000,
        100,
        out,
    )
    assert (out[..., 100:] == 0).all()
    hits = (out[0, :, :100] > 0).nonzero().tolist()
    assert hits == [[1, 40], [2, 99]]

    empty = cpu.logprob_statistics(rows, labels, None, 1.0, 1000, 0)
    assert (
        empty[0].tolist() == [-torch.inf] * 4
        and empty[1:3].eq(0).all()
        and empty[3].tolist() == [-torch.inf] * 4
    )
    assert cpu.logprob_statistics(rows[:, :0], labels[:0], None, 1.0, 0, 100).shape == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_and_written_in_place(
    cpu: SimpleNamespace, dtype: torch.dtype
) -> None:
    whole = make(3 * 8, 140, dtype)[0].view(3, 8, 140)
    view = whole[:, 1:, 3:126]
    labels = torch.randint(0, 123, (21,), generator=torch.Generator().manual_seed(1))
    copy = view.contiguous()
    stats = cpu.logprob_statistics(view, labels, None, 1.0, 0, 123)
    assert torch.equal(stats, cpu.logprob_statistics(copy, labels, None, 1.0, 0, 123))
    per_token = (stats[ROW_MAX].clone(), stats[ROW_SUM].clone(), None, torch.ones(21), None, None)
    want = torch.empty_like(copy)
    cpu.logprob_backward(copy, labels, None, *per_token, 1.0, 0, 123, want)
    untouched = whole.clone()
    cpu.logprob_backward(view, labels, None, *per_token, 1.0, 0, 123, view)
    assert torch.equal(view, want)
    untouched[:, 1:, 3:126] = want
    assert torch.equal(whole, untouched)


def test_offsets_past_two_to_the_31_elements(cpu: SimpleNamespace) -> None:
    far = 2**31 + 11
    store = torch.empty(
        far + 64, dtype=torch.bfloat16
    )  # never touched but at its ends, so never in memory
    rows = store.as_strided((1, 2, 64), (0, far, 1))
    rows.copy_(make(2, 64, torch.bfloat16)[0])
    labels = torch.tensor([3, 60])
    copy = rows.contiguous()
    stats = cpu.logprob_statistics(rows, labels, None, 1.0, 0, 64)
    assert torch.equal(stats, cpu.logprob_statistics(copy, labels, None, 1.0, 0, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("v", "shift", "temperature"), [(1, 0, 1.0), (252, 0, 1.0), (513, 1e3, 1.0), (4100, 0, 0.7)]
)
def test_kl_and_its_gradients_against_float64(
    cpu: SimpleNamespace, v: int, shift: float, temperature: float, dtype: torch.dtype
) -> None:
    rows, ref = make(4, v, dtype, shift)[0], make(4, v, dtype, seed=1)[0]
    if v > 100:
        rows[0, 0, 3:60] = -torch.inf
        ref[0, 0, 3:40] = -torch.inf
    stats = cpu.logits_kl_statistics(rows, ref, None, temperature, v)
    ours = kl_op._finish(stats, None, temperature)
    x, y = (t.double().requires_grad_() for t in (rows, ref))
    truth = kl_op.logits_kl_ref(x, y, temperature=temperature)[0]
    scale = (abs(shift) / temperature + 30 / temperature + 10) * EPS  # of the terms that cancel
    assert ((ours - truth).abs() <= 4 * scale).all()

    g = torch.randn(4, generator=torch.Generator().manual_seed(2))
    logp, logq = (torch.log_softmax(t.detach()[0] / temperature, -1) for t in (x, y))
    p, q, kl = logp.exp(), logq.exp(), truth.detach()[:, None]
    want = torch.where(p > 0, p * (logp - logq - kl), 0.0) * g[:, None] / temperature
    want_ref = (q - p) * g[:, None] / temperature
    out, ref_out = torch.empty_like(rows), torch.empty_like(ref)
    cpu.logits_kl_backward(rows, ref, None, stats, ours, g, temperature, v, out, ref_out)
    ulp, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    size = g.abs()[:, None] / temperature
    assert ((out[0] - want).abs() <= 0.51 * ulp * want.abs() + 20 * scale * p * size + tiny).all()
    bound_ref = 0.51 * ulp * want_ref.abs() + 8 * EPS * (40 / temperature) * (p + q) * size + tiny
    assert ((ref_out[0] - want_ref).abs() <= bound_ref).all()

    only, only_ref = torch.empty_like(out), torch.empty_like(out)
    cpu.logits_kl_backward(rows, ref, None, stats, ours, g, temperature, v, only, None)
    cpu.logits_kl_backward(rows, ref, None, stats, ours, g, temperature, v, None, only_ref)
    assert torch.equal(only, out) and torch.equal(only_ref, ref_out)


def test_kl_masks_padding_and_strides(cpu: SimpleNamespace) -> None:
    x, y = (make(12, 90, torch.float32, seed=k)[0].view(2, 6, 90)[:, :-1] for k in (0, 1))
    mask = torch.arange(10) % 3 > 0
    x, y = x.clone(), y[:, :, :]
    x.view(10, 90)[~mask] = torch.nan
    x[..., 80:] = torch.nan
    stats = cpu.logits_kl_statistics(x, y, mask, 1.0, 80)
    kl = kl_op._finish(stats, mask, 1.0)
    want = kl_op.logits_kl_ref(
        x[..., :80].double(), y[..., :80].double(), mask.view(2, 5)
    ).flatten()
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-5)
    out, ref_out = torch.full_like(x, 7.0), torch.full_like(y, 7.0)
    g = torch.where(mask, 1.0, torch.nan)
    cpu.logits_kl_backward(x, y, mask, stats, kl, g, 1.0, 80, out, ref_out)
    for t in (out, ref_out):
        assert (
            t.isfinite().all()
            and (t[..., 80:] == 0).all()
            and (t.reshape(10, 90)[~mask] == 0).all()
            and t.any()
        )


def test_one_thread_and_two_give_the_same_bits(cpu: SimpleNamespace, two_threads: None) -> None:
    rows, ref = make(64, 5003, torch.bfloat16)[0], make(64, 5003, torch.bfloat16, seed=1)[0]
    labels, mask = torch.arange(64), torch.arange(64) % 5 > 0

    def everything() -> list[Tensor]:
        stats = cpu.logprob_statistics(rows, labels, mask, 1.0, 0, 5003)
        kl_stats = cpu.logits_kl_statistics(rows, ref, mask, 1.0, 5003)
        g, out, kl_out = torch.ones(64), torch.empty_like(rows), torch.empty_like(rows)
        cpu.logprob_backward(
            rows,
            labels,
            mask,
            stats[ROW_MAX].clone(),
            stats[ROW_SUM].clone(),
            g,
            g,
            g,
            g,
            1.0,
            0,
            5003,
            out,
        )
        cpu.logits_kl_backward(rows, ref, mask, kl_stats, g, g, 1.0, 5003, kl_out, None)
        return [stats, kl_stats, out, kl_out]

    two = everything()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(two, everything(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_public_ops(isa: str, dtype: torch.dtype) -> None:
    base = make(2 * 6, 507, dtype)[0].view(2, 6, 507)
    labels = torch.randint(0, 500, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    results = {}
    for backend in ("cpu", "torch"):
        leaf = base.clone().requires_grad_()
        out = logprobs(
            leaf[:, :-1],
            labels,
            mask=mask,
            temperature=0.8,
            with_entropy=True,
            vocab_size=500,
            backend=backend,
        )
        assert out.entropy is not None
        kl = logits_kl(leaf[:, :-1], base[:, :-1] * 0.5, mask=mask, vocab_size=500, backend=backend)
        (out.logprobs.sum() + 2 * out.entropy.sum() - out.logsumexp.sum() + kl.sum()).backward()
        results[backend] = [
            out.logprobs.detach(),
            out.entropy.detach(),
            out.logsumexp.detach(),
            kl.detach(),
            leaf.grad,
        ]
    tolerance = max(3 * torch.finfo(dtype).eps, 64 * EPS)
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert ours.isfinite().all()


def test_unknown_instruction_set_is_refused(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRLHF_CPU_ISA", "mmx")
    with pytest.raises(
        RuntimeError, match=r"FASTRLHF_CPU_ISA=mmx: this build on this CPU has .*default"
    ):
        torch.ops.fastrlhf_cpu.isa()


def test_a_bad_call_is_refused(built: None) -> None:
    rows = torch.zeros(1, 2, 8)
    with pytest.raises(RuntimeError, match="contiguous per-token tensor of 2"):
        torch.ops.fastrlhf_cpu.logprob_statistics(
            rows, torch.zeros(3, dtype=torch.long), None, 1.0, 0, 8
        )
    with pytest.raises(RuntimeError, match="fp32, bf16 or fp16"):
        torch.ops.fastrlhf_cpu.logprob_statistics(
            rows.double(), torch.zeros(2, dtype=torch.long), None, 1.0, 0, 8
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [3, 100, 5000])
def test_softcap(cpu: SimpleNamespace, columns: int, dtype: torch.dtype) -> None:
    """Near 0, where the series is, in the middle, and saturated."""
    rows = (torch.randn(1, 4, columns) * torch.tensor([0.1, 1.0, 20.0, 300.0])[:, None]).to(dtype)
    labels = torch.arange(4) % columns
    options = (0.8, 0, columns)
    stats = cpu.logprob_statistics(rows, labels, None, *options, 5.0)
    exact = logprob_op._statistics_torch(rows.double(), labels, None, *options, 5.0)
    # a capped logit of at most 5 / 0.8 carries a few roundings into each exponential
    torch.testing.assert_close(stats.double(), exact, rtol=2e-6, atol=4e-6)
    out, wanted = torch.empty_like(rows), torch.empty(rows.shape, dtype=torch.float64)
    upstream = [torch.randn(4) for _ in range(3)]
    entropy = (exact[1].log() - exact[2] / exact[1]).float()
    saved = (stats[0].contiguous(), stats[1].contiguous(), entropy)
    cpu.logprob_backward(rows, labels, None, *saved, *upstream, *options, out, 5.0)
    wide = logprob_op.SavedRow(*(t.double() for t in saved))
    grads = logprob_op.TokenGrads(*(t.double() for t in upstream))
    logprob_op._backward_torch(rows.double(), labels, None, wide, grads, *options, wanted, 5.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, rtol=2 * eps + 4e-6, atol=4e-6)
