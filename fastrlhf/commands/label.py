"""The command `label`: serve a labeling project, and manage its links, backup and export."""

from __future__ import annotations

import logging
from pathlib import Path

from fastrlhf.config import yaml_file
from fastrlhf.errors import UserError
from fastrlhf.labeling.exchange import json_lines, judgements, read_items, training_records
from fastrlhf.labeling.project import Project, resolve
from fastrlhf.labeling.store import Store

notes = logging.getLogger(__name__)


def run(
    project_file: Path,
    *,
    host: str,
    port: int,
    link: list[str],
    admin_link: str | None,
    revoke: str | None,
    backup: Path | None,
    export: Path | None,
) -> None:
    """Import new items and serve the project, or do what the options ask and return."""
    project = yaml_file.load(Project, project_file)
    store = Store(resolve(project_file, project.database), project.lock_minutes * 60)
    try:
        if backup is not None:
            store.backup(backup)
        if revoke is not None:
            store.revoke(revoke)
        for name in link:
            print(f"{name}: http://{host}:{port}/link/{store.add_labeler(name)}")
        if admin_link is not None:
            token = store.add_labeler(admin_link, admin=True)
            print(f"{admin_link}: http://{host}:{port}/link/{token}")
        if export is not None:
            _export(store, export)
        if not (link or admin_link or revoke or backup or export):
            _serve(project, project_file, store, host, port)
    finally:
        store.close()


def _export(store: Store, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = list(judgements(store.answers()))
    for name, kept in (("judgements", records), ("training", list(training_records(records)))):
        (folder / f"{name}.jsonl").write_text(json_lines(kept), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(kept)} records")


def _serve(project: Project, project_file: Path, store: Store, host: str, port: int) -> None:
    try:
        import uvicorn

        from fastrlhf.labeling.web import LabelingSite
    except ModuleNotFoundError as error:
        raise UserError(
            f"label needs the package {error.name}; run pip install 'fastrlhf[label]'"
        ) from None
    for name in project.files:
        added = store.add_items(read_items(resolve(project_file, name), project))
        notes.info("%s: %d new items", name, added)
    site = LabelingSite(project, store)
    notes.info("serving on http://%s:%d; make links with --link NAME", host, port)
    # The access log would hold the tokens of the links.
    uvicorn.run(site.application(), host=host, port=port, log_level="warning", access_log=False)
