"""Whether Weights & Biases can log in without asking, which a batch job cannot answer."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

_OFF = ("offline", "disabled", "dryrun")


def has_login() -> bool:
    """Return whether wandb finds a key, or a sign that it needs none.

    It takes the key from WANDB_API_KEY or from the netrc file, where `wandb login` writes it for
    the server's host. A settings file of wandb may turn it offline or name another server, so one
    counts as a sign.
    """
    environment = os.environ
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if environment.get("WANDB_MODE", "").lower() in _OFF or "WANDB_DISABLED" in environment:
        return True
    folder = Path(environment.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"))
    if (folder / "settings").is_file() or Path("wandb/settings").is_file():
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    names = [environment.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in (Path(name).expanduser() for name in names if name):
        try:
            if host in path.read_text(encoding="utf-8", errors="replace").split():
                return True
        except OSError:
            continue
    return False
