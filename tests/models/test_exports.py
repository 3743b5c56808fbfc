"""Exports give in transformers what our own forward gives, called as users call them.

Models are trained for two steps with configs/debug, exported, and compared within 1e-5 with
AutoModelForCausalLM, AutoModelForSequenceClassification and the text-classification pipeline on
padded batches. Their scores and logits are of order 1, of which fp32 rounding is below 1e-6.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastrlhf.checkpoint.model_folder import describe_model
from fastrlhf.commands import convert, sample
from fastrlhf.config import ModelConfig, ParallelConfig, load_config
from fastrlhf.data.batches import pack
from fastrlhf.data.tokenize import load_tokenizer, tokenizer_files, train_bpe
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.hf import load_hf, model_config_from_hf, save_hf
from fastrlhf.models.hf.generation_settings import export_settings, generation_from_hf
from fastrlhf.models.hf.pad_token import export_tokenizer
from fastrlhf.models.loading import find_model, load_saved
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.run.train import train

ROOT = Path(__file__).parents[2]
TEXTS = ["What is 1 plus 2? It is 3.<|endoftext|>", "What is 10 plus 19? No idea.<|endoftext|>"]
CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module", params=["gpt", "llama"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Return a folder with an SFT and an RM run of one family, whose data folder was renamed.

    The GPT runs' tokenizer pads with eos, the Llama runs' has no pad token.
    """
    from configs.debug import make_data  # the root of the repository is on pytest's path

    folder = tmp_path_factory.mktemp(request.param)
    make_data.main(folder / "data")
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    if request.param == "gpt":
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder / "data" / "tokenizer")
    started = Path.cwd()
    os.chdir(folder)  # the paths in the configuration are relative to it
    try:
        for command, file, load in (("sft", "demonstrations", "null"), ("rm", "rankings", "sft")):
            overrides = [
                *(["model.family=llama", "model.ffn_size=172"] * (request.param == "llama")),
                f"model.load={load}",
                "data.tokenizer=data/tokenizer",
                f"data.train=data/{file}.jsonl",
                "train.steps=2",
                f"output_dir={command}",
                "log.tensorboard=false",
                "log.progress=false",
            ]
            if command == "rm":
                overrides.append("data.demonstrations=data/demonstrations.jsonl")
            train(command, load_config(ROOT / "configs" / "debug" / f"{command}.yaml", overrides))
    finally:
        os.chdir(started)
    (folder / "data").rename(folder / "renamed")
    yield folder
    meshes.finalize()


def ours(path: Path, sequences: list[list[int]]) -> tuple[GPT, torch.Tensor]:
    """Return our stage and its logits [T, V], or scores [sequences], of unpadded sequences."""
    saved = find_model(path)
    mesh = meshes.initialize(ParallelConfig(), seed=0)
    stage = load_saved(saved, mesh, "scalar" if saved.head == "scalar" else "lm", "fp32").eval()
    batch = pack(sequences, [0] * len(sequences))
    with torch.no_grad():
        hidden = stage(batch)
        if saved.head == "lm":
            return stage, (hidden @ stage.lm_head()["weight"].t())[:, : stage.vocab_size]
        return stage, stage.score(hidden)[batch.cu_seqlens[1:].long() - 1]


