"""Inputs of models: Hugging Face folders, model folders and checkpoints."""

from __future__ import annotations

import functools
import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fuzz.mutations import (
    EXTREMES,
    copy_folder,
    mutate_bytes,
    mutate_file,
    mutate_text,
    mutate_tree,
    tree_text,
)
from fuzz.outcomes import Case, Target

from fastrlhf.checkpoint.checkpointer import Checkpointer, read_state
from fastrlhf.checkpoint.integrity import MANIFEST, hash_and_sync, write_manifest
from fastrlhf.checkpoint.model_folder import describe_model, load_model, save_model
from fastrlhf.config import CheckpointConfig, ModelConfig, ParallelConfig
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.hf import load_hf
from fastrlhf.models.initialization import initialize_weights
from fastrlhf.models.loading import find_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
KINDS = {"gpt2": GPT2, "llama": SIZES, "qwen2": SIZES, "mistral": SIZES}


@functools.cache
def _mesh() -> Mesh:
    return meshes.initialize(ParallelConfig(), seed=7)


@functools.cache
def hf_folder(kind: str) -> Path:
    """Return the folder of a random model, sharded in two files; made once."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz")) / kind
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=30_000)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.6}')
    return folder


@functools.cache
def model_folder() -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a checkpoint with a model and a state, made once, and the model's tensors."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz")) / "run"
    stage = _stage(
        ModelConfig(
            family="gpt", num_layers=2, hidden_size=32, num_heads=4, max_positions=64, dtype="fp32"
        )
    )
    initialize_weights(stage, 5)
    step = folder / "checkpoints" / "step_00000003"
    save_model(step / "policy", stage, tokenizer="somewhere")
    state = {
        "version": 1,
        "step": 3,
        "data": {"epoch": 0, "cursor": 12},
        "algorithm": {"iteration": 2, "kl_coefficient": 0.02, "pretraining": {"epoch": 1}},
        "metrics": {"loss": 2.5, "none": None},
        "learners": {"policy": {"updates": 3, "loss_scale": {"scale": 65536.0}}},
        "layout": [1, 1, 1],
        "versions": {"torch": "2"},
    }
    (step / "state.json").write_text(json.dumps(state))
    files = ("state.json", f"policy/{MANIFEST}")
    write_manifest(step, {name: hash_and_sync(step / name) for name in files})
    (folder / "checkpoints" / "latest").write_text(step.name)
    return folder, {
        name: tensor.clone()
        for name, tensor in stage.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def _stage(model: ModelConfig) -> GPT:
    return build_model(model, _mesh(), VOCAB)


def plain_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the fp32 tensors of a safetensors file, parsed by its definition."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    return {
        name: np.frombuffer(
            data[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]], "<f4"
        ).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with a changed header, whose length is right or not."""
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    extremes = [
        *EXTREMES,
        "F64",
        "F32",
        "BF16",
        "I64",
        "F8_E4M3",
        [0, 128],
        [32, 32],
        [2**40, 2**40],
    ]
    text = tree_text(mutate_tree(header, rng, extremes)).encode()
    length = rng.choice((len(text), len(text), len(text), 0, 1, 2**63, 2**64 - 1, len(text) + 5))
    return struct.pack("<Q", length) + text + content[8 + size :]


def change(path: Path, rng: random.Random, extremes: list[Any] | None = None) -> None:
    """Change one file by its kind."""
    content = path.read_bytes()
    how = rng.randrange(10)
    if path.suffix == ".safetensors":
        path.write_bytes(mutate_header(content, rng) if how < 6 else mutate_bytes(content, rng))
    elif how < 7 and path.suffix == ".json":
        path.write_text(tree_text(mutate_tree(json.loads(content), rng, extremes)))
    else:
        path.write_bytes(mutate_text(content, rng))
    if rng.random() < 0.05:
        mutate_file(path, rng)


