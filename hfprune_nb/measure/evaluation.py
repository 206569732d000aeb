"""What a model can still do: benchmark items, perplexity, fidelity to the dense model, next tokens on sample prompts."""

import dataclasses
import logging
from pathlib import Path

import lm_eval
import numpy as np
import pandas as pd
import torch
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file

from hfprune_nb.errors import UserError
from hfprune_nb.files import claim
from hfprune_nb.inputs import tokenization
from hfprune_nb.measure import fidelity
from hfprune_nb.measure.harness import SharedPrefixLM
from hfprune_nb.measure.tasks import METRICS, describe, load_tasks, shown_metric, skipped
from hfprune_nb.models import Head, check_context, check_tokens, context_length, final_hidden, head, weights_digest
from hfprune_nb.progress import bar

ITEM_COLUMNS = ["task", "doc_id", "doc_hash", "metric", "value", "loglikelihoods", "characters", "bytes", "right"]
FEWSHOT_SEED = 1234  # lm-eval's default
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "She opened the door and saw",
    "The opposite of hot is",
    "In 1969, the first man walked on the",
)


@dataclasses.dataclass
class HeldOut:
    """Measurements on held-out windows.

    perplexity : one row per window (window, tokens, nll in nats summed over the window).
    fidelity : one row per window and split of its positions (`fidelity.by_window`); None without a dense reference.
    hidden : (windows, positions compared, hidden) final hidden states, which are the reference for other models.
    """

    perplexity: pd.DataFrame
    fidelity: pd.DataFrame | None
    hidden: torch.Tensor


