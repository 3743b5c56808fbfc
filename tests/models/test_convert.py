"""Conversion of Hugging Face folders to our checkpoints and back, verified, with tokenizers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastrlhf.checkpoint.model_folder import describe_model
from fastrlhf.commands import convert
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
from fastrlhf.errors import UserError
from fastrlhf.models.hf import LogitMismatch, model_config_from_hf

Bound = Callable[[ModelConfig], float]


def same_tensors(first: Path, second: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    equal = {
        name: after[name].dtype == tensor.dtype and torch.equal(tensor, after[name])
        for name, tensor in before.items()
    }
    return before.keys() == after.keys() and all(equal.values())


def test_language_model_with_tokenizer(
    hf_model: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    logit_bound: Bound,
) -> None:
    source = tmp_path / "source"
    train_bpe(["a small corpus of words to learn from"] * 4, 300, source)
    tokenizer = load_tokenizer(source)
    model = hf_model("llama", vocab_size=320, eos_token_id=tokenizer.eos_token_id).bfloat16()
    model.save_pretrained(source)
    difference = convert.convert_from_hf(source, tmp_path / "ours")
    saved = describe_model(tmp_path / "ours")
    assert difference < logit_bound(saved.model)
    assert (saved.head, saved.vocab_size, saved.model.dtype) == ("lm", 320, "bf16")
    assert saved.tokenizer_copy == tmp_path / "ours" / "tokenizer"
    assert load_tokenizer(saved.tokenizer).get_vocab() == tokenizer.get_vocab()

    assert convert.convert_to_hf(tmp_path / "ours", tmp_path / "back") < logit_bound(saved.model)
    assert same_tensors(source, tmp_path / "back")
    pad = {"<|pad|>": len(tokenizer)}  # in one of the embedding's free rows
    assert load_tokenizer(tmp_path / "back").get_vocab() == tokenizer.get_vocab() | pad
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id
    assert again.dtype == torch.bfloat16
    lines = [line for line in capsys.readouterr().out.splitlines() if "agree" in line]
    assert [re.sub(r"to [\d.e-]+$", "to X", line) for line in lines] == [
        f"{one} -> {other}: every tensor used once, logits agree with transformers to X"
        for one, other in ((source, tmp_path / "ours"), (tmp_path / "ours", tmp_path / "back"))
    ]

    # The exported policy works in transformers' pipeline and generates what the original does.
    texts = [
        transformers.pipeline("text-generation", model=str(folder))(
            "a small", max_new_tokens=5, do_sample=False
        )
        for folder in (source, tmp_path / "back")
    ]
    assert texts[0] == texts[1] and texts[0][0]["generated_text"].startswith("a small")
    assert len(texts[0][0]["generated_text"]) > len("a small")


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.mark), "w")


def test_pickles_and_code_planted_in_a_folder_are_not_run(
    hf_folder: Callable[[str], Path], tmp_path: Path, logit_bound: Bound
) -> None:
    """Pickles next to or instead of good weights, and modules named in config.json, are not run."""
    mark = tmp_path / "executed"
    folder = shutil.copytree(hf_folder("llama"), tmp_path / "source")
    train_bpe(["a small corpus of words to learn from"] * 4, 300, folder)
    torch.save(Bomb(mark), folder / "pytorch_model.bin")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "adapter_model.bin",
        "tokenizer.model",
        "vocab.pkl",
    ):
        shutil.copy(folder / "pytorch_model.bin", folder / name)
    (folder / "planted.py").write_text(
        f"open({str(mark)!r}, 'w')\nConfig = Model = Tokenizer = None\n"
    )
    asked = {
        "config.json": {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"]},
    }
    for name, classes in asked.items():
        text = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(text | {"auto_map": classes}))
    assert convert.convert_from_hf(folder, tmp_path / "ours") < logit_bound(
        model_config_from_hf(hf_folder("llama"))
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no safetensors, only \.bin weights"):
        convert.convert_from_hf(folder, tmp_path / "other")
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        convert.convert_from_hf(folder, tmp_path / "other")
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the bomb works


def test_reward_model_keeps_bias_and_statistics(
    hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    kind = transformers.AutoModelForSequenceClassification
    model = hf_model("gpt2", kind, num_labels=1, pad_token_id=0)
    model.config.score_bias = -0.625
    model.config.score_statistics = {"mean": 1.5, "std": 0.25}
    model.save_pretrained(tmp_path / "source")
    convert.convert_from_hf(tmp_path / "source", tmp_path / "ours")
    saved = describe_model(tmp_path / "ours")
    assert (saved.head, saved.statistics, saved.tokenizer) == (
        "scalar",
        {"mean": 1.5, "std": 0.25},
        "",
    )
    convert.convert_to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("source", "back"))
    shifted = before["transformer.ln_f.bias"] - after["transformer.ln_f.bias"]
    weight = before["score.weight"][0].double()
    torch.testing.assert_close(weight @ shifted.double(), torch.tensor(0.625).double())
    del before["transformer.ln_f.bias"], after["transformer.ln_f.bias"]
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["score_bias"] == 0.0 and config["pad_token_id"] == 0
    assert config["score_statistics"] == {"mean": 1.5, "std": 0.25}
    assert (
        config["architectures"] == ["GPT2ForSequenceClassification"]
        and len(config["id2label"]) == 1
    )


def test_errors_are_raised_before_anything_is_written(
    hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"parallel\.tensor 4 does not divide the model's num_kv_heads 2"
    ):
        convert.convert_from_hf(hf_folder("llama"), tmp_path / "ours", ParallelConfig(tensor=4))
    with pytest.raises(
        UserError, match=r"parallel\.pipeline 3 does not divide the model's num_layers 2"
    ):
        convert.convert_from_hf(hf_folder("llama"), tmp_path / "ours", ParallelConfig(pipeline=3))
    with pytest.raises(UserError, match="1 processes cannot be split"):
        convert.convert_from_hf(hf_folder("llama"), tmp_path / "ours", ParallelConfig(tensor=2))
    with pytest.raises(UserError, match="no model here"):
        convert.convert_to_hf(tmp_path, tmp_path / "back")
    assert not (tmp_path / "ours").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.convert_from_hf(hf_folder("llama"), tmp_path / "used")


def test_the_written_files_are_verified(
    hf_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage between loading and saving is detected."""
    save_model = convert.save_model

    def damaged(path: Path, stage: Any, **options: Any) -> None:
        with torch.no_grad():
            stage.decoder.layers[0].mlp.linear_fc1.weight[3] += 1.0
        save_model(path, stage, **options)

    monkeypatch.setattr(convert, "save_model", damaged)
    with pytest.raises(LogitMismatch):
        convert.convert_from_hf(hf_folder("gpt2"), tmp_path / "ours")
