"""What numbers depend on besides the settings: this code and the libraries it computes with, the same on every node."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import cafe
from cafe.errors import UserError

LIBRARIES = ("numpy", "open_clip_torch", "pillow", "timm", "torch", "torchvision")


@cache
def versions() -> dict[str, str]:
    """Return what numbers depend on besides the settings: the versions of libraries, and a digest of this code itself."""
    code = hashlib.sha256()
    root = Path(cafe.__path__[0])
    for folder, _, names in sorted(os.walk(root, followlinks=True)):  # in a checkout two packages are links
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            code.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode() + path.read_bytes())
    return {"cafe": code.hexdigest()[:12], **{library: version(library) for library in LIBRARIES}}


def check_versions(drivers: Mapping[str, str]) -> None:
    """Raise `UserError` where this node computes with other code or libraries than the driver planned with."""
    for name, wanted in drivers.items():
        if (here := versions().get(name)) != wanted:
            raise UserError(
                f"Node {socket.gethostname()} has {name} {here}, and the command was given with {name} {wanted}: install "
                "the same on every node."
            )


def code_version() -> str:
    """Return the git commit this code was checked out from, or its released version when it was installed.

    An installation may lie inside a checkout of its user's, whose commits are none of this code.
    """
    checkout, git = Path(cafe.__path__[0]).parent, shutil.which("git")
    if git and (checkout / ".git").exists():
        asked = subprocess.run([git, "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return f"cafe {cafe.__version__}"
