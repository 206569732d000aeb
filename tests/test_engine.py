"""The engine around the scores: batches that do not fit, checkpoints, snapshots, processes, and what may be missing."""

import json
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hfprune_nb import models, processes
from hfprune_nb.errors import UserError
from hfprune_nb.method import scoring
from hfprune_nb.method.scoring import accumulator, backward, distributed, engine
from hfprune_nb.models import loading

THREE = ["one_hot_ce", "entropy", "self_distillation"]
TENTH = [*THREE[:2], {"self_distillation": {"first_stage_ratio": 0.1}}]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_equal_scores(one, other, rtol=2e-4):
    assert one.importance.keys() == other.importance.keys()
    for name, values in one.importance.items():
        torch.testing.assert_close(values, other.importance[name], rtol=rtol, atol=1e-7)


def failing_above(size, error, monkeypatch):
    """Let every batch of more than `size` windows raise, after the forward pass; return the sizes that were tried."""
    tried, original = [], backward._Vocabulary.__call__

    def attempt(self, batch, *rest):
        tried.append(len(batch))
        if len(batch) > size:
            raise error
        return original(self, batch, *rest)

    monkeypatch.setattr(backward._Vocabulary, "__call__", attempt)
    return tried


# Batches


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("batch_size", [0, 7])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_counted_twice(error, batch_size, tiny, token_windows, monkeypatch):
    undisturbed = scoring.score(tiny("llama"), token_windows, THREE, batch_size=3, progress=False)
    tried = failing_above(2, error, monkeypatch)
    model = tiny("llama")
    scores = scoring.score(model, token_windows, THREE, batch_size=batch_size, progress=False)
    assert max(tried) > 2 and scores.batch_size <= 2
    assert_equal_scores(scores, undisturbed)
    assert scores.mean_value == pytest.approx(undisturbed.mean_value, rel=1e-5)
    assert not any(mlp.down._forward_pre_hooks or mlp.up._forward_hooks for mlp in models.gated_mlps(model))


def test_a_batch_that_failed_in_its_backward_leaves_nothing_in_memory(tiny, token_windows, monkeypatch):
    original_sum, original_factored, alive = backward.REDUCTIONS["absolute"], backward.factored, []

    def failing(hidden, gradient):
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(hidden) == 2:
            assert not [seen for seen in alive if seen() is not None and len(seen()) > 2]
        return original_sum(hidden, gradient)

    def watching(model, replace):
        def remember(layer, hidden):
            hidden = replace(layer, hidden)
            alive.append(weakref.ref(hidden))
            return hidden

        return original_factored(model, remember)

    monkeypatch.setitem(backward.REDUCTIONS, "absolute", failing)
    monkeypatch.setattr(backward, "factored", watching)
    assert scoring.score(tiny("llama"), token_windows, ["entropy"], batch_size=4, progress=False).batch_size == 2
    assert len(alive) > 3