def padded(out: Path) -> tuple[Any, list[list[int]]]:
    """Return a batch of two lengths as the exported tokenizer pads it, and its rows without pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    rows = [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)]
    assert len(rows[0]) != len(rows[1])
    eos = tokenizer.eos_token_id
    assert all(row[-1] == eos and tokenizer.pad_token_id not in row for row in rows)
    return batch, rows


def test_logits_of_an_exported_policy(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert convert.convert_to_hf(trained / "sft", out) < 1e-5
    batch, rows = padded(out)
    stage, expected = ours(trained / "sft", rows)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = model(**batch).logits
    assert expected.std() > 0.1
    kept = logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(kept[:, : stage.vocab_size], expected, **CLOSE)
    # The pad token's row is new. Its logit is the mean of the others, up to rounding.
    assert logits.shape[-1] == stage.vocab_size + 1
    torch.testing.assert_close(kept[:, -1], expected.mean(1), **CLOSE)
    assert model.generation_config.suppress_tokens == [stage.vocab_size]
    generated = transformers.pipeline("text-generation", model=str(out))(
        ["What is 1 plus 2?", "What"], max_new_tokens=4, batch_size=2
    )
    assert len(generated) == 2
    assert_ids_agree(out)


def assert_ids_agree(out: Path) -> None:
    """Check that all files of an export name the same special tokens."""
    config = json.loads((out / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    found = [config]
    if config["architectures"][0].endswith("ForSequenceClassification"):
        assert not (out / "generation_config.json").exists()
    else:
        found.append(json.loads((out / "generation_config.json").read_text()))
    for ids in found:
        assert ids["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert ids["eos_token_id"] == tokenizer.eos_token_id
    rows = next(
        tensor.shape[0]
        for name, tensor in load_file(out / "model.safetensors").items()
        if name.endswith(("wte.weight", "embed_tokens.weight"))
    )
    assert tokenizer.pad_token_id < config["vocab_size"] == rows
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_scores_of_an_exported_reward_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hf"
    assert convert.convert_to_hf(trained / "rm", out) < 1e-5
    printed = capsys.readouterr().out
    batch, rows = padded(out)
    stage, expected = ours(trained / "rm", rows)
    bias = stage.score.bias.item()
    assert abs(bias) > 1e-3 and abs(expected[0] - expected[1]) > 1e-3
    lacks = 0.0 if stage.model_config.family == "gpt" else bias
    assert (f"transformers' scores are ours {-bias:+.6g}" in printed) == (lacks != 0)
    assert "the pad token is <|pad|>" in printed
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
        alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(scores + lacks, expected, **CLOSE)
    torch.testing.assert_close(alone + lacks, expected, **CLOSE)
    classify = transformers.pipeline("text-classification", model=str(out), batch_size=2)
    results = classify(TEXTS)
    assert [result["label"] for result in results] == ["score", "score"]
    torch.testing.assert_close(
        torch.tensor([r["score"] for r in results]) + lacks, expected, **CLOSE
    )
    assert len(classify("What " * 200, truncation=True)) == 1  # not longer than its positions
    assert_ids_agree(out)

    # Imported again, it is our model.
    convert.convert_from_hf(out, tmp_path / "again")
    _, again = ours(tmp_path / "again", rows)
    torch.testing.assert_close(again, expected, **CLOSE)
    convert.convert_to_hf(tmp_path / "again", tmp_path / "twice")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[:, 0] + lacks, expected, **CLOSE)


# ---- the tokenizer in checkpoints ---------------------------------------------------------------


def test_a_checkpoint_works_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export and sampling need neither the data folder nor the working folder of the run."""
    monkeypatch.chdir(tmp_path)
    saved = describe_model(trained / "sft")
    shutil.copytree(saved.path.parent, tmp_path / "moved")
    alone = describe_model(tmp_path / "moved")
    assert alone.tokenizer_copy == tmp_path / "moved" / "tokenizer"
    expected = load_tokenizer(trained / "renamed" / "tokenizer")
    found = load_tokenizer(alone.tokenizer_folder)
    assert found.get_vocab() == expected.get_vocab()
    assert found.special_tokens_map == expected.special_tokens_map
    prompts = trained / "renamed" / "prompts.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))
    config = load_config(
        ROOT / "configs" / "debug" / "sft.yaml",
        [
            f"model.family={saved.model.family}",
            f"model.ffn_size={saved.model.ffn_size}",
            "model.load=moved",
            "data.tokenizer=data/tokenizer",
            f"data.prompts={few}",
            "generation.max_new_tokens=8",
            "sample.k=2",
            "output_dir=out",
        ],
    )
    sample.run(config)
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 2

    file = tmp_path / "moved" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("plus", "minu"))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged.*--tokenizer FOLDER"):
        convert.convert_to_hf("moved", "hf")
    shutil.rmtree(file.parent)  # as in checkpoints of old versions
    with pytest.raises(
        UserError,
        match=r"has no copy of its tokenizer, and data/tokenizer is not there.*--tokenizer",
    ):
        convert.convert_to_hf("moved", "hf")
    assert not (tmp_path / "hf").exists()
    convert.convert_to_hf("moved", "hf", tokenizer=trained / "renamed" / "tokenizer")
    assert_ids_agree(tmp_path / "hf")


