"""The scoring engine: one forward pass for everything that reads the dense model, one backward pass per gradient.

Only activations get gradients: weights are frozen and the graph starts at the first layer's neurons. The vocabulary side has no
graph at all: each criterion's closed-form gradient is taken in chunks of positions, so that no (positions, vocabulary) float32
tensor larger than a chunk ever exists. Sums over windows are float64. What a criterion needs follows from its kind: one that
reads activations alone gets no backward pass and no logits, one that reads weights alone no text.

Self-distillation reads the text twice: first the dense model, for the one-hot cross-entropy that chooses the student's neurons,
then the student. What the dense model's first reading left in front of the head is kept, up to `TEACHER_BYTES`, and is the
teacher of the second; only of the batches beyond is the teacher computed again.

What a batch gives is computed apart (`backward`) and then summed (`accumulator`): a batch that runs out of memory is tried again
in halves, a stopped run goes on from its checkpoint, and the processes of a group share the windows (`distributed`).
"""

import functools
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfprune_nb import criteria as registry
from hfprune_nb import processes
from hfprune_nb.errors import UserError
from hfprune_nb.method.scoring import accumulator
from hfprune_nb.method.scoring.backward import ATTENTION, Reader
from hfprune_nb.method.scoring.scores import Scores
from hfprune_nb.method.scoring.search import search
from hfprune_nb.method.selection import allocate, check_importance, kept_neurons, rank_last
from hfprune_nb.models import (
    check_context,
    check_groups,
    check_neurons,
    check_recomputation,
    check_tokens,
    gated_mlps,
    head,
    units,
)
from hfprune_nb.models.cpu_attention import fast_on_cpu
from hfprune_nb.models.hooks import frozen
from hfprune_nb.progress import bar

_FIRST_STAGE, _START = "first stage", "start of "

# Enough tokens in a forward pass to fill the matrix units; more would only take memory.
CPU_TOKENS, CUDA_TOKENS = 512, 32768

# Final hidden states of the dense model that a process keeps for self-distillation: little beside the weights of the paper's
# models (2.5 to 15 GB), and enough for 256 windows of 1024 tokens of a 7B model, 8 KB a token.
TEACHER_BYTES = 2**31

# Seconds after which the sums are saved even if few windows were read. Large sums take long to write: then so many times longer.
CHECKPOINT_SECONDS = 60.0

logger = logging.getLogger(__name__)