def test_one_window_that_does_not_fit_is_told(tiny, token_windows, monkeypatch):
    failing_above(0, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    with pytest.raises(UserError, match="a single window does not fit"):
        scoring.score(tiny("llama"), token_windows, ["entropy"], progress=False)


def test_a_model_that_is_being_trained_scores_like_a_frozen_one_and_stays_as_it_was(tiny, token_windows):
    expected = scoring.score(tiny("llama"), token_windows, THREE, progress=False)
    model = tiny("llama").train().requires_grad_(True)
    assert_equal_scores(scoring.score(model, token_windows, THREE, progress=False), expected)
    assert model.training and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.enable_input_require_grads()  # as training with adapters or checkpointing does
    assert_equal_scores(scoring.score(model, token_windows, THREE, progress=False), expected)
    assert model.model.embed_tokens(torch.tensor([1])).requires_grad, "it goes on being trained as before"
    with pytest.raises(UserError, match="windows: token id -100 is no token"):
        scoring.score(model, np.where(token_windows == token_windows.max(), -100, token_windows), THREE, progress=False)


def test_another_error_is_not_taken_for_a_full_memory(tiny, token_windows, monkeypatch):
    tried = failing_above(0, RuntimeError("shapes do not fit"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        scoring.score(tiny("llama"), token_windows, ["entropy"], progress=False)
    assert tried == [4]


def test_the_automatic_batch_of_the_cpu_follows_from_shapes_alone(tiny, monkeypatch, caplog):
    caplog.set_level("INFO", logger=scoring.__name__)
    monkeypatch.setattr(engine, "CPU_TOKENS", 50)
    windows = np.random.default_rng(1).integers(0, 61, (9, 12))
    tried = failing_above(99, None, monkeypatch)
    scores = scoring.score(tiny("llama"), windows, ["entropy"], batch_size=0, progress=False)
    assert tried == [4, 4, 1] and scores.batch_size == 4
    assert [record.getMessage() for record in caplog.records] == ["scoring takes 4 windows of 12 tokens in a batch"]


@pytest.mark.parametrize(("free", "expected"), [(800, 2), (100, 1), (10**9, 8)])
def test_the_batch_of_a_gpu_is_what_the_first_window_shows_to_fit(free, expected, tiny, monkeypatch):
    """The first window takes 250 bytes; four fifths of free memory, a power of two, never more than fills the device."""
    monkeypatch.setattr(engine, "CUDA_TOKENS", 120)
    for name, value in {"max_memory_allocated": 350, "memory_reserved": 150, "memory_allocated": 100}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 50, 0))
    scoring_pass = engine._Pass(tiny("llama"), np.zeros((9, 12)), {}, batch_size=0, checkpoint=None, checkpoint_every=1)
    assert scoring_pass._fitting_size({0: 100}) == expected


# The teacher of self-distillation


def computed_batches(monkeypatch):
    """Return a list that fills with the windows whose teacher, given to the reader as None, had to be computed."""
    computed, original = [], backward.Reader.__call__

    def call(self, windows, numbers, teacher_hidden=None):
        if self.student is not None and teacher_hidden is None:
            computed.append(len(windows))
        return original(self, windows, numbers, teacher_hidden)

    monkeypatch.setattr(backward.Reader, "__call__", call)
    return computed


def bytes_of(scores, folder):
    scores.save(folder / "scores.safetensors")
    scores.save_snapshots(folder / "snapshots.safetensors")
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("scores", "snapshots")]


@pytest.mark.parametrize(
    ("aggregation", "settings"), [("activation", {}), ("activation", {"activation_checkpointing": True}), ("weight", {})], ids=str
)
@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "bfloat16"), ("phi3", "float32"), ("gemma", "bfloat16")])
def test_a_teacher_that_was_kept_is_the_one_that_would_be_computed(
    architecture, dtype, aggregation, settings, tiny, token_windows, tmp_path, monkeypatch
):
    model, settings = tiny(architecture, dtype=dtype), {"batch_size": 4, "progress": False} | settings
    computed, criteria = computed_batches(monkeypatch), [{name: {"aggregation": aggregation}} for name in THREE]
    kept = scoring.score(model, token_windows, criteria, **settings)
    assert computed == []
    monkeypatch.setattr(engine, "TEACHER_BYTES", 0)
    again = scoring.score(model, token_windows, criteria, **settings)
    assert sum(computed) == 9
    assert bytes_of(again, tmp_path) == bytes_of(kept, tmp_path)
    assert (again.tokens, again.mean_value) == (kept.tokens, kept.mean_value)


