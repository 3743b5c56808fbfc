"""The steps of trainers.py in plain Hugging Face and torch: same weights, tokens and losses.

Padded batches, whole logits, `log_softmax` and `gather`, `generate`, a loop over time for the
advantages, torch's fused AdamW. Two choices favor it: everything is in the model's dtype (no fp32
masters or gradients, which would be slower), and sequences are sorted by length before they are
padded. Log-probs of the sampled tokens are computed again, as TRL does. Not supported: dropout (0
on both sides), several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from bench.trainers import EOS, Metrics, RandomParts, Steps, Task
from fastrlhf.algorithms.ppo_metrics import PhaseTimer
from fastrlhf.data.batches import demonstration_tokens
from fastrlhf.models.gpt import DTYPES, GPT, global_names
from fastrlhf.models.hf.shapes import hf_config
from fastrlhf.models.hf.weights import hf_tensors

Tensor = torch.Tensor
CLASSES = {
    "lm": transformers.AutoModelForCausalLM,
    "scalar": transformers.AutoModelForSequenceClassification,
}


def model_like(stage: GPT) -> Any:
    """Return transformers' model of the same shape, weights, dtype and device.

    A scalar head stays in fp32.
    """
    transformers.logging.set_verbosity_error()
    config = hf_config(stage.model_config, stage.vocab_size, stage.head_kind)
    with stage.mesh.device:
        model: Any = (
            CLASSES[stage.head_kind].from_config(config).to(DTYPES[stage.model_config.dtype])
        )
    missing, unknown = model.load_state_dict(
        dict(hf_tensors(stage, dict(global_names(stage)))), strict=False
    )
    assert set(missing) <= {"lm_head.weight"} and set(unknown) <= {"score.bias"}, (missing, unknown)
    if stage.head_kind == "scalar":
        model.score.float()
    return model.train()


class Learner:
    """A model with its optimizer."""

    def __init__(self, model: Any, task: Task) -> None:
        optimizer = task.config.optimizer
        self.model = model
        self.clip = optimizer.clip_grad
        self.adam = torch.optim.AdamW(
            model.parameters(),
            optimizer.lr,
            (optimizer.beta1, optimizer.beta2),
            optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def update(self) -> Tensor:
        """Update the weights and return the gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm


# ---- losses ------------------------------------------------------------------------------------


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) [B, L], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[EOS] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def micro_batches(
    items: Sequence[Any], longest: Callable[[Any], int], rows: Callable[[Any], int], most: int
) -> Iterator[list[Any]]:
    """Return `items` sorted by length, in groups of at most `most` tokens including padding.

    An item makes `rows` rows.
    """
    run: list[Any] = []
    for item in sorted(items, key=longest):  # the last of a run is its longest
        if run and sum(map(rows, [*run, item])) * longest(item) > most:
            yield run
            run = []
        run.append(item)
    yield run


