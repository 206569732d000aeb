"""Stage 05: tasks, perplexity and fidelity of a model."""

import functools
from pathlib import Path

import yaml

from hfprune_nb import paths
from hfprune_nb.inputs import hub
from hfprune_nb.runs.stages.base import EVERYTHING, Input, Stage, size


class Evaluation(Stage):
    """One job for each dense, pruned and tuned model; all others are compared with the dense one of the same settings."""

    name = "evaluation"
    notebook = "05_evaluation.ipynb"
    inputs = {
        "pruned": Input("pruning", optional=True),
        "recovered": Input("recovery", optional=True, agrees=("model", "pruned")),
        "reference": Input(
            "evaluation",
            passes=(EVERYTHING,),
            follows=("pruned", "recovered"),
            agrees=(
                "model",
                "perplexity_corpora",
                "text_column",
                "chat_template",
                "n_windows",
                "seq_len",
                "fidelity_positions",
                "seed",
                "bos",
                "dtype",
            ),
        ),
    }
    choices = {"task_source": ("auto", "local", "hub"), "metric": ("paper", "acc")}
    told_apart = False
    files = ("model", "perplexity_corpora")
    version = 3  # the dense evaluation keeps the held-out windows; dtype is float32 by default, was bfloat16

    def plan(self, grid):
        for values in grid.combinations(self.name):
            dense = {
                model: grid.add(self.name, {"model": model, "criterion": "dense"}, {"model": model} | values).reference
                for model in grid.study.models
            }
            for job in [*grid.of("pruning"), *grid.of("recovery")]:
                model = job.point["model"]
                made = {"pruned": job.reference}
                if job.stage == "recovery":
                    made = {"pruned": job.parameters["pruned"], "recovered": job.reference}
                grid.add(self.name, job.point, {"model": model, "reference": dense[model]} | made | values)

    def sources(self, parameters):
        files = [paths.data() / "tasks" / f"{task}.yaml" for task in parameters["tasks"]]
        return {name: path for file in files if file.is_file() for name, path in _task_files(file, file.stat().st_mtime_ns)}

    def from_hub(self, parameters):
        data = list(parameters["perplexity_corpora"])
        if parameters["task_source"] != "local":
            from hfprune_nb.runs import forecast  # which imports the stages

            known = forecast.rates()["tasks"]
            for name in parameters["tasks"]:
                facts = known.get(name, {})
                is_local = facts.get("local") or (paths.data() / "tasks" / f"{name}.yaml").is_file()
                if parameters["task_source"] == "hub" or not is_local:
                    data.append(facts.get("dataset") or hub.task_data(name))
        return [*super().from_hub(parameters), *((name, "dataset") for name in data)]

    def work(self, parameters, known, ancestor):
        tokens = len(parameters["perplexity_corpora"]) * parameters["n_windows"] * parameters["seq_len"]
        for name in parameters["tasks"]:
            task = known["tasks"].get(name, known["tasks"]["default"])
            tokens += min(parameters["limit"] or task["items"], task["items"]) * task["tokens"]
        return tokens * size(parameters, known), tokens


@functools.lru_cache(maxsize=256)
def _task_files(file: Path, modified: int) -> list[tuple[str, Path]]:
    """Return a task file of the kit's own and the records that it names."""
    records = yaml.safe_load(file.read_text(encoding="utf-8")).get("dataset_kwargs", {}).get("data_files", {})
    return [(file.stem, file), *((f"{file.stem}: {split}", file.parent / name) for split, name in records.items())]