def test_no_more_of_the_teacher_is_kept_than_the_limit(tiny, token_windows, tmp_path, monkeypatch):
    """A batch of two windows takes 2 * 12 * 16 float32 numbers: two of them fit, the third and fourth do not, the last does."""
    settings = {"batch_size": 2, "progress": False}
    whole = scoring.score(tiny("llama"), token_windows, THREE, **settings)
    held, keep = [], engine._Teacher.keep

    def watched(self, places, hidden):
        keep(self, places, hidden)
        held.append(sum(states.untyped_storage().nbytes() for states in self.states.values()))

    monkeypatch.setattr(engine._Teacher, "keep", watched)
    monkeypatch.setattr(engine, "TEACHER_BYTES", 5 * 12 * 16 * 4)
    computed = computed_batches(monkeypatch)
    limited = scoring.score(tiny("llama"), token_windows, THREE, **settings)
    window = 12 * 16 * 4
    assert held == [2 * window, 4 * window, 4 * window, 4 * window, 5 * window] and computed == [2, 2]
    assert bytes_of(limited, tmp_path) == bytes_of(whole, tmp_path)


def test_nothing_is_kept_where_no_criterion_has_a_teacher(tiny, token_windows, monkeypatch):
    teachers, original = [], engine._Teacher.__init__
    monkeypatch.setattr(engine._Teacher, "__init__", lambda self, limit: teachers.append(self) or original(self, limit))
    scoring.score(tiny("llama"), token_windows, ["one_hot_ce", "entropy", "magnitude"], progress=False)
    assert [teacher.states for teacher in teachers] == [{}]
    scoring.score(tiny("llama"), token_windows, THREE, progress=False)
    assert [teacher.states for teacher in teachers] == [{}, {}], "what was used up is still held"


def test_the_teacher_of_a_batch_that_was_halved_is_computed_for_the_halves(tiny, token_windows, tmp_path, monkeypatch):
    """The student, which needs more memory, does not fit in the dense model's batches."""
    settings = {"batch_size": 4, "progress": False}
    computed, original = computed_batches(monkeypatch), backward._Vocabulary.__call__

    def attempt(self, batch, hidden, numbers, teacher_hidden):
        if teacher_hidden is not None and len(batch) > 2:
            raise MemoryError
        return original(self, batch, hidden, numbers, teacher_hidden)

    monkeypatch.setattr(backward._Vocabulary, "__call__", attempt)
    kept = scoring.score(tiny("llama"), token_windows, THREE, **settings)
    assert kept.batch_size == 2 and computed == [2, 2, 2, 2], "only the last batch, of one window, is as it was"
    monkeypatch.setattr(engine, "TEACHER_BYTES", 0)
    assert bytes_of(scoring.score(tiny("llama"), token_windows, THREE, **settings), tmp_path) == bytes_of(kept, tmp_path)


def test_batches_that_the_first_window_decides_are_the_same_in_both_stages(tiny, token_windows, monkeypatch):
    """As on a GPU, where the first window is scored alone and shows how many fit."""
    monkeypatch.setattr(engine._Pass, "_first_size", lambda self: 1)
    monkeypatch.setattr(engine._Pass, "_fitting_size", lambda self, before: 4)
    original = engine._Pass.__init__

    def on_gpu(self, *arguments, **settings):
        original(self, *arguments, **settings)
        self.gpus = {"a GPU"}

    monkeypatch.setattr(engine._Pass, "__init__", on_gpu)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    tried, computed = failing_above(99, None, monkeypatch), computed_batches(monkeypatch)
    scores = scoring.score(tiny("llama"), token_windows, THREE, batch_size=0, progress=False)
    assert tried == [1, 4, 4] * 2 and computed == [] and scores.batch_size == 4


@pytest.mark.parametrize(("criteria", "counted"), [(["entropy"], 108), (["self_distillation"], 108), (["magnitude"], 0)])
def test_each_calibration_token_is_counted_once(criteria, counted, tiny, token_windows):
    assert scoring.score(tiny("llama"), token_windows, criteria, progress=False).tokens == counted


# Activation checkpointing, compilation


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "phi3"])
def test_layers_computed_twice_give_the_same_scores(architecture, tiny, token_windows):
    model = tiny(architecture, dtype="float64")
    plain = scoring.score(model, token_windows, THREE, progress=False)
    again = scoring.score(model, token_windows, THREE, activation_checkpointing=True, progress=False)
    assert_equal_scores(again, plain, rtol=1e-9)
    assert all(not layer._forward_pre_hooks and not layer._forward_hooks for layer in model.get_decoder().layers)


