"""The scalar head of reward and value models: fp32 whatever the body's dtype."""

from __future__ import annotations

import math

import torch


class ScalarHead(torch.nn.Module):
    """Linear map from a hidden state to one number, replicated on all tensor-parallel ranks.

    Weight [H] ~ N(0, 1 / (H + 1)), bias 0 (Stiennon et al. 2020, appendix; arXiv 2009.01325).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.bias = torch.nn.Parameter(torch.empty(1, dtype=torch.float32))

    @property
    def init_std(self) -> float:
        return 1.0 / math.sqrt(self.weight.numel() + 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] of any float dtype -> scores fp32 [...]."""
        return hidden.float() @ self.weight + self.bias