@pytest.mark.parametrize("setting", [True, False, None])
@pytest.mark.parametrize("adds", [True, False])
def test_the_copy_adds_bos_as_in_training(
    setting: bool | None, adds: bool, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.add_bos_token = adds
    tokenizer.save_pretrained(tmp_path / "data")
    loaded = load_tokenizer(tmp_path / "data", add_bos=setting)
    (tmp_path / "copy").mkdir()
    for name, text in tokenizer_files(loaded).items():
        (tmp_path / "copy" / name).write_text(text)
    expected = adds if setting is None else setting
    ids = load_tokenizer(tmp_path / "copy")("a small")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == expected
    assert (loaded("a small")["input_ids"][0] == tokenizer.bos_token_id) == adds  # unchanged


# ---- generation_config.json ---------------------------------------------------------------------


def test_generation_settings_come_back(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    settings = {
        "eos_token_id": [0, 5],
        "bos_token_id": 7,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
    }
    train_bpe(["a small corpus of words to learn from"] * 4, 300, source)
    hf_model("llama", vocab_size=320, eos_token_id=0).save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert.convert_from_hf(source, tmp_path / "ours")
    convert.convert_to_hf(tmp_path / "ours", tmp_path / "back")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    assert {name: getattr(found, name) for name in settings} == settings
    assert found.pad_token_id == load_tokenizer(tmp_path / "back").pad_token_id
    assert found.suppress_tokens is None  # the pad token has a row of the model's own

    (source / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: not valid JSON"):
        convert.convert_from_hf(source, tmp_path / "other")
    (source / "generation_config.json").unlink()
    assert generation_from_hf(source) == {"eos_token_id": 0}


def test_generation_stops_at_the_end_of_turn(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert export_settings({}, tokenizer, [])["eos_token_id"] == [0, end]
    stored = {"eos_token_id": [5, end]}
    assert export_settings(stored, tokenizer, [])["eos_token_id"] == [5, end, 0]
    assert stored == {"eos_token_id": [5, end]}


# ---- the pad token ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a small corpus of words to learn from"] * 4, 300, folder)
    return load_tokenizer(folder)


@pytest.fixture
def tokenizer(made_tokenizer: Any) -> Any:
    return copy.deepcopy(made_tokenizer)


@pytest.mark.parametrize(
    ("special", "pad", "expected", "is_new"),
    [
        ([], None, "<|pad|>", True),
        ([], "<|endoftext|>", "<|pad|>", True),
        (["<|reserved_0|>", "<|finetune_pad|>"], None, "<|finetune_pad|>", False),
        (["<|reserved_0|>", "<|start|>"], "<|endoftext|>", "<|reserved_0|>", False),
        (["<|start|>"], None, "<|pad|>", True),
        (["<|start|>", "<|fill|>"], "<|fill|>", "<|fill|>", False),
    ],
)
def test_choice_of_the_pad_token(
    special: list[str], pad: str | None, expected: str, is_new: bool, tokenizer: Any
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.pad_token = pad
    tokenizer.padding_side = "left"
    size = len(tokenizer)
    for free in (0, 1):
        export = export_tokenizer(tokenizer, size + free, 64, "scalar")
        assert export.tokenizer.pad_token == expected
        assert (len(export.tokenizer) == size + 1) == is_new
        assert export.rows == (1 if is_new and not free else 0)
        assert (export.tokenizer.padding_side, export.tokenizer.model_max_length) == ("right", 64)
        assert bool(export.note) == (expected != pad)
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.padding_side) == (size, pad, "left")
    assert export_tokenizer(tokenizer, size, 64, "lm").tokenizer.padding_side == "left"


def test_the_rows_of_every_architecture(
    variant: str, hf_folder: Callable[[str], Path], load: Callable[..., GPT], tokenizer: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    stage = load(hf_folder(variant))
    small = _tokenizer_of(stage.vocab_size, tmp_path / "tokenizer")
    save_hf(stage, tmp_path / "out", small)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == stage.vocab_size + 1 == config["pad_token_id"] + 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(hf_folder(variant))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        new, old = (getattr(one, get)().weight for one in (model, before))
        assert torch.equal(new[:-1], old)
        torch.testing.assert_close(new[-1], old.mean(0), atol=1e-6, rtol=0)
    tokens = torch.tensor([[1, 2, 3], [4, 5, config["pad_token_id"]]])
    mask = (tokens != config["pad_token_id"]).long()
    with torch.no_grad():
        new, old = (
            one(tokens.clamp_max(100), attention_mask=mask).logits for one in (model, before)
        )
        probability = new.softmax(-1)[..., -1]
    torch.testing.assert_close(new[..., :-1], old, **CLOSE)
    assert probability.max() < 1 / stage.vocab_size


def _tokenizer_of(size: int, folder: Path) -> Any:
    """Return a tokenizer of `size` words, without a pad token."""
    from tokenizers import Tokenizer, models

    words = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")),
        eos_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


# ---- the score bias -----------------------------------------------------------------------------


def test_a_bias_in_bf16_weights_is_exact(
    hf_model: Callable[..., Any], mesh: Mesh, tmp_path: Path
) -> None:
    """The last LayerNorm's bias is fp32 in the export, and comes back without rounding."""
    kind = transformers.AutoModelForSequenceClassification
    model = hf_model("gpt2", kind, num_labels=1, pad_token_id=0).bfloat16()
    model.config.score_bias = 1.8437
    model.save_pretrained(tmp_path / "in")
    stage = _scalar(tmp_path / "in", mesh)
    save_hf(stage, tmp_path / "out")
    again = _scalar(tmp_path / "out", mesh)
    layernorm = "transformer.ln_f.bias"
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("in", "out")]
    assert [tensors[layernorm].dtype for tensors in files] == [torch.bfloat16, torch.float32]
    weight = files[0]["score.weight"][0].double()
    shift = files[1][layernorm].double() - files[0][layernorm].double()
    # fp32 rounds each of the 32 sums by at most 2^-24 of it.
    bound = 2**-24 * (weight.abs() @ files[1][layernorm].double().abs()).item()
    assert abs((weight @ shift).item() - 1.8437) < bound + 2**-23
    kept = again.decoder.final_layernorm.bias.double() - stage.decoder.final_layernorm.bias.double()
    total = weight @ kept + again.score.bias.double() - stage.score.bias.double()
    assert abs(total.item()) < 4 * bound + 2**-23
    assert kept.abs().max() > 0


def _scalar(folder: Path, mesh: Mesh) -> GPT:
    model: ModelConfig = model_config_from_hf(folder)
    assert model.vocab_size is not None
    stage = build_model(model, mesh, model.vocab_size, head="scalar", seed=1)
    load_hf(folder, stage)
    return stage.eval()
