"""Peak memory of a run, on the CPU and on CUDA."""

import contextlib
import ctypes
import gc
import multiprocessing
import re
import resource
import sys
from pathlib import Path

import torch

from hfprune_nb.errors import UserError

_CLEAR = Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peak_memory(device):
    """Yield a dict that holds at the end `peak`: bytes in use at the worst moment beyond those in use at the beginning."""
    found, on_cuda = {}, device.startswith("cuda")
    gc.collect()
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif device:
        _return_free_memory()
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
    yield found
    if on_cuda:
        found["peak"] = torch.cuda.max_memory_allocated(device) - before
    elif device:
        found["peak"] = _resident("VmHWM") - before


def resets_high_water() -> bool:
    """Return whether this system lets a process reset its own memory high-water mark."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(name):
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE).group(1))


def _return_free_memory():
    # What the allocator keeps of earlier runs would hide what the next one needs. Other C libraries than glibc lack the call.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_in_fork(run):
    """Return the bytes by which resident memory rises in a forked process that calls `run` with one thread."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_report_rise, args=(run, results))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"memory: a forked process could not repeat the run (exit {process.exitcode}); measure on Linux or CUDA.")
    return results.get()


def _report_rise(run, results):
    torch.set_num_threads(1)  # the threads of the parent do not exist here
    before = _high_water()
    run()
    results.put(_high_water() - before)


def _high_water():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
