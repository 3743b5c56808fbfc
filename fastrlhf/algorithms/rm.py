"""The reward model: -1 / C(K, 2) * sum of log sigmoid(r_better - r_worse) over all pairs of a prompt's K ranked
responses.

All pairs of a prompt are in one micro-batch; ties are dropped; prompts weigh the same whatever their K (InstructGPT,
section 3.5, equation 1). A prompt is encoded once and its responses branch from it (model.shared_prompt), which gives
the scores of one forward per completion from fewer tokens.

    torchrun --nproc-per-node 8 -m fastrlhf rm configs/instructgpt/6b/rm.yaml
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastrlhf import ops
from fastrlhf.data import packing
from fastrlhf.data.batches import (
    PackedBatch,
    RankingBatch,
    TokenizedRanking,
    pack_rankings,
    ranking_tokens,
)
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh


class RewardModelling:
    """One update a step from this rank's micro-batches, each of whole prompts with all their responses."""

    def __init__(self, mesh: Mesh, reward: Any) -> None:
        self.mesh = mesh
        self.reward = reward
        self._statistics: dict[str, float] = {}

    def step(self, micro_batches: Sequence[RankingBatch]) -> dict[str, float]:
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        counts = self.mesh.sum_over_data(_counts(self.mesh, batches))
        prompts = counts[0].float()

        def head(
            hidden: torch.Tensor, batch: RankingBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            ranking = ranking_loss(self.reward.model, hidden, batch)
            loss = ranking.loss * (batch.num_prompts / prompts)
            return loss, {"loss": loss.detach(), **_sums_over_pairs(ranking)}

        metrics = _per_pair(self.mesh.sum_metrics(self.reward.accumulate(batches, head)))
        _, tokens, separate = counts.tolist()
        return metrics | self.reward.step() | {"tokens": tokens, "tokens_unshared": separate}

    def center(self, demonstrations: Iterable[Sequence[PackedBatch]]) -> None:
        """Shifts the head's bias so that demonstrations score 0 on average (section 3.5), and keeps their
        statistics.
        """
        stage = self.reward.model
        scores = score_responses(self.mesh, stage, demonstrations).double()
        moments = torch.stack([torch.ones_like(scores), scores, scores.square()]).sum(1)
        count, total, squares = self.mesh.sum_over_data(moments)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0.0).sqrt()
        if self.mesh.is_last_stage:
            with torch.no_grad():
                stage.score.bias -= mean
            self.reward.reload_weights()
        self._statistics = {
            "demonstration_mean_before": mean.item(),
            "demonstration_std": std.item(),
        }

    def models(self) -> dict[str, Any]:
        return {"reward": self.reward.model}

    def learners(self) -> dict[str, Any]:
        return {"reward": self.reward}

    def statistics(self) -> dict[str, float]:
        return self._statistics

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": self._statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._statistics = state["statistics"]


def ranking_loss(stage: Any, hidden: torch.Tensor, batch: RankingBatch) -> ops.RankingLoss:
    """Scores of the N responses at their last tokens, and the loss over all strict pairs; hidden [T, H]."""
    scores = stage.score(hidden[batch.last_index])
    return ops.pairwise_ranking_loss(scores, batch.ranks, batch.prompt_offsets)


def evaluate_ranking(
    mesh: Mesh, stage: Any, batches: Iterable[Sequence[RankingBatch]]
) -> dict[str, float]:
    """loss (mean over prompts), accuracy and margin (means over strict pairs) on held-out rankings, dropout off."""
    rows: list[dict[str, torch.Tensor]] = []

    def head(hidden: torch.Tensor, batch: RankingBatch) -> dict[str, torch.Tensor]:
        ranking = ranking_loss(stage, hidden, batch)
        prompts = float(batch.num_prompts)
        return {
            "loss": ranking.loss * prompts,
            "prompts": torch.tensor(prompts),
            **_sums_over_pairs(ranking),
        }

    training, _ = stage.training, stage.eval()
    for step in batches:
        rows += schedule.forward(mesh, stage, [batch.to(mesh.device) for batch in step], head)
    stage.train(training)
    metrics = _per_pair(mesh.sum_metrics(rows))
    return metrics | {"loss": metrics["loss"] / metrics.pop("prompts")}


