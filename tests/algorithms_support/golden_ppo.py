"""Reference of a PPO-ptx iteration, written from the equations in float64 torch on one process.

It shares no code with the package. The model is GPT-2's with megatron's parameter names; it reads
one sequence at a time, without padding. Gradients are autograd's. `c` holds the settings of the
run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass
class Episode:
    """A prompt and its sampled response."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    """Of the response under the policy that sampled it; given."""
    stopped: bool


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    """Return LayerNorm of x [..., H]."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hidden_states(state: State, tokens: list[int], heads: int) -> Tensor:
    """Return hidden states [T, H] after the final norm.

    The fused projection holds (query, key, value) head by head.
    """
    T = len(tokens)
    x = (
        state["embedding.word_embeddings.weight"][tokens]
        + state["embedding.position_embeddings.weight"][:T]
    )
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(sum(name.endswith("input_layernorm.weight") for name in state)):
        layer = f"decoder.layers.{i}."

        def linear(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ state[f"{layer}{name}.weight"].T + state[f"{layer}{name}.bias"]

        qkv = linear(layer_norm(x, state, f"{layer}input_layernorm"), "self_attention.linear_qkv")
        q, k, v = qkv.view(T, heads, 3, -1).permute(2, 1, 0, 3)  # each [heads, T, d]
        weights = (
            (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]))
            .masked_fill(future, -math.inf)
            .softmax(-1)
        )
        x = x + linear((weights @ v).transpose(0, 1).reshape(T, -1), "self_attention.linear_proj")
        up = linear(layer_norm(x, state, f"{layer}pre_mlp_layernorm"), "mlp.linear_fc1")
        x = x + linear(gelu(up), "mlp.linear_fc2")
    return layer_norm(x, state, "decoder.final_layernorm")


def log_softmax(state: State, hidden: Tensor, vocab: int, temperature: float) -> Tensor:
    """Return log-probs [T, vocab] of hidden states [T, H]."""
    return (
        (hidden @ state["embedding.word_embeddings.weight"][:vocab].T) / temperature
    ).log_softmax(-1)


def response_logprobs(state: State, episode: Episode, c: dict[str, Any]) -> Tensor:
    """Return log-probs [R] of the response tokens."""
    hidden = hidden_states(state, episode.prompt + episode.response, c["heads"])
    before = hidden[len(episode.prompt) - 1 : -1]  # the states that predict the response's tokens
    table = log_softmax(state, before, c["vocab"], c["temperature"])
    return table[torch.arange(len(episode.response)), episode.response]


def scalars(state: State, episode: Episode, c: dict[str, Any]) -> Tensor:
    """Return the scalar head's output at every position of prompt and response."""
    hidden = hidden_states(state, episode.prompt + episode.response, c["heads"])
    return hidden @ state["score.weight"] + state["score.bias"]


def response_values(state: State, episode: Episode, c: dict[str, Any]) -> Tensor:
    """Return the values [R] of the states before each response token."""
    return scalars(state, episode, c)[len(episode.prompt) - 1 : -1]


def advantages_and_returns(
    episodes: list[Episode], states: dict[str, State], c: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return values, advantages (whitened over all tokens) and returns [R] of each episode."""
    values, advantages, returns = [], [], []
    for e in episodes:
        score = scalars(states["reward"], e, c)[-1].item() if e.stopped else c["no_stop_penalty"]
        kl = torch.tensor(e.logprobs, dtype=torch.float64) - response_logprobs(
            states["reference"], e, c
        )  # k1
        rewards = -c["kl_coef"] * kl
        rewards[-1] += score
        v = response_values(states["value"], e, c)
        a, following = torch.zeros_like(v), 0.0
        for t in reversed(range(len(v))):
            v_next = v[t + 1] if t + 1 < len(v) else 0.0
            delta = rewards[t] + c["gamma"] * v_next - v[t]
            following = a[t] = delta + c["gamma"] * c["lam"] * following
        values.append(v)
        advantages.append(a)
        returns.append(a + v)
    flat = torch.cat(advantages)
    mean, std = flat.mean(), torch.sqrt((flat - flat.mean()).square().mean() + 1e-8)
    return values, [(a - mean) / std for a in advantages], returns


class Adam:
    """Adam (Kingma and Ba 2015) after clipping the gradient's norm."""

    def __init__(self, state: State, lr: float, c: dict[str, Any]) -> None:
        self.state, self.lr, self.c, self.t = state, lr, c, 0
        self.m = {name: torch.zeros_like(w) for name, w in state.items()}
        self.v = {name: torch.zeros_like(w) for name, w in state.items()}

    def step(self, grads: State) -> float:
        """Update the weights; return the norm of the gradients before clipping."""
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values())).item()  # type: ignore[arg-type]
        shrink = min(1.0, self.c["clip_grad"] / (norm + 1e-6))
        (b1, b2), self.t = self.c["betas"], self.t + 1
        for name, g in grads.items():
            g = g * shrink
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g.square()
            m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            self.state[name] = self.state[name] - self.lr * m / (v.sqrt() + self.c["eps"])
        return norm


