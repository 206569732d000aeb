"""Clocks on the device: what it is still busy with counts."""

import time

import pytest
import torch

from hfprune_nb.cost import generation, published_loops, timing
from hfprune_nb.method import scoring

pytestmark = pytest.mark.cuda

NEW_TOKENS = 5


class Busy:
    """Called, also as a hook, it keeps the device busy; on CUDA it returns at once. `spans` are the device's own seconds."""

    def __init__(self, device: str):
        self.on_cuda, self._marks = device != "cpu", []

    def __call__(self, *_):
        begin = self._mark()
        if self.on_cuda:
            torch.cuda._sleep(50_000_000)  # cycles: some 25 ms at 2 GHz
        else:
            time.sleep(0.02)
        self._marks.append((begin, self._mark()))

    def _mark(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self) -> list[float]:
        if not self.on_cuda:
            return [end - begin for begin, end in self._marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._marks]


def test_a_timed_call_ends_when_the_device_is_done(device):
    busy = Busy(device)
    assert timing.timed(busy, device) >= sum(busy.spans()) > 0.005


def test_generation_is_timed_token_by_token(device, network, record_property):
    model, busy = network(), Busy(device)
    model.get_decoder().register_forward_hook(busy)
    settings = {"prompt_tokens": 16, "new_tokens": NEW_TOKENS, "repetitions": 1, "progress": False}
    (row,) = generation.compare({"dense": model}, [2], **settings)
    record_property("first_token", row["first_token"])
    record_property("per_token", row["per_token"])
    spans = busy.spans()[-NEW_TOKENS:]  # those before are the warm-up's
    assert row["first_token"] >= spans[0] and row["first_token"] + (NEW_TOKENS - 1) * row["per_token"] >= sum(spans) > 0.02
    assert row["tokens_per_second"] == pytest.approx(2 / row["per_token"])


def test_the_profile_of_scoring_names_each_part(network, windows):
    model = network()
    parts = timing.breakdown(lambda: scoring.score(model, windows, ["entropy"], progress=False), model)
    assert all(part["seconds"] > 0 for part in parts) and sum(part["share"] for part in parts) == pytest.approx(1)


def test_every_contestant_of_the_cost_tables_runs(network, windows, device, record_property):
    dtype = "float32" if device == "cpu" else "bfloat16"  # a CPU without bfloat16 units would take minutes
    model, peak = network(dtype), timing.matmul_peak(device, getattr(torch, dtype))[dtype]
    contestants = published_loops.contestants(model, windows[:2]) + published_loops.ablation(model, windows[:2])
    rows = timing.alternate({contestant.name: contestant.run for contestant in contestants}, 1, device, progress=False)
    for row in timing.summarise(rows, contestants, model, windows[:2], peak):
        record_property(row["contestant"], [row["seconds"], row["peak_bytes"]])
        assert row["seconds"] > 0 and row["peak_bytes"] >= 0
