"""What a reader of a study sees without running it: tables, figures, executed notebooks, and pages that show them."""

import contextlib
import re
import shutil
import sys
from pathlib import Path

from hfprune_nb import paths
from hfprune_nb.files import read_json, write_json
from hfprune_nb.runs import pages
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.stages import STAGES

# A line of a tqdm bar, as `held-out text:  41%|####      | 840/2048 [00:01<00:01, 812tok/s]`.
PROGRESS = re.compile(r"\d+%\|.*\|.*\[.*\]|: \d+\S* \[\d\d:\d\d")
WIDGET = "application/vnd.jupyter.widget-view+json"  # JupyterLab's bars, which no longer move
# A link from one notebook to another, and the file of a cell's code in a warning.
_NEIGHBOUR = re.compile(r"\[([^\]]*)\]\((\w+)\.ipynb\)")
_KERNEL = re.compile(r"/[^\s\"']*/(?=ipykernel_\d+/)")


def files(folder: Path, kind: str, suffix: str) -> list[Path]:
    """Return the exported files of a study's `folder` in `kind` that end in `suffix`, sorted by name."""
    return sorted(path for path in (folder / kind).glob(f"*{suffix}") if path.is_file() and path.suffix != ".ipynb")


def is_exported(study, jobs) -> bool:
    """Return whether exactly the finished `jobs` of the study are exported."""
    folder = study.folder
    with contextlib.suppress(FileNotFoundError, ValueError):
        same_study = (folder / "study.yaml").read_text(encoding="utf-8") == study.text
        return same_study and (folder / "index.html").is_file() and read_json(folder / "cards.json") == _cards(study, jobs)
    return False


def write(study, jobs) -> None:
    """Copy the tables, figures and notebooks of the finished `jobs` of exported stages and one notebook of each other kind.

    Where a stage has several jobs, its files get the job's point into their names. Does nothing when exactly this is
    exported already, by another runner.
    """
    if is_exported(study, jobs):
        return
    folder = study.folder
    (folder / "index.html").unlink(missing_ok=True)  # its return says that everything else is there
    for kind in ("tables", "figures"):
        (folder / kind).mkdir(exist_ok=True)
        for outdated in files(folder, kind, ""):
            outdated.unlink()
    shown = [job for job in jobs if STAGES[job.stage].exported]
    chosen = _representatives(study, [job for job in jobs if job not in shown])
    contents: dict = {}
    for job in shown:
        alone = sum(other.stage == job.stage for other in shown) == 1
        point = "" if alone else "_" + re.sub(r"[^A-Za-z0-9.]+", "-", job.label)
        notebook = f"{Path(STAGES[job.stage].notebook).stem}{point}"
        chosen[notebook], contents[notebook] = job, []
        for kind in ("figures", "tables"):
            for path in sorted((folder / job.reference / kind).glob("*")):
                name = f"{path.stem}{point}{path.suffix}"
                shutil.copyfile(path, folder / kind / name)
                contents[notebook].append(f"{kind}/{name}")
    _write_notebooks(folder / "notebooks", {name: Artifact(folder / job.reference) for name, job in sorted(chosen.items())})
    (folder / "study.yaml").write_text(study.text, encoding="utf-8")
    write_json(folder / pages.CONTENTS, contents)
    write_json(folder / "cards.json", _cards(study, jobs))
    pages.write(folder.parent, [study.name])


def _cards(study, jobs) -> dict:
    artifacts = [Artifact(study.folder / job.reference) for job in jobs]
    return {artifact.reference: artifact.card | {"digest": artifact.digest} for artifact in artifacts}


def _representatives(study, jobs) -> dict:
    """Return one job by notebook name: the first, or of the last criterion, baselines apart, at the middle ratio."""
    ratios = sorted(study.axes["pruning"].get("ratio") or study.axes["pruning"].get("neuron_ratio", []))
    middle = f"{ratios[len(ratios) // 2]:.4g}" if ratios else ""
    criteria = [variant.name for variant in study.variants if not variant.criterion.baseline]
    chosen, typical = {}, set()
    for job in jobs:
        name = Path(STAGES[job.stage].notebook).stem
        if job.point.get("criterion") == "dense":
            name += "_dense"
        if job.stage == "evaluation" and "recovery" in job.point:
            name += "_tuned"
        is_typical = job.point.get("criterion") in criteria[-1:] and middle in job.point.values()
        if name not in chosen or (is_typical and name not in typical):
            chosen[name] = job
        if is_typical:
            typical.add(name)
    return dict(sorted(chosen.items()))


def _write_notebooks(folder: Path, artifacts: dict[str, Artifact]) -> None:
    """Write the executed notebooks as readers see them: no times of this run, no folders of this machine, no dead links."""
    import nbformat

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, artifact in artifacts.items():
        notebook = without_progress(nbformat.read(artifact.path("notebook.ipynb"), as_version=4))
        for part in (notebook, *notebook.cells):
            part.metadata.pop("papermill", None)
            part.metadata.pop("execution", None)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _NEIGHBOUR.sub(lambda found: found[0] if found[2] in artifacts else found[1], cell.source)
        (folder / f"{name}.ipynb").write_text(without_folders(nbformat.writes(notebook)) + "\n", encoding="utf-8")


def without_progress(notebook):
    """Return `notebook` without the progress bars in what its cells wrote; other words, warnings too, stay."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    notebook, _ = CoalesceStreamsPreprocessor(enabled=True)(notebook, {})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                lines = output.text.splitlines(keepends=True)
                output.text = "".join(line for line in lines if line.strip() and not PROGRESS.search(line))
        if "outputs" in cell:
            words = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            cell.outputs = [output for output in words if output.output_type != "stream" or output.text]
    notebook.metadata.pop("widgets", None)
    return notebook


def without_folders(text: str) -> str:
    """Return `text` with paths of this machine cut down to what lies inside the kit, its results or its environment."""
    for folder in (paths.results().parent, paths.project(), paths.cache(), Path(sys.prefix)):
        text = text.replace(f"{folder}/", "")
    return _KERNEL.sub("", text)
