"""Load tokenizer folders: those that transformers saves, and OpenAI's two files of GPT-2.

Every failure is one line with the folder's or the file's name. Not supported: slow (pure Python)
tokenizers.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastrlhf.data.foreign_errors import foreign_errors
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_ADD_BOS = "_fastrlhf_add_bos"  # the attribute of a tokenizer that has the setting data.add_bos
_OPENAI_FILES = ("encoder.json", "vocab.bpe")
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "encoder.json",
)


def load_tokenizer(path: str | Path, *, add_bos: bool | None = None) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer saved in the local folder `path`.

    The folder is one that transformers saves, or has GPT-2's encoder.json and vocab.bpe. `add_bos`
    is the setting data.add_bos: see `bos_ids`. Raises UserError if the folder is missing,
    unreadable or damaged, or the tokenizer is slow or has no eos token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such tokenizer folder; "
            "expected one saved by transformers (tokenizer.json), or train one with train_bpe"
        )
    for name in _JSON_FILES:
        _check_json(folder / name)
    here = (folder / "tokenizer.json").is_file()
    parts = [name for name in _OPENAI_FILES if (folder / name).is_file()]
    openai = not here and len(parts) == len(_OPENAI_FILES)

    def damaged(reason: str) -> UserError:
        if not here and len(parts) == 1:
            (missing,) = {*_OPENAI_FILES} - {*parts}
            reason = f"it has {parts[0]} without {missing}, and GPT-2's tokenizer is both"
        elif not here and not openai:
            reason = "it has no tokenizer.json"
        return UserError(
            f"{folder}: not a tokenizer folder ({reason}); expected the files transformers saves"
        )

    with foreign_errors(damaged):
        tokenizer = _openai_tokenizer(folder) if openai else _saved_tokenizer(folder)
        _check_usable(tokenizer, folder)
    setattr(tokenizer, _ADD_BOS, add_bos)
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError(
            f"data.add_bos is true, but the tokenizer {folder} has no bos token; "
            'set "bos_token" in its tokenizer_config.json, or leave data.add_bos out'
        )
    return tokenizer


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return the files that transformers saves of `tokenizer`: name -> text.

    They add bos to text as data.add_bos says, if it is set: a model must be used as it was trained.
    """
    setting = getattr(tokenizer, _ADD_BOS, None)
    if setting is not None and setting != _adds_bos(tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_bos_token = setting  # type: ignore[misc]  # its setter is defined apart
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_bytes().decode()
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }


def _saved_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return cast(
        "PreTrainedTokenizerFast",
        AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
    )


def _openai_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return GPT-2's byte-level BPE from the files that OpenAI published."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def _check_usable(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Raise UserError if the tokenizer is slow, has no eos or cannot encode and decode."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: the tokenizer has no fast version; save one that writes tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos token; "
            'set "eos_token" in its tokenizer_config.json'
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name, of which chats use this one
        template = tokenizer.chat_template = template.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"{folder}: chat_template is {type(template).__name__}; expected text")
    tokenizer.decode(tokenizer(str(tokenizer.eos_token))["input_ids"])


def _check_json(path: Path) -> None:
    """Raise UserError if `path` exists and is not a JSON object."""
    if not path.exists():
        return

    def unreadable(reason: str) -> UserError:
        return UserError(f"{path}: not valid JSON ({reason}); copy the file again")

    with foreign_errors(unreadable):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise unreadable(f"a {type(content).__name__}, expected an object")


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token that begins string prompts and documents: [bos], or [] for none.

    data.add_bos decides. Without it, bos is added if the tokenizer itself adds it to text that it
    encodes with special tokens.
    """
    setting, bos = getattr(tokenizer, _ADD_BOS, None), tokenizer.bos_token_id
    if bos is None or setting is False:
        return []
    if setting is None and not _adds_bos(tokenizer):
        return []
    return [int(bos)]


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the tokenizer itself adds bos to text."""
    bos = tokenizer.bos_token_id
    ids: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return bos is not None and ids == [bos]
