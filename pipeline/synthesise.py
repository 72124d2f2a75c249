"""Synthetic faces into a workspace: five domains with their manifests, so that everything runs without any data set."""

from __future__ import annotations

from collections.abc import Callable

from cafe.data import DATASETS
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.synthetic.domains import write
from pipeline.workspace import Workspace


def synthesise(
    workspace: Workspace,
    domains: list[str],
    faces: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Manifest]:
    """Draw about `faces` faces of each domain below `faces/` and write a manifest named after it.

    `progress(done, total)` counts domains. The same seed gives the same bytes.
    """
    manifests = []
    progress(0, len(domains))
    for number, domain in enumerate(domains, start=1):
        root = workspace.root / "faces"
        write(root, domain, faces, seed)
        manifest = index_files(domain, DATASETS["synthetic"](root / domain)).manifest
        manifest.save(workspace.manifest_path(domain))
        manifests.append(manifest)
        progress(number, len(domains))
    return manifests
