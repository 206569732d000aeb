"""One request, several processes of this machine, one per GPU: `launch` starts them, in `member` each of them works."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed

from hfprune_nb.errors import UserError

# The pipe that each process has as its standard input ends when the one that launched them is gone, even by SIGKILL.
_LAUNCHED = "HFPRUNE_LAUNCHED"


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size) of this process in its process group, (0, 1) outside one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def collective_device() -> str:
    """Return the device on which the process group exchanges tensors: NCCL knows CUDA only, any other group the CPU as well."""
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def check(processes: int, most: int, unit: str, device: str) -> None:
    """Raise UserError unless so many processes can share `most` units of work on `device`, on CUDA with a GPU for each."""
    if not 1 <= processes <= most:
        raise UserError(f"processes {processes} is outside 1 to {most}, the number of {unit}.")
    if device not in ("cpu", "cuda"):
        raise UserError(f"device '{device}' is one place for {processes} processes: choose auto, cpu or cuda, or processes 1.")
    if device == "cuda" and processes > (gpus := torch.cuda.device_count()):
        raise UserError(f"processes {processes} are more than the {gpus} GPUs of this machine: lower processes.")


def launch(module: str, folder: Path, processes: int) -> None:
    """Run `python -m module folder` in a group of so many processes and wait for all of them.

    They end with this process, however it ends. Raises UserError with the reason of the first one that failed.
    """
    for leftover in folder.glob("error.*.txt"):
        leftover.unlink()
    # One machine, a free port: nothing to configure, and nothing that needs a name service.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    status, said = _run([*launcher, "-m", module, str(folder)])
    if status:
        told = sorted(folder.glob("error.*.txt"))
        last = next((line.strip() for line in reversed(said.splitlines()) if any(map(str.isalpha, line))), "no message")
        reason = told[0].read_text(encoding="utf-8") if told else f"exit status {status}: {last}"
        who = f"process {told[0].name.split('.')[1]}" if told else "a process"
        raise UserError(f"processes: {who} of {processes} failed, and with it all of them ({reason}); processes 1 shows where.")


def _run(command):
    """Return the exit status of a launcher and what it wrote to its standard error; an interrupt ends its processes too."""
    reading, writing = os.pipe()
    environment = os.environ | {_LAUNCHED: "1"}
    try:
        with subprocess.Popen(command, stdin=reading, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
            try:
                said = launcher.communicate()[1]
            except BaseException:
                launcher.terminate()  # it passes this on; killed, as by subprocess.run, it would leave its processes behind
                raise
    finally:
        os.close(reading)
        os.close(writing)
    return launcher.returncode, said


@contextlib.contextmanager
def member(folder: Path) -> Iterator[int]:
    """Join the process group that `torch.distributed.run` or `accelerate launch` has started; yields this process's rank.

    What is raised inside is left as one sentence in `folder/error.<rank>.txt`, where `launch` finds it.
    """
    if os.environ.get(_LAUNCHED):
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    # What the processes tell each other is little and lies on the CPU.
    torch.distributed.init_process_group("gloo")
    rank = rank_and_world_size()[0]
    try:
        yield rank
    except Exception as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        (folder / f"error.{rank}.txt").write_text(sentence, encoding="utf-8")
        raise
    torch.distributed.destroy_process_group()


def own_device(device: str) -> str:
    """Return the device of this process in its group: on CUDA the GPU of its own number."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def _end_with_launcher():
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