def make_hugging_face(rng: random.Random, folder: Path) -> Case:
    """Write a Hugging Face folder of which a file is changed; it is loaded in the shape it says."""
    kind = rng.choice(list(KINDS))
    copied = copy_folder(hf_folder(kind), folder / "hf")
    names = sorted(path.name for path in copied.iterdir())
    weight = [4 if name == "config.json" else 2 if "index" in name else 1 for name in names]
    path = copied / rng.choices(names, weight)[0]
    extremes = [*EXTREMES, "../model.safetensors", "/etc/hostname", names[-1], *KINDS, "bert", "t5"]
    if rng.random() < 0.9:
        change(path, rng, extremes)

    def run() -> GPT | None:
        saved = find_model(copied)
        # Larger shapes are refused when the files are read; this test has no memory for them.
        if max(saved.vocab_size, saved.model.hidden_size, saved.model.ffn_size or 0) > 4096:
            raise UserError(f"{copied}: too large for this test")
        if saved.model.num_layers > 8 or saved.model.max_positions > 4096:
            raise UserError(f"{copied}: too large for this test")
        stage = build_model(
            saved.model.model_copy(update={"dtype": "fp32"}),
            _mesh(),
            saved.vocab_size,
            head=saved.head,
        )
        load_hf(copied, stage)
        return stage

    def check(stage: GPT) -> None:
        stored: dict[str, np.ndarray] = {}
        for file in copied.glob("*.safetensors"):
            stored |= plain_safetensors(file)
        sums = sorted(round(float(np.abs(v.astype(np.float64)).sum()), 3) for v in stored.values())
        name = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
        table = dict(stage.named_parameters())
        ours = next(p for n, p in table.items() if "word_embeddings" in n).detach().numpy()
        found = stored.get(name, stored.get(name.partition(".")[2]))
        assert sums and found is not None
        assert np.array_equal(ours[: len(found)], found, equal_nan=True)
        total = sum(float(np.abs(p.detach().double().numpy()).sum()) for p in table.values())
        if np.isfinite(total) and np.isfinite(sums).all():
            assert abs(total - sum(sums)) <= 1e-6 * max(total, 1) + 0.01 * len(sums), (
                total,
                sum(sums),
            )

    return Case(run, check, [str(copied)], f"{kind} {path.name}")


def reseal(folder: Path) -> None:
    """Write a manifest of the files that are in `folder` now, so that it is intact by its hashes."""
    files = [p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST]
    write_manifest(folder, {path.name: hash_and_sync(path) for path in files})


def make_model_folder(rng: random.Random, folder: Path) -> Case:
    """Write a run of which a file of the model is changed, with the old or a new manifest."""
    source, tensors = model_folder()
    copied = copy_folder(source, folder / "run")
    step = copied / "checkpoints" / "step_00000003"
    choices = [*sorted((step / "policy").iterdir()), copied / "checkpoints" / "latest"]
    path = rng.choice(choices)
    if rng.random() < 0.9:
        extremes = [*EXTREMES, "../../state.json", "rank_00000.safetensors", "/etc/hostname"]
        change(path, rng, extremes)
    sealed = rng.random() < 0.5 and path.parent.name == "policy" and path.name != MANIFEST
    if sealed:
        reseal(step / "policy")

    def run() -> GPT:
        saved = describe_model(rng.choice((copied, step, step / "policy")))
        shape = (saved.model.num_layers, saved.model.hidden_size, saved.vocab_size)
        if max(saved.model.max_positions, saved.model.ffn_size or 0, *shape) > 4096 or shape[0] > 8:
            raise UserError(f"{copied}: too large for this test")
        stage = build_model(
            saved.model.model_copy(update={"dtype": "fp32"}),
            _mesh(),
            saved.vocab_size,
            head=saved.head,
        )
        load_model(saved, stage)
        return stage

    def check(stage: GPT) -> None:
        if sealed and path.suffix == ".safetensors":
            return  # other weights under a valid hash
        found = {n: t for n, t in stage.state_dict().items() if isinstance(t, torch.Tensor)}
        if sealed and path.name == "model.json":  # another shape, under a valid hash
            found = {name: found[name] for name in found.keys() & tensors.keys()}
        assert found and (sealed or found.keys() == tensors.keys())
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())

    return Case(run, check, [str(copied)], f"{path.name} sealed={sealed}")


def make_state(rng: random.Random, folder: Path) -> Case:
    """Write a run whose state.json, manifest or list of checkpoints is changed; it is resumed."""
    source, _ = model_folder()
    copied = copy_folder(source, folder / "run")
    step = copied / "checkpoints" / "step_00000003"
    path = rng.choice(
        (step / "state.json", step / "state.json", step / MANIFEST, step.parent / "latest")
    )
    content = path.read_bytes()
    if rng.random() < 0.85:
        change(path, rng)
    if path.name == "state.json" and path.is_file():
        files = {name: hash_and_sync(step / name) for name in ("state.json", f"policy/{MANIFEST}")}
        write_manifest(step, files)
    if rng.random() < 0.1:
        (step.parent / rng.choice(("step_00000004", "step_00000004_good", "step_abc"))).mkdir()

    def run() -> tuple[Path | None, Any]:
        section = CheckpointConfig(asynchronous=False)
        checkpointer = Checkpointer(_mesh(), step.parent, section, "", tokenizer="")
        newest = checkpointer.newest()
        return newest, None if newest is None else read_state(newest)

    def check(result: tuple[Path | None, Any]) -> None:
        newest, state = result
        assert newest == step
        plain = json.loads((step / "state.json").read_text(encoding="utf-8"))
        assert state["step"] == plain["step"] >= 0 and type(state["step"]) is int
        assert state["learners"] == plain["learners"]
        assert path.name != "latest" or content

    return Case(run, check, [str(copied)], path.name)


TARGETS = [
    Target("hugging face", make_hugging_face),
    Target("model folder", make_model_folder),
    Target("state", make_state),
]
