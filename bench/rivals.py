"""Other libraries' versions of the ops, called as their documentation says, if installed.

No library compared here has linear_ppo_loss or pairwise_ranking_loss.
"""

from __future__ import annotations

from typing import Any

from bench.cases import Inputs, Outputs
from bench.providers import Function, provider

CUDA = ("cuda",)


def cuda(name: str) -> dict[str, Any]:
    return {"package": name, "devices": CUDA}


@provider("logprobs_entropy", "TRL", **cuda("trl"))
def _() -> Function:
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda x: tuple(selective_log_softmax_and_entropy(x["logits"], x["labels"]))


@provider("linear_logprobs linear_logprobs_recompute", "TRL", package="trl")
def _() -> Function:
    from trl.kernels import ChunkedLogProbFunction

    def run(x: Inputs) -> Outputs:
        # hidden, weight, bias, targets, temperature, columns a tile (TRL's trainers pass 32,768)
        return tuple(
            ChunkedLogProbFunction.apply(x["hidden"], x["weight"], None, x["labels"], 1.0, 32768)[
                :2
            ]
        )

    return run


# The gradient goes over the logits, already in the forward: so there is no backward to time alone.
@provider(
    "logprobs", "Liger", mutates=("logits",), modes=("fwd", "fwd+bwd"), **cuda("liger-kernel")
)
def _() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x: (-liger_cross_entropy(x["logits"], x["labels"], reduction="none"),)


@provider("linear_cross_entropy", "Liger", **cuda("liger-kernel"))
def _() -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x: (liger_fused_linear_cross_entropy(x["hidden"], x["weight"], x["labels"]),)


@provider("logprobs", "flash-attn", **cuda("flash-attn"))
def _() -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x: (-cross_entropy_loss(x["logits"], x["labels"])[0],)


@provider("logprobs", "quack", **cuda("quack-kernels"))
def _() -> Function:
    from quack.cross_entropy import cross_entropy

    return lambda x: (-cross_entropy(x["logits"], x["labels"], reduction="none"),)


@provider("linear_cross_entropy", "quack", **cuda("quack-kernels"))
def _() -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: (chunked_linear_cross_entropy(x["hidden"], x["weight"], x["labels"]),)


@provider("linear_cross_entropy", "cut-cross-entropy", **cuda("cut-cross-entropy"))
def _() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x: (linear_cross_entropy(x["hidden"], x["weight"], x["labels"]),)


@provider("linear_cross_entropy", "F.linear_cross_entropy", package="torch")
def _() -> Function:
    import torch

    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    function = torch.nn.functional.linear_cross_entropy
    return lambda x: (function(x["hidden"], x["weight"], x["labels"], options=options),)


@provider("logprobs", "F.cross_entropy", package="torch")
def _() -> Function:
    from torch.nn.functional import cross_entropy

    return lambda x: (-cross_entropy(x["logits"], x["labels"], reduction="none").float(),)
