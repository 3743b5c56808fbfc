"""Draws next tokens from vocabulary-sharded logits, without gathering them.

A draw is a pure function of (seed, sequence id, position, logits): batch order, slots and parallel layout never change
it. Left out on purpose: repetition penalties and beam search; a PPO rollout must follow the policy's own distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastrlhf.config import GenerationConfig
from fastrlhf.models.gpt import VOCAB_MULTIPLE
from fastrlhf.parallel.mesh import hashed_seed

Tensor = torch.Tensor
BLOCK = VOCAB_MULTIPLE
"""Tokens in a block of the vocabulary; every shard is a whole number of blocks."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn and when they end.

    Truncation follows the usual order: temperature, then `top_k`, then `top_p` of what is left. `stop` strings end a
    response whenever they appear; `min_new_tokens` holds back the stop token only. Temperature 0 is greedy.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    cache_mb: float | None = None
    """Most memory of the KV cache on a rank, 10^6 bytes: fewer sequences decode at once where it binds, and no response
    changes. None: half of a GPU's free memory; on a CPU, no bound."""
    cuda_graphs: bool = False
    """Decode steps as CUDA graphs, on a GPU without tensor and pipeline parallelism. Off until measured on one."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens < 1:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}: "
                "expected 0 <= min_new_tokens <= max_new_tokens and max_new_tokens >= 1"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or above")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected above 0 and at most 1")
        if any(not text for text in self.stop):
            raise ValueError(
                "stop holds an empty string, which would end every response at once; remove it"
            )
        if self.cache_mb is not None and self.cache_mb <= 0:
            raise ValueError(f"cache_mb is {self.cache_mb}; expected megabytes above 0, or None")

    @classmethod
    def from_config(cls, generation: GenerationConfig, seed: int) -> SamplingParams:
        """The configuration's `generation` section, with the run's seed."""
        return cls(
            max_new_tokens=generation.max_new_tokens,
            min_new_tokens=generation.min_new_tokens,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            stop=tuple(generation.stop),
            seed=seed,
            cache_mb=generation.cache_mb,
            cuda_graphs=generation.cuda_graphs,
        )

    @property
    def truncated(self) -> bool:
        """True when the draw is not from the model's whole distribution."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


# --- counter-based noise ---------------------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, where torch's >> copies the sign


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") on int64."""
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def row_keys(seed: int, ids: Tensor, positions: Tensor) -> Tensor:
    """int64 [B]: one stream of random numbers for each (seed, sequence id, position of the token to draw).

    The seed is hashed, or id 1 under seed 1 would have the stream of id 0 under seed 2.
    """
    return _mix(_mix(ids + hashed_seed(seed)) + positions)


