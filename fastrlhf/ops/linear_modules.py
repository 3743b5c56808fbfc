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
from fastrlhf.ops.policy import check_policy
from fastrlhf.ops.ppo import PPOLoss
from fastrlhf.ops.scalars import Number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class SharedOptions(TypedDict, total=False):
    """Options of all linear ops, as in `linear_logprobs`."""

    temperature: Number
    softcap: Number | None
    vocab_start: int | None
    vocab_size: int | None
    group: ProcessGroup | None
    backend: str


class _FusedLinear(nn.Module):
    def __init__(
        self,
        *,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        vocab_start: int | None = None,
        vocab_size: int | None = None,
        group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        if softcap is not None:
            checks.positive("softcap", softcap)
        self.temperature, self.softcap, self.backend = temperature, softcap, backend
        self.vocab_start, self.vocab_size, self.group = vocab_start, vocab_size, group

    def _options(self) -> SharedOptions:
        return {
            "temperature": self.temperature,
            "softcap": self.softcap,
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
        num_counted: int | None = None,
    ) -> TokenLogprobs:
        return linear_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            mask=mask,
            ref_logprobs=ref_logprobs,
            num_counted=num_counted,
            recompute=self.recompute,
            with_entropy=self.with_entropy,
            **self._options(),
        )


class FusedLinearCrossEntropy(_FusedLinear):
    """`linear_cross_entropy` with fixed options; by default `ignore_index` labels are masked."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: Number = 0.0,
        z_loss: Number = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**options)
        checks.fraction("label_smoothing", label_smoothing)
        checks.not_negative("z_loss", z_loss)
        self.ignore_index = ignore_index
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        denominator: Number | None = None,
        num_counted: int | None = None,
    ) -> Tensor:
        mask = labels != self.ignore_index if mask is None else mask
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            mask,
            bias=bias,
            denominator=denominator,
            num_counted=num_counted,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            **self._options(),
        )


class FusedLinearPPOLoss(_FusedLinear):
    """`linear_ppo_loss` with fixed options; `forward` takes its tensors."""

    def __init__(
        self,
        *,
        clip: Number | tuple[Number, Number] = 0.2,
        dual_clip: Number | None = None,
        kl_coef: Number = 0.0,
        kl_estimator: str = "k3",
        objective: str = "clip",
        ratio: str = "token",
        entropy_coef: Number = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**options)
        check_policy(clip, dual_clip, kl_coef, kl_estimator, objective, ratio)
        self.clip, self.dual_clip, self.entropy_coef = clip, dual_clip, entropy_coef
        self.kl_coef, self.kl_estimator = kl_coef, kl_estimator
        self.objective, self.ratio = objective, ratio

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
        bias: Tensor | None = None,
        denominator: Number | None = None,
        num_counted: int | None = None,
    ) -> PPOLoss:
        return linear_ppo_loss(
            hidden,
            weight,
            labels,
            old_logprobs,
            advantages,
            mask,
            ref_logprobs=ref_logprobs,
            weights=weights,
            bias=bias,
            denominator=denominator,
            num_counted=num_counted,
            clip=self.clip,
            dual_clip=self.dual_clip,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            objective=self.objective,
            ratio=self.ratio,
            entropy_coef=self.entropy_coef,
            **self._options(),
        )
