"""A toy project: notebooks with the kit's stages and parameter names that only do arithmetic, and a study file."""

import json
from pathlib import Path

import nbformat
import yaml

CALIBRATION = (
    'study: str = "toy"\nmodel: str = "tiny"\ncorpus: str = "text"\nn_windows: int = 4\nseq_len: int = 8\nseed: int = 0\n'
    "length: float = 1.0",
    "(corpus, n_windows, seed, length)",
)
SCORING = (
    'study: str = "toy"\nmodel: str = "tiny"\ncalibration: str = ""\ncriteria: list[str | dict] = ["entropy"]\nseed: int = 0\n'
    'dtype: str = "float32"\ndevice: str = "cpu"',
    "(read(run.inputs['calibration']), criteria)",
)
PRUNING = (
    'study: str = "toy"\nmodel: str = "tiny"\nscores: str = ""\ncriterion: str = "entropy"\nratio: float = 0.2\n'
    'neuron_ratio: float = 0.0\nallocation: str | dict = "uniform"\nseed: int = 0\ndevice: str = "cpu"',
    "(read(run.inputs['scores']), criterion, ratio)",
)
RECOVERY = (
    'study: str = "toy"\nmodel: str = "tiny"\npruned: str = ""\nsteps: int = 3\nseed: int = 0\nrecipe: str = "hfprune-lora"\n'
    'data: str = "text"\nn_records: int = 2\nepochs: float = 0.0\nmax_steps: int = 0',
    "('tuned', read(run.inputs['pruned']), steps)",
)
EVALUATION = (
    'study: str = "toy"\nmodel: str = "tiny"\npruned: str = ""\nrecovered: str = ""\nreference: str = ""\n'
    'tasks: list[str] = ["choice"]\nlimit: any = None\nseed: int = 0\nperplexity_corpora: list = ["text"]\n'
    "n_windows: int = 2\nseq_len: int = 8",
    "(read(run.inputs['pruned']), read(run.inputs.get('recovered')), read(run.inputs['reference']), tasks)",
)
FIGURES = (
    'study: str = "toy"\nevaluations: list = []\nscorings: list = []\nprunings: list = []\ntitle: str = "Toy"',
    "[read(artifact) for artifact in run.inputs['evaluations']]",
)
COST = ('study: str = "toy"\nmodel: str = "tiny"\nrepetitions: int = 3\nn_windows: int = 2\nseq_len: int = 8', "repetitions")
EXPERIMENTS = (
    'study: str = "toy"\nmodel: str = "tiny"\nablations: int = 4\ncriteria: list = ["entropy"]\nseed: int = 0',
    "ablations",
)
QUESTIONS = (
    'study: str = "toy"\nevaluations: list = []\nscorings: list = []\nprunings: list = []\nexperiments: list = []',
    "[read(artifact) for artifact in run.inputs['experiments']]",
)
RECOMMENDATION = (
    'study: str = "toy"\nevaluations: list = []\nscorings: list = []\nprunings: list = []',
    "[read(artifact) for artifact in run.inputs['evaluations']]",
)
STEP = """\
from hfprune_nb.runs import stage

run = stage.start("{stage}")

def read(artifact):
    return artifact and artifact.path("value.txt").read_text()
"""
COMPUTE = """\
{before}
if not run.done:
    value = repr({value})
    run.path("value.txt").write_text(value)
    run.path("tables/table.csv").write_text(value)
    run.path("figures/figure.png").write_bytes(b"png")
    run.finish(device="cpu")
print(run.describe())
"""


def write_notebook(path: Path, parameters: str, *cells: str, tags=("parameters",)) -> Path:
    """Write a notebook: a tagged parameters cell and code cells."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)})]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def write_stage(project: Path, stage: str, file: str, toy: tuple[str, str], before: str = "") -> Path:
    """Write the toy notebook of a stage; `before` is code that runs ahead of its computation."""
    parameters, value = toy
    start = STEP.format(stage=stage)
    compute = COMPUTE.format(before=before, value=value)
    return write_notebook(project / "notebooks" / file, parameters, start, compute)


def write_project(project: Path) -> Path:
    """Write the toy notebooks and the study `toy` (12 cells: 2 seeds, entropy and magnitude, 1 ratio)."""
    write_stage(project, "calibration", "01_calibration.ipynb", CALIBRATION)
    write_stage(project, "scoring", "02_scoring.ipynb", SCORING)
    write_stage(project, "pruning", "03_pruning.ipynb", PRUNING)
    write_stage(project, "recovery", "04_recovery.ipynb", RECOVERY)
    write_stage(project, "evaluation", "05_evaluation.ipynb", EVALUATION)
    write_stage(project, "figures", "06_figures.ipynb", FIGURES)
    write_stage(project, "cost", "07_cost.ipynb", COST)
    write_stage(project, "experiments", "08_experiments.ipynb", EXPERIMENTS)
    write_stage(project, "questions", "09_questions.ipynb", QUESTIONS)
    write_stage(project, "recommendation", "12_recommendation.ipynb", RECOMMENDATION)
    write_study(project)
    (project / "data").mkdir()
    (project / "data" / "rates.yaml").write_bytes((Path(__file__).parents[1] / "data" / "rates.yaml").read_bytes())
    return project


def write_study(project: Path, name: str = "toy", /, **changes) -> Path:
    """Write a study file with some keys changed; a key set to None is left out."""
    content = {
        "description": "toy study",
        "models": ["tiny"],
        "seeds": [0, 1],
        "criteria": ["entropy", "magnitude"],
        "ratios": [0.2],
        "evaluation": {"tasks": ["choice", "other"]},
        "run": {"workers": 2, "offline": True},
    } | changes
    # These notebooks load no library that a warm kernel would have.
    content["run"] = {"warm": False} | content["run"]
    path = project / "notebooks" / "studies" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def outputs(notebook: Path) -> str:
    """Return the printed text and the tracebacks of an executed notebook."""
    cells = json.loads(notebook.read_text())["cells"]
    parts = [output for cell in cells for output in cell.get("outputs", ())]
    return "\n".join("".join(part.get("text", part.get("traceback", ()))) for part in parts)


def pictures(notebook: Path) -> list[str]:
    """Return the pictures of an executed notebook."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", ())]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", ())]
