"""What a reader of a study sees without running it: tables, figures, one notebook of each kind, and an index page."""

import contextlib
import html
import re
import shutil
import sys
from pathlib import Path

from hfprune_nb import paths
from hfprune_nb.files import read_json, write_json
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.stages import STAGES

# A line of a tqdm bar, as `held-out text:  41%|####      | 840/2048 [00:01<00:01, 812tok/s]`.
PROGRESS = re.compile(r"\d+%\|.*\|.*\[.*\]|: \d+\S* \[\d\d:\d\d")


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
    """Copy the tables and figures of the finished `jobs` of exported stages and render one notebook of each kind.

    Where a stage has several jobs, its files get the job's point into their names. Does nothing when exactly this is
    exported already, by another runner.
    """
    if is_exported(study, jobs):
        return
    folder = study.folder
    for kind in ("tables", "figures"):
        (folder / kind).mkdir(exist_ok=True)
        for outdated in files(folder, kind, ""):
            outdated.unlink()
    shown = [job for job in jobs if STAGES[job.stage].exported]
    for job in shown:
        alone = sum(other.stage == job.stage for other in shown) == 1
        point = "" if alone else "_" + re.sub(r"[^A-Za-z0-9.]+", "-", job.label)
        for kind in ("tables", "figures"):
            for path in sorted((folder / job.reference / kind).glob("*")):
                shutil.copyfile(path, folder / kind / f"{path.stem}{point}{path.suffix}")
    chosen = _representatives(study, jobs)
    _render(folder / "notebooks", {name: Artifact(folder / job.reference) for name, job in chosen.items()})
    (folder / "study.yaml").write_text(study.text, encoding="utf-8")
    (folder / "index.html").write_text(_index(study), encoding="utf-8")
    write_json(folder / "cards.json", _cards(study, jobs))


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


def _render(folder: Path, artifacts: dict[str, Artifact]) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    exporter = HTMLExporter(template_name="classic")
    for name, artifact in artifacts.items():
        notebook = without_progress(nbformat.read(artifact.path("notebook.ipynb"), as_version=4))
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name}})
        (folder / f"{name}.html").write_text(without_folders(page), encoding="utf-8")


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
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text]
    return notebook


def without_folders(page: str) -> str:
    """Return `page` with paths of this machine cut down to what lies inside the kit or its environment."""
    for folder in (paths.project(), Path(sys.prefix)):
        page = page.replace(f"{folder}/", "")
    return page


def _index(study) -> str:
    """Return a small page that links everything exported."""
    name, description = html.escape(study.name), html.escape(study.description)
    parts = [f"<h1>Study {name}</h1><p>{description}</p>"]
    for kind, suffix in (("tables", ".html"), ("figures", ".png"), ("notebooks", ".html")):
        links = [f'<li><a href="{kind}/{path.name}">{path.stem}</a></li>' for path in files(study.folder, kind, suffix)]
        parts.append(f"<h2>{kind.capitalize()}</h2><ul>{''.join(links)}</ul>")
    facts = [f'<li><a href="{file}">{file}</a></li>' for file in ("study.yaml", "cards.json", "run.log")]
    parts.append(f"<h2>How it was made</h2><ul>{''.join(facts)}</ul>")
    style = "<style>body{font:1rem sans-serif;margin:2rem}</style>"
    head = f'<meta charset="utf-8"><title>HFPrune study {name}</title>{style}'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
