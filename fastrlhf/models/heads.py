"""The heads: the arguments of the LM head, and the fp32 scalar head of reward and value models."""

from __future__ import annotations

import math
from typing import Literal, TypedDict

import torch
import torch.distributed as dist

Head = Literal["lm", "scalar"]


class LMHead(TypedDict):
    """The arguments of `ops.linear_*` that describe an LM head."""

    weight: torch.Tensor
    """[V_local, H]: this rank's rows of the unembedding, padding included."""
    vocab_size: int
    """Ids of the softmax: `GPT.num_tokens`."""
    group: dist.ProcessGroup | None
    """The group over which the vocabulary is sharded; None if it is not."""


class ScalarHead(torch.nn.Module):
    """Linear map from a hidden state to one number, replicated on all tensor-parallel ranks.

    Its weights are fp32 whatever the dtype of the other layers. Weight [H] ~ N(0, 1 / (H + 1)),
    bias 0 (Stiennon et al. 2020, appendix; arXiv 2009.01325).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.bias = torch.nn.Parameter(torch.empty(1, dtype=torch.float32))

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial weights."""
        return 1.0 / math.sqrt(self.weight.numel() + 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden [..., H] of any float dtype to scores, fp32 [...]."""
        return hidden.float() @ self.weight + self.bias
