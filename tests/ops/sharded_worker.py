"""One of four gloo ranks: every op that takes a group, against the unsharded vocabulary.

The groups have 2, 3 and 4 ranks. test_sharded.py runs
`python sharded_worker.py RANK STORE_FILE OUT_FILE`, which writes {check: error or null} as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist

from fastrlhf.ops import (
    linear_chunks,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    logits_kl,
    logprobs,
    masked_mean,
    masked_whiten,
)

VOCAB, HIDDEN, SHAPE = 53, 7, (2, 6)  # 53 divides by no group size


class Shard:
    """This rank's columns of the vocabulary: uneven, or even with padding past the true size."""

    def __init__(self, group: dist.ProcessGroup, padded: bool) -> None:
        size, rank = group.size(), group.rank()
        self.group = group
        if padded:
            # every shard is 20 wider than the widest: the last ones hold padding, some only that
            width = -(-VOCAB // size) + 20
            self.start, self.width = rank * width, width
            self.options = {"group": group, "vocab_size": VOCAB}
        else:
            edges = [VOCAB * i // size - (i % size > 0) for i in range(size + 1)]
            self.start, self.width = edges[rank], edges[rank + 1] - edges[rank]
            self.options = {"group": group, "vocab_start": self.start}

    def cut(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        columns = whole.movedim(dim, 0)[self.start : self.start + self.width]
        padding = columns.new_full((self.width - columns.shape[0], *columns.shape[1:]), 77.0)
        return torch.cat([columns, padding]).movedim(0, dim).contiguous()


def same_bits_everywhere(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    everyone = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(everyone, x.detach().contiguous(), group=group)
    assert all(torch.equal(x, other) for other in everyone), "ranks disagree"


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def padding_has_no_gradient(grad: torch.Tensor, shard: Shard, dim: int) -> None:
    real = max(0, min(shard.width, VOCAB - shard.start))
    assert not bool(grad.movedim(dim, 0)[real:].any()), "padding got a gradient"


def data() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(*SHAPE, HIDDEN, generator=g)
    mask = torch.rand(SHAPE, generator=g) > 0.25
    labels = torch.randint(0, VOCAB, SHAPE, generator=g)
    return {
        "logits": 5 * torch.randn(*SHAPE, VOCAB, generator=g),
        "other": torch.randn(*SHAPE, VOCAB, generator=g),
        "hidden": hidden.masked_fill(~mask[..., None], torch.nan),
        "weight": torch.randn(VOCAB, HIDDEN, generator=g),
        "bias": torch.randn(VOCAB, generator=g),
        "labels": torch.where(mask, labels, -100),
        "mask": mask,
        "old": torch.randn(SHAPE, generator=g) - 4,
        "advantages": torch.randn(SHAPE, generator=g),
        "upstream": torch.randn(4, *SHAPE, generator=g),
        "ref": torch.randn(SHAPE, generator=g),
    }


def check_logprobs(shard: Shard, dtype: torch.dtype, shift: float) -> None:
    d = data()
    logits = (d["logits"] + shift).to(dtype)
    options = {
        "mask": d["mask"],
        "temperature": 0.7,
        "with_entropy": True,
        "ref_logprobs": d["ref"],
    }
    whole, mine = logits.clone().requires_grad_(), shard.cut(logits, -1).requires_grad_()
    expected, ours = (
        logprobs(whole, d["labels"], **options),
        logprobs(mine, d["labels"], **options, **shard.options),
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 + abs(shift) * 1e-7, atol=4e-6)
        same_bits_everywhere(a, shard.group)
    (expected_grad,) = torch.autograd.grad(list(expected), whole, list(d["upstream"]))
    (grad,) = torch.autograd.grad(list(ours), mine, list(d["upstream"]))
    real = max(0, min(shard.width, VOCAB - shard.start))
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 4e-6}
    )
    torch.testing.assert_close(
        grad[..., :real], shard.cut(expected_grad, -1)[..., :real], **tolerance
    )
    padding_has_no_gradient(grad, shard, -1)


def check_forbidden_tokens(shard: Shard) -> None:
    """Check that a shard whose logits are all -inf does not affect the others."""
    d = data()
    d["logits"][..., :30] = -torch.inf
    labels = d["labels"].clamp(min=40)
    expected = logprobs(d["logits"], labels, with_entropy=True)
    ours = logprobs(shard.cut(d["logits"], -1), labels, with_entropy=True, **shard.options)
    for a, b in zip(ours[:3], expected[:3], strict=True):
        close(a, b)


def check_logits_kl(shard: Shard) -> None:
    d = data()
    whole = [d[k].clone().requires_grad_() for k in ("logits", "other")]
    mine = [shard.cut(d[k], -1).requires_grad_() for k in ("logits", "other")]
    expected = logits_kl(*whole, mask=d["mask"], temperature=1.2)
    ours = logits_kl(*mine, mask=d["mask"], temperature=1.2, **shard.options)
    close(ours, expected)
    same_bits_everywhere(ours, shard.group)
    expected_grads = torch.autograd.grad(expected, whole, d["upstream"][0])
    real = max(0, min(shard.width, VOCAB - shard.start))
    for grad, wanted in zip(
        torch.autograd.grad(ours, mine, d["upstream"][0]), expected_grads, strict=True
    ):
        close(grad[..., :real], shard.cut(wanted, -1)[..., :real])
        padding_has_no_gradient(grad, shard, -1)


def check_linear(shard: Shard, call: Callable[..., torch.Tensor]) -> None:
    """Check a scalar `call(hidden, weight, bias, data, **options)`.

    dH must be that of the unsharded head, dW and db the shard's part.
    """
    d = data()
    whole = [d[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    mine = [d["hidden"].clone(), shard.cut(d["weight"], 0), shard.cut(d["bias"], 0)]
    mine = [t.requires_grad_() for t in mine]
    expected, ours = call(*whole, d), call(*mine, d, **shard.options)
    close(ours, expected)
    same_bits_everywhere(ours, shard.group)
    wanted, grads = torch.autograd.grad(expected, whole), torch.autograd.grad(ours, mine)
    close(grads[0], wanted[0])
    real = max(0, min(shard.width, VOCAB - shard.start))
    for grad, full in zip(grads[1:], wanted[1:], strict=True):
        close(grad[:real], shard.cut(full, 0)[:real])
        padding_has_no_gradient(grad, shard, 0)


@contextlib.contextmanager
def three_rows_a_chunk(shard: Shard, padded: bool) -> Iterator[None]:
    """Cut several chunks, so that the statistics of one travel while the next one is made.

    With padding the budget allows three rows, counted at ceil(VOCAB / size) columns on every rank;
    without, no rank knows the others' widths, and the row limit decides.
    """
    budget = str(3 * -(-VOCAB // shard.group.size()) * 4 / 2**20) if padded else ""
    with (
        mock.patch.dict(os.environ, FASTRLHF_LINEAR_BUDGET_MB=budget),
        mock.patch.object(linear_chunks, "CPU_ROWS", 3),
    ):
        yield


def check_small_chunks(shard: Shard, padded: bool, call: Callable[..., torch.Tensor]) -> None:
    with three_rows_a_chunk(shard, padded):
        check_linear(shard, call)


def linear_logprobs_sum(h, w, b, d, recompute=True, **options):
    out = linear_logprobs(
        h,
        w,
        d["labels"],
        bias=b,
        mask=d["mask"],
        with_entropy=True,
        recompute=recompute,
        temperature=0.9,
        **options,
    )
    return sum((t * u).sum() for t, u in zip(out[:3], d["upstream"], strict=False))


def cross_entropy(h, w, b, d, **options):
    return linear_cross_entropy(h, w, d["labels"], d["mask"], bias=b, temperature=0.8, **options)


def ppo(h, w, b, d, **options):
    return linear_ppo_loss(
        h, w, d["labels"], d["old"], d["advantages"], d["mask"], bias=b, entropy_coef=0.1, **options
    ).loss


def smoothed(h, w, b, d, **options):
    extra = {"label_smoothing": 0.1, "z_loss": 0.01}
    return linear_cross_entropy(h, w, d["labels"], d["mask"], bias=b, **extra, **options)


def capped(h, w, b, d, **options):
    return linear_cross_entropy(h, w, d["labels"], d["mask"], bias=b, softcap=2.0, **options)


def sequences(h, w, b, d, **options):
    # k3 would grow with exp(d), and the rounding of d with it
    extra = {"ratio": "sequence", "ref_logprobs": d["old"], "kl_coef": 0.1, "kl_estimator": "k2"}
    extra |= {"weights": d["old"].abs(), "entropy_coef": 0.1}
    arguments = (h, w, d["labels"], d["old"], d["advantages"], d["mask"])
    return linear_ppo_loss(*arguments, bias=b, **extra, **options).loss


def check_misuse(group: dist.ProcessGroup, absent: object) -> None:
    """Check that all columns given for a shard, and another's group, are named."""
    d = data()
    for wrong, words in (
        ({"group": group, "vocab_size": VOCAB}, f"this rank's shard of the {VOCAB} columns"),
        ({"group": absent}, "a group that this rank is a member of"),
    ):
        try:
            logprobs(d["logits"], d["labels"], mask=d["mask"], **wrong)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{wrong} was accepted")


def check_masked(group: dist.ProcessGroup) -> None:
    g = torch.Generator().manual_seed(2)
    x, mask = (
        torch.randn(group.size(), 9, generator=g) + 50,
        torch.rand(group.size(), 9, generator=g) > 0.4,
    )
    mask[0] = False  # a rank may hold nothing
    rank = group.rank()
    whole, mine = x.clone().requires_grad_(), x[rank].clone().requires_grad_()
    for op in (masked_mean, masked_whiten):
        expected, ours = op(whole, mask), op(mine, mask[rank], group=group)
        expected_here = expected if expected.dim() == 0 else expected[rank]
        torch.testing.assert_close(ours, expected_here, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(masked_mean(whole, mask), whole)
    (grad,) = torch.autograd.grad(masked_mean(mine, mask[rank], group), mine)
    torch.testing.assert_close(grad, wanted[rank])


def check_compiled(shard: Shard) -> None:
    d = data()
    compiled = torch.compile(logprobs, fullgraph=True, backend="aot_eager")
    mine = shard.cut(d["logits"], -1).requires_grad_()
    eager = logprobs(mine, d["labels"], mask=d["mask"], **shard.options).logprobs
    ours = compiled(mine, d["labels"], mask=d["mask"], **shard.options).logprobs
    assert torch.equal(eager, ours)
    (a,), (b,) = torch.autograd.grad(eager.sum(), mine), torch.autograd.grad(ours.sum(), mine)
    assert torch.equal(a, b)


def checks(group: dist.ProcessGroup) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {"masked": lambda: check_masked(group)}
    for padded in (False, True):
        shard, kind = Shard(group, padded), "padded" if padded else "uneven"
        found[f"logprobs-{kind}"] = lambda s=shard: check_logprobs(s, torch.float32, 0.0)
        found[f"logprobs-shifted-{kind}"] = lambda s=shard: check_logprobs(s, torch.float32, -1e3)
        found[f"logprobs-bf16-{kind}"] = lambda s=shard: check_logprobs(s, torch.bfloat16, 0.0)
        found[f"forbidden-{kind}"] = lambda s=shard: check_forbidden_tokens(s)
        found[f"logits_kl-{kind}"] = lambda s=shard: check_logits_kl(s)
        found[f"linear_logprobs-{kind}"] = lambda s=shard: check_linear(s, linear_logprobs_sum)
        found[f"linear_kept-{kind}"] = lambda s=shard: check_linear(
            s, lambda *a, **k: linear_logprobs_sum(*a, recompute=False, **k)
        )
        found[f"linear_cross_entropy-{kind}"] = lambda s=shard: check_linear(s, cross_entropy)
        found[f"linear_ppo_loss-{kind}"] = lambda s=shard: check_linear(s, ppo)
        found[f"linear_smoothed-{kind}"] = lambda s=shard: check_linear(s, smoothed)
        found[f"linear_capped-{kind}"] = lambda s=shard: check_linear(s, capped)
        found[f"linear_sequences-{kind}"] = lambda s=shard: check_linear(s, sequences)
        for name, call in (
            ("logprobs", linear_logprobs_sum),
            ("cross_entropy", cross_entropy),
            ("ppo", ppo),
            ("smoothed", smoothed),
            ("sequences", sequences),
        ):
            found[f"chunks-{name}-{kind}"] = lambda s=shard, p=padded, c=call: check_small_chunks(
                s, p, c
            )
    absent = dist.GroupMember.NON_GROUP_MEMBER
    found["misuse"] = lambda: check_misuse(group, absent)
    if group.size() == 2:
        found["compiled"] = lambda: check_compiled(Shard(group, padded=False))
    return found


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter(
        "error", FutureWarning
    )  # a deprecated collective would warn once a process of every run
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    results: dict[str, str | None] = {}
    for size in (2, 3, 4):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for name, check in checks(group).items():
            try:
                check()
                results[f"{size}-{name}"] = None
            except (AssertionError, RuntimeError, ValueError, FutureWarning):
                results[f"{size}-{name}"] = traceback.format_exc()
    with open(out, "w") as file:
        json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
