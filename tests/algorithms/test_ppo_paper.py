"""Details that decide whether PPO is correct, numbered as in docs/ppo.md, with one test each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithms_support import tiny_ppo

from fastrlhf.algorithms.kl_controller import KLController
from fastrlhf.algorithms.ppo import PPO
from fastrlhf.algorithms.rollouts import Rollouts, gather, own_rows, training_batch
from fastrlhf.checkpoint.model_folder import describe_model, load_model
from fastrlhf.config import ModelConfig, PPOConfig, load_config, require
from fastrlhf.data.batches import pack
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import train

Build = Callable[..., Any]


def random_rollouts(ppo: PPO) -> Rollouts:
    """Return scored random episodes of different lengths."""
    return ppo.score(gather(ppo.mesh, tiny_ppo.episodes(16, ppo.policy.model.vocab_size)))


def hidden_states(model: GPT, sequence: list[int]) -> torch.Tensor:
    """Return hidden states [T, H] of a sequence that is alone in its batch."""
    with torch.no_grad():
        return model(pack([sequence], [0]))


def logprobs_from_logits(model: GPT, sequence: list[int], temperature: float) -> torch.Tensor:
    """Return log-probs of every token but the first."""
    logits = hidden_states(model, sequence) @ model.lm_head()["weight"][: model.vocab_size].T
    return (logits / temperature).log_softmax(-1)[torch.arange(len(sequence) - 1), sequence[1:]]


def flat(rollouts: Rollouts, per_token: torch.Tensor) -> np.ndarray:
    return per_token[rollouts.mask].double().numpy()


def test_01_reward_and_value_read_prompt_and_response_up_to_the_last_token(build: Build) -> None:
    ppo = build()
    rollouts = random_rollouts(ppo)
    reward, value = ppo.rewards.models[0][1], ppo.value.model
    for i, sequence in enumerate(rollouts.sequences(torch.arange(16))):
        prompt, response = int(rollouts.prompt_lengths[i]), int(rollouts.response_lengths[i])
        expected = reward.score(hidden_states(reward, sequence)[-1])
        assert rollouts.scores[i].item() == pytest.approx(expected.item(), abs=1e-5)
        # The value of the state before each token.
        values = value.score(hidden_states(value, sequence))[prompt - 1 : -1]
        torch.testing.assert_close(rollouts.values[i, :response], values, atol=1e-5, rtol=0)
    episodes = tiny_ppo.episodes(16, value.vocab_size)
    changed = [([prompt[0] % 100 + 1, *prompt[1:]], answer) for prompt, answer in episodes]
    other = ppo.score(gather(ppo.mesh, changed))
    assert ((other.scores - rollouts.scores).abs() > 1e-4).all()
    assert ((other.values - rollouts.values)[:, 0].abs() > 1e-4).all()


def test_02_no_padding_reaches_a_model(build: Build) -> None:
    """Sequences are packed without gaps, and entries past the end of a sequence are never read.

    Positions start at 0 in each sequence. The stop token is a token like any other.
    """
    ppo = build()
    rollouts = random_rollouts(ppo)
    batch = rollouts.pack(torch.arange(16))
    assert batch.tokens.numel() == rollouts.lengths.sum()
    assert (batch.positions[batch.cu_seqlens[:-1].long()] == 0).all()
    assert batch.loss_mask.sum() == rollouts.response_lengths.sum()
    garbage = torch.arange(rollouts.tokens.shape[1]) >= rollouts.lengths[:, None]
    assert garbage.sum() > 50
    filled = replace(rollouts, tokens=torch.where(garbage, 99, rollouts.tokens))
    one_by_one = build(train={"micro_batch_size": 1}).score(replace(filled))
    for name in ("scores", "values", "ref_logprobs"):
        torch.testing.assert_close(
            getattr(one_by_one, name), getattr(rollouts, name), atol=1e-5, rtol=0
        )
    eos = ppo.tokenizer.eos_token_id
    ended = replace(
        rollouts,
        tokens=rollouts.tokens.index_put(
            (torch.tensor(0), rollouts.lengths[0] - 1), torch.tensor(eos)
        ),
    )
    rescored = ppo.score(replace(ended))
    reward = ppo.rewards.models[0][1]
    (sequence,) = ended.sequences(torch.tensor([0]))
    expected = reward.score(hidden_states(reward, sequence)[-1]).item()
    assert rescored.scores[0].item() == pytest.approx(expected, abs=1e-5)


def test_03_one_temperature_and_no_truncation(build: Build, tiny: Path) -> None:
    ppo = build(generation={"temperature": 0.7})
    rollouts = ppo.score(gather(ppo.mesh, ppo.sample(ppo.first_tokens)))
    for i, sequence in enumerate(rollouts.sequences(torch.arange(16))):
        R = int(rollouts.response_lengths[i])
        for model, got in (
            (ppo.policy.model, rollouts.logprobs),
            (ppo.reference, rollouts.ref_logprobs),
        ):
            torch.testing.assert_close(
                got[i, :R], logprobs_from_logits(model, sequence, 0.7)[-R:], atol=1e-5, rtol=0
            )
    # So the training pass divides by the temperature too.
    assert ppo.learn(rollouts)["ratio_deviation"] < 1e-5
    assert not ppo.sampling.truncated
    for truncation in ({"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(UserError, match="ppo needs generation"):
            require(tiny_ppo.config(tiny, generation=truncation), "ppo")


def test_04_responses_end_at_the_first_stop_then_are_scored(build: Build) -> None:
    ppo = build(generation={"stop": ["1"], "max_new_tokens": 12}, ppo={"no_stop_penalty": -3.0})
    episodes = ppo.sample(ppo.first_tokens * 2)
    assert {answer.stopped for _, answer in episodes} == {True, False}
    for _, answer in episodes:
        text = [
            ppo.tokenizer.decode(answer.tokens[:n], skip_special_tokens=True)
            for n in range(len(answer.tokens) + 1)
        ]
        ended = "1" in text[-1] or answer.tokens[-1] == ppo.tokenizer.eos_token_id
        assert ended == answer.stopped
        assert "1" not in text[-2]  # nothing is kept after the stop
        assert ppo.tokenizer.eos_token_id not in answer.tokens[:-1]
    rollouts = ppo.score(gather(ppo.mesh, episodes))
    scores = ppo.apply_no_stop_penalty(rollouts)
    assert (scores[~rollouts.stopped] == -3.0).all()
    assert torch.equal(scores[rollouts.stopped], rollouts.scores[rollouts.stopped])
    last = rollouts.response_lengths - 1
    rewards = ppo.targets(rollouts, scores).rewards[torch.arange(32), last]
    # The KL from the reference is 0 before an update.
    torch.testing.assert_close(rewards, scores, atol=1e-4, rtol=0)
    own = build(ppo={"no_stop_penalty": None})
    assert torch.equal(own.apply_no_stop_penalty(rollouts), rollouts.scores)


def test_05_dropout_is_off_in_all_models(build: Build, tiny: Path) -> None:
    dropout = {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}
    mesh = tiny_ppo.mesh_of(tiny_ppo.config(tiny))
    tiny_ppo.save_reward_model(tiny, mesh, "rm_dropout", **dropout)
    ppo = build(model=dropout, ppo={"reward_model": str(tiny / "rm_dropout")})
    average = ppo.average.model
    models = [ppo.policy.model, ppo.value.model, ppo.reference, ppo.rewards.models[0][1], average]
    batch = pack([list(range(1, 20))], [3])
    dropping = build_model(ModelConfig(**tiny_ppo.MODEL, **dropout), mesh, 300, seed=1)
    with torch.no_grad():
        for model in models:
            model.train()
            assert torch.equal(model(batch), model(batch))
        assert not torch.equal(dropping(batch), dropping(batch))


def test_06_the_first_ratio_is_one_and_its_deviation_is_logged(build: Build) -> None:
    ppo = build()
    assert ppo.step([ppo.first_prompts])["ratio_deviation"] < 1e-5
    rollouts = ppo.score(gather(ppo.mesh, ppo.sample(ppo.first_tokens)))
    first = next(ppo.minibatches(16))
    rollouts.logprobs[first[0], 1] += 0.25  # as if one token had been sampled by another policy
    assert ppo.learn(rollouts)["ratio_deviation"] == pytest.approx(np.expm1(0.25), abs=1e-4)


def test_07_whitening_is_masked_biased_and_over_the_whole_batch(build: Build) -> None:
    """Rewards without a mean shift, advantages with one."""
    ppo = build(ppo={"whiten_rewards": True, "lam": 0.9, "gamma": 0.97})
    rollouts = random_rollouts(ppo)
    scores = ppo.apply_no_stop_penalty(rollouts)
    targets = ppo.targets(rollouts, scores)
    rewards = flat(rollouts, targets.rewards)
    scaled = (rewards - rewards.mean()) / np.sqrt(rewards.var(ddof=0) + 1e-8) + rewards.mean()
    ends = np.cumsum(rollouts.response_lengths.numpy())
    advantages = np.zeros_like(scaled)
    values = flat(rollouts, rollouts.values)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        following = next_value = 0.0
        for t in range(end - 1, start - 1, -1):
            following = scaled[t] + 0.97 * next_value - values[t] + 0.97 * 0.9 * following
            advantages[t], next_value = following, values[t]
    np.testing.assert_allclose(flat(rollouts, targets.returns), advantages + values, atol=1e-4)
    white = (advantages - advantages.mean()) / np.sqrt(advantages.var(ddof=0) + 1e-8)
    np.testing.assert_allclose(flat(rollouts, targets.advantages), white, atol=1e-4)
    assert (targets.advantages[~rollouts.mask] == 0).all()
    plain = build(ppo={"whiten_rewards": False, "lam": 0.9, "gamma": 0.97}).targets(
        rollouts, scores
    )
    assert np.abs(flat(rollouts, plain.advantages)).mean() == pytest.approx(0.8, abs=0.3)
    assert flat(rollouts, plain.advantages).mean() == pytest.approx(0.0, abs=1e-5)
    assert flat(rollouts, plain.advantages).var() == pytest.approx(1.0, abs=1e-4)


def test_08_the_value_is_clipped_around_its_rollout_value(build: Build) -> None:
    """0.5 max((v - R)^2, (v_clipped - R)^2) with a range of 0.2."""
    ppo = build()
    rollouts = random_rollouts(ppo)
    now = flat(rollouts, rollouts.values)
    generator = torch.Generator().manual_seed(0)
    rollouts.values = rollouts.values + 0.4 * torch.randn(
        rollouts.values.shape, generator=generator
    )
    returns = rollouts.values + torch.randn(rollouts.values.shape, generator=generator)
    batches = [
        training_batch(rollouts, returns, returns, rows) for rows in torch.arange(16).split(5)
    ]
    old, target = flat(rollouts, rollouts.values), flat(rollouts, returns)
    clipped = old + np.clip(now - old, -0.2, 0.2)
    expected = 0.5 * np.maximum((now - target) ** 2, (clipped - target) ** 2)
    metrics = ppo.value_gradient(batches)
    assert metrics["value_loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert metrics["value_clip_fraction"] == pytest.approx(
        ((clipped - target) ** 2 > (now - target) ** 2).mean()
    )
    assert abs(0.5 * ((now - target) ** 2).mean() - expected.mean()) > 0.01


def test_09_adams_epsilon_is_the_configured_one(build: Build) -> None:
    ppo = build(optimizer={"lr": 1e-3, "eps": 3e-5})
    for learner in ppo.learners().values():
        assert {
            group["eps"]
            for part in learner.optimizer.chained_optimizers
            for group in part.optimizer.param_groups
        } == {3e-5}
    for path in (Path(__file__).parents[2] / "configs").rglob("ppo*.yaml"):
        assert load_config(path).optimizer.eps == 1e-5, path


def test_10_every_inner_epoch_has_a_new_order(build: Build) -> None:
    ppo = build(ppo={"inner_epochs": 3})
    seen: list[list[int]] = []
    ppo.update = lambda batches, first: (
        seen.append([b.num_sequences for b in batches])
        or {
            "policy_loss": 0.0,
            "value_loss": 0.0,
            "entropy": 0.0,
        }
    )
    ppo.learn(random_rollouts(ppo))
    assert len(seen) == 6  # three epochs of two minibatches
    orders = [torch.cat(list(ppo.minibatches(16))).split(16)]
    ppo.iteration += 1
    orders.append(torch.cat(list(ppo.minibatches(16))).split(16))
    epochs = [epoch.tolist() for order in orders for epoch in order]
    assert len(epochs) == 6
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # The order is a function of the iteration and the seed, so it is the same on every rank.
    assert torch.equal(torch.cat(list(ppo.minibatches(16))), torch.cat(orders[1]))
    other = build(ppo={"inner_epochs": 3}, train={"seed": 12})  # the next seed
    others = {tuple(epoch.tolist()) for epoch in torch.cat(list(other.minibatches(16))).split(16)}
    assert not others & {tuple(epoch) for epoch in epochs}


def test_11_seeds_differ_by_data_rank_and_agree_inside_a_tensor_group(build: Build) -> None:
    """test_ppo_golden.py checks the same on four real ranks."""
    ppo = build()
    place, draws = ppo.mesh, {}
    for data, tensor in ((0, 0), (0, 1), (1, 0)):
        ppo.mesh = replace(place, data_rank=data, tensor_rank=tensor)
        meshes.seed_generators(ppo.mesh, 11)
        sampled = [tuple(answer.tokens) for _, answer in ppo.sample([[5, 6, 7]] * 4)]
        draws[data, tensor] = (torch.rand(3).tolist(), sampled)
    assert draws[0, 0] == draws[0, 1]
    assert draws[0, 0][0] != draws[1, 0][0]
    assert not set(draws[0, 0][1]) & set(draws[1, 0][1])


def test_12_the_reward_holds_k1_and_the_controller_is_optional(build: Build) -> None:
    ppo = build(ppo={"kl_coef": 0.3})
    rollouts = random_rollouts(ppo)
    scores = ppo.apply_no_stop_penalty(rollouts)
    expected = -0.3 * (rollouts.logprobs - rollouts.ref_logprobs)
    expected[torch.arange(16), rollouts.response_lengths - 1] += scores
    rewards = ppo.targets(rollouts, scores).rewards
    torch.testing.assert_close(
        rewards, torch.where(rollouts.mask, expected, 0.0), atol=1e-5, rtol=1e-5
    )
    metrics = ppo.learn(rollouts)
    k1 = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).sum(1).mean().item()
    assert metrics["kl"] == pytest.approx(k1, rel=1e-5)
    assert ppo.kl.coefficient == 0.3
    adaptive = PPOConfig(kl_coef=0.1, adaptive_kl_target=6.0)
    for kl, error in ((60.0, 0.2), (0.0, -0.2), (6.6, 0.1)):
        controller = KLController(adaptive)
        controller.update(kl, 512)
        assert controller.coefficient == pytest.approx(0.1 * (1 + error * 512 / 10_000))
        before = controller.coefficient
        controller.update(math.nan, 512)  # a step that fp16 skips must not affect later ones
        assert controller.coefficient == before


def test_13_the_average_is_what_is_evaluated_and_exported(tiny: Path) -> None:
    chosen = tiny_ppo.config(tiny, ppo={"ema_decay": 0.5}).model_copy(
        update={"output_dir": str(tiny / "averaged")}
    )
    train.train("ppo", chosen)
    saved = describe_model(chosen.output_dir)  # as eval, sample and export find it
    assert saved.path.name == "ema"
    mesh = tiny_ppo.mesh_of(chosen)
    weights = {}
    for name in ("ema", "policy"):
        found = describe_model(saved.path.with_name(name))
        model = build_model(found.model, mesh, found.vocab_size)
        load_model(found, model)
        weights[name] = dict(model.named_parameters())
    start = dict(
        build_model(chosen.model, mesh, saved.vocab_size, seed=chosen.train.seed).named_parameters()
    )
    for name, average in weights["ema"].items():
        moved = (weights["policy"][name] - start[name]).abs().max()
        lag = (weights["policy"][name] - average).abs().max()
        assert 0 < lag < moved, name


def test_14_losses_are_divided_by_the_global_token_count(build: Build) -> None:
    """Micro-batch sizes and token budgets change no loss and no gradient of unequal sequences."""
    found = []
    settings = (
        {"micro_batch_size": 8},
        {"micro_batch_size": 1},
        {"max_tokens_per_micro_batch": 45},
    )
    for section in settings:
        ppo = build(train=section)
        rollouts = random_rollouts(ppo)
        micro_batches = {8: 1, 1: 8}.get(section.get("micro_batch_size", 0), 3)
        rows = own_rows(ppo.mesh, torch.arange(8), rollouts.lengths, ppo.train)
        assert len(rows) == micro_batches
        metrics = ppo.learn(rollouts)
        names = (
            "policy_loss",
            "value_loss",
            "ptx_loss",
            "grad_norm",
            "value_grad_norm",
            "ppo_grad_norm",
            "approx_kl",
        )
        found.append([metrics[name] for name in names])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)
