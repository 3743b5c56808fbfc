"""Training and scoring of reward models (InstructGPT, section 3.5, equation 1).

The loss of a prompt is the mean of -log sigmoid(r_better - r_worse) over the pairs of its K ranked
responses. All pairs of a prompt are in one micro-batch, ties are dropped, and prompts weigh the
same whatever their K. A prompt is encoded once and its responses branch from it
(model.shared_prompt), which gives the scores of one forward per response from fewer tokens.

    torchrun --nproc-per-node 8 -m fastrlhf rm configs/instructgpt/6b/rm.yaml
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch

from fastrlhf import ops
from fastrlhf.algorithms.protocols import Learner
from fastrlhf.checkpoint.soundness import check_losses_finite
from fastrlhf.data import packing
from fastrlhf.data.batches import (
    PackedBatch,
    RankingBatch,
    TokenizedRanking,
    pack_rankings,
    ranking_tokens,
)
from fastrlhf.errors import UserError
from fastrlhf.evaluation.winrate import pair_agreement
from fastrlhf.models.gpt import GPT
from fastrlhf.ops.ranking import strict_pairs
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import Metrics
from fastrlhf.parallel.watchdog import current_phase

Tensor = torch.Tensor


class RewardModelling:
    """Training of a reward model, one update a step."""

    def __init__(self, mesh: Mesh, reward: Learner) -> None:
        self.mesh = mesh
        self.reward = reward
        self._statistics: dict[str, float] = {}

    def step(self, micro_batches: Sequence[RankingBatch]) -> dict[str, float]:
        """Update the model on this rank's micro-batches of the global batch; return the metrics.

        A micro-batch holds whole prompts, each with all its responses.
        """
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        counts = self.mesh.sum_over_data(_counts(self.mesh, batches))
        prompts = counts[0].float()

        def head(hidden: Tensor, batch: RankingBatch) -> tuple[Tensor, Metrics]:
            ranking = ranking_loss(self.reward.model, hidden, batch)
            loss = ranking.loss * (batch.num_prompts / prompts)
            return loss, {"loss": loss.detach(), **_sums_over_pairs(ranking)}

        rows = self.reward.accumulate(batches, head)
        metrics = _per_pair(self.mesh.sum_metrics(rows, ["loss", *_PAIR_SUMS]))
        if not metrics["pairs"]:
            raise UserError(
                f"{current_phase()}: no two responses of the global batch have different ranks, so"
                " there is no pair to learn from; check data.train"
            )
        if not self.reward.model.config.fp16:  # its optimizer skips updates that are not finite
            check_losses_finite(current_phase(), metrics)
        _, tokens, separate = counts.tolist()
        return metrics | self.reward.step() | {"tokens": tokens, "tokens_unshared": separate}

    def center(self, demonstrations: Iterable[Sequence[PackedBatch]]) -> None:
        """Shift the head's bias so that demonstrations score 0 on average.

        Each element of `demonstrations` is this rank's micro-batches of one step. The mean before
        the shift and the standard deviation become the model's statistics. InstructGPT,
        section 3.5.
        """
        model = self.reward.model
        scores = score_responses(self.mesh, model, demonstrations).double()
        moments = torch.stack([torch.ones_like(scores), scores, scores.square()]).sum(1)
        count, total, squares = self.mesh.sum_over_data(moments)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0.0).sqrt()
        if self.mesh.is_last_stage:
            with torch.no_grad():
                model.score.bias.sub_(mean)
            self.reward.reload_weights()
        self._statistics = {
            "demonstration_mean_before": mean.item(),
            "demonstration_std": std.item(),
        }

    def models(self) -> dict[str, GPT]:
        """Return the models that a checkpoint holds."""
        return {"reward": self.reward.model}

    def learners(self) -> dict[str, Learner]:
        """Return the learners whose optimizer state a checkpoint holds."""
        return {"reward": self.reward}

    def statistics(self) -> dict[str, float]:
        """Return mean and standard deviation of demonstrations' scores; empty before `center`."""
        return self._statistics

    def state_dict(self) -> dict[str, object]:
        """Return the statistics, for JSON."""
        return {"statistics": self._statistics}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""
        self._statistics = cast("dict[str, float]", state["statistics"])


def ranking_loss(model: GPT, hidden: Tensor, batch: RankingBatch) -> ops.RankingLoss:
    """Return the loss over all strict pairs of the N responses; hidden [T, H].

    Its accuracy counts equal scores as `pair_agreement` does, one half. The op counts them as wrong.
    """
    scores = model.score(hidden[batch.last_index])
    ranking = ops.pairwise_ranking_loss(scores, batch.ranks, batch.prompt_offsets)
    _, better = strict_pairs(scores, batch.ranks, batch.prompt_offsets)
    fixed = scores.detach()
    agreement = pair_agreement(fixed[:, None] - fixed[None])
    return ranking._replace(accuracy=(agreement * better).sum() / better.sum().clamp(min=1))


