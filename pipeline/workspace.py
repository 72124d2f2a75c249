"""The workspace: one folder or URI whose names stand for paths, so that commands say `news` instead of where it lies.

Every path of the project is a `UPath`: a laptop's folder and an object store are read and written by the same lines, and
nothing relies on renaming.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from upath import UPath

from cafe.addresses import own
from cafe.data.manifest import NAME, Manifest
from cafe.data.rows import RowFiles, find_folder
from cafe.errors import UserError, unknown
from cafe.files import check_encoded, exists, list_files, list_folder, locate, place_below
from cafe.pipeline.process.lease import hold
from cafe.results.runs import Run, read_run, read_runs

LONGEST = 100  # characters of a name; with those of others it becomes a file's, which has at most 255 bytes
RUN_FILES = ("run.json", "result.json", "model.safetensors", "start.safetensors")
RUN_FOLDERS = {
    "epochs": (".json",),
    "checkpoints": (".json", ".safetensors"),
    "predictions": (".parquet",),
    "exported": (".json", ".safetensors"),
}


def check_name(name: str) -> str:
    """Return a name that can be a file's and a metric's; raise `UserError`."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"The name {name!r} cannot be used: take letters, digits, dots, hyphens and underscores.")
    if len(name) > LONGEST:
        raise UserError(f"The name {name[:20]}… has {len(name)} characters: take at most {LONGEST}.")
    return name


@dataclass(frozen=True)
class Workspace:
    """`manifests/`, `features/`, `runs/`, `benchmarks/` and the MLflow database below one root."""

    root: UPath
    manifests: dict[str, Manifest] | None = field(default=None, compare=False, repr=False)  # those read so far, if kept

    @classmethod
    def at(cls, location: str) -> Workspace:
        """Open the workspace at a folder or URI, which its user names; nothing is created until something is written.

        Raises `UserError` for a file, and for a link whose disk is away: in neither would a name be found.
        """
        own(check_encoded(location))
        root = locate(location)
        if not root.protocol:  # one in an object store is looked at when it is used
            if root.is_file():
                raise UserError(
                    f"The workspace {root} is a file: give a folder, or the name of a new one, with --workspace."
                )
            if root.is_symlink() and not root.exists():
                raise UserError(
                    f"The workspace {root} leads to {root.readlink()}, which is not there: bring that back."
                )
        return cls(root)

    def keeping_manifests(self) -> Workspace:
        """Return this workspace, which from now on reads every manifest only once."""
        return self if self.manifests is not None else replace(self, manifests={})

    @property
    def local(self) -> bool:
        """Whether the workspace is a folder of this machine, where a database can live."""
        return not self.root.protocol

    @property
    def features(self) -> UPath:
        """The folder of all feature stores: `features/MANIFEST/KEY`."""
        return self.root / "features"

    def manifest_path(self, name: str) -> UPath:
        """Where the manifest of that name is kept."""
        return place_below(self.root / "manifests", f"{name}.parquet")

    @contextmanager
    def writing_manifest(self, name: str) -> Iterator[Callable[[Manifest], UPath]]:
        """Yield what keeps a manifest and returns its path; raise `UserError` where another command makes one of that name.

        Each of two would take the rows of the other for what a killed one left.
        """
        path = self.manifest_path(name)

        def save(manifest: Manifest) -> UPath:
            check()
            manifest.save(path)
            return path

        with hold(path.parent, file=path.name) as check:
            yield save

    def image_path(self, name: str) -> UPath:
        """Where the pictures of a manifest are kept that came as a table of pixels."""
        return place_below(self.root / "images", name)

    def manifest_names(self) -> list[str]:
        """The manifests there are."""
        return [path.stem for path in list_folder(self.root / "manifests") if path.suffix == ".parquet"]

    def manifest_digests(self) -> dict[str, str]:
        """The digests of the manifests there are, by their names."""
        return {name: self.load_manifest(name).digest for name in self.manifest_names()}

    def load_manifest(self, name: str) -> Manifest:
        """Load a manifest by name; raise `UserError` naming those there are and how to make one."""
        if self.manifests is not None and name in self.manifests:
            return self.manifests[name]
        path = self.manifest_path(name)
        if not exists(path):
            raise self._no_manifest(name)
        manifest = Manifest.load(path)
        if self.manifests is not None:
            self.manifests[name] = manifest
        return manifest

    def find_manifest(self, name: str, digest: str) -> Manifest | None:
        """Load a manifest, unless there is none of that name any more or it is another one than that with the digest."""
        if name not in self.manifest_names():
            return None
        manifest = self.load_manifest(name)
        return manifest if manifest.digest == digest else None

    def _no_manifest(self, name: str) -> UserError:
        from cafe.data.readers import DATASETS
        from cafe.synthetic.domains import DOMAINS

        names = self.manifest_names()
        hint = f"choose {', '.join(names)}, or" if names else "this workspace has none yet:"
        kind = name if name in DATASETS else "folder"
        command = "cafe data synth" if name in DOMAINS else f"cafe data index {kind} ROOT --name {name}"
        return UserError(f"Unknown manifest {name!r} in {self.root}: {hint} make it with `{command}`.")

    @property
    def runs(self) -> UPath:
        """The folder of all runs."""
        return self.root / "runs"

    def run_path(self, name: str) -> UPath:
        """The folder of a run."""
        return place_below(self.runs, name)

    def sealed_files(self, names: Collection[str] = ()) -> list[UPath]:
        """Return the files outside feature stores whose content decides a number: of some runs and manifests, or of all.

        Raises `UserError` for a name that is neither. Not among them are notes that decide none: of status, progress and
        leases, which experiments a run belongs to, figures, and pages.
        """
        runs = [path.name for path in list_folder(self.runs)]
        if unheard := set(names) - {*runs, *self.manifest_names()}:
            raise unknown("run, manifest or exported folder", min(unheard), [*runs, *self.manifest_names()])
        manifests = [self.manifest_path(name) for name in self.manifest_names() if not names or name in names]
        found = [file for path in manifests for file in (path, *_list_rows(path))]
        for run in (self.run_path(name) for name in runs if not names or name in names):
            found += [path for file in RUN_FILES if exists(path := run / file)]
            found += [
                path
                for folder, suffixes in RUN_FOLDERS.items()
                for path in list_files(run / folder)
                if path.suffix in suffixes
            ]
        if not names:
            found += [path for path in list_files(self.root / "audits") if path.suffix == ".parquet"]
        return found

    def run_names(self) -> list[str]:
        """The runs there are, finished or not."""
        return [path.name for path in list_folder(self.runs) if exists(path / "run.json")]

    def read_runs(self, name: str = "") -> list[Run]:
        """Read the runs there are; with a name that of this name, else those that begin so, and all where none does.

        That is as many as choosing one by name needs (`cafe.results.runs.choose`). Others that cannot be read are left out,
        each named by a warning; raises `UserError` where it is the one of this name.
        """
        names = self.run_names()
        if name in names:
            run = read_run(self.run_path(name))
            return [run] if run else []
        found = [run for run in names if run.startswith(name)]
        return read_runs(self.run_path(run) for run in found or names)


def _list_rows(manifest: UPath) -> list[UPath]:
    """Return the files of rows that a large manifest lists, gone ones too; of a damaged one those there are."""
    try:
        table = Manifest.load(manifest).table
    except UserError:
        return list_files(find_folder(manifest))
    return table.paths if isinstance(table, RowFiles) else []
