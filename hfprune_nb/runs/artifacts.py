"""Results by address: a folder named by the hash of its parameters, complete only once its DONE manifest lies in it.

`<study>/<stage>/<key>/` holds the stage's files, params.json, card.json and DONE. DONE lists every file with its size
and SHA-256 and is written last; the executed notebook.ipynb joins afterwards and belongs to no manifest.
"""

import contextlib
import errno
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json, sha256, sync, write_json

# What describes a run but is not its result: changes here must not make dependants stale.
DESCRIPTIONS = ("params.json", "card.json", "notebook.ipynb")
KEY = re.compile(r"[0-9a-f]{16}")


def canonical(value) -> str:
    """Return the one JSON text of `value`, keys sorted; raises UserError for what JSON cannot hold, such as NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"parameters must be plain finite numbers, strings, lists or mappings: {error}") from error


@dataclass(frozen=True)
class Artifact:
    """The finished or missing result of one stage run, in `folder` = `<study>/<stage>/<key>`."""

    folder: Path

    @property
    def key(self) -> str:
        """The folder's name: 16 hex digits."""
        return self.folder.name

    @property
    def reference(self) -> str:
        """`stage/key`, the name by which other stages and the study know this artifact."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def done(self) -> bool:
        """Whether the run was finished; says nothing about later corruption."""
        return (self.folder / "DONE").is_file()

    @property
    def manifest(self) -> dict:
        """File name -> {size in bytes, sha256} as in DONE; raises UserError when that is missing or unreadable."""
        try:
            return read_json(self.folder / "DONE")
        except FileNotFoundError:
            raise UserError(f"artifact {self.reference} is missing or unfinished: run its stage again") from None
        except ValueError:
            raise self._corrupt("DONE") from None

    @property
    def parameters(self) -> dict:
        """The stage's parameters, defaults included."""
        return read_json(self.folder / "params.json")["parameters"]

    @property
    def inputs(self) -> dict:
        """Reference -> content digest of every input, as they were when this artifact was made."""
        return read_json(self.folder / "params.json")["inputs"]

    @property
    def card(self) -> dict:
        """How the run was made: versions, commit, machine, seconds, peak memory and the stage's own facts."""
        return read_json(self.folder / "card.json")

    @property
    def digest(self) -> str:
        """Hash of the content alone, 16 hex digits: equal for two runs that wrote the same bytes in whatever time."""
        content = {name: entry["sha256"] for name, entry in self.manifest.items() if name not in DESCRIPTIONS}
        return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]

    @property
    def current(self) -> bool:
        """Whether the artifact is finished, intact, and made from its inputs as they are now."""
        try:
            self.check(everything=False)
            study = self.folder.parent.parent
            return all(Artifact(study / name).digest == digest for name, digest in self.inputs.items())
        except UserError:
            return False

    def path(self, name: str) -> Path:
        """Return the path of one of the artifact's files."""
        return self.folder / name

    def check(self, everything: bool = True) -> None:
        """Raise UserError if a file is missing or not as DONE recorded it.

        With `everything=False` only files changed after DONE are hashed again: instant, and still sees an edit.
        """
        finished = 0 if everything else self._modified("DONE")
        for name, entry in self.manifest.items():
            modified = self._modified(name)
            if modified is None or self.path(name).stat().st_size != entry["size"]:
                raise self._corrupt(name)
            if modified > finished and sha256(self.path(name)) != entry["sha256"]:
                raise self._corrupt(name)

    def _modified(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self.path(name).stat().st_mtime_ns

    def _corrupt(self, name: str) -> UserError:
        return UserError(f"artifact {self.reference} is corrupt ({name}): delete the folder and rerun its stage")


def open_artifact(folder: Path) -> Artifact:
    """Return the artifact in `folder` after hashing its files; raises UserError when it is unfinished or corrupt."""
    artifact = Artifact(Path(folder))
    artifact.check()
    return artifact


def finished(study: Path, stage: str) -> list[Artifact]:
    """Return every finished artifact of a stage in a study's folder, in the order of their keys."""
    candidates = [Artifact(folder) for folder in sorted((study / stage).glob("*")) if KEY.fullmatch(folder.name)]
    return [artifact for artifact in candidates if artifact.done]


class Writer:
    """Collects a run's files in a folder beside `<key>/`, and turns that into `<key>/` in one rename.

    What killed runs left there is cleared first, except a complete artifact that only missed its rename: it is put in place.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        # A name of its own: a run that lost its lock while it was suspended must not write among its successor's files.
        self.partial = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(4)}.partial")
        for leftover in self.folder.parent.glob(f"{self.folder.name}.*partial"):
            with contextlib.suppress(UserError):
                open_artifact(leftover)
                self._replace(leftover)
            shutil.rmtree(leftover, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Return where to write the file `name` (may contain folders, which are made)."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, parameters: dict, inputs: dict, card: dict, allowed: Callable[[], bool] = lambda: True) -> Artifact:
        """Write params.json, card.json and DONE, sync all to disk, and put the artifact in place of any older one.

        Raises UserError when nothing was written, when the disk is full, or when `allowed`, asked last, says no; then no
        artifact is left.
        """
        if not self.partial.is_dir():
            raise UserError(f"{self.folder.parent.name} wrote no file: write to run.path(NAME) before run.finish()")
        try:
            write_json(self.partial / "params.json", {"inputs": inputs, "parameters": parameters})
            write_json(self.partial / "card.json", card)
            files = sorted(path for path in self.partial.rglob("*") if path.is_file())
            manifest = {
                path.relative_to(self.partial).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
            }
            for path in files:
                sync(path)
            write_json(self.partial / "DONE", manifest)
            sync(self.partial / "DONE")
            sync(self.partial)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(f"no disk space left in {self.folder.parent}: free some and run again") from error
        if not allowed():
            shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(f"another process took over {self.folder.parent.name}/{self.folder.name}: its result counts")
        self._replace(self.partial)
        return Artifact(self.folder)

    def _replace(self, complete: Path) -> None:
        # A folder cannot be renamed onto a full one, so a stale artifact steps aside first. Killed between the two
        # renames, the complete folder is found by the next writer.
        outdated = self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(outdated, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(outdated)
        complete.rename(self.folder)
        sync(self.folder.parent)
        shutil.rmtree(outdated, ignore_errors=True)