def most_held(model, windows, **settings):
    """Bytes that autograd holds for backward passes, at their most."""
    held, most = weakref.WeakSet(), 0

    class Saved:
        def __init__(self, tensor):
            nonlocal most
            self.tensor = tensor
            held.add(self)
            most = max(most, sum(saved.tensor.nbytes for saved in held))

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Saved(tensor.detach()), lambda saved: saved.tensor):
        scoring.score(model, windows, ["entropy"], progress=False, **settings)
    return most


def test_layers_computed_twice_hold_the_activations_of_one(tiny, token_windows, monkeypatch):
    monkeypatch.setattr(engine, "check_recomputation", lambda model: None)  # a probe of the whole model, on few tokens
    model = tiny("llama", num_hidden_layers=6)
    assert most_held(model, token_windows, activation_checkpointing=True) < most_held(model, token_windows) / 4


def test_compilation_is_asked_for_criteria_and_sums_only_when_wanted(tiny, token_windows, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or function)
    plain = scoring.score(tiny("llama"), token_windows, ["entropy", "one_hot_ce"], progress=False)
    assert compiled == []
    again = scoring.score(tiny("llama"), token_windows, ["entropy", "one_hot_ce"], compile=True, progress=False)
    assert compiled.count("value_and_gradient") == 2 and "_absolute" in compiled
    assert_equal_scores(again, plain, rtol=0)


# Snapshots


def test_a_snapshot_is_the_importance_of_the_first_windows(tiny, token_windows, tmp_path):
    model = tiny("llama")
    scores = scoring.score(model, token_windows, ["entropy", "one_hot_ce", "magnitude"], batch_size=7, progress=False)
    assert list(scores.snapshots) == [1, 2, 4, 8, 9]
    for n, found in scores.snapshots.items():
        alone = scoring.score(model, token_windows[:n], ["entropy", "one_hot_ce"], progress=False)
        assert found.keys() == {"entropy", "one_hot_ce"}
        for name, values in found.items():
            torch.testing.assert_close(values, alone.importance[name], rtol=2e-4, atol=1e-7)
    assert equal(scores.snapshots[9]["entropy"], scores.importance["entropy"])
    scores.save_snapshots(tmp_path / "snapshots.safetensors")
    again = scoring.load_snapshots(tmp_path / "snapshots.safetensors")
    assert list(again) == list(scores.snapshots)
    assert all(equal(values, again[n][name]) for n, found in scores.snapshots.items() for name, values in found.items())


def test_snapshots_of_self_distillation_have_the_student_of_the_full_first_stage(tiny, token_windows):
    scores = scoring.score(tiny("llama"), token_windows, TENTH, progress=False)
    removed = [
        {(layer, neuron) for layer, row in enumerate(found["self_distillation"]) for neuron in (row < 0).nonzero()[:, 0].tolist()}
        for found in scores.snapshots.values()
    ]
    assert all(removed) and len(set(map(frozenset, removed))) == 1
    assert equal(scores.snapshots[9]["self_distillation"], scores.importance["self_distillation"])


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])
def test_snapshots_are_at_powers_of_two_and_the_total(count, expected):
    assert accumulator.snapshot_counts(count) == expected


# Checkpoints


class Killed(BaseException):
    """What stands for a killed process."""


def stop_after(count, monkeypatch):
    """Let the engine be killed when it has added `count` batches; return the real method."""
    original, calls = accumulator.Accumulator.add, []

    def add(self, *arguments):
        if len(calls) == count:
            raise Killed
        calls.append(None)
        original(self, *arguments)

    monkeypatch.setattr(accumulator.Accumulator, "add", add)
    return original