def score(
    model,
    windows: np.ndarray,
    criteria: Sequence[str | dict | registry.Variant],
    *,
    batch_size: int = 4,
    chunk_size: int = 128,
    seed: int = 0,
    compile: bool = False,
    activation_checkpointing: bool = False,
    attention_groups: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 256,
    progress: bool = True,
) -> Scores:
    """Score every MLP neuron of `model` under all `criteria` (HFPrune Eq. 4).

    In a `torch.distributed` process group each process scores every n-th window and all return the merged scores: one all-reduce
    of float64 sums at the end of each pass. There are two passes with self-distillation, whose student is derived from the merged
    scores of the first.

    Parameters
    ----------
    windows : (windows, seq) token ids; may be empty when no criterion reads text.
    criteria : specs as `criteria.variants` reads them, each a name or a mapping with settings; the settings are explained there.
        `self_distillation` scores a student that has lost the `first_stage_ratio` of its neurons with the lowest one-hot
        cross-entropy importance of the same aggregation (SDMPrune's first stage; 3.9 instead of 4.0 times hidden size is 2.5 %).
        Neurons removed there rank last, in the order of the first stage.
    batch_size : windows in one forward pass; 0: on CUDA what the first window shows to fit in free memory, on the CPU as many as
        have 512 tokens, whatever the memory, so that the same windows give the same bytes. chunk_size : positions whose logits
        exist at once. Neither changes the scores beyond float error. When memory runs out, the batch is tried again in halves.
    seed : of the `random` criterion and of sampled labels, which depend on it and on the window's number and position alone.
    compile : use torch.compile for the criteria and for the sums over positions, whose many small steps a GPU would start one by
        one. On one CPU core it saved 5 % with SmolLM2-135M and 512-token windows. The decoder is never compiled: its layers took
        a minute to compile there and ran no faster.
    activation_checkpointing : keep each layer's input only, and compute each layer a second time, with its graph, when the
        gradients of all criteria go back through it: one more forward, and the memory of one layer. For long windows.
    attention_groups : score the key-value groups of the attention as well, by the criteria that can: by what they give to
        `o_proj` and the same gradients, the products of a group's channels being summed before anything else; by activations as
        Wanda-sp, summed over channels.
    checkpoint : a folder for the sums so far, one file for each pass and process, written after every `checkpoint_every`
        windows, every `CHECKPOINT_SECONDS` and at the end of a pass. A run with the same model, windows and parameters goes on
        from there and gives the same bytes; files of any other run are ignored.

    Raises UserError for an unknown criterion or setting, an unsupported architecture, missing text, a window that does not fit in
    memory, scores that are NaN or all equal, and, with `attention_groups`, where no criterion scores any.
    """
    chosen = {variant.name: variant.create() for variant in registry.variants(criteria)}
    try:
        windows = np.asarray(windows)
    except ValueError:
        raise UserError("windows differ in length: give equally many token ids in each.") from None
    _check(chosen, batch_size, chunk_size, checkpoint_every)
    check_neurons(model)
    mlps, groups = gated_mlps(model), _groups(model, registry.variants(criteria)) if attention_groups else []
    reading = {name: criterion for name, criterion in chosen.items() if criterion.reads_text}
    if reading:
        if windows.dtype == object:
            raise UserError("windows must be an array of token ids: of calibration.windows(...) give .ids.")
        if np.ndim(windows) != 2 or np.size(windows) == 0 or windows.shape[1] < 2:
            raise UserError("calibration: these criteria read text, so give windows of at least two tokens each.")
        if activation_checkpointing:
            check_recomputation(model)
        check_context(model.config, windows.shape[1])
        check_tokens(model.config, windows)
    dense, students = _passes(reading)
    scoring_pass = _Pass(
        model,
        windows,
        {
            "chunk_size": chunk_size,
            "checkpointing": activation_checkpointing,
            "compiled": compile,
            "seed": seed,
            "groups": attention_groups,
        },
        batch_size=batch_size,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        teacher_bytes=TEACHER_BYTES if students else 0,
    )
    started = time.perf_counter()
    found: dict = {}
    mean_value: dict = {}
    ranked_last: dict = {}
    tokens = np.size(windows) if reading else 0
    searching: dict[str, Any] = {name: criterion for name, criterion in reading.items() if criterion.kind == "search"}
    own = tokens * (1 + len(students)) // scoring_pass.world_size
    own += int(tokens * sum(criterion.passes.forward - criterion.start.passes.forward for criterion in searching.values()))
    with bar(own, "tok", "scoring", enabled=progress and tokens > 0) as progress_bar, fast_on_cpu(model), frozen(model):
        if dense:
            found, mean_value = scoring_pass("dense", dense, None, progress_bar)
        for index, ((aggregation, ratio), group) in enumerate(students.items(), start=1):
            first = [rows[-1] for rows in found[f"{_FIRST_STAGE}, {aggregation}/importance"]]
            student = kept_neurons(first, allocate(model, neuron_ratio=ratio).width_after)
            is_last = index == len(students)
            sums, values = scoring_pass(f"student.{aggregation}.{ratio:g}", group, student, progress_bar, is_last)
            found |= sums
            mean_value |= values
            ranked_last |= dict.fromkeys(group, (student, first))

        def closed(name, criterion, index, n):
            rows = _closed(name, criterion, found, index, n, windows, mlps)
            return rank_last(rows, *ranked_last[name]) if name in ranked_last else rows

        counts, snapshots, notes = accumulator.snapshot_counts(len(windows)) if reading else [], {}, {}
        for index, n in enumerate(counts):
            last = n == len(windows)
            ready = {name: each for name, each in reading.items() if name not in searching and (last or not each.subsets)}
            snapshots[n] = {name: closed(name, criterion, index, n) for name, criterion in ready.items()}
        importance = snapshots[counts[-1]].copy() if counts else {}
        for name, criterion in searching.items():
            begin = closed(_START + name, criterion.start, len(counts) - 1, len(windows))
            importance[name], notes[name] = search(
                model, scoring_pass.head, windows, criterion, begin, seed, chunk_size, progress_bar
            )
    importance |= {name: _from_weights(mlps, chosen[name], seed) for name in chosen.keys() - reading.keys()}
    importance = {name: check_importance(importance[name], f"criterion '{name}'") for name in chosen}
    mean_value = {name: value for name, value in mean_value.items() if name in chosen}
    seconds = time.perf_counter() - started + scoring_pass.seconds_before
    of_groups = {
        name: _closed_groups(name, criterion, scoring_pass.attention, groups, np.size(windows))
        for name, criterion in chosen.items()
        if groups and criterion.of_groups
    }
    return Scores(importance, mean_value, tokens, seconds, scoring_pass.batch_size, snapshots, notes, of_groups)


