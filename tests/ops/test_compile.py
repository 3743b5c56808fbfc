"""torch.compile keeps one graph through every op; the registered ops pass opcheck."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import fastrlhf.ops as ops

LABELS = torch.tensor([[1, 4, 6], [0, 2, 3]])
MASK = torch.tensor([[True, True, False], [True, False, True]])
RANKING = (torch.tensor([0, 1, 2, 1, 0, 0]), torch.tensor([0, 4, 6]))


@pytest.fixture(autouse=True, scope="module")
def private_cache(tmp_path_factory):
    """Compile into a folder of this run: inductor's default one is shared by every run of a user.

    A concurrent run with another instruction set would put its code there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def vocabulary(x, h, w, backend):
    tokens = ops.logprobs(
        x[:, :-1], LABELS, mask=MASK, with_entropy=True, temperature=0.7, backend=backend
    )
    fused = ops.linear_logprobs(
        h, w, LABELS, mask=MASK, ref_logprobs=tokens.logprobs.detach(), backend=backend
    )
    full = ops.logits_kl(x[:, 1:], x[:, :-1].detach(), mask=MASK, backend=backend)
    return tokens.logprobs.sum() + tokens.entropy.sum() + fused.kl.square().sum() + full.sum()


def losses(x, h, w, backend):
    logp = x[:, :3, 0]
    rewards, _ = ops.shaped_rewards(
        logp[:, 0].detach(), logp.detach(), logp.detach() - 1, MASK, 0.1
    )
    advantages, returns = ops.gae(rewards, x[:, :3, 1], MASK, backend=backend)
    advantages = ops.masked_whiten(advantages, MASK)
    values = x[:, :3, 2]
    out = ops.ppo_loss(
        logp,
        logp.detach() + 0.1,
        advantages,
        MASK,
        values=values,
        old_values=values.detach(),
        returns=returns,
        backend=backend,
    )
    head = ops.linear_ppo_loss(
        h, w, LABELS, logp.detach(), advantages, MASK, entropy_coef=0.1, backend=backend
    )
    sft = ops.linear_cross_entropy(h, w, LABELS, MASK, denominator=3.0, backend=backend)
    ranking = ops.pairwise_ranking_loss(x[0, :2, :3].reshape(-1), *RANKING, backend=backend)
    kl = ops.masked_mean(ops.token_kl(logp, logp.detach() - 0.5, "k3"), MASK)
    return out.loss + out.approx_kl + head.loss + sft + ranking.loss + ranking.accuracy + kl


def small(x, h, w, backend):
    return (
        2 * ops.logprobs(x[:, :-1] * 3, LABELS, mask=MASK, backend=backend).logprobs.sum()
        + h.sum()
        + w.sum()
    )


