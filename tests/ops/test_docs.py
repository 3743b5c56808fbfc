"""The code of docs/ops.md runs, and its signatures are those of the ops."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from fastrlhf import ops

PAGE = (Path(__file__).parents[2] / "docs/ops.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)

pytestmark = pytest.mark.usefixtures("torch_only")


def test_plain_loop(capsys):
    exec(compile(BLOCKS[0], "docs/ops.md", "exec"), {})
    assert re.match(r"ratio at most 1\.\d{3}, clipped \d+%", capsys.readouterr().out)


def test_trainer_loss_equals_the_models_own():
    transformers = pytest.importorskip("transformers")
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS[1], "docs/ops.md", "exec"), namespace)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 61, (2, 9))
    labels = torch.where(torch.rand(2, 9) > 0.3, tokens, -100)
    expected = model(input_ids=tokens, labels=labels).loss
    trainer = namespace["LeanTrainer"]
    loss = trainer.compute_loss(
        trainer.__new__(trainer), model, {"input_ids": tokens, "labels": labels}
    )
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in ops.__all__ if callable(getattr(ops, n)) and n.islower()]
)
def test_every_op_and_its_arguments_are_documented(name):
    assert f"{name}(" in PAGE
    described = PAGE.split(f"\n{name}(", 1)
    if len(described) == 2:
        signature = described[1].split(") ", 1)[0].split(")\n", 1)[0]
        given = {
            a.split("=")[0].split("[")[0].strip()
            for a in re.sub(r"\[[^\]]*\]", "", signature).split(",")
        }
        known = set(inspect.signature(getattr(ops, name)).parameters) | {"*", "...", ""}
        assert given <= known, given - known
