"""Sums over windows in float64: kept apart between snapshots, merged over processes, saved and resumed."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hfprune_nb.files import by_layer, full_disk_in_one_sentence
from hfprune_nb.processes import collective_device, rank_and_world_size


def snapshot_counts(windows: int) -> list[int]:
    """Return the numbers of windows after which importance is reported: the powers of two below `windows`, and `windows`."""
    return [1 << power for power in range(max(windows - 1, 0).bit_length())] + [windows]


class Accumulator:
    """Running sums of one pass over the windows: by name, for each layer (segments, ...) on that layer's device.

    A segment is what lies between two snapshots: the windows of one process can then be added to those of another, and the sums
    over the first n windows are still known. Where `subsets` names a criterion, its segments are so many subsets of the windows,
    every n-th one. Names, `criterion/statistic`, and shapes are those of the first batch.

    done : windows of this process already added; batch_size : windows in a forward pass; seconds : time that they took.
    """

    def __init__(self, windows: int, batch_size: int, subsets: dict[str, int] | None = None):
        self.counts, self.subsets = snapshot_counts(windows), subsets or {}
        self.sums: dict[str, list[torch.Tensor]] = {}
        self.values: dict[str, float] = {}
        self.done, self.batch_size, self.seconds = 0, batch_size, 0.0

    def add(self, windows: np.ndarray, gradients: dict[str, list[torch.Tensor]], values: dict[str, float]) -> None:
        """Add what a batch gives: windows (batch,) are their numbers among all windows, the rest is what `Reader` returns."""
        for name, rows in gradients.items():
            subsets = self._subsets(name)
            segments = windows % subsets if subsets else np.searchsorted(self.counts, windows, side="right")
            if name not in self.sums:
                count = subsets or len(self.counts)
                self.sums[name] = [row.new_zeros(count, *row.shape[1:], dtype=torch.float64) for row in rows]
            for segment in np.unique(segments):
                members = torch.as_tensor(np.flatnonzero(segments == segment))
                for total, row in zip(self.sums[name], rows, strict=True):
                    total[segment] += row[members.to(row.device)].sum(dim=0, dtype=torch.float64)
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value
        self.done += len(windows)

    def _subsets(self, name):
        return self.subsets.get(name.partition("/")[0], 0)

    def merged(self) -> tuple[dict[str, list[torch.Tensor]], dict[str, float]]:
        """Return by name the sums at each snapshot, or of each subset, for each layer, and the values, of all processes.

        In a process group this is the one all-reduce of the pass, in float64. All that is returned lies on the CPU.
        """
        sums = {name: [total.cpu() for total in self.sums[name]] for name in sorted(self.sums)}
        values = torch.tensor([self.values[name] for name in sorted(self.values)], dtype=torch.float64)
        if rank_and_world_size()[1] > 1:
            parts = [*(total for rows in sums.values() for total in rows), values]
            flat = torch.cat([part.flatten() for part in parts]).to(collective_device())
            torch.distributed.all_reduce(flat)
            flat = flat.cpu()
            for part, found in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(found.view_as(part))
        return (
            {name: rows if self._subsets(name) else [total.cumsum(dim=0) for total in rows] for name, rows in sums.items()},
            dict(zip(sorted(self.values), values.tolist(), strict=True)),
        )

    def save(self, file: Path, fingerprint: str) -> None:
        """Write everything to `file` as safetensors with JSON metadata, whole or not at all; raise UserError for a full disk."""
        tensors = {f"{name}/{layer}": total.cpu() for name, rows in self.sums.items() for layer, total in enumerate(rows)}
        state = {name: value for name, value in vars(self).items() if name not in ("sums", "counts", "subsets")}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        with full_disk_in_one_sentence(file):
            save_file(tensors, partial, metadata={"state": json.dumps(state | {"fingerprint": fingerprint})})
        os.replace(partial, file)

    def resume(self, file: Path, fingerprint: str, devices: list[torch.device]) -> bool:
        """Take over what `save` wrote with this fingerprint, each layer to its device; return False if there is no such file."""
        with contextlib.suppress(FileNotFoundError, SafetensorError, OSError), safe_open(file, "pt") as saved:
            state = json.loads(saved.metadata()["state"])
            if state.pop("fingerprint") == fingerprint:
                layers = by_layer({name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118
                self.sums = {
                    name: [row.to(device) for row, device in zip(rows, devices, strict=True)] for name, rows in layers.items()
                }
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
