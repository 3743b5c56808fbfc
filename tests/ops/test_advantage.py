from __future__ import annotations

import pytest
import torch

from fastrlhf.ops import (
    gae,
    group_advantages,
    masked_whiten,
    rollout_targets,
    shaped_rewards,
    token_kl,
)


def gae_per_row(rewards, values, mask, gamma, lam):
    """Compute sum_k (gamma lam)^k delta_{t+k} over each row's True positions (equation 16)."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        at = mask[b].nonzero().flatten()
        r, v = rewards[b, at], values[b, at]
        delta = r + gamma * torch.cat([v[1:], v.new_zeros(1)])[: len(v)] - v
        for i in range(len(at)):
            powers = (gamma * lam) ** torch.arange(len(at) - i, dtype=r.dtype)
            advantages[b, at[i]] = (powers * delta[i:]).sum()
        returns[b, at] = advantages[b, at] + v
    return advantages, returns


@pytest.mark.parametrize(
    ("length", "gamma", "lam"),
    [
        (1, 1.0, 0.95),
        (2, 0.99, 0.9),
        (63, 1.0, 1.0),
        (130, 0.9, 0.0),
        (63, 0.0, 0.5),
        (1025, 1.0, 0.95),
    ],
)
def test_gae_with_interior_gaps_against_its_sum(length, gamma, lam, backend, device):
    rewards, values = (
        torch.randn(3, length, dtype=torch.float64),
        torch.randn(3, length, dtype=torch.float64),
    )
    rewards, values = rewards.float().double(), values.float().double()
    mask = torch.rand(3, length) > 0.3
    mask[1] = False
    expected = gae_per_row(rewards, values, mask, gamma, lam)
    poison = [torch.where(mask, x.float(), torch.nan).to(device) for x in (rewards, values)]
    ours = gae(*poison, mask.to(device), gamma, lam, backend=backend)
    # each step's rounding is carried 1 / (1 - gamma lam) steps, or all of them without discount
    carried = min(length, 1 / max(1 - gamma * lam, 1e-9)) + 2
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32 and not a.requires_grad
        assert bool((a[~mask.to(device)] == 0).all())
        assert float((a.cpu().double() - b).abs().max()) <= 2**-23 * carried * float(
            1 + b.abs().max()
        )


def test_gae_golden(backend, device):
    """gamma 1, lambda 0.5, by hand: deltas (1 + 4 - 2, 0 + 0 - 4) over the two True positions."""
    rewards = torch.tensor([[1.0, 9.0, 0.0, 9.0]], device=device)
    values = torch.tensor([[2.0, 9.0, 4.0, 9.0]], device=device)
    mask = torch.tensor([[True, False, True, False]], device=device)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5, backend=backend)
    assert advantages.tolist() == [[1.0, 0.0, -4.0, 0.0]] and returns.tolist() == [
        [3.0, 0.0, 0.0, 0.0]
    ]


def test_gae_dtypes_strides_and_empty(backend, device):
    rewards, values = (torch.randn(5, 7, device=device).bfloat16().T for _ in range(2))
    mask = torch.ones(7, 5, dtype=torch.bool, device=device)
    half = gae(rewards, values, mask, backend=backend)
    full = gae(rewards.float().contiguous(), values.float().contiguous(), mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))
    assert gae(rewards[:, :0], values[:, :0], mask[:, :0], backend=backend)[0].shape == (7, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rollouts_are_computed_in_fp32(dtype, backend, device):
    """A 0-dim kl_coef or mean does not promote: results equal those of fp32 inputs bit for bit."""
    half = [torch.randn(*shape).to(dtype).to(device) for shape in ((3,), (3, 20), (3, 20), (3, 20))]
    full, mask = [t.float() for t in half], torch.rand(3, 20).to(device) > 0.3
    coefficient = torch.tensor(0.1, device=device)
    for x, y in zip(
        shaped_rewards(*half[:3], mask, coefficient),
        shaped_rewards(*full[:3], mask, 0.1),
        strict=True,
    ):
        assert torch.equal(x, y)
    ours, exact = (
        rollout_targets(*t, mask, kl_coef=coefficient, backend=backend) for t in (half, full)
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, exact, strict=True))


def test_lambda_one_returns_the_reward_to_go(backend, device):
    rewards = torch.randn(2, 50, device=device)
    mask = torch.ones(2, 50, dtype=torch.bool, device=device)
    _, returns = gae(rewards, torch.randn(2, 50, device=device), mask, 1.0, 1.0, backend=backend)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=0, atol=50 * 2**-20)


def test_shaped_rewards_golden(torch_only):
    logp, ref = torch.tensor([[-1.0, -2.0, -3.0]] * 2), torch.tensor([[-1.5, -2.0, -1.0]] * 2)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    rewards, kl = shaped_rewards(torch.tensor([10.0, 5.0]), logp, ref, mask, 0.1)
    assert kl.tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert rewards[0].tolist() == pytest.approx([-0.05, 10.0, 0.0]) and not bool(rewards[1].any())


def test_the_score_goes_to_the_last_true_position(torch_only):
    mask = torch.tensor([[False, True, False, True, False]])
    zeros = torch.where(mask, 0.0, torch.nan)
    rewards, kl = shaped_rewards(torch.tensor([3.0]), zeros, zeros, mask, torch.tensor(0.5))
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 3.0, 0.0]] and kl.tolist() == [[0.0] * 5]


def test_the_penalty_is_clipped_but_not_the_reported_kl(torch_only):
    logp, ref = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[-8.0, 8.0, -1.0]])
    rewards, kl = shaped_rewards(
        torch.zeros(1), logp, ref, torch.ones(1, 3, dtype=torch.bool), 1.0, clip=2.0
    )
    assert rewards.tolist() == [[-2.0, 2.0, -1.0]] and kl.tolist() == [[8.0, -8.0, 1.0]]


@pytest.mark.parametrize(
    ("length", "estimator", "clip"),
    [
        (1, "k1", None),
        (77, "k1", 0.4),
        (77, "abs", None),
        (77, "k2", 0.4),
        (77, "k3", None),
        (1030, "k3", 0.4),
    ],
)
def test_rollout_targets_are_the_three_ops_in_one(length, estimator, clip, backend, device):
    logp, ref, values = (torch.randn(4, length, device=device) for _ in range(3))
    ref[:, ::5] = logp[:, ::5] - 1e-3  # where k3 would cancel
    mask = torch.rand(4, length).to(device) > 0.3
    mask[2] = False
    scores = torch.randn(4, device=device)
    inputs = [torch.where(mask, t, torch.nan) for t in (logp, ref, values)]
    ours = rollout_targets(
        scores, *inputs, mask, kl_coef=0.1, estimator=estimator, clip=clip, backend=backend
    )
    exact = [t.double() for t in (logp, ref)]
    rewards, kl = shaped_rewards(
        scores.double(), *exact, mask, torch.tensor(0.1).double(), estimator, clip
    )
    advantages, returns = gae(rewards, values.double(), mask)
    expected = (rewards, kl, masked_whiten(advantages, mask), returns)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32 and not a.requires_grad and bool((a[~mask] == 0).all())
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=3e-6)
    raw = rollout_targets(
        scores, *inputs, mask, kl_coef=0.1, estimator=estimator, clip=clip, whiten=False
    )
    torch.testing.assert_close(raw.advantages.double(), advantages, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_estimators_by_hand(estimator, torch_only):
    d = torch.tensor([0.5, -0.25, 0.0], dtype=torch.float64)
    exact = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    logp = (d - 1).requires_grad_()
    torch.testing.assert_close(token_kl(logp, torch.full_like(d, -1.0), estimator), exact)
    assert torch.autograd.gradcheck(
        lambda x: token_kl(x, torch.full_like(d, -1.1), estimator), (logp,)
    )
    small = token_kl(torch.tensor([1e-4]), torch.zeros(1), "k3")
    assert small.item() == pytest.approx(5e-9, rel=1e-3, abs=4e-12), (
        "exp(-d) - 1 + d cancels: expm1 keeps it"
    )


def test_estimators_average_to_the_true_kl(torch_only):
    """E_p[k1] = E_p[k3] = KL(p || q), summed over the distribution instead of sampled."""
    p, q = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    true = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * token_kl(p, q, estimator)).sum(), true)


def test_mistakes_are_named(torch_only):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gamma: got 1\.5, expected a number from 0 to 1"):
        gae(x, x, mask, gamma=1.5)
    with pytest.raises(
        ValueError, match=r"rewards: got float32\[3\] on cpu, expected shape \[B, T\]"
    ):
        gae(x[0], x[0], mask[0])
    with pytest.raises(ValueError, match=r"scores: got float32\[3\]"):
        shaped_rewards(torch.zeros(3), x, x, mask, 0.1)
    with pytest.raises(
        ValueError, match="estimator: got 'k4', expected one of 'k1', 'abs', 'k2', 'k3'"
    ):
        token_kl(x, x, "k4")


# --- what follows a truncated row, and groups -----------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 130, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bootstrap_is_the_value_of_one_more_position(length, dtype, backend, device):
    """A row that ends in it equals one with a last position of that value and reward 0."""
    rewards, values = (torch.randn(5, length).to(device, dtype) for _ in range(2))
    mask = torch.rand(5, length).to(device) > 0.3
    mask[1] = False
    after = torch.randn(5).to(device, dtype)
    ours = gae(rewards, values, mask, 0.9, 0.8, bootstrap=after, backend=backend)
    wide = [
        torch.cat([t.double(), last.double()[:, None]], 1)
        for t, last in ((rewards, after), (values, after), (mask.double(), torch.ones_like(after)))
    ]
    # its advantage is reward - value = 0
    exact = gae(wide[0], wide[1], wide[2].bool(), 0.9, 0.8)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b[:, :-1], rtol=1e-5, atol=2e-5)
    assert not bool(ours[0][1].any())


def test_a_bootstrap_by_hand(backend, device):
    """1 + 0.5 * 4 - 1 = 2 at the last position, 0 + 0.5 * 1 - 2 + 0.25 * 2 = -1 before it."""
    rewards, values = (torch.tensor([x], device=device) for x in ([0.0, 1.0], [2.0, 1.0]))
    mask, after = torch.ones_like(rewards, dtype=torch.bool), torch.tensor([4.0], device=device)
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5, bootstrap=after, backend=backend)
    assert advantages.tolist() == [[-1.0, 2.0]] and returns.tolist() == [[1.0, 3.0]]


def test_rollout_targets_hand_the_bootstrap_to_gae(backend, device):
    logp, ref, values = (torch.randn(4, 60, device=device) for _ in range(3))
    scores, after = torch.randn(4, device=device), torch.randn(4, device=device)
    mask = torch.rand(4, 60, device=device) > 0.3
    ours = rollout_targets(
        scores, logp, ref, values, mask, kl_coef=0.1, bootstrap=after, whiten=False, backend=backend
    )
    rewards, _ = shaped_rewards(scores, logp, ref, mask, 0.1)
    advantages, returns = gae(rewards, values, mask, bootstrap=after, backend=backend)
    torch.testing.assert_close(ours.advantages, advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.returns, returns, rtol=1e-5, atol=1e-5)
    with_rest, _ = shaped_rewards(scores, logp, ref, mask, 0.1, bootstrap=after)
    torch.testing.assert_close((with_rest - rewards).sum(1), after * mask.any(1))


@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 1, 2], [7, -3, 7, -3, -3, 2**40]])
def test_group_advantages_by_definition(ids, torch_only):
    rewards, groups = torch.tensor([1.0, 3.0, 0.0, 2.0, 7.0, 5.0]), torch.tensor(ids)
    for leave_one_out, normalize in ((False, False), (False, True), (True, False)):
        options = {"leave_one_out": leave_one_out, "normalize": normalize}
        ours = group_advantages(rewards, groups, **options)
        for i in range(6):
            mine = rewards[groups == groups[i]]
            others = rewards[(groups == groups[i]) & (torch.arange(6) != i)]
            if len(mine) == 1:
                assert ours[i] == 0
                continue
            expected = rewards[i] - (others if leave_one_out else mine).mean()
            scale = mine.std() + 1e-6 if normalize else 1.0
            torch.testing.assert_close(ours[i], expected / scale, rtol=1e-6, atol=1e-6)


def test_equal_rewards_have_no_advantage(torch_only):
    rewards = torch.full((4,), 0.1, dtype=torch.bfloat16)
    ours = group_advantages(rewards, torch.zeros(4, dtype=torch.int32))
    assert ours.dtype == torch.float32 and not bool(ours.any())
    assert group_advantages(rewards[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)
