"""The settings of generation_config.json: read on import, kept in checkpoints, written on export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrlhf.data.foreign_errors import foreign_errors
from fastrlhf.data.tokenize import stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.models.hf.shapes import read_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION_FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_THE_FILE = ("transformers_version", "_from_model_config", "_commit_hash")


def generation_from_hf(path: str | Path) -> dict[str, Any]:
    """Return the generation settings of a Hugging Face folder or .gguf file.

    They are those of generation_config.json, if there is one. The ids of bos, eos and pad that it
    does not have are those of config.json, without the defaults of transformers' classes that are
    outside the vocabulary. Raises UserError if the file is damaged.
    """
    file = Path(path) / GENERATION_FILE
    settings: dict[str, Any] = {}
    if file.is_file():

        def damaged(reason: str) -> UserError:
            return UserError(f"{file}: not valid JSON ({reason}); copy the file again")

        with foreign_errors(damaged):
            settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise damaged(f"a {type(settings).__name__}, expected an object")
    config = read_hf_config(path)
    for name in _IDS:
        ids = id_list(getattr(config, name, None))
        if ids and name not in settings and all(0 <= number < config.vocab_size for number in ids):
            settings[name] = getattr(config, name)
    return {name: value for name, value in settings.items() if name not in _OF_THE_FILE}


def id_list(value: object) -> list[int]:
    """Return the token ids of a setting, which may be None, one id or several."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int)]


def export_settings(
    stored: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast | None, suppressed: list[int]
) -> dict[str, Any]:
    """Return the settings of an export: those `stored`, with the special tokens of `tokenizer`.

    Generation stops at the stored eos tokens and where ours stops: at eos and at the chat
    template's end of turn. The tokens `suppressed` are never generated.
    """
    settings = dict(stored)
    if tokenizer is None:
        return settings
    ends = id_list(settings.get("eos_token_id"))
    missing = [number for number in stop_token_ids(tokenizer) if number not in ends]
    if missing:
        ends += missing
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if tokenizer.bos_token_id is not None:
        settings.setdefault("bos_token_id", tokenizer.bos_token_id)
    settings["pad_token_id"] = tokenizer.pad_token_id
    if suppressed:
        settings["suppress_tokens"] = [*id_list(settings.get("suppress_tokens")), *suppressed]
    return settings


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write generation_config.json.

    Not with GenerationConfig.save_pretrained, which refuses combinations that published files have,
    such as a temperature without do_sample.
    """
    import transformers

    content = {**settings, "transformers_version": transformers.__version__}
    (folder / GENERATION_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