def score_responses(
    mesh: Mesh, stage: Any, batches: Iterable[Sequence[PackedBatch]]
) -> torch.Tensor:
    """Score of every response of this data-parallel rank at its last token, fp32 [responses], in order, dropout off."""

    def head(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        last = (
            batch.last_index if isinstance(batch, RankingBatch) else batch.cu_seqlens[1:].long() - 1
        )
        return stage.score(hidden[last])

    training, _ = stage.training, stage.eval()
    rows = [
        scores
        for step in batches
        for scores in schedule.forward(mesh, stage, [batch.to(mesh.device) for batch in step], head)
    ]
    stage.train(training)
    if not mesh.is_last_stage:
        return mesh.from_last_stage(None)
    return mesh.from_last_stage(torch.cat(rows) if rows else torch.zeros(0, device=mesh.device))


def score_rankings(
    mesh: Mesh,
    stage: Any,
    rankings: Sequence[TokenizedRanking],
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    shared_prompt: bool = True,
) -> list[torch.Tensor]:
    """Scores [K] of every ranking, fp32 on the CPU, in order, on every rank; data-parallel ranks share the work.

    A micro-batch has `micro_batch_size` rankings, or as many as fit under `max_tokens`.
    """
    if max_tokens is not None:
        lengths = [ranking_tokens(ranking, shared_prompt=shared_prompt) for ranking in rankings]
        shares = packing.share(lengths, mesh.data_size, max_tokens)
    else:
        starts = range(0, len(rankings), micro_batch_size)
        chunks = [
            list(range(start, min(start + micro_batch_size, len(rankings)))) for start in starts
        ]
        shares = [chunks[rank :: mesh.data_size] for rank in range(mesh.data_size)]
    own = shares[mesh.data_rank]
    batches = [
        pack_rankings([rankings[i] for i in micro], shared_prompt=shared_prompt) for micro in own
    ]
    scores = score_responses(mesh, stage, [batches])
    # Ranks have different numbers of responses, and a gather wants rows of one length.
    orders = [[i for micro in micro_batches for i in micro] for micro_batches in shares]
    counts = [[len(rankings[i].responses) for i in order] for order in orders]
    longest = max(map(sum, counts))
    rows = mesh.gather_over_data(torch.nn.functional.pad(scores, (0, longest - len(scores)))).cpu()
    found: dict[int, torch.Tensor] = {}
    for row, order, sizes in zip(rows.view(mesh.data_size, longest), orders, counts, strict=True):
        found |= zip(order, row[: sum(sizes)].split(sizes), strict=True)
    return [found[i] for i in range(len(rankings))]


def _counts(mesh: Mesh, batches: Sequence[RankingBatch]) -> torch.Tensor:
    """Prompts, tokens processed, and tokens that one forward per response would process; float64 [3]."""
    counts = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        counts[0] += batch.num_prompts
        counts[1] += batch.tokens.numel()
        counts[2] += batch.separate_tokens()
    return counts


def _sums_over_pairs(ranking: ops.RankingLoss) -> dict[str, torch.Tensor]:
    """What adds up over micro-batches and ranks; `_per_pair` turns the sums into means."""
    pairs = ranking.pairs.float()
    return {"pairs": pairs, "accuracy": ranking.accuracy * pairs, "margin": ranking.margin * pairs}


def _per_pair(metrics: dict[str, float]) -> dict[str, float]:
    pairs = max(metrics["pairs"], 1.0)
    return metrics | {name: metrics[name] / pairs for name in ("accuracy", "margin")}
