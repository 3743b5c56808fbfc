"""Providers of an op: this library on each backend, plain torch, torch.compile, loops, bare GEMMs.

Other libraries are in rivals.py. A provider is registered by a loader that imports what it needs
and returns the function to measure; ImportError there means "not installed" and is listed as such.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrlhf.ops as ops
from bench.cases import MODES, Inputs, Outputs
from fastrlhf.ops.advantage import _gae_torch
from fastrlhf.ops.ppo import ppo_loss_ref
from fastrlhf.ops.ranking import pairwise_ranking_loss_ref

Function = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Provider:
    op: str
    name: str
    kind: str
    """ "ours", "rival", or "floor": bare GEMMs, which compute no loss and so are not checked"""
    load: Callable[[], Function]
    package: str | None = None
    """whose version goes into the CSV"""
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = MODES
    mutates: tuple[str, ...] = ()
    """inputs it overwrites; it gets copies of its own, restored before each call, outside the clock
    """


PROVIDERS: dict[str, list[Provider]] = {}


def provider(
    op: str, name: str, kind: str = "rival", **options: Any
) -> Callable[[Callable[[], Function]], Callable[[], Function]]:
    """Register a loader for `op` (several, separated by spaces)."""

    def register(load: Callable[[], Function]) -> Callable[[], Function]:
        for one in op.split():
            PROVIDERS.setdefault(one, []).append(Provider(one, name, kind, load, **options))
        return load

    return register


# --- ours ---------------------------------------------------------------------------------------


def _linear_logprobs(x: Inputs, backend: str, recompute: bool) -> Outputs:
    args = (x["hidden"], x["weight"], x["labels"])
    tokens = ops.linear_logprobs(*args, with_entropy=True, recompute=recompute, backend=backend)
    assert tokens.entropy is not None
    return tokens.logprobs, tokens.entropy


def _logprobs_entropy(x: Inputs, backend: str) -> Outputs:
    tokens = ops.logprobs(x["logits"], x["labels"], with_entropy=True, backend=backend)
    assert tokens.entropy is not None
    return tokens.logprobs, tokens.entropy


def _ppo(x: Inputs, backend: str) -> Outputs:
    values = {n: x[n] for n in ("values", "old_values", "returns")}
    args = (x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"])
    return (ops.ppo_loss(*args, **values, backend=backend).loss,)


def _linear_ppo(x: Inputs, backend: str) -> Outputs:
    args = [x[n] for n in ("hidden", "weight", "labels", "old_logprobs", "advantages", "mask")]
    return (ops.linear_ppo_loss(*args, backend=backend).loss,)


OURS: dict[str, Callable[[Inputs, str], Outputs]] = {
    "logprobs": lambda x, b: (ops.logprobs(x["logits"], x["labels"], backend=b).logprobs,),
    "logprobs_entropy": _logprobs_entropy,
    "logits_kl": lambda x, b: (ops.logits_kl(x["logits"], x["ref_logits"], backend=b),),
    "linear_cross_entropy": lambda x, b: (
        ops.linear_cross_entropy(x["hidden"], x["weight"], x["labels"], x["mask"], backend=b),
    ),
    "linear_ppo_loss": _linear_ppo,
    "linear_logprobs": lambda x, b: _linear_logprobs(x, b, recompute=False),
    "linear_logprobs_recompute": lambda x, b: _linear_logprobs(x, b, recompute=True),
    "ppo_loss": _ppo,
    "gae": lambda x, b: ops.gae(x["rewards"], x["values"], x["mask"], backend=b),
    "pairwise_ranking_loss": lambda x, b: (
        ops.pairwise_ranking_loss(x["scores"], x["ranks"], x["offsets"], backend=b).loss,
    ),
}


def _register_ours(op: str, backend: str, devices: tuple[str, ...]) -> None:
    @provider(op, f"fastrlhf[{backend}]", "ours", package="fastrlhf", devices=devices)
    def load() -> Function:
        report = ops.backends()[backend]
        if not report["available"]:
            raise ImportError(report["why_not"])
        return lambda x: OURS[op](x, backend)


for _op in OURS:
    if _op.startswith(("logprobs", "linear_")):  # what the cluster kernels serve
        _register_ours(_op, "cuda", ("cuda",))
    _register_ours(_op, "cpu", ("cpu",))
    _register_ours(_op, "triton", ("cuda",))
    _register_ours(_op, "torch", ("cpu", "cuda"))


# --- plain torch, as a trainer would write it ---------------------------------------------------


def chosen(logp: Tensor, labels: Tensor) -> Tensor:
    return logp.gather(-1, labels[:, None]).squeeze(-1)


def eager_logprobs(x: Inputs) -> Outputs:
    return (chosen(torch.log_softmax(x["logits"].float(), -1), x["labels"]),)


def eager_logprobs_entropy(x: Inputs) -> Outputs:
    logp = torch.log_softmax(x["logits"].float(), -1)
    return chosen(logp, x["labels"]), -(logp.exp() * logp).sum(-1)


def eager_logprobs_entropy_same_dtype(x: Inputs) -> Outputs:
    logp = torch.log_softmax(x["logits"], -1)
    return chosen(logp, x["labels"]), -(logp.exp() * logp).sum(-1)


def eager_logits_kl(x: Inputs) -> Outputs:
    logp, logq = (torch.log_softmax(x[n].float(), -1) for n in ("logits", "ref_logits"))
    return ((logp.exp() * (logp - logq)).sum(-1),)


def eager_linear_cross_entropy(x: Inputs) -> Outputs:
    return (F.cross_entropy(F.linear(x["hidden"], x["weight"]).float(), x["labels"]),)


def eager_linear_ppo(x: Inputs) -> Outputs:
    logp = chosen(torch.log_softmax(F.linear(x["hidden"], x["weight"]).float(), -1), x["labels"])
    ratio = torch.exp(logp - x["old_logprobs"])
    losses = torch.maximum(-x["advantages"] * ratio, -x["advantages"] * ratio.clamp(0.8, 1.2))
    return ((losses * x["mask"]).sum() / x["mask"].sum(),)


def eager_linear_logprobs(x: Inputs) -> Outputs:
    return eager_logprobs_entropy(
        {"logits": F.linear(x["hidden"], x["weight"]), "labels": x["labels"]}
    )


def eager_ppo(x: Inputs) -> Outputs:
    values = {n: x[n] for n in ("values", "old_values", "returns")}
    return (
        ppo_loss_ref(x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"], **values).loss,
    )


def eager_ranking(x: Inputs) -> Outputs:
    return (pairwise_ranking_loss_ref(x["scores"], x["ranks"], x["offsets"]).loss,)


EAGER: dict[str, Function] = {
    "logprobs": eager_logprobs,
    "logprobs_entropy": eager_logprobs_entropy,
    "logits_kl": eager_logits_kl,
    "linear_cross_entropy": eager_linear_cross_entropy,
    "linear_ppo_loss": eager_linear_ppo,
    "linear_logprobs": eager_linear_logprobs,
    "linear_logprobs_recompute": eager_linear_logprobs,
    "ppo_loss": eager_ppo,
    "pairwise_ranking_loss": eager_ranking,
}


def _register_eager(op: str, function: Function) -> None:
    provider(op, "eager", package="torch")(lambda: function)

    @provider(op, "torch.compile", package="torch")
    def load() -> Function:
        return torch.compile(function, fullgraph=True, dynamic=False)


for _op, _function in EAGER.items():
    _register_eager(_op, _function)

provider("logprobs_entropy", "eager, no upcast", package="torch")(
    lambda: eager_logprobs_entropy_same_dtype
)


# --- Python loops -------------------------------------------------------------------------------


def loop_gae(x: Inputs, gamma: float = 1.0, lam: float = 0.95) -> Outputs:
    """Return GAE by the usual loop over time, for rows padded on the right."""
    rewards, values = x["rewards"] * x["mask"], x["values"] * x["mask"]
    last, columns = torch.zeros_like(rewards[:, 0]), []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        next_value = values[:, t + 1] if t < length - 1 else 0.0
        last = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], 1)
    return advantages * x["mask"], (advantages + values) * x["mask"]


def loop_pairs(x: Inputs) -> Outputs:
    """Return the ranking loss by loops over prompts and pairs; ranks are read on the host once."""
    scores, ranks, offsets = x["scores"], x["ranks"].tolist(), x["offsets"].tolist()
    prompts = []
    for begin, end in itertools.pairwise(offsets):
        losses = [
            -F.logsigmoid(scores[i] - scores[j])
            for i in range(begin, end)
            for j in range(begin, end)
            if ranks[i] < ranks[j]
        ]
        if losses:
            prompts.append(torch.stack(losses).mean())
    return (torch.stack(prompts).mean(),)


provider("gae", "Python loop over time", package="torch")(lambda: loop_gae)
provider("pairwise_ranking_loss", "Python loop over pairs", package="torch")(lambda: loop_pairs)


@provider("gae", "torch.compile", package="torch", devices=("cuda",))
def _() -> Function:
    # the loop would unroll to one graph of T steps, minutes to compile: this is the vectorised
    # product form instead
    return torch.compile(matrix_gae, fullgraph=True, dynamic=False)


def matrix_gae(x: Inputs, gamma: float = 1.0, lam: float = 0.95) -> Outputs:
    """Return GAE as one [B, T] x [T, T] product.

    A = delta M with M_kt = (gamma lam)^(k - t) for k >= t.
    """
    rewards, values = x["rewards"] * x["mask"], x["values"] * x["mask"]
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    t = torch.arange(rewards.shape[1], device=rewards.device)
    powers = torch.where(t[:, None] >= t, (gamma * lam) ** (t[:, None] - t).to(delta.dtype), 0.0)
    advantages = delta @ powers
    return advantages * x["mask"], (advantages + values) * x["mask"]


@provider("gae", "eager", package="torch", devices=("cuda",))
def _() -> Function:
    return lambda x: _gae_torch(x["rewards"], x["values"], x["mask"], 1.0, 0.95)


# --- bare GEMMs ---------------------------------------------------------------------------------


class BareGemms:
    """The bare products: logits = h W^T, dh = dlogits W, dW = dlogits^T h (and logits once more).

    The logits go to an existing buffer. dh and dW are new tensors, as the gradients of any op must
    be.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.logits: Tensor | None = None

    def __call__(self, x: Inputs) -> Outputs:
        hidden, weight = x["hidden"].detach(), x["weight"].detach()
        if self.logits is None or self.logits.shape != (hidden.shape[0], weight.shape[0]):
            self.logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        for _ in range(self.count - 2):
            torch.mm(hidden, weight.T, out=self.logits)
        return torch.mm(self.logits, weight), torch.mm(self.logits.T, hidden)


def _register_gemms(op: str, count: int) -> None:
    provider(op, f"{count} bare GEMMs", "floor", package="torch", modes=("fwd+bwd",))(
        lambda: BareGemms(count)
    )


for _op, _count in (
    ("linear_cross_entropy", 3),
    ("linear_ppo_loss", 3),
    ("linear_logprobs", 3),
    ("linear_logprobs_recompute", 4),
):
    _register_gemms(_op, _count)
