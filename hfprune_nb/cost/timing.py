"""How fast and how large: alternating runs of anything callable, peak memory, and the machine's own speed as a yardstick.

Needs torch, transformers and numpy only, and knows nothing of pruning: it times what it is given.
"""

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from hfprune_nb.cost.flops import backward_flops, forward_flops
from hfprune_nb.cost.memory import peak_in_fork, peak_memory, resets_high_water
from hfprune_nb.errors import UserError
from hfprune_nb.machine import processor
from hfprune_nb.progress import bar

logger = logging.getLogger(__name__)

PEAK_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}


def machine(device: str = "cpu") -> dict:
    """Return what the figures depend on: device, threads, processor, torch and transformers versions, how memory is measured."""
    import transformers

    if device.startswith("cuda"):
        name, memory = torch.cuda.get_device_name(device), "peak of torch's CUDA allocator"
    else:
        name = processor()
        resets = resets_high_water()
        memory = "high-water mark of resident memory, reset before each run" if resets else "resident memory of a forked process"
    return {
        "device": device,
        "processor": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memory": memory,
    }


def alternate(
    contestants: dict[str, Callable[[], object]], repetitions: int = 3, device: str = "cpu", progress: bool = True
) -> list[dict]:
    """Time `contestants` against each other: after one warm-up each, every repetition runs each once, the order rotated.

    Returns rows with contestant, repetition, seconds and peak_bytes: the most memory in use during the run beyond what was in use
    before it, so beyond the weights. On CUDA that is what torch's allocator held; on the CPU, resident memory. Where the system
    does not let its high-water mark be reset, a forked process with one thread repeats each contestant once for it. A contestant
    that does not fit in the GPU's memory has no rows and is named in the log. Raises UserError where none fits.
    """
    if repetitions < 1:
        raise UserError(f"repetitions {repetitions} is too small: it must be at least 1.")
    names, rows = list(contestants), []
    on_cuda = device.startswith("cuda")
    in_process = on_cuda or resets_high_water()
    with bar(len(names) * (repetitions + 1), "run", "timing", enabled=progress) as progress_bar:
        peaks = {}
        for name, run in contestants.items():
            progress_bar.set_postfix_str(name)
            if not in_process:
                peaks[name] = peak_in_fork(run)
            if not _fits(run):
                names.remove(name)
                logger.warning("%s does not fit in memory and is left out", name)
            progress_bar.update()
        if not names:
            raise UserError(f"device: nothing that is to be timed fits in the memory of {device}: use a larger one.")
        for repetition in range(repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                progress_bar.set_postfix_str(name)
                with peak_memory(device if in_process else "") as memory:
                    seconds = timed(contestants[name], device)
                peak = memory["peak"] if in_process else peaks[name]
                rows.append({"contestant": name, "repetition": repetition, "seconds": seconds, "peak_bytes": peak})
                progress_bar.update()
    return rows


def _fits(run):
    try:
        run()
        return True
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # only here is what the traceback held free again
    return False


def timed(run: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of one call, the device's queue empty before and after."""
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: str) -> None:
    """Wait until a CUDA device has done all it was asked to; nothing on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def median_interval(values: Iterable[float]) -> dict:
    """Return the median with the narrowest order-statistic interval that covers it with at least 95 %, and its coverage.

    Between the k-th smallest and k-th largest of n values the median lies with probability 1 - 2 P(Binomial(n, 1/2) < k).
    Below six values no such interval reaches 95 %: then it is the whole range, which of three values covers 75 %.

    >>> median_interval([2.0, 1.0, 4.0])
    {'median': 2.0, 'low': 1.0, 'high': 4.0, 'coverage': 0.75}
    """
    ordered = sorted(values)
    count, chosen = len(ordered), 0
    for k in range(count // 2):
        if _order_coverage(count, k) < 0.95:
            break
        chosen = k
    return {
        "median": statistics.median(ordered),
        "low": ordered[chosen],
        "high": ordered[-1 - chosen],
        "coverage": _order_coverage(count, chosen),
    }


def ratio_interval(rows: list[dict], numerator: str, denominator: str, value: str = "seconds") -> dict | None:
    """Return `median_interval` of value(numerator) / value(denominator) paired by repetition; None where one did not run."""
    found = {
        name: {row["repetition"]: row[value] for row in rows if row["contestant"] == name} for name in (numerator, denominator)
    }
    shared = found[numerator].keys() & found[denominator].keys()
    if not shared:
        return None
    return median_interval(found[numerator][index] / max(found[denominator][index], 1e-9) for index in shared)


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, repetitions: int = 3) -> dict[str, float]:
    """Return the best rate of products of square matrices of several sizes, in FLOP/s: of `dtype` and of float32, by name.

    A CPU without units for `dtype` takes minutes for the larger ones and reaches no other rate: they are left out there.
    """
    best = {}
    for kind in dict.fromkeys((dtype, torch.float32)):
        rates = []
        for size in PEAK_SIZES["cuda" if device.startswith("cuda") else "cpu"]:
            a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
            run = functools.partial(torch.mm, a, b)
            if timed(run, device) > 2:
                rates.append(2 * size**3 / timed(run, device))
                break
            rates += [2 * size**3 / timed(run, device) for _ in range(repetitions)]
        best[str(kind).removeprefix("torch.")] = max(rates)
    return best


def summarise(rows: list[dict], contestants: Iterable, model, windows: np.ndarray, peak: float) -> list[dict]:
    """Return one row per contestant that ran: seconds (median, interval), tokens/s, peak memory, fraction of the matmul peak.

    contestants : objects with name, criterion, implementation, forwards and backwards (passes over all `windows`, an array
    (windows, seq)); peak : FLOP/s.
    The FLOPs are those which the criterion needs, so a loop that does more gets no credit for it.
    """
    config, summary = model.config.get_text_config(), []
    tokens, seq_len = windows.size, windows.shape[1]
    for contestant in contestants:
        own = [row for row in rows if row["contestant"] == contestant.name]
        if not own:
            continue
        seconds = median_interval(row["seconds"] for row in own)
        flops = contestant.forwards * forward_flops(config, tokens, seq_len)
        flops += contestant.backwards * backward_flops(config, tokens, seq_len)
        summary.append(
            {
                "contestant": contestant.name,
                "criterion": contestant.criterion,
                "implementation": contestant.implementation,
                "seconds": seconds["median"],
                "seconds_low": seconds["low"],
                "seconds_high": seconds["high"],
                "coverage": seconds["coverage"],
                "tokens_per_second": tokens / seconds["median"],
                "peak_bytes": statistics.median(row["peak_bytes"] for row in own),
                "flops": flops,
                "peak_fraction": flops / seconds["median"] / peak,
            }
        )
    return summary


def targets(rows: list[dict], summary: list[dict], device: str, correlations: dict[str, float] | None = None) -> list[dict]:
    """Return the project's targets beside what was measured: target, bound, limit, median, low, high, met.

    correlations : criterion -> the lowest rank correlation over layers of the engine's scores with those in float64.
    """
    on_cuda = device.startswith("cuda")
    faster, smaller = (3.0, 0.3) if on_cuda else (2.0, 0.4)
    loop, teacher = "entropy: HFPrune loop", "self_distillation: SDMPrune loop"
    engine, both, taught = "entropy: engine", "one_hot_ce + entropy: engine", "self_distillation: engine"
    ratios = [
        ("entropy, tokens/s: engine against HFPrune loop", ">=", faster, (loop, engine)),
        ("entropy, peak memory: engine against HFPrune loop", "<=", smaller, (f"{engine}, 1 window", loop, "peak_bytes")),
        ("self-distillation, tokens/s: engine against SDMPrune loop", ">=", faster, (teacher, taught)),
        ("CE + entropy in one pass, time against entropy", "<=", 1.6, (both, engine)),
    ]
    found = [(text, bound, limit, ratio_interval(rows, *names)) for text, bound, limit, names in ratios]
    fractions = [row["peak_fraction"] for row in summary if row["contestant"] == engine]
    goal = 0.5 if on_cuda else None
    found.append(("entropy, engine: fraction of the matmul peak", ">=", goal, {"median": fractions[0]} if fractions else None))
    for criterion, correlation in (correlations or {}).items():
        found.append((f"{criterion}, rank correlation with float64, lowest layer", ">=", 0.999, {"median": correlation}))
    return [
        {"target": text, "bound": bound, "limit": limit, **measured, "met": _met(measured["median"], bound, limit)}
        for text, bound, limit, measured in found
        if measured
    ]


def breakdown(run: Callable[[], object], model) -> list[dict]:
    """Return the seconds of one scoring run of `model` by part, as torch's profiler sees its operators: part, seconds, share.

    `forward` is what runs inside the decoder, `head and criterion` what runs outside of it and of the backward pass; of the
    backward pass, what hooks add is `importance`. Time outside operators is Python's and is not counted.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    scopes, decoder = [], model.get_decoder()
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: scopes.append(record_function(_FORWARD).__enter__())),
        decoder.register_forward_hook(lambda *_: scopes.pop().__exit__(None, None, None)),
    ]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    try:
        with profile(activities=activities) as profiler:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    parts = dict.fromkeys(("forward", "head and criterion", "backward", "importance"), 0.0)
    events = [event for event in profiler.events() if event.name.startswith("aten::")]
    on_cuda = any(event.self_device_time_total for event in events)
    for event in events:
        parts[_part(event)] += (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
    total = sum(parts.values())
    return [{"part": part, "seconds": seconds, "share": seconds / total} for part, seconds in parts.items()]


_FORWARD, _BACKWARD = "decoder", "evaluate_function"


def _part(event):
    names = [event.name, *(parent.name for parent in _parents(event))]
    if not any(_BACKWARD in name for name in names):
        return "forward" if _FORWARD in names else "head and criterion"
    innermost = next(name for name in names if not name.startswith("aten::"))
    # Directly below a node of the graph, autograd itself only adds gradients: every other operator there is a hook's.
    is_hook = _BACKWARD in innermost and not {"aten::add", "aten::add_"} & set(names)
    return "importance" if is_hook else "backward"


def _parents(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _met(value, bound, limit):
    if limit is None:
        return None
    return value >= limit if bound == ">=" else value <= limit


def _order_coverage(count, k):
    return 1 - 2 * sum(math.comb(count, index) for index in range(k + 1)) / 2**count if count > 1 else 0.0
