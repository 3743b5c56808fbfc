"""Transforms that would lose a gradient raise and name the cure; a wrong group is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from fastrlhf import ops

pytestmark = pytest.mark.usefixtures("torch_only")

LABELS, MASK = torch.tensor([1, 4, 6]), torch.tensor([True, True, False])
OPS = {
    "logprobs": lambda x: ops.logprobs(x, LABELS).logprobs.sum(),
    "logits_kl": lambda x: ops.logits_kl(x, x.detach() * 0.5).sum(),
    "linear_logprobs": lambda x: ops.linear_logprobs(x, torch.ones(9, 7), LABELS).logprobs.sum(),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, torch.ones(9, 7), LABELS, MASK),
    "ppo_loss": lambda x: ops.ppo_loss(x[:, 0], torch.zeros(3), torch.ones(3), MASK).loss,
    "pairwise_ranking_loss": lambda x: (
        ops.pairwise_ranking_loss(x[:, 0], torch.arange(3), torch.tensor([0, 3])).loss
    ),
}
IN_FUNC = r"no derivative inside torch\.func.*call torch\.autograd\.grad or \.backward\(\)"


@pytest.mark.parametrize("name", OPS)
def test_func_grad_and_jvp_are_refused(name):
    x = torch.randn(3, 7)
    with pytest.raises(RuntimeError, match=IN_FUNC):
        torch.func.grad(OPS[name])(x)
    with pytest.raises(RuntimeError, match=IN_FUNC):
        torch.func.jvp(OPS[name], (x,), (x,))
    with pytest.raises(RuntimeError, match=IN_FUNC):
        torch.func.grad(lambda t: torch.func.vmap(OPS[name])(t).sum())(x[None])


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_refused(name):
    x = torch.randn(3, 7)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no forward-mode derivative: use reverse mode"):
            OPS[name](dual)
        OPS[name](x)  # a constant there is no concern


def test_constants_inside_a_transform_are_let_through():
    x = torch.randn(3, 7)
    constant = OPS["logprobs"](x)
    gradient = torch.func.grad(lambda t: t.sum() * OPS["logprobs"](x))(torch.ones(2))
    torch.testing.assert_close(gradient, constant.expand(2))


def test_ops_in_plain_torch_are_transformed():
    x = torch.randn(4)
    mask, ref = x > -1, torch.zeros(4)
    gradient = torch.func.grad(lambda t: ops.masked_mean(ops.token_kl(t, ref, "k2"), mask))(x)
    torch.testing.assert_close(gradient, torch.where(mask, x / mask.sum(), 0.0))
    torch.func.grad(lambda t: ops.dpo_loss(t, ref, ref, ref).loss)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_loops_over_the_batch():
    x = torch.randn(2, 3, 7)
    mapped = torch.func.vmap(lambda t: ops.logprobs(t, LABELS).logprobs)(x)
    torch.testing.assert_close(mapped, ops.logprobs(x, LABELS.expand(2, 3)).logprobs)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_wrong_groups_are_named(one_rank):
    x = torch.randn(3, 7)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for call in (
        lambda group: ops.logprobs(x, LABELS, group=group),
        lambda group: ops.linear_logprobs(x, torch.ones(9, 7), LABELS, group=group),
        lambda group: ops.masked_mean(x[:, 0], MASK, group),
        lambda group: ops.rollout_targets(x[:, 0], x, x, x, x > 0, kl_coef=0.1, group=group),
    ):
        words = r"group: got .*, expected a torch\.distributed\.ProcessGroup .*mesh\.get_group"
        with pytest.raises(ValueError, match=words):
            call(mesh)
        absent = dist.GroupMember.NON_GROUP_MEMBER
        with pytest.raises(ValueError, match="group that this rank is a member of"):
            call(absent)
        call(one_rank)
        call(mesh.get_group())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ops.logprobs(x, LABELS, temperature=float("inf")), "temperature: got inf"),
        (lambda x: ops.logprobs(x, LABELS, mask=MASK.float()), r"mask: .*: pass mask\.bool\(\)"),
        (lambda x: ops.masked_mean(x[:, 0], MASK.long()), r"pass mask\.bool\(\)"),
        (
            lambda x: ops.linear_logprobs(x[:, :0], torch.ones(9, 0), LABELS),
            r"hidden: got float32\[3, 0\] on cpu, expected shape \[\.\.\., H\] with H above 0",
        ),
        (lambda x: ops.gae(x, x, x > 0, gamma=torch.tensor(1.5)), "gamma: got .* from 0 to 1"),
    ],
    ids=["temperature", "float mask", "integer mask", "no hidden size", "gamma"],
)
def test_value_edges(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(3, 7))
