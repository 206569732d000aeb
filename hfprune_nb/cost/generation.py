"""How fast models generate text: time to the first token, time per further token, throughput, parameters and FLOPs.

The paper's Table 4 has 256 tokens in and one out (prefill), and batches of 8 with 256 tokens out (decoding). Greedy, with a
forced length, so that every model does the same work whatever it would say.
"""

import time

import numpy as np
import torch

from hfprune_nb.cost.flops import forward_flops
from hfprune_nb.cost.timing import median_interval, synchronise
from hfprune_nb.errors import UserError
from hfprune_nb.models import count_parameters, gated_mlps
from hfprune_nb.progress import bar

CACHES = ("dynamic", "static")


def compare(
    models: dict,
    batch_sizes: list[int],
    prompt_tokens: int = 256,
    new_tokens: int = 256,
    repetitions: int = 3,
    cache: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Time generation by `models` (name -> model) against each other at each batch size, the order rotated.

    Prompts are random tokens. cache : the key-value cache of transformers' `generate`; transformers compiles the model for a
    `static` one on CUDA. A batch that does not fit in memory is left out for that model.

    Returns rows with model, batch_size, repetition, first_token (seconds until the first new token of all sequences),
    per_token (seconds per further one) and tokens_per_second (all sequences together, after the first token). Raises UserError
    for a cache that is unknown and fewer than two new tokens.
    """
    if cache not in CACHES:
        raise UserError(f"cache '{cache}' is unknown: choose one of {', '.join(CACHES)}.")
    if new_tokens < 2 or prompt_tokens < 1:
        raise UserError(f"new_tokens {new_tokens} must be at least 2 and prompt_tokens {prompt_tokens} at least 1.")
    names, rows = list(models), []
    generator = np.random.default_rng(seed)
    with bar(len(names) * len(batch_sizes) * (repetitions + 1), "run", "generating", enabled=progress) as progress_bar:
        for batch_size in batch_sizes:
            vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
            prompts = torch.as_tensor(generator.integers(0, vocabulary, (batch_size, prompt_tokens)))
            for repetition in range(-1, repetitions):  # the first round warms up
                first = max(repetition, 0) % len(names)
                for name in names[first:] + names[:first]:
                    times = _token_times(models[name], prompts, new_tokens, cache)
                    progress_bar.update()
                    if repetition >= 0 and times is not None:
                        rows.append(
                            {"model": name, "batch_size": batch_size, "repetition": repetition, **_rates(times, batch_size)}
                        )
    return rows


def summarise(rows: list[dict], models: dict, prompt_tokens: int) -> list[dict]:
    """Return one row per model and batch size: medians with intervals, largest width, parameters, FLOPs of prefill."""
    summary = []
    for name, model in models.items():
        config = model.config.get_text_config()
        sizes = {
            "width": max(mlp.width for mlp in gated_mlps(model)),
            "parameters": count_parameters(model),
            "prefill_flops": forward_flops(config, prompt_tokens, prompt_tokens),
        }
        for batch_size in sorted({row["batch_size"] for row in rows if row["model"] == name}):
            own = [row for row in rows if row["model"] == name and row["batch_size"] == batch_size]
            row = {"model": name, "batch_size": batch_size, **sizes}
            for value in ("first_token", "per_token", "tokens_per_second"):
                found = median_interval(run[value] for run in own)
                row |= {value: found["median"], f"{value}_low": found["low"], f"{value}_high": found["high"]}
            summary.append(row)
    return summary


def _rates(times, batch_size):
    further = (times[-1] - times[0]) / (len(times) - 1)
    return {"first_token": times[0], "per_token": further, "tokens_per_second": batch_size / further}


def _token_times(model, prompts, new_tokens, cache):
    """Return seconds from the start until each new token is there, or None when memory does not suffice."""
    device = str(model.device)
    ids = prompts.to(device)
    times = []

    def note(input_ids, scores):
        synchronise(device)
        times.append(time.perf_counter() - started)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "cache_implementation": cache}
    synchronise(device)
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), stopping_criteria=[note], pad_token_id=0, use_cache=True, **settings
            )
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return times