def exponentials(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard exponentials, float64 [B, N]: number counters[n] (or [b, n]) of stream keys[b], SplitMix64's n-th
    output.
    """
    bits = _shift(_mix(keys[:, None] + counters * _GOLDEN), 12)
    return -torch.log((bits.double() + 0.5) * 2.0**-52)


# --- the sampler -----------------------------------------------------------------------------------------------------


class Sampler:
    """Next tokens from the hidden states of the last stage, where the LM head's weight [V_local, H] is this rank's
    shard.

    Without truncation a token is drawn in two races of exponentials (Gumbel-max, written without its logarithms): block
    b of 128 tokens wins with probability sum_{v in b} p_v, then token v of it with p_v / sum p. The product is p_v, for
    V / 128 + 128 random numbers a row in place of V. Each shard sends its winner: one gather of four numbers a row.
    Truncated draws gather top_k candidates of each shard (all tokens if only top_p is set) and race among those kept.
    """

    def __init__(
        self,
        params: SamplingParams,
        weight: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        eos: int,
    ) -> None:
        self.params = params
        self.weight = weight.detach()
        self.group = group
        # The log-probabilities of greedy tokens are those at temperature 1.
        self.temperature = params.temperature or 1.0
        columns = weight.shape[0]
        self.start = columns * (group.rank() if group is not None else 0)
        self.columns = min(columns, max(0, vocab_size - self.start))
        self.vocab_size = vocab_size
        self.eos = eos - self.start if 0 <= eos - self.start < self.columns else None
        blocks = torch.arange(
            self.start // BLOCK, (self.start + columns) // BLOCK, device=weight.device
        )
        # Block numbers stay below 2^32, so the two races never share a random number.
        self.counters = torch.cat([blocks, (1 << 32) + torch.arange(BLOCK, device=weight.device)])

    def __call__(
        self, hidden: Tensor, ids: Tensor, positions: Tensor, eos_from: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, H] -> (tokens int64 [B], log-probabilities fp32 [B]), the same on every rank of the group.

        `positions` int64 [B] are those of the tokens to draw; the stop token cannot be drawn at positions before
        `eos_from`. Log-probabilities are of log softmax(logits / temperature) over the whole vocabulary, truncated or
        not.
        """
        logits = (hidden @ self.weight.T).float()
        logits[:, self.columns :] = -torch.inf
        held_back = None
        if eos_from is not None and self.eos is not None:
            held_back = torch.where(positions < eos_from, logits[:, self.eos], -torch.inf)
            logits[:, self.eos].masked_fill_(positions < eos_from, -torch.inf)
        if self.params.truncated:
            return self._truncated(logits, held_back, row_keys(self.params.seed, ids, positions))
        if self.params.temperature == 0:
            score, token, value, lse = self._greedy(logits)
        else:
            score, token, value, lse = self._race(
                logits, row_keys(self.params.seed, ids, positions)
            )
        shards = self._gather(
            torch.stack([score, token + self.start, value, self._whole(lse, held_back)])
        )
        best = shards[:, 0].argmax(0)
        token, value = shards[best, 1:3, torch.arange(best.numel(), device=best.device)].unbind(1)
        return token.long(), (value - shards[:, 3].logsumexp(0)).float()

    def _gather(self, x: Tensor) -> Tensor:
        """Every shard's x, in rank order: [R, *x.shape]. float64 carries token ids exactly."""
        if self.group is None:
            return x[None]
        out = x.new_empty(self.group.size(), *x.shape)
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def _whole(self, lse: Tensor, held_back: Tensor | None) -> Tensor:
        """Log-sum-exp with the stop token's logit put back: holding it back changes the draw, not the policy."""
        return (
            lse
            if held_back is None
            else torch.logaddexp(lse, held_back.double() / self.temperature)
        )

    def _greedy(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top, token = logits.max(-1)
        top = top.clamp_min(torch.finfo(top.dtype).min)
        total = (logits - top[:, None]).exp_().sum(-1)
        return top.double(), token.double(), top.double(), top.double() + total.double().log()

    def _race(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(score, local token, logit / T, log-sum-exp of logits / T) of this shard, float64 [B]; overwrites logits."""
        rows = torch.arange(logits.shape[0], device=logits.device)
        # A shard of padding only has a maximum of -inf, and -inf - -inf would be NaN.
        top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
        weights = logits.sub_(top)
        if self.temperature != 1:
            weights = weights.div_(self.temperature)
        weights = weights.exp_().view(rows.numel(), -1, BLOCK)
        noise = exponentials(keys, self.counters)
        blocks = weights.sum(-1)
        score, block = (blocks / noise[:, :-BLOCK]).max(-1)
        inside = weights[rows, block]
        offset = (inside / noise[:, -BLOCK:]).argmax(-1)
        shift = top[:, 0].double() / self.temperature
        value = inside[rows, offset].double().log() + shift
        return (
            score.log() + shift,
            (block * BLOCK + offset).double(),
            value,
            blocks.double().sum(-1).log() + shift,
        )

    def _truncated(
        self, logits: Tensor, held_back: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.div_(self.temperature)
        top = scaled.amax(-1).clamp_min(torch.finfo(scaled.dtype).min)
        lse = (scaled - top[:, None]).exp_().sum(-1).double().log() + top
        # A shard may hold fewer columns than top_k; shards have equal shapes, so all gather the same number.
        k = min(self.params.top_k or scaled.shape[1], scaled.shape[1])
        values, tokens = scaled.topk(k)
        packed = torch.cat(
            [values.double(), (tokens + self.start).double(), self._whole(lse, held_back)[:, None]],
            1,
        )
        shards = self._gather(packed)
        values, order = (
            shards[:, :, :k].transpose(0, 1).flatten(1).sort(descending=True, stable=True)
        )
        tokens = shards[:, :, k:-1].transpose(0, 1).flatten(1).gather(1, order).long()
        values, tokens = (
            values[:, : self.params.top_k or None],
            tokens[:, : self.params.top_k or None],
        )
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        weights = torch.where(before < self.params.top_p, probabilities, 0.0)
        # Counters past both races of the whole vocabulary, one for each token, wherever it stands in the order.
        choice = (weights / exponentials(keys, (1 << 33) + tokens)).argmax(-1, keepdim=True)
        logprob = values.gather(1, choice)[:, 0] - shards[:, :, -1].logsumexp(0)
        return tokens.gather(1, choice)[:, 0], logprob.float()
