"""Importance summed over windows in float64: kept apart between powers of two, merged over processes, saved and resumed."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hfprune_nb.files import full_disk_in_one_sentence
from hfprune_nb.processes import place


def borders(count: int) -> list[int]:
    """Return the numbers of windows after which importance is reported: the powers of two below `count`, and `count`."""
    return [1 << power for power in range(max(count - 1, 0).bit_length())] + [count]


class Totals:
    """Running sums of one pass over the windows: each layer's (criteria, segments, neurons) on that layer's device.

    A segment is what lies between two `borders`: the windows of one process can then be added to those of another, and the
    importance after the first n windows is still known.

    done : windows of this process already added; batch_size : windows in a forward pass; seconds : time that they took.
    """

    def __init__(self, mlps, criteria: int, windows: int, batch_size: int):
        self.borders = borders(windows)
        self.sums = [
            torch.zeros(criteria, len(self.borders), mlp.width, dtype=torch.float64, device=mlp.down.weight.device)
            for mlp in mlps
        ]
        self.values = torch.zeros(criteria, dtype=torch.float64)
        self.done, self.batch_size, self.seconds = 0, batch_size, 0.0

    def add(self, windows: np.ndarray, changes: list[torch.Tensor], values: list[float]) -> None:
        """Add what a batch changed: windows (batch,) are their places among all windows, the rest as `Contributions` gives it."""
        segments = np.searchsorted(self.borders, windows, side="right")
        for segment in np.unique(segments):
            members = np.flatnonzero(segments == segment)
            rows = slice(members[0], members[-1] + 1)
            for total, change in zip(self.sums, changes, strict=True):
                total[:, segment] += change[:, rows].sum(dim=1, dtype=torch.float64)
        self.values += torch.tensor(values, dtype=torch.float64)
        self.done += len(windows)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return importance after each border, (criteria, borders, layers, neurons), and values (criteria,), of all processes.

        In a process group this is the one all-reduce of the pass, on the CPU and in float64.
        """
        importance = torch.stack([total.cpu() for total in self.sums], dim=2)
        flat = torch.cat([importance.flatten(), self.values])
        if place()[1] > 1:
            torch.distributed.all_reduce(flat)
        importance, values = flat[: -len(self.values)].view_as(importance), flat[-len(self.values) :]
        return importance.cumsum(dim=1), values

    def save(self, file: Path, fingerprint: str) -> None:
        """Write everything to `file` as safetensors with JSON metadata, whole or not at all; raise UserError for a full disk."""
        tensors = {f"layers.{layer}": total.cpu() for layer, total in enumerate(self.sums)} | {"values": self.values}
        state = {"fingerprint": fingerprint, "done": self.done, "batch_size": self.batch_size, "seconds": self.seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        with full_disk_in_one_sentence(file):
            save_file(tensors, partial, metadata={"state": json.dumps(state)})
        os.replace(partial, file)

    def resume(self, file: Path, fingerprint: str) -> bool:
        """Take over what `save` wrote with this fingerprint; return False, unchanged, if there is no such file."""
        with contextlib.suppress(FileNotFoundError, SafetensorError, OSError), safe_open(file, "pt") as saved:
            state = json.loads(saved.metadata()["state"])
            if state.pop("fingerprint") == fingerprint:
                for layer, total in enumerate(self.sums):
                    total.copy_(saved.get_tensor(f"layers.{layer}"))
                self.values = saved.get_tensor("values")
                vars(self).update(state)
                return True
        return False


def fingerprint(model, windows: np.ndarray, **settings) -> str:
    """Return a hash of the weights, the windows and all settings: sums are only continued by a run that would give the same."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(f"{torch.__version__} {type(model).__name__} {model.config.to_json_string()} {np.shape(windows)}".encode())
    digest.update(np.ascontiguousarray(windows, dtype=np.int64).tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {parameter.sum(dtype=torch.float64).item()!r}".encode())
    return digest.hexdigest()
