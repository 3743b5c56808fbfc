"""The command `eval human`: figures of the judgements that people gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrlhf.data.files import make_folder, raw_rows
from fastrlhf.data.json_rows import BadRecord, decode_row
from fastrlhf.errors import UserError
from fastrlhf.evaluation.human import human_figures, write_human
from fastrlhf.evaluation.page import write_json


def run(files: list[Path], baseline: str | None, output: Path) -> dict[str, Any]:
    """Read judgements, write human.json and human.html to `output`, and return the figures."""
    rows = [row for path in files for row in _read(path)]
    if not rows:
        raise UserError(f"{files[0]}: holds no judgements")
    figures = human_figures(rows, baseline)
    if baseline is not None and not figures["win_rates"]:
        raise UserError(f"no ranking holds the baseline {baseline!r} and another model")
    make_folder(output)
    write_json(output / "human.json", figures)
    print(write_human(output / "human.html", figures))
    return figures


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, raw in raw_rows(path):
        try:
            row = decode_row(raw) if isinstance(raw, bytes) else dict(raw)
        except BadRecord as error:
            raise UserError(f"{path}:{number}: {error}") from None
        for name in ("prompt", "labeler_id", "item_id"):
            if name not in row:
                raise UserError(f"{path}:{number}: {name} is missing; expected a file of `label`")
        for name in ("ranks", "ratings", "flags", "model"):
            if name in row and (
                not isinstance(row[name], list) or len(row[name]) != len(row.get("responses", []))
            ):
                raise UserError(f"{path}:{number}: {name} has not one entry for each response")
        rows.append(row)
    return rows