def gradients(loss: Tensor, state: State) -> State:
    """Return the gradient of each parameter, 0 where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(state.values()), allow_unused=True)
    return {
        n: torch.zeros_like(w) if g is None else g
        for (n, w), g in zip(state.items(), found, strict=True)
    }


def policy_losses(
    state: State, rows: list[int], episodes: list[Episode], A: list[Tensor], c: dict[str, Any]
) -> Tensor:
    """Return the mean over the minibatch's tokens of max(-A r, -A clip(r))."""
    terms = []
    for i in rows:
        old = torch.tensor(episodes[i].logprobs, dtype=torch.float64)
        ratio = torch.exp(response_logprobs(state, episodes[i], c) - old)
        terms.append(
            torch.maximum(-A[i] * ratio, -A[i] * ratio.clamp(1 - c["clip"], 1 + c["clip"]))
        )
    return torch.cat(terms).mean()


def value_losses(
    state: State,
    rows: list[int],
    episodes: list[Episode],
    old: list[Tensor],
    R: list[Tensor],
    c: dict[str, Any],
) -> Tensor:
    """Return the mean over the minibatch's tokens of 0.5 max((v - R)^2, (v clipped - R)^2)."""
    terms = []
    for i in rows:
        v = response_values(state, episodes[i], c)
        clipped = old[i] + (v - old[i]).clamp(-c["value_clip"], c["value_clip"])
        terms.append(0.5 * torch.maximum((v - R[i]).square(), (clipped - R[i]).square()))
    return torch.cat(terms).mean()


def ptx_loss(state: State, windows: list[list[int]], c: dict[str, Any]) -> Tensor:
    """Return the mean cross-entropy of the pretraining tokens."""
    terms = []
    for window in windows:
        table = log_softmax(state, hidden_states(state, window[:-1], c["heads"]), c["vocab"], 1.0)
        terms.append(-table[torch.arange(len(window) - 1), window[1:]])
    return torch.cat(terms).mean()


def iteration(
    states: dict[str, State],
    episodes: list[Episode],
    minibatches: list[list[int]],
    windows: list[list[list[int]]],
    c: dict[str, Any],
) -> dict[str, Any]:
    """Run one iteration.

    `states` are those of policy, value, reference and reward; `windows` the pretraining examples of
    each minibatch. Returns the states "after" it and, for each of the "updates", the losses, the
    gradients before clipping, and their norms.
    """
    policy, value = dict(states["policy"]), dict(states["value"])
    values, A, R = advantages_and_returns(episodes, states, c)
    adams = {"policy": Adam(policy, c["lr"], c), "value": Adam(value, c["value_lr"], c)}
    updates = []
    decay, average = c["ema_decay"], states["policy"]
    for rows, text in zip(minibatches, windows, strict=True):
        for weights in (policy, value):
            weights.update({name: w.detach().requires_grad_() for name, w in weights.items()})
        ppo, ptx = policy_losses(policy, rows, episodes, A, c), ptx_loss(policy, text, c)
        v_loss = value_losses(value, rows, episodes, values, R, c)
        g_ppo, g_ptx = gradients(ppo, policy), gradients(c["gamma_ptx"] * ptx, policy)
        grads = {
            "policy": {n: g_ppo[n] + g_ptx[n] for n in g_ppo},
            "value": gradients(v_loss, value),
        }
        norms = {name: adams[name].step(grads[name]) for name in adams}
        # Once for each update, from the start of the policy.
        average = {n: decay * average[n] + (1 - decay) * w.detach() for n, w in policy.items()}
        parts = [
            torch.sqrt(sum(g.square().sum() for g in part.values())).item()
            for part in (g_ppo, g_ptx)
        ]  # type: ignore[arg-type]
        losses = {"policy_loss": ppo.item(), "ptx_loss": ptx.item(), "value_loss": v_loss.item()}
        updates.append({"losses": losses, "grads": grads, "norms": norms, "parts": parts})
    after = {"policy": policy, "value": value, "ema": average}
    return {
        "after": {m: {n: w.detach() for n, w in s.items()} for m, s in after.items()},
        "updates": updates,
    }