def evaluate_ranking(
    mesh: Mesh, model: GPT, batches: Iterable[Sequence[RankingBatch]]
) -> dict[str, float]:
    """Evaluate `model` on held-out rankings, with dropout off.

    Each element of `batches` is this rank's micro-batches of one step. Returns loss (mean over
    prompts), accuracy and margin (means over strict pairs) and pairs, their number.
    """
    rows: list[Metrics] = []

    def head(hidden: Tensor, batch: RankingBatch) -> Metrics:
        ranking = ranking_loss(model, hidden, batch)
        prompts = float(batch.num_prompts)
        return {
            "loss": ranking.loss * prompts,
            "prompts": torch.tensor(prompts),
            **_sums_over_pairs(ranking),
        }

    was_training = model.training
    model.eval()
    for step in batches:
        rows += schedule.forward(mesh, model, [batch.to(mesh.device) for batch in step], head)
    model.train(was_training)
    metrics = _per_pair(mesh.sum_metrics(rows, ["loss", "prompts", *_PAIR_SUMS]))
    return metrics | {"loss": metrics["loss"] / metrics.pop("prompts")}


def score_responses(mesh: Mesh, model: GPT, batches: Iterable[Sequence[PackedBatch]]) -> Tensor:
    """Score each response of this data-parallel rank at its last token, with dropout off.

    Each element of `batches` is this rank's micro-batches of one step. Returns fp32 [responses], in
    order, on every pipeline stage.
    """

    def head(hidden: Tensor, batch: PackedBatch) -> Tensor:
        last = (
            batch.last_index if isinstance(batch, RankingBatch) else batch.cu_seqlens[1:].long() - 1
        )
        return model.score(hidden[last])

    was_training = model.training
    model.eval()
    rows = [
        scores
        for step in batches
        for scores in schedule.forward(mesh, model, [batch.to(mesh.device) for batch in step], head)
    ]
    model.train(was_training)
    if not mesh.is_last_stage:
        return mesh.from_last_stage(None)
    return mesh.from_last_stage(torch.cat(rows) if rows else torch.zeros(0, device=mesh.device))


def score_rankings(
    mesh: Mesh,
    model: GPT,
    rankings: Sequence[TokenizedRanking],
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    shared_prompt: bool = True,
) -> list[Tensor]:
    """Score the responses of every ranking; data-parallel ranks share the work.

    A micro-batch has `micro_batch_size` rankings, or as many as fit under `max_tokens`. Returns one
    fp32 tensor [K] on the CPU for each ranking, in order, on every rank.
    """
    if max_tokens is not None:
        lengths = [ranking_tokens(ranking, shared_prompt=shared_prompt) for ranking in rankings]
        shares = packing.assign_micro_batches(lengths, mesh.data_size, max_tokens)
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
    scores = score_responses(mesh, model, [batches])
    # Ranks have different numbers of responses, and a gather needs tensors of one shape.
    orders = [[i for micro in micro_batches for i in micro] for micro_batches in shares]
    counts = [[len(rankings[i].responses) for i in order] for order in orders]
    longest = max(map(sum, counts))
    rows = mesh.gather_over_data(torch.nn.functional.pad(scores, (0, longest - len(scores)))).cpu()
    found: dict[int, Tensor] = {}
    for row, order, sizes in zip(rows.view(mesh.data_size, longest), orders, counts, strict=True):
        found |= zip(order, row[: sum(sizes)].split(sizes), strict=True)
    return [found[i] for i in range(len(rankings))]


def _counts(mesh: Mesh, batches: Sequence[RankingBatch]) -> Tensor:
    """Count prompts, tokens, and tokens of one forward per response; float64 [3]."""
    counts = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        counts[0] += batch.num_prompts
        counts[1] += batch.tokens.numel()
        counts[2] += batch.unshared_tokens()
    return counts


_PAIR_SUMS = ("pairs", "accuracy", "margin")
"""Names of the sums over pairs."""


def _sums_over_pairs(ranking: ops.RankingLoss) -> Metrics:
    """Return sums over pairs, which add up over micro-batches and ranks (see `_per_pair`)."""
    pairs = ranking.pairs.float()
    return {"pairs": pairs, "accuracy": ranking.accuracy * pairs, "margin": ranking.margin * pairs}


def _per_pair(metrics: dict[str, float]) -> dict[str, float]:
    """Divide the sums of `_sums_over_pairs` by the number of pairs."""
    pairs = max(metrics["pairs"], 1.0)
    return metrics | {name: metrics[name] / pairs for name in ("accuracy", "margin")}
