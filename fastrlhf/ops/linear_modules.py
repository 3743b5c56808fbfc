"""The linear ops as nn.Modules, for models that keep their loss as a submodule.

They hold options, never parameters: the weight is an argument of each call, so a tied or sharded
one stays the model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn

from fastrlhf.ops import checks
from fastrlhf.ops.linear import linear_logprobs
from fastrlhf.ops.linear_loss import linear_cross_entropy, linear_ppo_loss
from fastrlhf.ops.logprob import TokenLogprobs
from fastrlhf.ops.ppo import PPOLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class SharedOptions(TypedDict, total=False):
    """Options of all linear ops, as in `linear_logprobs`."""

    temperature: float
    vocab_start: int | None
    vocab_size: int | None
    group: ProcessGroup | None
    backend: str


class _FusedLinear(nn.Module):
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        vocab_start: int | None = None,
        vocab_size: int | None = None,
        group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        self.temperature, self.backend = temperature, backend
        self.vocab_start, self.vocab_size, self.group = vocab_start, vocab_size, group

    def _options(self) -> SharedOptions:
        return {
            "temperature": self.temperature,
            "vocab_start": self.vocab_start,
            "vocab_size": self.vocab_size,
            "group": self.group,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        """Return every option, the group by its name, so that printed losses are distinct."""
        held = {
            name: value
            for name, value in vars(self).items()
            if name != "training" and not name.startswith("_")
        }
        held["group"] = None if self.group is None else self.group.group_name
        return ", ".join(f"{name}={value!r}" for name, value in held.items())


class FusedLinearLogprobs(_FusedLinear):
    """`linear_logprobs` with fixed options; `forward` takes its tensors."""

    def __init__(
        self,
        *,
        recompute: bool | str = "auto",
        with_entropy: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**options)
        checks.choice("recompute", recompute, ("auto", True, False))
        self.recompute, self.with_entropy = recompute, with_entropy

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
    ) -> TokenLogprobs:
        return linear_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            mask=mask,
            ref_logprobs=ref_logprobs,
            recompute=self.recompute,
            with_entropy=self.with_entropy,
            **self._options(),
        )


class FusedLinearCrossEntropy(_FusedLinear):
    """`linear_cross_entropy` with fixed options; by default `ignore_index` labels are masked."""

    def __init__(self, *, ignore_index: int = -100, **options: Unpack[SharedOptions]) -> None:
        super().__init__(**options)
        self.ignore_index = ignore_index

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        mask = labels != self.ignore_index if mask is None else mask
        return linear_cross_entropy(
            hidden, weight, labels, mask, bias=bias, denominator=denominator, **self._options()
        )


class FusedLinearPPOLoss(_FusedLinear):
    """`linear_ppo_loss` with fixed options; `forward` takes its tensors."""

    def __init__(
        self, *, clip: float = 0.2, entropy_coef: float = 0.0, **options: Unpack[SharedOptions]
    ) -> None:
        super().__init__(**options)
        checks.positive("clip", clip)
        self.clip, self.entropy_coef = clip, entropy_coef

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> PPOLoss:
        return linear_ppo_loss(
            hidden,
            weight,
            labels,
            old_logprobs,
            advantages,
            mask,
            bias=bias,
            denominator=denominator,
            clip=self.clip,
            entropy_coef=self.entropy_coef,
            **self._options(),
        )