@pytest.mark.parametrize("after", [0, 3, 5, 8])
def test_a_resumed_run_gives_the_same_bytes(after, tiny, token_windows, tmp_path, monkeypatch):
    """Five batches in each of two passes: it is killed before the first checkpoint, in the first pass, between, in the second."""
    settings = {"batch_size": 2, "checkpoint_every": 2, "progress": False}
    scoring.score(tiny("llama"), token_windows, TENTH, **settings).save(tmp_path / "whole.safetensors")
    original = stop_after(after, monkeypatch)
    with pytest.raises(Killed):
        scoring.score(tiny("llama"), token_windows, TENTH, checkpoint=tmp_path / "checkpoint", **settings)
    added = []
    monkeypatch.setattr(accumulator.Accumulator, "add", lambda self, *rest: added.append(None) or original(self, *rest))
    resumed = scoring.score(tiny("llama"), token_windows, TENTH, checkpoint=tmp_path / "checkpoint", **settings)
    resumed.save(tmp_path / "resumed.safetensors")
    resumed.save_snapshots(tmp_path / "snapshots.safetensors")
    assert len(added) == 10 - after, "a batch was computed again"
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list((tmp_path / "checkpoint").glob("*.partial"))


def test_sums_are_saved_by_the_clock_where_windows_are_few(tiny, token_windows, tmp_path, monkeypatch):
    """A default scoring has fewer windows than `checkpoint_every`, and would lose all that it did to an interrupt."""
    settings = {"batch_size": 2, "progress": False}
    whole = scoring.score(tiny("llama"), token_windows, ["entropy"], **settings)
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0.0)
    original = stop_after(3, monkeypatch)
    with pytest.raises(Killed):
        scoring.score(tiny("llama"), token_windows, ["entropy"], checkpoint=tmp_path, **settings)
    added = []
    monkeypatch.setattr(accumulator.Accumulator, "add", lambda self, *rest: added.append(None) or original(self, *rest))
    found = scoring.score(tiny("llama"), token_windows, ["entropy"], checkpoint=tmp_path, **settings)
    assert len(added) == 2, "a batch was computed again"
    assert all(torch.equal(*rows) for rows in zip(found.importance["entropy"], whole.importance["entropy"], strict=True))
    monkeypatch.setattr(accumulator.Accumulator, "save", lambda self, *_: saved.append(self.done))
    saved = []
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 60.0)
    scoring.score(tiny("llama"), token_windows, ["entropy"], checkpoint=tmp_path / "quick", **settings)
    assert saved == [9], "nothing but the end is worth a file in a run of seconds"


def test_a_batch_size_that_shrank_is_remembered(tiny, token_windows, tmp_path, monkeypatch):
    settings = {"batch_size": 8, "checkpoint": tmp_path, "checkpoint_every": 1, "progress": False}
    failing_above(2, MemoryError(), monkeypatch)
    original = stop_after(1, monkeypatch)
    with pytest.raises(Killed):
        scoring.score(tiny("llama"), token_windows, ["entropy"], **settings)
    monkeypatch.setattr(accumulator.Accumulator, "add", original)
    tried = failing_above(99, None, monkeypatch)
    assert scoring.score(tiny("llama"), token_windows, ["entropy"], **settings).batch_size == 2
    assert tried == [2, 2, 2, 1]


@pytest.mark.parametrize("other", ["windows", "model", "criterion", "chunk", "damaged"])
def test_a_checkpoint_of_another_run_is_ignored(other, tiny, token_windows, tmp_path):
    settings = {"batch_size": 2, "progress": False}
    scoring.score(tiny("llama"), token_windows, ["entropy"], checkpoint=tmp_path, **settings)
    model, windows, criteria = tiny("llama"), token_windows.copy(), ["entropy"]
    if other == "windows":
        windows[0, 0] += 1
    elif other == "model":
        models.gated_mlps(model)[0].down.weight.data[0, 0] += 1
    elif other == "criterion":
        criteria = ["one_hot_ce"]
    elif other == "chunk":
        settings["chunk_size"] = 5
    else:
        file = next(tmp_path.iterdir())
        file.write_bytes(file.read_bytes()[:-8])
    expected = scoring.score(model, windows, criteria, **settings)
    found = scoring.score(model, windows, criteria, checkpoint=tmp_path, **settings)
    assert all(equal(values, found.importance[name]) for name, values in expected.importance.items())


