"""The scoring engine: one forward pass, one backward pass per criterion, importance of every MLP neuron.

Only activations get gradients: weights are frozen and the graph starts at the first layer's neurons. The vocabulary side has no
graph at all: each criterion's closed-form gradient is taken in chunks of positions, so that no (positions, vocabulary) float32
tensor larger than a chunk ever exists. Importance is summed in float64.

Self-distillation reads the text twice: first the dense model, for the one-hot cross-entropy that chooses the student's neurons,
then the student. What the dense model's first reading left in front of the head is kept, up to `TEACHER_BYTES`, and is the
teacher of the second; only of the batches beyond is the teacher computed again.

What a batch adds is computed apart (`contributions`) and then summed (`totals`): a batch that runs out of memory is tried again
in halves, a stopped run goes on from its checkpoint, and the processes of a group share the windows (`shards`).
"""

import functools
import hashlib
import logging
import time
from pathlib import Path

import numpy as np
import torch

from hfprune_nb import criteria as registry
from hfprune_nb import processes
from hfprune_nb.errors import UserError
from hfprune_nb.method.scoring import accumulator
from hfprune_nb.method.scoring.backward import Contributions
from hfprune_nb.method.scoring.scores import Scores
from hfprune_nb.method.selection import allocate, check_importance, kept_neurons
from hfprune_nb.models import check_context, check_neurons, check_recomputation, check_tokens, gated_mlps, head
from hfprune_nb.models.cpu_attention import fast_on_cpu
from hfprune_nb.progress import bar

_FIRST_STAGE = "first stage"

# Enough tokens in a forward pass to fill the matrix units; more would only take memory.
CPU_TOKENS, CUDA_TOKENS = 512, 32768

# Final hidden states of the dense model that a process keeps for self-distillation: little beside the weights of the paper's
# models (2.5 to 15 GB), and enough for 256 windows of 1024 tokens of a 7B model, 8 KB a token.
TEACHER_BYTES = 2**31

logger = logging.getLogger(__name__)


