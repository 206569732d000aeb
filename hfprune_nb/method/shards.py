"""Scoring by several processes that share the windows, one per GPU: `score` starts them, `main` is what each of them runs.

Each process loads the model and scores every n-th window; `scoring.score` merges the sums of each pass in one all-reduce.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hfprune_nb.errors import UserError
from hfprune_nb.inputs import models
from hfprune_nb.method import scoring
from hfprune_nb.method.totals import place


def score(
    model: str,
    windows: np.ndarray,
    criteria: list[str],
    *,
    folder: Path,
    processes: int = 1,
    dtype: str = "bfloat16",
    device: str = "auto",
    attention: str = "sdpa",
    **settings,
) -> scoring.Scores:
    """Load the model by its name and score it in `processes` processes; return their merged `Scores`.

    Parameters
    ----------
    model, dtype, device, attention : as in `models.load`; with several processes each takes the GPU of its own number.
    folder : for checkpoints and for what the processes tell each other; may be left over from a stopped run, which then goes on.
    settings : keyword arguments of `scoring.score`.

    The same number of processes gives the same bytes. Raises UserError for a number of processes below one or above that of the
    windows, a device that several processes cannot share, a process that fails, and what `models.load` and `scoring.score` raise.
    """
    settings = {"checkpoint": str(folder / "checkpoint")} | settings
    if processes == 1:
        return scoring.score(
            models.load(model, dtype=dtype, device=device, attention=attention)[0], windows, criteria, **settings
        )
    if not 1 <= processes <= len(windows):
        raise UserError(f"processes {processes} is outside 1 to {len(windows)}, the number of windows.")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{device}' is one place for {processes} processes: choose auto, cpu or cuda, or processes 1.")
    gpus = torch.cuda.device_count()
    if models.resolve_device(device) == "cuda" and processes > gpus:
        raise UserError(f"processes {processes} are more than the {gpus} GPUs of this machine: lower processes.")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("error.*.txt"), *folder.glob("merged.*")]:
        leftover.unlink()
    save_file({"windows": torch.as_tensor(np.array(windows), dtype=torch.int64)}, folder / "windows.safetensors")
    loading = {"name": model, "dtype": dtype, "device": device, "attention": attention}
    request = {"model": loading, "criteria": list(criteria), "settings": settings}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    _launch(folder, processes)
    told = json.loads((folder / "merged.json").read_text(encoding="utf-8"))
    snapshots = scoring.load_snapshots(folder / "merged.snapshots.safetensors")
    return scoring.Scores(load_file(folder / "merged.scores.safetensors"), snapshots=snapshots, **told)


def _launch(folder, processes):
    # One machine, a free port: nothing to configure, and nothing that needs a name service.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [*launcher, "-m", "hfprune_nb.method.shards", str(folder)]
    status, said = _run(command)
    if status:
        told = sorted(folder.glob("error.*.txt"))
        last = (said.strip().splitlines() or ["no message"])[-1]
        reason = told[0].read_text(encoding="utf-8") if told else f"exit status {status}: {last}"
        who = f"process {told[0].name.split('.')[1]}" if told else "a process"
        raise UserError(f"processes: {who} of {processes} failed, and with it all of them ({reason}); processes 1 shows where.")


def _run(command):
    """Return the exit status of a launcher and what it wrote to its standard error; an interrupt ends its processes too."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            said = launcher.communicate()[1]
        except BaseException:
            launcher.terminate()  # it passes this on; killed, as by subprocess.run, it would leave its processes behind
            raise
    return launcher.returncode, said


def main(arguments: list[str] | None = None) -> None:
    """Run one process of the group that `torch.distributed.run` or `accelerate launch` has started, on the request in a folder.

    `FOLDER/request.json` holds `model` (arguments of `models.load`), `criteria` and `settings` (arguments of `scoring.score`),
    `FOLDER/windows.safetensors` the token ids. The first process writes the merged scores beside them.
    """
    parser = argparse.ArgumentParser(prog="python -m hfprune_nb.method.shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where request.json and windows.safetensors lie")
    folder = parser.parse_args(arguments).folder
    # Sums are merged on the CPU: two or three times in a run, some megabytes of float64.
    torch.distributed.init_process_group("gloo")
    rank = place()[0]
    try:
        _score_shard(folder, rank)
    except Exception as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        (folder / f"error.{rank}.txt").write_text(sentence, encoding="utf-8")
        raise
    torch.distributed.destroy_process_group()


def _score_shard(folder, rank):
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    windows = load_file(folder / "windows.safetensors")["windows"].numpy()
    loading = dict(request["model"])
    if models.resolve_device(loading["device"]) == "cuda":
        loading["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    model, _ = models.load(**loading)
    scores = scoring.score(model, windows, request["criteria"], **{"progress": rank == 0} | request["settings"])
    if rank == 0:
        scores.save(folder / "merged.scores.safetensors")
        scores.save_snapshots(folder / "merged.snapshots.safetensors")
        told = {name: getattr(scores, name) for name in ("mean_value", "tokens", "seconds", "batch_size")}
        (folder / "merged.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
