"""Which commits of the hub a study reads: asked once, kept in its folder, part of every key and card."""

import contextlib
from pathlib import Path

from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json, write_json
from hfprune_nb.inputs import hub
from hfprune_nb.runs.stages import STAGES

FILE = "revisions.json"


def known(folder: Path) -> dict[str, str]:
    """Return what was asked for a study so far: `OWNER/NAME@REVISION` -> commit."""
    with contextlib.suppress(FileNotFoundError):
        return read_json(folder / FILE)
    return {}


def repositories(stage: str, parameters: dict) -> dict[str, str]:
    """Return the hub repositories that a stage run reads: name -> model or dataset."""
    named = STAGES[stage].from_hub(parameters)
    return {found: kind for name, kind in named if (found := hub.repository(name))}


def pinned(stage: str, parameters: dict, commits: dict[str, str], ask: bool = False) -> dict:
    """Return the parameters of a stage run with the commits of what it reads in `revisions`, as far as they are known.

    commits : `known`; ask : ask the hub for those that are not there, and raise UserError where it does not say.
    """
    if "revisions" not in parameters:
        return parameters
    found = {}
    for name, kind in repositories(stage, parameters).items():
        wanted = parameters["revisions"].get(name, "main")
        commit = commits.get(f"{name}@{wanted}") or (hub.commit(name, kind, wanted) if ask else None)
        if commit or wanted != "main":
            found[name] = commit or wanted
    return parameters | {"revisions": found}


def resolve(study) -> list[str]:
    """Ask for every commit that a study reads and that is not known yet, and keep it; return a sentence for each refusal."""
    commits, refused = known(study.folder), []
    wanted = {
        (name, job.parameters["revisions"].get(name, "main")): kind
        for job in study.jobs
        if "revisions" in job.parameters
        for name, kind in repositories(job.stage, job.parameters).items()
    }
    before = dict(commits)
    for (name, revision), kind in wanted.items():
        asked = f"{name}@{revision}"
        if asked in commits or hub.COMMIT.fullmatch(revision):
            continue
        try:
            commits[asked] = hub.commit(name, kind, revision)
        except UserError as error:
            refused.append(str(error))
    if commits != before:
        study.folder.mkdir(parents=True, exist_ok=True)
        partial = study.folder / f"{FILE}.partial"
        write_json(partial, commits)
        partial.replace(study.folder / FILE)
    return refused