def score(
    model,
    windows: np.ndarray,
    criteria: list[str | dict],
    *,
    batch_size: int = 4,
    chunk_size: int = 128,
    seed: int = 0,
    compile: bool = False,
    activation_checkpointing: bool = False,
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
    criteria : specs as `criteria.variants` reads them, each a name or a mapping with settings. Aggregation `weight` is SDMPrune's
        `mean over the hidden dimension of the sum over windows of |g_down * w_down + g_up * w_up + g_gate * w_gate|`, g being the
        gradient of C for a weight; it takes one window at a time and memory for the gradients of all MLP weights.
        `self_distillation` scores a student that has lost the `first_stage_ratio` of its neurons with the lowest one-hot
        cross-entropy importance of the same aggregation (SDMPrune's first stage; 3.9 instead of 4.0 times hidden size is 2.5 %).
        Neurons removed there rank last, in the order of the first stage.
    batch_size : windows in one forward pass; 0: on CUDA what the first window shows to fit in free memory, on the CPU as many as
        have 512 tokens, whatever the memory, so that the same windows give the same bytes. chunk_size : positions whose logits
        exist at once. Neither changes the scores beyond float error. When memory runs out, the batch is tried again in halves.
    seed : of the `random` criterion.
    compile : use torch.compile for the criteria and for the sums over positions, whose many small steps a GPU would start one by
        one. On one CPU core it saved 5 % with SmolLM2-135M and 512-token windows. The decoder is never compiled: its layers took
        a minute to compile there and ran no faster.
    activation_checkpointing : keep each layer's input only, and compute each layer a second time, with its graph, when the
        gradients of all criteria go back through it: one more forward, and the memory of one layer. For long windows; not with
        aggregation `weight`.
    checkpoint : a folder for the sums so far, one file for each pass and process, written after every `checkpoint_every` windows
        and at the end of a pass. A run with the same model, windows and parameters goes on from there and gives the same bytes;
        files of any other run are ignored.

    Raises UserError for an unknown criterion or setting, an unsupported architecture, missing text, a window that does not fit in
    memory, or scores that are NaN or all equal.
    """
    chosen, windows = registry.variants(criteria), np.asarray(windows)
    _check(chosen, activation_checkpointing, batch_size, chunk_size, checkpoint_every)
    check_neurons(model)
    mlps = gated_mlps(model)
    from_weights = {variant.name: variant.create() for variant in chosen if variant.criterion.kind == "weights"}
    from_logits = {variant.name: variant.create() for variant in chosen if variant.criterion.kind == "logits"}
    if from_logits and (np.ndim(windows) != 2 or np.size(windows) == 0 or windows.shape[1] < 2):
        raise UserError("calibration: these criteria read text, so give windows of at least two tokens each.")
    if from_logits and activation_checkpointing:
        check_recomputation(model)
    if from_logits:
        check_context(model.config, windows.shape[1])
        check_tokens(model.config, windows)
    passes, first_stage = {}, {}
    for name, criterion in from_logits.items():
        taught = "teacher_logits" in criterion.needs
        stage = (criterion.aggregation, criterion.first_stage_ratio if taught else 0)
        passes.setdefault(stage, {})[name] = criterion
        if taught:
            first_stage[criterion.aggregation] = registry.create("one_hot_ce", aggregation=criterion.aggregation)
    for aggregation, criterion in first_stage.items():
        dense = passes.setdefault((aggregation, 0), {})
        alike = [name for name, other in dense.items() if type(other) is type(criterion)]
        first_stage[aggregation] = alike[0] if alike else _FIRST_STAGE
        dense.setdefault(first_stage[aggregation], criterion)
    scoring_pass = _Pass(
        model,
        windows,
        {"chunk_size": chunk_size, "checkpointing": activation_checkpointing, "compiled": compile},
        batch_size=batch_size,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        teacher_bytes=TEACHER_BYTES if any(ratio for _, ratio in passes) else 0,
    )
    started = time.perf_counter()
    found, mean_value = {}, {}
    tokens = np.size(windows) if from_logits else 0
    shown = bar(tokens * len(passes) // processes.place()[1], "tok", "scoring", enabled=progress and tokens > 0)
    with shown as progress_bar, fast_on_cpu(model):
        for (aggregation, ratio), group in sorted(passes.items(), key=lambda item: item[0]):
            first = student = None
            if ratio:
                first = found[first_stage[aggregation]][-1]
                student = kept_neurons(first, allocate(model, neuron_ratio=ratio).width_after)
            rows, values = scoring_pass(aggregation, f"student-{ratio:g}" if ratio else "dense", group, student, progress_bar)
            if ratio:
                rows = {name: torch.stack([_rank_last(scores, student, first) for scores in each]) for name, each in rows.items()}
            found |= rows
            mean_value |= values
    importance = {name: rows[-1] for name, rows in found.items()}
    importance |= {name: _weight_importance(mlps, criterion, seed) for name, criterion in from_weights.items()}
    importance = {variant.name: importance[variant.name] for variant in chosen}
    for name, scores in importance.items():
        check_importance(scores, f"criterion '{name}'")
    snapshots = {}
    if from_logits:
        for index, n in enumerate(accumulator.borders(len(windows))):
            snapshots[n] = {name: found[name][index] for name in from_logits}
    mean_value = {name: value for name, value in mean_value.items() if name in importance}
    seconds = time.perf_counter() - started + scoring_pass.seconds_before
    return Scores(importance, mean_value, tokens, seconds, scoring_pass.batch_size, snapshots)


def _check(chosen, activation_checkpointing, batch_size, chunk_size, checkpoint_every):
    if not chosen:
        raise UserError(f"criteria is empty: name at least one of {', '.join(registry.names())}.")
    for name, value, least in (
        ("batch_size", batch_size, 0),
        ("chunk_size", chunk_size, 1),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value} is too small: it must be at least {least}.")
    if activation_checkpointing and any(variant.settings.get("aggregation") == "weight" for variant in chosen):
        raise UserError("activation_checkpointing does not go with aggregation 'weight': switch it off.")


class _Pass:
    """One reading of this process's windows: batches, memory, checkpoints, and the merging at the end."""

    def __init__(self, model, windows, settings, *, batch_size, checkpoint, checkpoint_every, teacher_bytes=0):
        self.model, self.windows, self.settings, self.batch_size = model, windows, settings, batch_size
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.finds_batch = batch_size == 0
        self.teacher = _Teacher(teacher_bytes)
        self.rank, self.processes = processes.place()
        self.places = np.arange(self.rank, len(windows), self.processes)
        self.gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self.seconds_before = 0.0

    @functools.cached_property
    def head(self):
        """The model's head, which is checked once for all passes."""
        return head(self.model)

    def __call__(self, aggregation, name, group, student, progress_bar):
        """Return {criterion: importance after each border (borders, layers, neurons)} and {criterion: mean of C}.

        Of the dense model, or of the `student`, which keeps only those neurons and goes with the dense model as its teacher.
        """
        names, group = list(group), list(group.values())
        # By weight, the absolute value is taken of each window's own gradient.
        size = 1 if aggregation == "weight" else self.batch_size
        sums = accumulator.Totals(gated_mlps(self.model), len(group), len(self.windows), size)
        file = fingerprint = None
        if self.checkpoint is not None:
            file = Path(self.checkpoint) / f"{aggregation}.{name}.{self.rank}of{self.processes}.safetensors"
            fingerprint = self._fingerprint(group, student)
            if sums.resume(file, fingerprint):
                logger.info("scoring goes on after %d windows of %s", sums.done, file)
                self.seconds_before += sums.seconds
        progress_bar.update(sums.done * self.windows.shape[1])
        contributions = Contributions(self.model, self.head, group, aggregation=aggregation, student=student, **self.settings)
        saved, started, before = sums.done, time.perf_counter(), sums.seconds
        while sums.done < len(self.places):
            added = self._add_batch(contributions, sums)
            progress_bar.update(added * self.windows.shape[1])
            sums.seconds = before + time.perf_counter() - started
            if file and (sums.done - saved >= self.checkpoint_every or sums.done == len(self.places)):
                sums.save(file, fingerprint)
                saved = sums.done
        self.batch_size = sums.batch_size
        importance, values = sums.merged()
        means = (values / len(self.windows)).tolist()
        return dict(zip(names, importance, strict=True)), dict(zip(names, means, strict=True))

    def _add_batch(self, contributions, sums):
        """Add the next batch to `sums`, smaller if memory runs out, and return its number of windows."""
        found = None
        while found is None:
            size = self._next_size(sums)
            places = self.places[sums.done : sums.done + size]
            before = {gpu: torch.cuda.memory_allocated(gpu) for gpu in self.gpus}
            for gpu in self.gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
            # What a batch adds is added only when all of it is known: nothing is lost or counted twice.
            found = _unless_out_of_memory(contributions, np.array(self.windows[places]), self.teacher.take(places))
            if found is None:
                if len(places) == 1:
                    raise UserError(
                        "batch_size: a single window does not fit in memory: score shorter windows, set "
                        "activation_checkpointing, or use a larger device."
                    )
                sums.batch_size = len(places) // 2
                logger.info(
                    "scoring ran out of memory with %d windows in a batch and goes on with %d", len(places), sums.batch_size
                )
        changes, values, hidden = found
        if contributions.student is None:
            self.teacher.keep(places, hidden)
        sums.add(places, changes, values)
        if not sums.batch_size:
            sums.batch_size = self._fitting_size(before) if before else size
            logger.info("scoring takes %d windows of %d tokens in a batch", sums.batch_size, self.windows.shape[1])
        return len(places)

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
            place=[self.rank, self.processes],
            criteria=[[type(criterion).__name__, vars(criterion)] for criterion in group],
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
        self.free, self.states = limit, {}

    def keep(self, places, hidden):
        """Keep what the batch of the windows at `places` left, if it still fits."""
        if hidden.nbytes <= self.free:
            self.states[tuple(places)] = hidden.cpu()
            self.free -= hidden.nbytes

    def take(self, places):
        """Give back and forget the states of this very batch; None where there are none."""
        return self.states.pop(tuple(places), None)


def _unless_out_of_memory(contributions, windows, teacher_hidden):
    """Return what `windows` add, or None when memory ran out; by then everything that the attempt had allocated is free again."""
    try:
        return contributions(windows, teacher_hidden)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words on the CPU, where it has no type of its own for this
            raise
    torch.cuda.empty_cache()
    return None


def _weight_importance(mlps, criterion, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for mlp in mlps:
        inputs = list(mlp.fused.weight.chunk(2)) if mlp.fused is not None else [mlp.gate.weight, mlp.up.weight]
        rows.append(criterion.importance(inputs, mlp.down.weight, generator).cpu())
    return torch.stack(rows)


def _rank_last(scores, kept, first_stage):
    """Give neurons outside `kept` negative scores in the order of `first_stage`, below every neuron that was kept."""
    lowest = max(row.max() for row in first_stage)
    rows = [row - lowest - 1 for row in first_stage]
    for row, own, indices in zip(rows, scores, kept, strict=True):
        row[indices] = own[indices]
    return torch.stack(rows)
