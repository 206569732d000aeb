"""lm-eval's data-parallel evaluation, one process per GPU: `benchmark_items` starts them, `main` is what each of them runs.

Each process loads the model and answers every n-th item of a task; the harness gathers the answers in the first one. The model
goes to the processes as a plain checkpoint, so they need not know how it was made.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from hfprune_nb import models
from hfprune_nb import processes as group
from hfprune_nb.measure import evaluation
from hfprune_nb.measure.tasks import load_tasks


def benchmark_items(
    model, tokenizer, names: list[str], source: str = "auto", limit: int = 0, *,
    scratch: str | Path, processes: int = 1, **settings,
) -> tuple[pd.DataFrame, dict, dict[str, str]]:  # fmt: skip
    """Run lm-eval tasks on an in-memory model in `processes` processes; return what `evaluation.benchmark_items` returns.

    scratch : a folder for the checkpoint, which needs the disk space of the model, and for finished tasks, as there; settings :
    its other keyword arguments. Items are those of one process, in the same order; as batches differ, log-likelihoods agree
    within float error. Meanwhile the model itself waits in the CPU's memory. Raises UserError for a number of processes below
    one or above that of the items of a task, a device that several processes cannot share, a process that fails, and what
    `evaluation.benchmark_items` raises.
    """
    scratch = Path(scratch)
    sizes = {name: len(task.eval_docs) for name, task in load_tasks(names, source).items()} if processes != 1 else {}
    if sizes:
        fewest = min(sizes, key=sizes.__getitem__)
        items = min(limit, sizes[fewest]) if limit > 0 else sizes[fewest]
        group.check(processes, items, f"items of {fewest}", _place(model))
        checkpoint = scratch / "checkpoint"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        loading = {"name": str(checkpoint), "dtype": str(model.dtype).removeprefix("torch."), "device": _place(model)}
        loading["attention"] = model.config._attn_implementation
        request = {"model": loading, "tasks": {"names": list(names), "source": source, "limit": limit, **settings}}
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        device = model.device
        model.to("cpu")
        torch.cuda.empty_cache()  # what torch has freed but kept, the other processes could not use
        group.launch(__name__, scratch, processes)
        model.to(device)
    return evaluation.benchmark_items(model, tokenizer, names, source, limit, scratch=scratch, **settings)


def _place(model) -> str:
    """Return `cpu`, `cuda`, or `balanced` for a model that lies on several GPUs."""
    return "balanced" if len(set(getattr(model, "hf_device_map", {}).values())) > 1 else model.device.type


def main(arguments: list[str] | None = None) -> None:
    """Run one process of the group that `torch.distributed.run` or `accelerate launch` has started, on the request in a folder.

    `FOLDER/request.json` holds `model` (arguments of `models.load`) and `tasks` (those of `evaluation.benchmark_items`). The
    first process writes `FOLDER/<task>.parquet`.
    """
    parser = argparse.ArgumentParser(prog="python -m hfprune_nb.measure.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where request.json lies")
    folder = parser.parse_args(arguments).folder
    with group.member(folder):
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        loading = request["model"]
        model, tokenizer = models.load(**loading | {"device": group.own_device(loading["device"])})
        evaluation.benchmark_items(model, tokenizer, **request["tasks"], scratch=folder)


if __name__ == "__main__":
    main()
