"""Fine-tune a Hugging Face causal LM without its [B, T, V] logits: python examples/hf_sft.py."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastrlhf.ops import FusedLinearCrossEntropy

torch.manual_seed(0)
sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=503, bos_token_id=0, eos_token_id=0, **sizes)
model = GPT2LMHeadModel(config)
cross_entropy = FusedLinearCrossEntropy()  # a label of -100 does not count, as in Hugging Face
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

tokens = torch.randint(0, 503, (4, 32))
labels = tokens.clone()
labels[:, :8] = -100  # the prompt

for step in range(20):
    hidden = model.transformer(tokens).last_hidden_state  # without the head, which is in the loss
    loss = cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
