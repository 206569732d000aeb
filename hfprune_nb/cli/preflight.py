"""Before a study runs for hours: whether the hub gives what it reads, and whether the disk holds what it writes."""

import shutil
from collections.abc import Iterator

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub, hub_data
from hfprune_nb.runs import forecast
from hfprune_nb.runs.stages import STAGES


def check(jobs: list, study) -> None:
    """Raise UserError, with a sentence for each obstacle, unless these jobs of a study have all that they need from outside.

    That is: access to each model's files, the configuration and files of each corpus, and space on the disks.
    """
    obstacles = [] if study.run["offline"] else list(_of_the_hub(jobs))
    obstacles += _of_the_disk(jobs, study)
    if obstacles:
        raise UserError("\n".join(obstacles))


def _of_the_hub(jobs: list) -> Iterator[str]:
    revisions = {name: commit for job in jobs for name, commit in job.parameters.get("revisions", {}).items()}
    hub.pin(revisions)
    # What data of a task is asked for, only the harness knows.
    named = {pair for job in jobs if job.stage != "evaluation" for pair in STAGES[job.stage].from_hub(job.parameters)}
    for name, kind in sorted(named):
        if not (repository := hub.repository(name)):
            continue
        try:
            if kind == "model":
                hub.file(repository, "config.json")
            else:
                hub_data.find(hub.REPOSITORIES.get(name, name))
        except UserError as error:
            yield str(error)


def _of_the_disk(jobs: list, study) -> Iterator[str]:
    wanted = forecast.needs(study)
    written = sum(wanted[job.reference].disk for job in jobs)
    for what, folder, gigabytes in (
        ("results", paths.results(), written),
        ("downloads", hub.cache(), forecast.download(jobs)),
    ):
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(place).free / 1e9
        if gigabytes > free:
            variable = "HFPRUNE_RESULTS" if what == "results" else "HF_HOME"
            yield f"{place} has {free:.2g} GB free and {what} take {gigabytes:.2g} GB: free some, or set {variable} elsewhere."
