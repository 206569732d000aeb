"""Scoring by several processes that share the windows, one per GPU: `score` starts them, `main` is what each of them runs.

Each process loads the model and scores every n-th window; `scoring.score` merges the sums of each pass in one all-reduce.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hfprune_nb import models
from hfprune_nb import processes as group
from hfprune_nb.criteria import variants
from hfprune_nb.files import by_layer, load_tensors
from hfprune_nb.method.scoring import engine, scores


def score(
    model: str | Path,
    windows: np.ndarray,
    criteria: list[str | dict],
    *,
    folder: str | Path,
    processes: int = 1,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = "sdpa",
    **settings,
) -> scores.Scores:
    """Load the model by its name and score it in `processes` processes; return their merged `Scores`.

    Parameters
    ----------
    model, dtype, device, attention : as in `models.load`; with several processes each takes the GPU of its own number.
    folder : for checkpoints and for what the processes tell each other; may be left over from a stopped run, which then goes on.
    settings : keyword arguments of `scoring.score`.

    The same number of processes gives the same bytes. Raises UserError for a number of processes below one or above that of the
    windows, a device that several processes cannot share, a process that fails, and what `models.load` and `scoring.score` raise.
    """
    folder, dtype, device = Path(folder), str(models.resolve_dtype(dtype)).removeprefix("torch."), models.resolve_device(device)
    settings = {"checkpoint": str(folder / "checkpoint")} | settings
    if processes == 1:
        return engine.score(models.load(model, dtype=dtype, device=device, attention=attention)[0], windows, criteria, **settings)
    group.check(processes, len(windows), "windows", device)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("merged.*"):
        leftover.unlink()
    save_file({"windows": torch.as_tensor(np.array(windows), dtype=torch.int64)}, folder / "windows.safetensors")
    loading = {"name": str(model), "dtype": dtype, "device": device, "attention": attention}
    request = {"model": loading, "criteria": [variant.spec for variant in variants(criteria)], "settings": settings}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    group.launch(__name__, folder, processes)
    told = json.loads((folder / "merged.json").read_text(encoding="utf-8"))
    snapshots = scores.load_snapshots(folder / "merged.snapshots.safetensors")
    importance, groups = (by_layer(load_tensors(folder / f"merged.{name}.safetensors")) for name in ("scores", "groups"))
    return scores.Scores(importance, snapshots=snapshots, groups=groups, **told)


def main(arguments: list[str] | None = None) -> None:
    """Run one process of the group that `torch.distributed.run` or `accelerate launch` has started, on the request in a folder.

    `FOLDER/request.json` holds `model` (arguments of `models.load`), `criteria` and `settings` (arguments of `scoring.score`),
    `FOLDER/windows.safetensors` the token ids. The first process writes the merged scores beside them.
    """
    parser = argparse.ArgumentParser(prog="python -m hfprune_nb.method.scoring.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where request.json and windows.safetensors lie")
    folder = parser.parse_args(arguments).folder
    with group.member(folder) as rank:
        _score_shard(folder, rank)


def _score_shard(folder, rank):
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    windows = load_file(folder / "windows.safetensors")["windows"].numpy()
    loading = request["model"]
    model, _ = models.load(**loading | {"device": group.own_device(loading["device"])})
    scores = engine.score(model, windows, request["criteria"], **{"progress": rank == 0} | request["settings"])
    if rank == 0:
        scores.save(folder / "merged.scores.safetensors")
        scores.save_groups(folder / "merged.groups.safetensors")
        scores.save_snapshots(folder / "merged.snapshots.safetensors")
        told = {name: getattr(scores, name) for name in ("mean_value", "tokens", "seconds", "batch_size", "notes")}
        (folder / "merged.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