@torch.no_grad()
def held_out(
    model,
    windows: np.ndarray,
    compared_positions: int = 32,
    reference: torch.Tensor | None = None,
    reference_head: Head | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> HeldOut:
    """Measure perplexity on windows (windows, seq) and, with a reference, fidelity to the dense model there.

    Perplexity reads every position but the last; fidelity reads `compared_positions` evenly spaced ones of each window.
    reference, reference_head : `HeldOut.hidden` and `models.head` of the dense model on the same windows. Raises UserError when
    the reference does not fit, the windows do not fit the model, or a size is not positive.
    """
    _check_positive(batch_size=batch_size, fidelity_positions=compared_positions)
    windows = np.asarray(windows)
    check_context(model.config, windows.shape[1])
    check_tokens(model.config, windows)
    count, seq_len = windows.shape
    places = fidelity.positions(seq_len, compared_positions)
    if reference is not None and reference.shape[-1] != reference_head.module.in_features:
        raise UserError("reference: its hidden states do not fit the dense model's head: name an evaluation of this dense model.")
    if reference is not None and reference.shape[:2] != (count, len(places)):
        raise UserError(
            f"reference: the dense model was evaluated on {reference.shape[0]} windows at {reference.shape[1]} positions, this "
            f"one on {count} at {len(places)}: evaluate both with the same parameters."
        )
    own_head = head(model)
    device = own_head.weight.device
    nll_rows, compared, kept_hidden = [], [], []
    with bar(windows.size, "tok", "held-out text", enabled=progress) as progress_bar:
        for start in range(0, count, batch_size):
            batch = torch.as_tensor(windows[start : start + batch_size], dtype=torch.long, device=device)
            hidden = final_hidden(model, batch)
            for row in range(len(batch)):
                index = start + row
                logits = own_head.logits(hidden[row])
                nll = torch.nn.functional.cross_entropy(logits[:-1], batch[row, 1:], reduction="none").sum(dtype=torch.float64)
                nll_rows.append({"window": index, "tokens": seq_len - 1, "nll": float(nll)})
                kept_hidden.append(hidden[row, places].cpu())
                if reference is not None:
                    dense_logits = reference_head.logits(reference[index].to(hidden))
                    compared.append(fidelity.compare(logits[places], dense_logits).assign(window=index))
            progress_bar.update(batch.numel())
    found = fidelity.by_window(pd.concat(compared, ignore_index=True)) if compared else None
    return HeldOut(pd.DataFrame(nll_rows), found, torch.stack(kept_hidden))


def stack(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the frames of several corpora as one, with the column `corpus` in front."""
    parts = [frame.assign(corpus=corpus) for corpus, frame in frames.items()]
    joined = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"corpus": []})
    return joined[["corpus", *(column for column in joined if column != "corpus")]]


def save_reference(hidden: dict[str, torch.Tensor], file: Path) -> None:
    """Write `HeldOut.hidden` of each corpus as safetensors, the reference for the fidelity of other models."""
    save_file({corpus: states.contiguous() for corpus, states in hidden.items()}, file)


def benchmark_items(
    model, tokenizer, names: list[str], source: str = "auto", limit: int = 0, batch_size: int = 16,
    bos: bool | str = tokenization.AUTO,
    metric: str = "paper", scratch: str | Path | None = None, max_length: int = 2048,
) -> tuple[pd.DataFrame, dict, dict[str, str]]:  # fmt: skip
    """Run lm-eval tasks on an in-memory model, each on its own, and keep every item.

    names, source : tasks and where their records come from, as in `tasks.load_tasks`; limit : the first so many items of each
    task (0 = all); metric : which of a task's metrics its tables show, as in `tasks.shown_metric`; scratch : a folder in which
    finished tasks are kept, so that a run with the same arguments that was killed goes on with the next task. In a
    `torch.distributed` process group each process answers every n-th item, and only the first gets and keeps them all. Returns
    one row per item and metric (task, doc_id, doc_hash, metric, value, and what `_choices` says of a multiple choice), the
    protocol of each task (metric, shots, version, number of items in all, source), and a sentence for each skipped task. Raises
    UserError for an unknown task or metric, and a scratch folder of another run.
    """
    _check_positive(batch_size=batch_size)
    if limit < 0:
        raise UserError(f"limit {limit} is negative: give the number of items per task, or 0 for all.")
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is unknown: choose one of {', '.join(METRICS)}.")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    language_model = SharedPrefixLM(
        model, tokenizer, batch_size, min(max_length, context_length(model.config) or max_length), bos
    )
    chosen = load_tasks(names, source)
    if scratch and chosen and language_model.rank == 0:
        settings = {"source": source, "limit": limit, "batch_size": batch_size, "bos": bos, "max_length": max_length}
        claim(Path(scratch), settings | {"dtype": str(model.dtype), "model": weights_digest(model)})
    frames, protocol = [], {}
    for number, (name, task) in enumerate(chosen.items(), start=1):
        language_model.task = f"{name}, task {number} of {len(chosen)}"
        kept = Path(scratch) / f"{name}.parquet" if scratch else None
        if kept and kept.is_file():
            items = pd.read_parquet(kept)
        else:
            items = _task_items(language_model, name, task, limit)
            if kept and language_model.rank == 0:
                partial = kept.with_suffix(".partial")
                items.to_parquet(partial, index=False)
                partial.replace(kept)
        if language_model.rank > 0:
            continue
        frames.append(items)
        facts = describe(task)
        del facts["metrics"]
        protocol[name] = {"metric": shown_metric(items["metric"].unique().tolist(), metric), **facts}
    items = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=ITEM_COLUMNS)
    return items, protocol, skipped(names, source)


def _task_items(language_model, name: str, task: Task, limit: int) -> pd.DataFrame:
    # What lm_eval.simple_evaluate does to a task; it would also ask pip for the list of packages, which takes half a second.
    task.set_config("num_fewshot", task.config.num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results = lm_eval.evaluate(
        lm=language_model,
        task_dict=TaskManager(include_defaults=False).load([task]),
        limit=limit or None,
        log_samples=True,
        bootstrap_iters=0,
    )
    rows = []
    # Only the first process of a group has results, those of one process after those of another.
    for sample in sorted(results["samples"][name] if results else [], key=lambda sample: sample["doc_id"]):
        # A task that reads written answers in several ways has every item once per way.
        way = "" if sample["filter"] == "none" else f",{sample['filter']}"
        values = {metric: sample[metric] for metric in sample["metrics"] if np.isscalar(sample[metric])}
        item, choices = (name, sample["doc_id"], sample["doc_hash"]), _choices(task, sample)
        rows += [(*item, metric + way, float(value), *choices) for metric, value in values.items()]
    return pd.DataFrame(rows, columns=ITEM_COLUMNS)


def _choices(task: Task, sample: dict) -> tuple[list[float] | None, list[int] | None, list[int] | None, int]:
    """Return what a model says to the choices of an item: log-likelihoods in nats, their lengths, and which is right.

    Lengths are those by which the harness divides: characters (`acc_norm`) and bytes of the choices as the task gives them. The
    right one is -1 where a task has several or a score of its own, and in tasks that are no multiple choice, which have no lists.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, None, None, -1
    choices = task.doc_to_choice(sample["doc"])
    right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    right = choices.index(right) if right in choices else right
    single = isinstance(right, int) and right in range(len(choices)) and not callable(task.config.process_results)
    # Mutual information asks for the choices without their question as well, after those with it.
    likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"][: len(choices)]]
    return likelihoods, [*map(len, choices)], [len(choice.encode()) for choice in choices], right if single else -1


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} {value} is too small: it must be at least 1.")


@torch.no_grad()
def next_tokens(model, tokenizer, prompts=PROMPTS, top: int = 10, bos: bool | str = tokenization.AUTO) -> pd.DataFrame:
    """Return the `top` likeliest next tokens after each prompt: prompt_id, prompt, rank (from 1), token, probability.

    bos : what stands in front of a prompt, as in `tokenization.prefix`.
    """
    own_head, rows, prefix = head(model), [], tokenization.prefix(tokenizer, bos)
    for number, prompt in enumerate(prompts):
        ids = prefix + tokenization.encode(tokenizer, [prompt])["input_ids"][0]
        ids = torch.tensor([ids], device=own_head.weight.device)
        probability = torch.softmax(own_head.logits(final_hidden(model, ids)[0, -1:])[0], -1)
        best = probability.topk(min(top, len(probability)))
        rows += [
            {"prompt_id": number, "prompt": prompt, "rank": rank, "token": tokenizer.decode([token]), "probability": value}
            for rank, (token, value) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), start=1)
        ]
    return pd.DataFrame(rows)
