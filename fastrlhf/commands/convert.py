"""The commands `fastrlhf convert from-hf|to-hf`: Hugging Face folders to our checkpoints and back.

Run them under torchrun with as many ranks as the model needs; the result does not depend on the
layout. Both directions end with a comparison of the written model's logits with transformers'. An
exported model has what transformers' batched calls need: a pad token at which no response ends, the
generation settings that it was imported with, and a reward model's bias in its weights if possible.
"""

from __future__ import annotations

from pathlib import Path

from fastrlhf.checkpoint.model_folder import describe_model, load_model, save_model
from fastrlhf.checkpoint.names import TOKENIZER
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.config.shape import check_layout
from fastrlhf.config.yaml_file import ConfigError
from fastrlhf.data.files import make_folder
from fastrlhf.data.tokenize import load_tokenizer, tokenizer_files
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.heads import Head
from fastrlhf.models.hf import (
    generation_from_hf,
    head_from_hf,
    load_hf,
    model_config_from_hf,
    save_hf,
    verify_logits,
)
from fastrlhf.models.hf.shapes import read_hf_config
from fastrlhf.models.hf.weights import Exported, check_new_folder
from fastrlhf.models.loading import saved_tokenizer
from fastrlhf.parallel import mesh as meshes

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def convert_from_hf(
    path: str | Path, out: str | Path, parallel: ParallelConfig | None = None
) -> float:
    """Convert the Hugging Face folder (or .gguf file) `path` to the model folder `out`.

    The dtype is kept. The folder's tokenizer, if it has one, is copied to `out`/tokenizer. Returns
    the largest difference between the logits of the written model and transformers' model. Raises
    UserError (nothing is written) or `models.hf.LogitMismatch`.
    """
    path, out, parallel = Path(path), Path(out).resolve(), parallel or ParallelConfig()
    model, head = model_config_from_hf(path), head_from_hf(path)
    _check_layout(model, parallel)
    check_new_folder(out)
    has_tokenizer = path.is_dir() and any((path / name).is_file() for name in _TOKENIZER_FILES)
    files = tokenizer_files(load_tokenizer(path)) if has_tokenizer else None
    with meshes.joined(parallel, seed=0) as mesh:
        assert model.vocab_size is not None
        stage = build_model(model, mesh, model.vocab_size, head=head)
        load_hf(path, stage)
        save_model(
            out,
            stage,
            tokenizer=str(out / TOKENIZER) if has_tokenizer else "",
            tokenizer_files=files,
            statistics=getattr(read_hf_config(path), "score_statistics", None),
            generation=generation_from_hf(path),
        )
        load_model(describe_model(out), stage)
        difference = verify_logits(stage, path, mesh)
        _report(path, out, stage, difference)
        return difference


def convert_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    parallel: ParallelConfig | None = None,
    tokenizer: str | Path | None = None,
) -> float:
    """Convert a run, step or model folder to the Hugging Face folder `out`, with its tokenizer.

    The folder `tokenizer` replaces the checkpoint's own.

    Returns the largest difference between the logits of transformers' model of that folder and of
    our stage. Raises UserError (nothing is written) or `models.hf.LogitMismatch`.
    """
    out, parallel = Path(out), parallel or ParallelConfig()
    saved = describe_model(checkpoint)
    _check_layout(saved.model, parallel)
    check_new_folder(out)
    own = saved_tokenizer(saved, tokenizer)
    make_folder(out.resolve().parent)
    with meshes.joined(parallel, seed=0) as mesh:
        head: Head = "scalar" if saved.head == "scalar" else "lm"
        stage = build_model(saved.model, mesh, saved.vocab_size, head=head)
        load_model(saved, stage)
        exported = save_hf(
            stage,
            out,
            own,
            extra={"score_statistics": saved.statistics} if saved.statistics else None,
            generation=saved.generation,
        )
        difference = verify_logits(stage, out, mesh)
        _report(checkpoint, out, stage, difference)
        if mesh.rank == 0:
            _report_export(out, stage, exported)
        return difference


def _report_export(out: Path, stage: GPT, exported: Exported) -> None:
    """Print what the user must know to call the exported model."""
    if exported.pad_note:
        print(f"{out}: {exported.pad_note}")
    if exported.score_bias:
        print(
            f"{out}: transformers' scores are ours {-exported.score_bias:+.6g}: this architecture "
            "has no place for the score bias, which is score_bias in config.json"
        )
    if stage.head_kind == "scalar" and read_hf_config(out).pad_token_id is None:
        print(f"{out}: no tokenizer, so no pad token: transformers scores one text at a time")


def _report(source: str | Path, out: Path, stage: GPT, difference: float) -> None:
    """Print the result on rank 0."""
    if stage.mesh.rank == 0:
        kind = "logits" if stage.head_kind == "lm" else "scores"
        print(
            f"{source} -> {out}: every tensor used once, {kind} agree with transformers to "
            f"{difference:.2g}"
        )


def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    try:
        check_layout(model, parallel, "the model's ", "convert on another number of ranks")
    except ConfigError as error:
        raise UserError(str(error)) from None
