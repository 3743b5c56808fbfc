"""Update a Hugging Face causal LM with PPO from hidden states: python examples/hf_ppo_loss.py."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrlhf.ops import FusedLinearLogprobs, FusedLinearPPOLoss, masked_whiten

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=503, num_attention_heads=2, **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
logprobs, ppo_loss = FusedLinearLogprobs(), FusedLinearPPOLoss(clip=0.2, entropy_coef=0.01)

sampling = {"max_new_tokens": 16, "do_sample": True, "eos_token_id": None}
tokens = model.generate(torch.randint(3, 503, (4, 8)), **sampling)
labels, head = tokens[:, 1:], model.lm_head.weight
mask = torch.arange(labels.shape[1]).expand(labels.shape) >= 7  # the responses
rewards = (labels % 2 == 0).float()  # for even tokens, in place of a reward model's
advantages = masked_whiten(rewards, mask)
with torch.no_grad():
    old = logprobs(model.model(tokens).last_hidden_state[:, :-1], head, labels, mask=mask).logprobs

for step in range(8):
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    loss = ppo_loss(hidden, head, labels, old, advantages, mask)
    loss.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.loss.item():.4f}, largest ratio {loss.ratio_max.item():.3f}")
