from __future__ import annotations

import math
import os

import pytest
import torch

from fastrlhf.ops import logprobs
from fastrlhf.ops.logprob import logprobs_ref
from fastrlhf.ops.rows import as_rows

# half a unit in the last place of each dtype's results, relative, and its smallest subnormal
ROUNDING = {
    torch.float32: (2**-24, 2**-149),
    torch.bfloat16: (2**-9, 2**-133),
    torch.float16: (2**-12, 2**-24),
}
if (
    os.environ.get("TRITON_INTERPRET") == "1"
):  # the interpreter truncates to bf16 where a GPU rounds to nearest
    ROUNDING[torch.bfloat16] = (2**-8, 2**-133)


def value_bound(exact: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return the error of exponentials good to a few ulp, log2(V) partial sums and a log."""
    size = exact.double().abs().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return 2**-21 + math.log2(vocab + 1) * 2**-23 + 2**-22 * size


def make(shape, vocab, dtype, device, scale=4.0):
    logits = (scale * torch.randn(*shape, vocab)).to(dtype).to(device).requires_grad_()
    return logits, torch.randint(0, vocab, shape).to(device)


def run(function, logits, labels, upstream, **options):
    out = function(logits, labels, **options)
    tensors = [t for t in (out.logprobs, out.entropy, out.logsumexp, out.kl) if t is not None]
    (grad,) = torch.autograd.grad(
        [*tensors], [logits], [u.to(t.dtype) for u, t in zip(upstream, tensors, strict=True)]
    )
    return tensors, grad


def check(logits, labels, backend, within, temperature=1.0, mask=None, ref=None):
    upstream = [
        torch.randn(labels.shape, device=labels.device) for _ in range(3 if ref is None else 4)
    ]
    shared = {"temperature": temperature, "mask": mask}
    exact_ref = None if ref is None else ref.double()
    exact_in = logits.detach().double().requires_grad_()
    exact, exact_grad = run(
        logprobs_ref, exact_in, labels, upstream, ref_logprobs=exact_ref, **shared
    )
    torchs, torch_grad = run(logprobs_ref, logits, labels, upstream, ref_logprobs=ref, **shared)
    ours, grad = run(
        logprobs,
        logits,
        labels,
        upstream,
        ref_logprobs=ref,
        with_entropy=True,
        backend=backend,
        **shared,
    )
    assert all(t.dtype == torch.float32 for t in ours) and grad.dtype == logits.dtype
    for a, b, c in zip(ours, exact, torchs, strict=True):
        within(a, b, c, value_bound(b.cpu(), logits.shape[-1]))
    largest = sum(float(u.abs().max()) for u in upstream)
    bound = 2**-19 * largest / temperature + ROUNDING[logits.dtype][0] * exact_grad.cpu().abs()
    within(grad, exact_grad, torch_grad, bound + ROUNDING[logits.dtype][1])
    return ours, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 123, 252, 507, 4095, 4096, 4097])
def test_values_and_gradients_against_float64(vocab, dtype, backend, device, within):
    logits, labels = make((2, 3), vocab, dtype, device)
    check(logits, labels, backend, within, temperature=0.7, mask=torch.rand(2, 3).to(device) > 0.3)


@pytest.mark.parametrize("vocab", [50257, 128256, 151936])
def test_real_vocabularies(vocab, backend, device, within):
    logits, labels = make((2,), vocab, torch.bfloat16, device)
    check(logits, labels, backend, within)


@pytest.mark.parametrize("shift", [1e3, -1e3])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_shift_changes_only_the_logsumexp(shift, temperature, backend, device, within):
    logits, labels = make((4,), 507, torch.float32, device)
    shifted = (
        logits.detach() + shift
    ).requires_grad_()  # rounding happens here, and float64 sees the same numbers
    check(shifted, labels, backend, within, temperature=temperature)


def test_kl_and_its_gradients(backend, device, within):
    logits, labels = make((3, 2), 123, torch.float32, device)
    ref = torch.randn(3, 2, device=device)
    check(
        logits,
        labels,
        backend,
        within,
        ref=ref,
        mask=torch.tensor([[1, 0], [1, 1], [0, 1]], device=device).bool(),
    )
    ref.requires_grad_()
    mask = torch.tensor([[True, False], [True, True], [False, True]], device=device)
    out = logprobs(logits, labels, ref_logprobs=ref, mask=mask, backend=backend)
    (grad,) = torch.autograd.grad(out.kl.sum(), ref)
    assert torch.equal(grad, -mask.float())
    assert torch.equal(out.kl, torch.where(mask, out.logprobs - ref, 0.0))


def test_golden(backend, device):
    """softmax of log(1, 2, 5) is (1, 2, 5) / 8."""
    logits = torch.tensor([[1.0, 2.0, 5.0]], device=device).log().requires_grad_()
    out = logprobs(logits, torch.tensor([1], device=device), with_entropy=True, backend=backend)
    assert out.logprobs.item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert out.logsumexp.item() == pytest.approx(math.log(8), abs=1e-6)
    entropy = -sum(p * math.log(p) for p in (0.125, 0.25, 0.625))
    assert out.entropy.item() == pytest.approx(entropy, abs=1e-6)
    out.logprobs.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.125, 0.75, -0.625], abs=1e-6)


def test_minus_infinity_logits(backend, device, within):
    """A forbidden token has probability 0: it adds nothing to the entropy and gets no gradient."""
    logits, labels = make((3,), 123, torch.float32, device)
    with torch.no_grad():
        logits[:, ::3] = -torch.inf
    labels = torch.tensor([1, 2, 4], device=device)
    _, grad = check(logits, labels, backend, within)
    assert bool((grad[:, ::3] == 0).all())
    out = logprobs(
        logits, torch.tensor([0, 3, 1], device=device), with_entropy=True, backend=backend
    )
    assert out.logprobs[:2].tolist() == [-math.inf, -math.inf] and bool(
        out.entropy.isfinite().all()
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_leaks_from_under_the_mask(poison, backend, device):
    logits, labels = make((4, 3), 252, torch.bfloat16, device)
    mask = torch.rand(4, 3).to(device) > 0.5
    with torch.no_grad():
        logits[~mask] = poison
    labels = torch.where(mask, labels, -100)
    ref = torch.where(mask, torch.zeros(4, 3, device=device), torch.nan)
    out = logprobs(logits, labels, mask=mask, with_entropy=True, ref_logprobs=ref, backend=backend)
    upstream = torch.where(mask, 1.0, torch.nan)
    (grad,) = torch.autograd.grad(list(out), logits, [upstream] * 4)
    for t in out:
        assert bool((t[~mask] == 0).all()) and bool(t[mask].isfinite().all())
    assert bool((grad[~mask] == 0).all()) and bool(grad[mask].isfinite().all())


@pytest.mark.parametrize("column", [0, 40, 122])
def test_a_nan_logit_shows(column, backend, device):
    """Maxima and bounds inside the kernels skip NaN; the results must not."""
    logits, labels = make((2,), 123, torch.float32, device)
    with torch.no_grad():
        logits[0, column] = torch.nan
    out = logprobs(logits, labels, with_entropy=True, backend=backend)
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), logits)
    for result in (*out[:3], grad):
        assert bool(result[0].isnan().all()) and bool(result[1].isfinite().all())


def test_all_rows_masked_and_no_rows(backend, device):
    logits, _ = make((4,), 17, torch.float32, device)
    bad = torch.full((4,), -100, device=device)
    none = torch.zeros(4, dtype=torch.bool, device=device)
    out = logprobs(logits, bad, mask=none, with_entropy=True, backend=backend)
    out.logprobs.sum().backward()
    assert not any(bool(t.any()) for t in (out.logprobs, out.entropy, out.logsumexp, logits.grad))
    empty = torch.zeros(0, 17, device=device, requires_grad=True)
    out = logprobs(empty, torch.zeros(0, dtype=torch.long, device=device), backend=backend)
    out.logprobs.sum().backward()
    assert out.logprobs.shape == (0,) and empty.grad.shape == (0, 17)


def test_padded_columns_are_excluded(backend, device):
    logits, labels = make((5,), 200, torch.float32, device)
    padded = torch.cat(
        [logits.detach(), torch.full((5, 56), 1e4, device=device)], -1
    ).requires_grad_()
    a = logprobs(logits, labels, with_entropy=True, backend=backend)
    b = logprobs(padded, labels, with_entropy=True, vocab_size=200, backend=backend)
    torch.testing.assert_close(a[:3], b[:3], rtol=0, atol=2**-20)
    a.logprobs.sum().backward()
    b.logprobs.sum().backward()
    torch.testing.assert_close(logits.grad, padded.grad[:, :200], rtol=0, atol=2**-20)
    assert not bool(padded.grad[:, 200:].any())


def test_a_label_outside_the_vocabulary_is_minus_infinity(backend, device):
    logits, _ = make((3,), 17, torch.float32, device)
    out = logprobs(
        logits, torch.tensor([-1, 16, 17], device=device), vocab_size=16, backend=backend
    )
    assert out.logprobs.tolist() == [-math.inf] * 3


def test_strided_views_are_not_copied(backend, device, within):
    """logits[:, :-1], a column slice, and a sequence-first tensor seen batch-first."""
    for vocab in (64, 123):
        base = torch.randn(3, 5, vocab + 7, device=device)
        for view in (
            base[:, :-1, :vocab],
            base[:, 1:, 3 : vocab + 3],
            base.transpose(0, 1)[..., :vocab],
        ):
            logits = view.detach().requires_grad_()
            labels = torch.randint(0, vocab, logits.shape[:-1], device=device)
            assert (
                as_rows(logits).data_ptr() == logits.data_ptr()
                and as_rows(logits).stride() == view.stride()
            )
            out = logprobs(view, labels, backend=backend)
            dense = logprobs(view.contiguous(), labels, backend=backend)
            torch.testing.assert_close(out.logprobs, dense.logprobs, rtol=0, atol=2**-20)
            check(logits, labels, backend, within)


def test_four_dimensions_broadcast_and_strided_last(backend, device, within):
    logits, labels = make((2, 2, 3), 31, torch.float32, device)
    check(logits.transpose(0, 1).detach().requires_grad_(), labels, backend, within)
    one = torch.randn(1, 31, device=device).expand(4, 31).detach().requires_grad_()
    check(one, labels.view(-1)[:4], backend, within)
    turned = torch.randn(31, 4, device=device).T.detach().requires_grad_()
    check(turned, labels.view(-1)[:4], backend, within)


def test_retain_graph_and_partial_upstream(backend, device):
    logits, labels = make((4,), 123, torch.float32, device)
    out = logprobs(logits, labels, with_entropy=True, backend=backend)
    before = logits.detach().clone()
    (first,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    (again,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    (entropy,) = torch.autograd.grad(out.entropy.sum(), logits)
    assert torch.equal(first, again) and torch.equal(before, logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(logprobs_ref(exact, labels).entropy.sum(), exact)
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=2**-20)


def test_inplace_backward_writes_the_gradient_over_the_logits(backend, device):
    leaf, labels = make((2, 4), 123, torch.float32, device)
    (expected,) = torch.autograd.grad(
        logprobs(leaf * 2, labels, backend=backend).logprobs.sum(), leaf
    )
    logits = leaf * 2
    out = logprobs(logits, labels, inplace_backward=True, backend=backend)
    address = logits.data_ptr()
    (grad_logits,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    assert grad_logits.data_ptr() == address
    torch.testing.assert_close(2 * grad_logits, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()


def test_inplace_backward_never_overwrites_a_leaf(backend, device):
    leaf, labels = make((4,), 123, torch.float32, device)
    before = leaf.detach().clone()
    logprobs(leaf, labels, inplace_backward=True, backend=backend).logprobs.sum().backward()
    assert torch.equal(leaf, before)


def test_gradcheck(torch_only):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    ref = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def op(x, r):
        return tuple(
            logprobs(
                x,
                labels,
                temperature=0.6,
                mask=mask,
                with_entropy=True,
                ref_logprobs=r,
                vocab_size=6,
            )
        )

    labels.clamp_(max=5)
    assert torch.autograd.gradcheck(op, (logits, ref))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(2, 3, dtype=torch.int64)},
            r"logits: got int64\[2, 3\] on cpu, expected a float32",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"labels: got int64\[3\] on cpu, expected an integer tensor",
        ),
        ({"labels": torch.zeros(2)}, r"labels: got float32\[2\]"),
        (
            {"mask": torch.ones(2, dtype=torch.int64)},
            r"mask: got int64\[2\] on cpu, expected a bool tensor",
        ),
        ({"ref_logprobs": torch.zeros(2, 1)}, r"ref_logprobs: got float32\[2, 1\]"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        ({"backend": "rocm"}, "backend: got 'rocm', expected one of"),
        ({"vocab_start": -1}, "vocab_start: got -1"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
    ],
)
def test_mistakes_are_named(change, message, torch_only):
    arguments = {"logits": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        logprobs(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_offsets_past_2_to_the_31(backend, device, within):
    """Two rows are 2.17e9 elements apart; only their pages of the 4 GiB are ever touched."""
    vocab, distance = 1000, 16_900 * 128_256
    store = torch.empty(distance + vocab, dtype=torch.bfloat16, device=device)
    rows = store.as_strided((2, vocab), (distance, 1))
    rows.copy_(torch.randn(2, vocab))
    labels = torch.tensor([3, 997], device=device)
    ours = logprobs(rows, labels, with_entropy=True, backend=backend)
    exact = logprobs_ref(rows.double(), labels)
    for a, b in zip(ours[:3], exact[:3], strict=True):
        within(a, b, b, value_bound(b.cpu(), vocab))


def test_masked_rows_are_not_even_read_for_their_labels(backend, device):
    """Labels far outside the row, under the mask: reading there would fail or give NaN."""
    logits, labels = make((3,), 50, torch.float32, device)
    mask = torch.tensor([True, False, True], device=device)
    labels[1] = 2**62
    out = logprobs(logits, labels, mask=mask, backend=backend)
    out.logprobs.sum().backward()
    assert out.logprobs[1] == 0 and not bool(logits.grad[1].any())
