"""The nn.Modules give what the functions give; the examples run, learn, and stay short."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch

from fastrlhf.ops import (
    FusedLinearCrossEntropy,
    FusedLinearLogprobs,
    FusedLinearPPOLoss,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
)
from fastrlhf.ops.linear_modules import _FusedLinear

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("torch_only")


def inputs():
    h, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 4), (11, 4), (11,)))
    labels, mask = torch.randint(0, 11, (2, 5)), torch.rand(2, 5) > 0.4
    return h, w, b, labels, mask, torch.randn(2, 5), torch.randn(2, 5)


def test_logprobs_module():
    h, w, b, labels, mask, ref, _ = inputs()
    module = FusedLinearLogprobs(recompute=False, with_entropy=True, temperature=0.5, vocab_size=10)
    ours = module(h, w, labels.clamp(max=9), bias=b, mask=mask, ref_logprobs=ref)
    expected = linear_logprobs(
        h,
        w,
        labels.clamp(max=9),
        bias=b,
        mask=mask,
        ref_logprobs=ref,
        recompute=True,
        with_entropy=True,
        temperature=0.5,
        vocab_size=10,
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_cross_entropy_module_and_its_ignore_index():
    h, w, b, labels, mask, _, _ = inputs()
    expected = linear_cross_entropy(h, w, labels, mask, bias=b, denominator=3.0, temperature=2.0)
    module = FusedLinearCrossEntropy(temperature=2.0)
    assert torch.equal(module(h, w, labels, mask, bias=b, denominator=3.0), expected)
    assert torch.equal(
        module(h, w, torch.where(mask, labels, -100), bias=b, denominator=3.0), expected
    )
    ours, torchs = (
        FusedLinearCrossEntropy()(h, w, torch.where(mask, labels, -100)),
        torch.nn.CrossEntropyLoss(),
    )
    torch.testing.assert_close(
        ours, torchs((h @ w.T).flatten(0, 1), torch.where(mask, labels, -100).flatten())
    )


def test_ppo_module():
    h, w, b, labels, mask, old, advantages = inputs()
    module = FusedLinearPPOLoss(clip=0.1, entropy_coef=0.3)
    ours = module(h, w, labels, old, advantages, mask, bias=b, denominator=7.0)
    expected = linear_ppo_loss(
        h, w, labels, old, advantages, mask, bias=b, denominator=7.0, clip=0.1, entropy_coef=0.3
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_modules_hold_no_parameters_and_name_mistakes():
    assert not list(FusedLinearPPOLoss().parameters()) and "temperature=0.5" in repr(
        FusedLinearLogprobs(temperature=0.5)
    )
    with pytest.raises(
        ValueError, match="recompute: got 'no', expected one of 'auto', True, False"
    ):
        FusedLinearLogprobs(recompute="no")
    with pytest.raises(ValueError, match="clip: got -1"):
        FusedLinearPPOLoss(clip=-1)


def test_a_module_prints_every_option_it_holds():
    common = (
        "temperature=1.0, softcap=None, backend='auto', vocab_start=None, vocab_size=None,"
        " group=None"
    )
    policy = (
        "clip=0.1, dual_clip=None, entropy_coef=0.0, kl_coef=0.0, kl_estimator='k3',"
        " objective='clip', ratio='token'"
    )
    assert repr(FusedLinearPPOLoss(clip=0.1)) == f"FusedLinearPPOLoss({common}, {policy})"
    smoothing = "ignore_index=-100, label_smoothing=0.0, z_loss=0.0"
    assert repr(FusedLinearCrossEntropy()) == f"FusedLinearCrossEntropy({common}, {smoothing})"
    logprobs = FusedLinearLogprobs(recompute=False, with_entropy=True, vocab_size=7)
    assert "vocab_size=7" in repr(logprobs) and repr(logprobs).endswith(
        "recompute=False, with_entropy=True)"
    )


@pytest.mark.parametrize(
    ("module", "op"),
    [
        (FusedLinearLogprobs, linear_logprobs),
        (FusedLinearCrossEntropy, linear_cross_entropy),
        (FusedLinearPPOLoss, linear_ppo_loss),
    ],
)
def test_a_module_takes_every_argument_of_its_op(module, op):
    """Options when it is made, tensors when it is called; the defaults are the op's."""
    shared = inspect.signature(_FusedLinear.__init__).parameters
    made = inspect.signature(module.__init__).parameters
    called = inspect.signature(module.forward).parameters
    taken = {k: p for k, p in {**shared, **made, **called}.items() if k not in ("self", "options")}
    wanted = dict(inspect.signature(op).parameters)
    if module is FusedLinearCrossEntropy:  # its mask may come from ignore_index
        del taken["ignore_index"], taken["mask"], wanted["mask"]
    assert set(taken) == set(wanted)
    assert {k: p.default for k, p in taken.items()} == {k: p.default for k, p in wanted.items()}
    assert not set(called) & (set(shared) | set(made)) - {"self"}


def test_the_options_reach_the_ops():
    h, w, b, labels, mask, old, advantages = inputs()
    options = {"dual_clip": 2.0, "kl_coef": 0.1, "kl_estimator": "k2", "ratio": "sequence"}
    options |= {"clip": (0.1, 0.3), "softcap": 3.0}
    tensors = {"ref_logprobs": old - 0.1, "weights": old.abs(), "num_counted": int(mask.sum())}
    ours = FusedLinearPPOLoss(**options)(h, w, labels, old, advantages, mask, bias=b, **tensors)
    expected = linear_ppo_loss(h, w, labels, old, advantages, mask, bias=b, **options, **tensors)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    smoothed = {"label_smoothing": 0.1, "z_loss": 0.01}
    ours = FusedLinearCrossEntropy(**smoothed)(h, w, labels, mask)
    assert torch.equal(ours, linear_cross_entropy(h, w, labels, mask, **smoothed))


@pytest.mark.parametrize("name", ["hf_sft.py", "hf_ppo_loss.py"])
def test_examples_learn_in_under_30_lines(name, capsys):
    pytest.importorskip("transformers")
    assert len((EXAMPLES / name).read_text().splitlines()) < 30
    runpy.run_path(str(EXAMPLES / name))
    losses = [float(x) for x in re.findall(r"loss (-?[\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] - 0.05