def logprobs(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the log-prob of each token after the first, fp32 [B, L - 1]."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])[..., 0]


def hidden_scores(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the scalar head at every position, fp32 [B, L]."""
    hidden = model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
    return model.score(hidden.float())[..., 0]


def ranking_loss(scores: Tensor) -> Tensor:
    """Return the mean loss over the pairs of one prompt's K scores, best first."""
    better, worse = torch.combinations(torch.arange(len(scores), device=scores.device)).T
    return -F.logsigmoid(scores[better] - scores[worse]).mean()


# ---- steps -------------------------------------------------------------------------------------


def sft(parts: RandomParts) -> Steps:
    task, device = parts.task, parts.mesh.device
    policy = Learner(model_like(parts.model(task.config.model, "lm")), task)
    counted = sum(len(d.tokens) - d.prompt_length for d in task.demonstrations)

    def step() -> Metrics:
        total = torch.zeros((), device=device)
        for micro in micro_batches(
            task.demonstrations, demonstration_tokens, lambda _: 1, _budget(task)
        ):
            ids, mask = padded([d.tokens for d in micro], device)
            first = torch.tensor([d.prompt_length for d in micro], device=device)
            trained = mask[:, 1:] & (torch.arange(1, ids.shape[1], device=device) >= first[:, None])
            loss = -(logprobs(policy.model, ids, mask) * trained).sum() / counted
            loss.backward()
            total += loss.detach()
        return {"grad_norm": policy.update().item(), "loss": total.item()}

    return Steps(step)


def rm(parts: RandomParts) -> Steps:
    task, device = parts.task, parts.mesh.device
    reward = Learner(model_like(parts.model(task.config.model, "scalar")), task)

    def longest(ranking: Any) -> int:
        return len(ranking.prompt_tokens) + max(map(len, ranking.responses))

    def step() -> Metrics:
        total = torch.zeros((), device=device)
        for micro in micro_batches(
            task.rankings, longest, lambda r: len(r.responses), _budget(task)
        ):
            ids, mask = padded(
                [r.prompt_tokens + response for r in micro for response in r.responses], device
            )
            last = mask.sum(1, keepdim=True) - 1
            scores = hidden_scores(reward.model, ids, mask).gather(1, last)[:, 0]
            losses = [ranking_loss(s) for s in scores.split([len(r.responses) for r in micro])]
            loss = torch.stack(losses).sum() / len(task.rankings)
            loss.backward()
            total += loss.detach()
        return {"grad_norm": reward.update().item(), "loss": total.item()}

    return Steps(step)


class PPO:
    """An iteration of PPO-ptx: rollout, scoring, update.

    Every prompt and response has its full length, P and R.
    """

    def __init__(self, parts: RandomParts) -> None:
        self.task, self.config, self.device = parts.task, parts.task.config.ppo, parts.mesh.device
        task, model = parts.task, parts.task.config.model
        self.policy = Learner(model_like(parts.model(model, "lm")), task)
        self.reference = model_like(parts.model(model, "lm")).eval()
        self.value = Learner(model_like(parts.model(model, "scalar")), task)
        self.reward = model_like(parts.model(model, "scalar")).eval()
        self.average = [p.detach().float().clone() for p in self.policy.model.parameters()]
        self.prompts = torch.tensor(task.prompts, device=self.device)
        self.R = task.config.generation.max_new_tokens
        self.rows = max(1, _budget(task) // (self.prompts.shape[1] + self.R))

    def step(self) -> Metrics:
        clock = PhaseTimer()
        with clock("rollout"):
            ids = self.rollout(self.R)
        with clock("scoring"):
            scored = self.score(ids)
        with clock("update"):
            loss = self.update(ids, *scored)
        return {"loss": loss} | clock.metrics(
            sampled_tokens=ids.numel(), trained_tokens=ids.numel()
        )

    @torch.no_grad()
    def rollout(self, length: int) -> Tensor:
        """Sample responses and return the tokens, int64 [B, P + length]."""
        self.policy.model.eval()
        ids = self.policy.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            min_new_tokens=length,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        self.policy.model.train()
        return ids

    @torch.no_grad()
    def score(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (old log-probs, values, advantages), each [B, R]."""
        old, reference, values, scores = [], [], [], []
        R = self.R
        for micro in ids.split(self.rows):
            old.append(logprobs(self.policy.model, micro)[:, -R:])
            reference.append(logprobs(self.reference, micro)[:, -R:])
            values.append(hidden_scores(self.value.model, micro)[:, -R - 1 : -1])
            scores.append(hidden_scores(self.reward, micro)[:, -1])
        old_BR, values_BR = torch.cat(old), torch.cat(values)
        rewards = -self.config.kl_coef * (old_BR - torch.cat(reference))
        rewards[:, -1] += torch.cat(scores)
        advantages = torch.zeros_like(rewards)
        following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
        for t in reversed(range(R)):
            delta = rewards[:, t] + self.config.gamma * next_value - values_BR[:, t]
            following = delta + self.config.gamma * self.config.lam * following
            advantages[:, t], next_value = following, values_BR[:, t]
        return old_BR, values_BR, advantages

    def update(self, ids: Tensor, old: Tensor, values: Tensor, advantages: Tensor) -> float:
        returns = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
        total = torch.zeros((), device=self.device)
        for _ in range(self.config.inner_epochs):
            for rows in torch.randperm(len(ids), device=self.device).split(
                self.config.minibatch_size
            ):
                for micro in rows.split(self.rows):
                    total += self.policy_loss(
                        ids[micro], old[micro], advantages[micro], rows.numel()
                    )
                total += self.pretraining_loss()
                for micro in rows.split(self.rows):
                    total += self.value_loss(
                        ids[micro], values[micro], returns[micro], rows.numel()
                    )
                self.value.update()
                self.policy.update()
        with torch.no_grad():
            for average, weights in zip(self.average, self.policy.model.parameters(), strict=True):
                average.lerp_(weights.float(), 1 - self.config.ema_decay)
        return total.item()

    def policy_loss(self, ids: Tensor, old: Tensor, advantages: Tensor, episodes: int) -> Tensor:
        ratio = torch.exp(logprobs(self.policy.model, ids)[:, -self.R :] - old)
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).sum() / (episodes * self.R)
        loss.backward()
        return loss.detach()

    def pretraining_loss(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        windows = torch.tensor(self.task.windows, device=self.device)
        for micro in windows.split(self.rows):
            logits = self.policy.model(input_ids=micro[:, :-1]).logits
            chosen = torch.log_softmax(logits.float(), -1).gather(-1, micro[:, 1:, None])
            loss = -self.config.gamma_ptx * chosen.sum() / windows[:, 1:].numel()
            loss.backward()
            total += loss.detach()
        return total

    def value_loss(self, ids: Tensor, old: Tensor, returns: Tensor, episodes: int) -> Tensor:
        now = hidden_scores(self.value.model, ids)[:, -self.R - 1 : -1]
        clipped = old + (now - old).clamp(-self.config.value_clip, self.config.value_clip)
        errors = torch.maximum((now - returns).square(), (clipped - returns).square())
        loss = 0.5 * errors.sum() / (episodes * self.R)
        loss.backward()
        return loss.detach()


def ppo(parts: RandomParts) -> Steps:
    iteration = PPO(parts)
    return Steps(iteration.step, {"prefill": partial(iteration.rollout, 1)})


def _budget(task: Task) -> int:
    budget = task.config.train.max_tokens_per_micro_batch
    assert budget is not None
    return budget
