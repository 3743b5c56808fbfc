"""Collectives over an explicit process group, in a form that torch.compile keeps in one graph.

Custom ops take no ProcessGroup, so a group is passed by its name; "" is no group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.registry import Context, Gradients, custom_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(group: object) -> None:
    """Check that `group` is None or a process group with this rank in it."""
    if group is None:
        return
    absent = group is dist.GroupMember.NON_GROUP_MEMBER
    expected = "a group that this rank is a member of, or None"
    checks.require(not absent, "group", group, expected)
    expected = "a torch.distributed.ProcessGroup (of a DeviceMesh: mesh.get_group(dimension))"
    checks.require(isinstance(group, dist.ProcessGroup), "group", group, expected)


def name_of(group: ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def rank_of(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _resolve(name: str) -> ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]  # torch annotates another type


def _all_gather(
    out: Tensor, x: Tensor, group: ProcessGroup, async_op: bool = False
) -> dist.Work | None:
    # by its newer name where torch has it: the older one warns there
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out.view(-1), x.view(-1), group=group, async_op=async_op)


def gather_stack(x: Tensor, group_name: str) -> Tensor:
    """Stack every rank's `x` in rank order: [R, *x.shape].

    Not differentiable; called inside custom ops only.
    """
    group = _resolve(group_name)
    out = x.new_empty(group.size(), *x.shape)
    _all_gather(out, x.contiguous(), group)
    return out


def gather_stack_async(x: Tensor, group_name: str) -> Callable[[], Tensor]:
    """Start `gather_stack` and return a function that waits for its result.

    On a GPU the stream waits, not the host.
    """
    group = _resolve(group_name)
    x, out = x.contiguous(), x.new_empty(group.size(), *x.shape)
    work = _all_gather(out, x, group, async_op=True)
    assert work is not None

    def wait() -> Tensor:
        work.wait()
        return out

    return wait


def reduce_sum_(x: Tensor, group_name: str) -> Tensor:
    """Sum `x` in place over the group, or do nothing for ""; called inside custom ops only."""
    if group_name:
        dist.all_reduce(x, group=_resolve(group_name))
    return x


@custom_op("all_reduce_sum")
def _all_reduce_sum(x: Tensor, group_name: str) -> Tensor:
    return reduce_sum_(x.clone(), group_name)


@_all_reduce_sum.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x)


def _all_reduce_sum_grad(ctx: Context, grad: Tensor | None) -> Gradients:
    return {"x": grad}


_all_reduce_sum.register_autograd(_all_reduce_sum_grad)


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of `x` over the group, out of place.

    Its gradient is the identity: every rank holds the same sum and the same loss, so each rank's
    gradient is that of its own term.
    """
    check_group(group)
    return x if group is None else _all_reduce_sum(x, group.group_name)