# Processes


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_two_processes_give_the_scores_of_one(one_thread, token_windows, tmp_path):
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 2, "progress": False}
    one = distributed.score(models.TINY, token_windows, TENTH, folder=tmp_path / "one", **settings)
    two = distributed.score(models.TINY, token_windows, TENTH, folder=tmp_path / "two", processes=2, **settings)
    assert_equal_scores(two, one)
    assert two.tokens == one.tokens and two.mean_value == pytest.approx(one.mean_value, rel=1e-5)
    assert list(two.snapshots) == list(one.snapshots)
    for n, found in one.snapshots.items():
        for name, values in found.items():
            torch.testing.assert_close(two.snapshots[n][name], values, rtol=2e-4, atol=1e-7)
    files = {path.name for path in (tmp_path / "two" / "checkpoint").iterdir()}
    assert files == {f"{name}.{rank}of2.safetensors" for name in ("dense", "student.activation.0.1") for rank in (0, 1)}


def write_request(folder, windows, criteria):
    save_file({"windows": torch.as_tensor(windows)}, folder / "windows.safetensors")
    model = {"name": models.TINY, "dtype": "float32", "device": "cpu"}
    request = {"model": model, "criteria": criteria, "settings": {"progress": False}}
    (folder / "request.json").write_text(json.dumps(request))


@pytest.fixture
def alone_in_a_group(monkeypatch):
    """What torch.distributed.run sets for the only process of a group."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_process_leaves_its_reason_when_it_fails(alone_in_a_group, token_windows, tmp_path):
    write_request(tmp_path, token_windows, ["entropie"])
    with pytest.raises(UserError):
        distributed.main([str(tmp_path)])
    assert (tmp_path / "error.0.txt").read_text().startswith("criterion 'entropie' is unknown")


@pytest.mark.parametrize("reason", ["no memory left", None])
def test_a_process_that_fails_is_told_in_one_sentence(reason, token_windows, tmp_path, monkeypatch):
    def run(command):
        if reason:
            (tmp_path / "error.1.txt").write_text(reason)
        return 1, "Traceback\nSignal 9 (SIGKILL) received\n=====\n"

    monkeypatch.setattr(processes, "_run", run)
    words = "process 1 of 2 failed.*no memory left" if reason else "a process of 2 failed.*SIGKILL"
    with pytest.raises(UserError, match=words) as caught:
        distributed.score(models.TINY, token_windows, ["entropy"], folder=tmp_path, processes=2, device="cpu", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"processes": 10}, "processes 10 is outside 1 to 9"),
        ({"processes": 2, "device": "balanced"}, "device 'balanced' is one place"),
    ],
)
def test_processes_that_cannot_be_started_are_refused(settings, words, token_windows, tmp_path):
    with pytest.raises(UserError, match=words):
        distributed.score(models.TINY, token_windows, ["entropy"], folder=tmp_path, **settings)


# The package alone

BLOCKED = (
    "datasets",
    "lm_eval",
    "papermill",
    "pandas",
    "requests",
    "pypi_simple",
    "tenacity",
    "pyarrow",
    "matplotlib",
    "peft",
    "trl",
)


def test_scoring_needs_only_torch_and_transformers(tmp_path):
    """`hfprune cost` runs from the package alone: a model made here is loaded by its folder and scored."""
    folder = loading._source(models.TINY)
    code = f"""
import json, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import numpy
from hfprune_nb import models
from hfprune_nb.method import scoring
from hfprune_nb.method.scoring import distributed as shards
model, _ = models.load({folder!r}, device="cpu")
windows = numpy.random.default_rng(0).integers(0, 384, (2, 8))
print(json.dumps([models.aliases(), scoring.score(model, windows, ["entropy"], progress=False).tokens]))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [[models.TINY], 16]