def _groups(model, chosen):
    """Return the model's attention groups; raise UserError where no criterion scores them, and what `check_groups` raises."""
    registry.check_groups(chosen)
    check_groups(model)
    return units.attention_groups(model)


def _check(chosen, batch_size, chunk_size, checkpoint_every):
    if not chosen:
        raise UserError(f"criteria is empty: name at least one of {', '.join(registry.names())}.")
    for name, value, least in (
        ("batch_size", batch_size, 0),
        ("chunk_size", chunk_size, 1),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value} is too small: it must be at least {least}.")


def _passes(criteria):
    """Return the criteria that read the dense model, and those that read a student by aggregation and first-stage ratio."""
    dense, students = {}, {}
    for name, criterion in criteria.items():
        if "teacher_logits" in getattr(criterion, "needs", ()):
            students.setdefault((criterion.aggregation, criterion.first_stage_ratio), {})[name] = criterion
            first = registry.create("one_hot_ce", aggregation=criterion.aggregation)
            dense[f"{_FIRST_STAGE}, {criterion.aggregation}"] = first
        elif criterion.kind == "search":
            dense[_START + name] = criterion.start
        else:
            dense[name] = criterion
    return dense, students


class _Pass:
    """One reading of this process's windows: batches, memory, checkpoints, and the merging at the end."""

    def __init__(self, model, windows, settings, *, batch_size, checkpoint, checkpoint_every, teacher_bytes=0):
        self.model, self.windows, self.settings, self.batch_size = model, windows, settings, batch_size
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.finds_batch = batch_size == 0
        self.teacher = _Teacher(teacher_bytes)
        self.rank, self.world_size = processes.rank_and_world_size()
        self.numbers = np.arange(self.rank, len(windows), self.world_size)
        self.gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self.seconds_before = 0.0
        self.attention = {}

    @functools.cached_property
    def head(self):
        """The model's head, which is checked once for all passes."""
        return head(self.model)

    def __call__(self, name, group, student, progress_bar, is_last=False):
        """Return {criterion/statistic: sums at each snapshot, (snapshots, ...) for each layer} and {criterion: mean of C}.

        Of the dense model, or of the `student`, which keeps only those neurons and goes with the dense model as its teacher,
        of which nothing more is kept after the pass that `is_last`.
        """
        self.forgets_teacher = is_last
        subsets = {name: criterion.subsets for name, criterion in group.items() if criterion.subsets}
        sums = accumulator.Accumulator(len(self.windows), self.batch_size, subsets)
        file = fingerprint = None
        if self.checkpoint is not None:
            file = Path(self.checkpoint) / f"{name}.{self.rank}of{self.world_size}.safetensors"
            fingerprint = self._fingerprint(group, student)
            if sums.resume(file, fingerprint, [mlp.down.weight.device for mlp in gated_mlps(self.model)]):
                logger.info("scoring goes on after %d windows of %s", sums.done, file)
                self.seconds_before += sums.seconds
        progress_bar.update(sums.done * self.windows.shape[1])
        has_logits = any(criterion.kind in ("logits", "gates", "weight_gradients") for criterion in group.values())
        reader = Reader(self.model, self.head if has_logits else None, group, student=student, **self.settings)
        saved, started, before = sums.done, time.perf_counter(), sums.seconds
        due = CHECKPOINT_SECONDS
        while sums.done < len(self.numbers):
            added = self._add_batch(reader, sums)
            progress_bar.update(added * self.windows.shape[1])
            sums.seconds = before + time.perf_counter() - started
            now = time.perf_counter() - started
            if file and (sums.done - saved >= self.checkpoint_every or now >= due or sums.done == len(self.numbers)):
                sums.save(file, fingerprint)
                saved, written = sums.done, time.perf_counter() - started
                due = written + CHECKPOINT_SECONDS * max(1.0, written - now)
        self.batch_size = sums.batch_size
        merged, values = sums.merged()
        self.attention |= {key: merged.pop(key) for key in list(merged) if f"/{ATTENTION}" in key}
        return merged, {name: value / len(self.windows) for name, value in values.items()}

    def _add_batch(self, reader, sums):
        """Add the next batch to `sums`, smaller if memory runs out, and return its number of windows."""
        found = None
        while found is None:
            size = self._next_size(sums)
            numbers = self.numbers[sums.done : sums.done + size]
            before = {} if sums.batch_size else self._allocated()
            # What a batch adds is added only when all of it is known: nothing is lost or counted twice.
            taught = self.teacher.take(numbers, self.forgets_teacher) if reader.student is not None else None
            found = _unless_out_of_memory(reader, np.array(self.windows[numbers]), numbers, taught)
            if found is None:
                if len(numbers) == 1:
                    raise UserError(
                        "batch_size: a single window does not fit in memory: score shorter windows, set "
                        "activation_checkpointing, or use a larger device."
                    )
                sums.batch_size = len(numbers) // 2
                logger.info(
                    "scoring ran out of memory with %d windows in a batch and goes on with %d", len(numbers), sums.batch_size
                )
        gradients, values, hidden = found
        if reader.student is None:
            self.teacher.keep(numbers, hidden)
        sums.add(numbers, gradients, values)
        if not sums.batch_size:
            sums.batch_size = self._fitting_size(before) if before else size
            logger.info("scoring takes %d windows of %d tokens in a batch", sums.batch_size, self.windows.shape[1])
        return len(numbers)

    def _allocated(self):
        """Return the bytes allocated on each GPU, from which on its peak is counted; elsewhere a caller's own count goes on."""
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        return {gpu: torch.cuda.memory_allocated(gpu) for gpu in self.gpus}

    def _next_size(self, sums):
        """Return the windows to try next: where the batch is found by its first window, that one is alone in every pass.

        So the student's batches are those of the dense model, and what was kept of these is of use.
        """
        if self.finds_batch and not sums.done:
            return min(sums.batch_size or self._first_size(), self._first_size())
        return sums.batch_size

    def _first_size(self):
        return 1 if self.gpus else max(1, CPU_TOKENS // self.windows.shape[1])

    def _fitting_size(self, before):
        """Return the windows that fit in 80 % of free memory if each takes what the first one took, as a power of two."""
        fits = CUDA_TOKENS // self.windows.shape[1]
        for gpu, allocated in before.items():
            taken = max(1, torch.cuda.max_memory_allocated(gpu) - allocated)
            free = torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
            fits = min(fits, int(0.8 * free) // taken)
        return 1 << max(fits, 1).bit_length() - 1

    def _fingerprint(self, group, student):
        return accumulator.fingerprint(
            self.model,
            self.windows,
            **self.settings,
            batch_size=self.batch_size,
            rank=[self.rank, self.world_size],
            criteria={name: [criterion.name, vars(criterion)] for name, criterion in group.items()},
            student=None if student is None else hashlib.sha256(b"".join(row.numpy().tobytes() for row in student)).hexdigest(),
            attention=self.model.config._attn_implementation,
            device=str(self.model.get_input_embeddings().weight.device),
        )


class _Teacher:
    """Final hidden states of the dense model, on the CPU and in its dtype, batch by batch and up to `limit` bytes.

    A batch is given back to no other than itself: the same window in a batch of another size may differ in its last bits, and
    then a run whose batches were halved, or that was stopped and lost all states, would not give the same bytes.
    """

    def __init__(self, limit: int):
        self.free = limit
        self.states: dict = {}

    def keep(self, numbers, hidden):
        """Keep what the batch of the windows with these `numbers` left, if it still fits."""
        if hidden.nbytes <= self.free:
            self.states[tuple(numbers)] = hidden.cpu()
            self.free -= hidden.nbytes

    def take(self, numbers, forget):
        """Give back the states of this very batch, and forget them if told so; None where there are none."""
        return (self.states.pop if forget else self.states.get)(tuple(numbers), None)


def _unless_out_of_memory(reader, windows, numbers, teacher_hidden):
    """Return what `windows` give, or None when memory ran out; by then all that the attempt had allocated is free again."""
    try:
        return reader(windows, numbers, teacher_hidden)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words on the CPU, where it has no type of its own for this
            raise
    torch.cuda.empty_cache()
    return None


def _closed(name, criterion, found, index, n, windows, mlps):
    """Return one criterion's importance, (neurons,) of each layer, from the sums of the first `n` windows."""
    prefix, rows = f"{name}/", []
    sums = {key.removeprefix(prefix): layers for key, layers in found.items() if key.startswith(prefix)}
    if set(sums) == {"importance"}:
        return [layer[index] for layer in sums["importance"]]
    count = n * windows.shape[1] if criterion.kind == "activations" else n
    for mlp in mlps:
        device = mlp.down.weight.device
        own = {statistic: layers[mlp.layer] for statistic, layers in sums.items()}
        own = {statistic: (rows if criterion.subsets else rows[index]).to(device) for statistic, rows in own.items()}
        if criterion.kind == "gates":
            rows.append(criterion.importance(own, n, windows.shape[1]).cpu())
        else:
            rows.append(criterion.importance(own, mlp.input_weights, mlp.down.weight, count).cpu())
    return rows


def _closed_groups(name, criterion, found, groups, tokens):
    """Return one criterion's importance, (groups,) of each layer, from the sums of all windows."""
    prefix, rows = f"{name}/{ATTENTION}", []
    sums = {key.removeprefix(prefix): [row[-1] for row in layers] for key, layers in found.items() if key.startswith(prefix)}
    if criterion.kind == "logits":
        return check_importance(sums["importance"], f"criterion '{name}', attention groups")
    for unit in groups:
        weight = unit.output.weight
        own = {statistic: layers[unit.layer].to(weight.device) for statistic, layers in sums.items()}
        rows.append(criterion.importance(own, [], weight, tokens).view(unit.width, -1).sum(1).cpu())
    return check_importance(rows, f"criterion '{name}', attention groups")


def _from_weights(mlps, criterion, seed):
    generator = torch.Generator().manual_seed(seed)
    return [criterion.importance(mlp.input_weights, mlp.down.weight, generator).cpu() for mlp in mlps]