@pytest.mark.parametrize(
    ("function", "compiler"),
    [(vocabulary, "aot_eager"), (losses, "aot_eager"), (small, "inductor")],
)
def test_full_graph(function, compiler, backend, device, torch_only):
    inputs = [torch.randn(s).to(device).requires_grad_() for s in ((2, 4, 7), (2, 3, 5), (7, 5))]
    if device.type == "cuda":
        pytest.skip("the index tensors of this test live on the CPU")
    torch._dynamo.reset()
    eager = function(*inputs, backend)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)(*inputs, backend)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_one_graph_for_all_lengths(torch_only):
    """After one recompilation to a symbolic length, no length compiles again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, labels: ops.logprobs(x, labels, with_entropy=True).entropy.sum(),
        fullgraph=True,
        backend=counter,
    )
    for tokens in (5, 6, 9, 17, 33):
        x = torch.randn(tokens, 11, requires_grad=True)
        compiled(x, torch.zeros(tokens, dtype=torch.long)).backward()
        assert x.grad is not None
    assert counter.frame_count <= 2


def every_op_with_every_scalar():
    """Yield (name, call): s is in every scalar, and n the length of x, y, m and a."""
    yield (
        "logprobs",
        lambda s, n, x, h, w, y, m, a: ops.logprobs(
            x, y, mask=m, with_entropy=True, temperature=s, softcap=s + 3
        ).logprobs.sum(),
    )
    yield (
        "logits_kl",
        lambda s, n, x, h, w, y, m, a: ops.logits_kl(
            x, x.detach() * 0.5, mask=m, temperature=s
        ).sum(),
    )
    yield (
        "linear_logprobs",
        lambda s, n, x, h, w, y, m, a: ops.linear_logprobs(
            h, w, y, mask=m, temperature=s, softcap=s + 1, num_counted=2 * n
        ).logprobs.sum(),
    )
    yield (
        "linear_cross_entropy",
        lambda s, n, x, h, w, y, m, a: ops.linear_cross_entropy(
            h, w, y, m, temperature=s, label_smoothing=s / 10, z_loss=s / 100, denominator=s + 1
        ),
    )
    policy = lambda s, a: {  # noqa: E731  (next to the calls that share it)
        "clip": (s / 10, s / 5),
        "dual_clip": 1 + s,
        "ref_logprobs": a,
        "kl_coef": s,
        "weights": a.abs(),
        "entropy_coef": s,
        "denominator": s,
    }
    yield (
        "linear_ppo_loss",
        lambda s, n, x, h, w, y, m, a: (
            ops.linear_ppo_loss(
                h, w, y, a, a, m, temperature=s, softcap=s + 1, ratio="sequence", **policy(s, a)
            ).loss
        ),
    )
    yield (
        "ppo_loss",
        lambda s, n, x, h, w, y, m, a: (
            ops.ppo_loss(
                x[..., 0],
                a,
                a,
                m,
                values=x[..., 1],
                old_values=a,
                returns=a,
                value_clip=s,
                value_coef=s,
                entropy=x[..., 2],
                ratio="sequence",
                **policy(s, a),
            ).loss
        ),
    )
    yield (
        "gae",
        lambda s, n, x, h, w, y, m, a: sum(
            t.sum() for t in ops.gae(a, a, m, s / 3, s / 4, bootstrap=a[:, 0])
        ),
    )
    yield (
        "shaped_rewards",
        lambda s, n, x, h, w, y, m, a: ops.shaped_rewards(
            a[:, 0], a, a + 0.1, m, s, clip=s, bootstrap=a[:, 1]
        )[0].sum(),
    )
    yield (
        "rollout_targets",
        lambda s, n, x, h, w, y, m, a: ops.rollout_targets(
            a[:, 0], a, a + 0.1, a, m, kl_coef=s, clip=s, gamma=s / 3, lam=s / 4
        ).advantages.sum(),
    )
    yield (
        "dpo_loss",
        lambda s, n, x, h, w, y, m, a: (
            ops.dpo_loss(x[0, :, 0], x[0, :, 1], a[0], a[1], beta=s, label_smoothing=s / 10).loss
        ),
    )
    yield (
        "pairwise_ranking_loss",
        lambda s, n, x, h, w, y, m, a: (
            ops.pairwise_ranking_loss(
                x[0, :, 0], y[0], torch.tensor([0, 2, n]), margins=a[0], center_coef=s
            ).loss
        ),
    )
    yield (
        "averages",
        lambda s, n, x, h, w, y, m, a: (
            ops.masked_mean(x[..., 0], m)
            + ops.masked_var(x[..., 0], m, dim=1).sum()
            + ops.masked_whiten(x[..., 0], m).sum()
            + ops.token_kl(x[..., 0], a, "k3", mask=m).sum()
        ),
    )
    yield "group_advantages", lambda s, n, x, h, w, y, m, a: ops.group_advantages(a[0], y[0]).sum()


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("name", [name for name, _ in every_op_with_every_scalar()])
def test_two_graphs_for_twelve_lengths_and_values_of_every_scalar(name, kind, torch_only):
    """The first call may specialize; one more graph serves all other lengths and values."""
    function = dict(every_op_with_every_scalar())[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for step in range(12):
        n, s = 5 + step, 0.3 + 0.05 * step
        x, h, w = (_float(*shape) for shape in ((2, n, 7), (2, n, 5), (7, 5)))
        tokens = torch.randint(0, 7, (2, n)), torch.rand(2, n) > 0.3, torch.randn(2, n)
        scalar = torch.tensor(s) if kind == "tensor" else s
        ours, eager = (f(scalar, n, x, h, w, *tokens) for f in (compiled, function))
        torch.testing.assert_close(ours, eager)
        if ours.requires_grad:
            ours.backward()
    assert counter.frame_count <= 2


def _float(*shape):
    return torch.randn(*shape, requires_grad=True)


def cases():
    lib, long = torch.ops.fastrlhf, LABELS
    flat, m = torch.randn(2, 3), MASK
    softmax, capped = (torch.tensor([0.7, 1.0]), False), (torch.tensor([0.7, 5.0]), True)
    yield (
        lib.token_logprobs,
        (_float(2, 3, 7), long, m, flat, *softmax, True, 0, 6, "", False, "auto"),
    )
    yield (
        lib.token_logprobs,
        (_float(2, 4, 7)[:, :-1], long, None, None, *capped, False, 0, 7, "", False, "auto"),
    )
    saved, upstream = (torch.zeros(2, 3), torch.ones(2, 3), flat), (flat, flat, None)
    stats = (long, m, *saved, *upstream, *softmax, 0, 7, "", "auto")
    yield lib.token_logprobs_backward, (torch.randn(2, 3, 7), *stats)
    yield lib.token_logprobs_backward_, (torch.randn(2, 3, 7), *stats)
    one = torch.tensor([1.0])
    yield lib.logits_kl, (_float(2, 3, 7), _float(2, 3, 7), m, one, 7, "", "auto")
    h, w, b = _float(2, 3, 5), _float(7, 5), _float(7)
    yield (
        lib.linear_logprobs,
        (h, w, b, long, m, None, flat, *softmax, True, False, 0, 7, "", "auto"),
    )
    yield (
        lib.linear_logprobs,
        (h, w, None, long, None, None, None, *capped, False, True, 0, 7, "", "auto"),
    )
    options = (0, 7, "", 7, "auto", [True, True, True])
    form, policy = ("clip", "sequence", "k3", 3), (flat, flat, flat, flat.abs())
    scalars = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.2, 0.2, 0.2, 1.0, 0.1, torch.inf, 0.1])
    terms, ce = (False, True, False, False), (False, False, True, True)
    tokens = (long, m, None)
    yield (
        lib.linear_loss,
        (h, w, b, *tokens, *policy, torch.tensor(3.0), scalars, *form, *terms, *options),
    )
    nothing = (None, None, None, None)
    yield lib.linear_loss, (h, w, b, *tokens, *nothing, None, scalars, *form, *ce, *options)
    numbers = (torch.tensor([0.2, 0.2, 0.2, 1.0, 0.1, torch.inf, 0.1]), *form, "auto")
    values = (_float(2, 3), flat, flat, _float(2, 3))
    yield lib.ppo_loss, (_float(2, 3), flat, flat, m, *values, flat, flat, None, *numbers)
    yield lib.ppo_loss, (_float(2, 3), flat, flat, m, *[None] * 6, torch.tensor(2.0), *numbers)
    yield lib.gae, (flat, flat, m, flat[:, 0].clone(), torch.tensor([1.0, 0.95]), "auto")
    yield lib.ranking_loss, (_float(6), *RANKING, torch.randn(6), torch.tensor([0.1]), True, "auto")
    yield lib.all_reduce_sum, (_float(3), "")


@pytest.mark.parametrize(
    ("op", "arguments"), [pytest.param(*case, id=case[0].__name__) for case in cases()]
)
def test_opcheck(op, arguments, torch_only):
    with torch.random.fork_rng():
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("upstream", [1.0, -1.0, 0.5])
def test_a_backward_leaves_the_outputs_of_the_loss_as_they_were(upstream, torch_only):
    """Its gradients are outputs, which opcheck compares; only negative losses showed a change."""
    scalars = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.2, 0.2, 0.2, 1.0, 0.1, torch.inf, 0.1])
    form, terms = ("clip", "token", "k3", 3), (False, False, False, False)
    policy = (None, None, None, None, None, None, scalars, *form, *terms)
    options = (*policy, 0, 7, "", 7, "auto", [True, True, True])
    outputs = torch.ops.fastrlhf.linear_loss(
        _float(2, 3, 5), _float(7, 5), _float(7), LABELS, MASK, *options
    )
    before = [output.detach().clone() for output in outputs]
    outputs[0].backward(torch.tensor(upstream))
    assert all(torch.equal(output, kept) for output, kept in zip(outputs, before, strict=True))
