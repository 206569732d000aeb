"""One model on several devices, and several processes that share the windows."""

import pytest
import torch
import torch.multiprocessing

from hfprune_nb import models
from hfprune_nb.method import scoring
from hfprune_nb.method.scoring import distributed

pytestmark = pytest.mark.cuda

CRITERIA = ["entropy", "self_distillation", "wanda"]


@pytest.fixture
def two_devices(device):
    """Skip unless the device is the CPU, which any number of processes share, or there are two of it."""
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("two CUDA devices are needed and there is one")


@pytest.fixture
def expected(checkpoint, device, tokens):
    """The scores of one process on one device."""
    return scoring.score(models.load(checkpoint, device=device)[0], tokens, CRITERIA, progress=False).importance


@pytest.fixture
def tokens(windows):
    """Windows in the vocabulary of the checkpoint."""
    return windows % 256


def assert_equal(found, expected):
    for name in CRITERIA:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4 * max(map(torch.max, expected[name])).item())


def test_two_processes_give_the_scores_of_one(two_devices, checkpoint, device, tokens, expected, tmp_path):
    shared = {"folder": tmp_path, "processes": 2, "device": device, "progress": False}
    assert_equal(distributed.score(checkpoint, tokens, CRITERIA, **shared).importance, expected)


def _member(rank, backend, store, checkpoint, tokens, file):
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    model, _ = models.load(checkpoint, device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    scores = scoring.score(model, tokens, CRITERIA, progress=False)
    if rank == 0:
        scores.save(file)
    torch.distributed.destroy_process_group()


def test_a_group_of_the_users_own_merges_too(two_devices, checkpoint, device, tokens, expected, tmp_path, record_property):
    backend, file = "gloo" if device == "cpu" else "nccl", tmp_path / "scores.safetensors"
    record_property("backend", backend)
    torch.multiprocessing.spawn(_member, (backend, tmp_path / "store", checkpoint, tokens, file), nprocs=2)
    assert_equal({name: scoring.load_importance(file, name) for name in CRITERIA}, expected)


def test_a_model_spread_over_devices_scores_as_on_one(checkpoint, tokens, expected):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two CUDA devices are needed and there are {torch.cuda.device_count()}")
    model, _ = models.load(checkpoint, device="balanced")
    assert len({parameter.device for parameter in model.parameters()}) > 1
    assert_equal(scoring.score(model, tokens, CRITERIA, batch_size=0, progress=False).importance, expected)
