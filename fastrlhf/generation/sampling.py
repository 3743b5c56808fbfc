"""Sampling of next tokens from vocabulary-sharded logits, without gathering the logits.

A sample is a pure function of (seed, sequence id, position, logits): batch order, slots and
parallel layout never change it. Not supported: repetition penalties and beam search, because a PPO
rollout must follow the policy's own distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastrlhf.config import GenerationConfig
from fastrlhf.models.stage import VOCAB_MULTIPLE
from fastrlhf.parallel.mesh import hashed_seed

Tensor = torch.Tensor
BLOCK = VOCAB_MULTIPLE
"""Tokens in a block of the vocabulary; every shard consists of full blocks."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling distribution and end of a response.

    Truncation follows the usual order: temperature, then `top_k`, then `top_p` of the remaining
    tokens. `stop` strings end a response whenever they appear; `min_new_tokens` suppresses the
    stop token only. Temperature 0 is greedy.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    cache_mb: float | None = None
    """Maximum size of the KV cache per rank, in 10^6 bytes.

    If it binds, fewer sequences decode at once, and no response changes. None: half of a GPU's
    free memory; on a CPU, no bound.
    """
    cuda_graphs: bool = False
    """Replay decode steps as CUDA graphs (a GPU without tensor or pipeline parallelism).

    Off by default: not measured on a GPU yet.
    """

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
        """Return the parameters of the `generation` section, with the run's seed."""
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
        """Whether samples come from a truncated distribution (top-k or top-p)."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


# ---- counter-based noise -------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift; torch's >> copies the sign


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to int64.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
    """
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def row_keys(seed: int, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the key of the random stream of each (seed, sequence id, position), int64 [B].

    `positions` are those of the tokens to sample. The seed is hashed: otherwise id 1 under seed 1
    would share its stream with id 0 under seed 2.
    """
    return _mix(_mix(ids + hashed_seed(seed)) + positions)


def exponentials(keys: Tensor, counters: Tensor) -> Tensor:
    """Return standard exponential variates, float64 [B, N].

    Element [b, n] is made from output number counters[n] (or counters[b, n]) of SplitMix64 stream
    keys[b].
    """
    bits = _shift(_mix(keys[:, None] + counters * _GOLDEN), 12)
    return -torch.log((bits.double() + 0.5) * 2.0**-52)


# ---- the sampler ---------------------------------------------------------------------------------


class Sampler:
    """Sampler of next tokens from the last stage's hidden states.

    `weight` [V_local, H] is this rank's shard of the LM head; `group` is the group over which the
    vocabulary is sharded (None: not sharded). `missing` are ids below `vocab_size` that are no
    token: they are never sampled, but count in the log-probabilities, as they do in training.

    Without truncation a token is sampled in two exponential races (Gumbel-max without logarithms):
    block b of 128 tokens wins with probability sum_{v in b} p_v, then token v of the block with
    probability p_v / sum p. The product is p_v, and a row needs V / 128 + 128 random numbers
    instead of V. Each shard sends its winner: one all-gather of four numbers per row. With
    truncation, the top_k candidates of each shard (all tokens if only top_p is set) are gathered,
    and the race is among the tokens kept.
    """

    def __init__(
        self,
        params: SamplingParams,
        weight: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        eos: int | Sequence[int],
        missing: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.weight = weight.detach()
        self.group = group
        # Greedy tokens report their log-probabilities at temperature 1.
        self.temperature = params.temperature or 1.0
        columns = weight.shape[0]
        self.start = columns * (group.rank() if group is not None else 0)
        self.columns = min(columns, max(0, vocab_size - self.start))
        self.vocab_size = vocab_size
        stops = [eos] if isinstance(eos, int) else eos
        local = [token - self.start for token in stops]
        self.eos = [column for column in local if 0 <= column < self.columns]
        self.missing = torch.tensor(
            [token - self.start for token in missing if 0 <= token - self.start < self.columns],
            dtype=torch.long,
            device=weight.device,
        )
        blocks = torch.arange(
            self.start // BLOCK, (self.start + columns) // BLOCK, device=weight.device
        )
        # Block numbers stay below 2^32, so the two races never share a random number.
        self.counters = torch.cat([blocks, (1 << 32) + torch.arange(BLOCK, device=weight.device)])

    def __call__(
        self, hidden: Tensor, ids: Tensor, positions: Tensor, eos_from: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a token per row of hidden [B, H]: (tokens int64 [B], log-probabilities fp32 [B]).

        Every rank of the group returns the same values. `positions` int64 [B] are those of the
        tokens to sample; a stop token is never sampled at positions before `eos_from`.
        Log-probabilities are log softmax(logits / temperature) over the full vocabulary, whether
        or not the samples are truncated.
        """
        logits = (hidden @ self.weight.T).float()
        logits[:, self.columns :] = -torch.inf
        suppressed = None
        if eos_from is not None and self.eos:
            is_early = positions < eos_from
            columns = [logits[:, column] for column in self.eos]
            suppressed = torch.stack([torch.where(is_early, x, -torch.inf) for x in columns], -1)
            for column in columns:
                column.masked_fill_(is_early, -torch.inf)
        if self.missing.numel():
            holes = logits[:, self.missing]
            logits[:, self.missing] = -torch.inf
            suppressed = holes if suppressed is None else torch.cat([suppressed, holes], -1)
        if self.params.truncated:
            return self._truncated(logits, suppressed, row_keys(self.params.seed, ids, positions))
        if self.params.temperature == 0:
            score, token, value, lse = self._greedy(logits)
        else:
            score, token, value, lse = self._race(
                logits, row_keys(self.params.seed, ids, positions)
            )
        shards = self._gather(
            torch.stack([score, token + self.start, value, self._add_suppressed(lse, suppressed)])
        )
        best = shards[:, 0].argmax(0)
        token, value = shards[best, 1:3, torch.arange(best.numel(), device=best.device)].unbind(1)
        return token.long(), (value - shards[:, 3].logsumexp(0)).float()

    def _gather(self, x: Tensor) -> Tensor:
        """Return every shard's x in rank order, [R, *x.shape]; float64 holds token ids exactly."""
        if self.group is None:
            return x[None]
        out = x.new_empty(self.group.size(), *x.shape)
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def _add_suppressed(self, lse: Tensor, suppressed: Tensor | None) -> Tensor:
        """Return the log-sum-exp including the logits [B, N] of suppressed tokens.

        Suppressing a token changes what is sampled, not the policy's distribution.
        """
        if suppressed is None:
            return lse
        return torch.logaddexp(lse, (suppressed.double() / self.temperature).logsumexp(-1))

    def _greedy(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `_race` returns, for the token with the largest logit."""
        top, token = logits.max(-1)
        top = top.clamp_min(torch.finfo(top.dtype).min)
        total = (logits - top[:, None]).exp_().sum(-1)
        return top.double(), token.double(), top.double(), top.double() + total.double().log()

    def _race(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return this shard's winner: (score, local token, logit / T, log-sum-exp of logits / T).

        All are float64 [B]. Overwrites `logits`.
        """
        rows = torch.arange(logits.shape[0], device=logits.device)
        # The maximum of a shard that holds only padding is -inf, and -inf - -inf would be NaN.
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
        self, logits: Tensor, suppressed: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (tokens, log-probabilities) of truncated samples; overwrites `logits`."""
        scaled = logits.div_(self.temperature)
        top = scaled.amax(-1).clamp_min(torch.finfo(scaled.dtype).min)
        lse = (scaled - top[:, None]).exp_().sum(-1).double().log() + top
        # A shard may have fewer columns than top_k. All shards have the same shape, so all gather
        # the same number of candidates.
        k = min(self.params.top_k or scaled.shape[1], scaled.shape[1])
        values, tokens = scaled.topk(k)
        packed = torch.cat(
            [
                values.double(),
                (tokens + self.start).double(),
                self._add_suppressed(lse, suppressed)[:, None],
            ],
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
        # One counter per token, independent of its rank, above the counters of `_race`.
        choice = (weights / exponentials(keys, (1 << 33) + tokens)).argmax(-1, keepdim=True)
        logprob = values.gather(1, choice)[:, 0] - shards[:, :, -1].logsumexp(0)
        return tokens.gather(1, choice)[:, 0], logprob.float()
