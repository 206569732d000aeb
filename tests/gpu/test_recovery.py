"""Ten steps of recovery on the device."""

import numpy as np
import pytest
import torch

from hfprune_nb import models
from hfprune_nb.inputs.instructions import TEMPLATE, Record
from hfprune_nb.method import recovery

pytestmark = pytest.mark.cuda

RECORDS = [Record(TEMPLATE.format(instruction=f"Double {i}."), f"It is {2 * i}.") for i in range(48)]


@pytest.mark.parametrize("recipe", ["hfprune-lora", "full"])
def test_ten_steps_lower_the_loss_and_can_be_applied_again(recipe, checkpoint, device, tmp_path, record_property):
    dtype = "float32" if device == "cpu" else "bfloat16"  # a CPU without bfloat16 units would take minutes
    model, tokenizer = models.load(checkpoint, dtype, device)
    chosen = recovery.recipe(recipe, learning_rate=2e-3, seq_len=256, rows_per_step=2)
    settings = {"max_steps": 10, "micro_batch": 2, "measurements": 2, "scratch": tmp_path / "scratch", "progress": False}
    found = recovery.recover(model, tokenizer, RECORDS[:40], RECORDS[40:], chosen, **settings)
    losses = found.curve.groupby("split")["loss"].agg(list)
    record_property("held-out loss", losses["held_out"])
    assert len(losses["train"]) == 10 and np.isfinite(found.curve["loss"]).all()
    assert losses["held_out"][-1] < losses["held_out"][0]
    found.save(tmp_path)
    again = recovery.apply(models.load(checkpoint, dtype, device)[0], tmp_path)
    ids = torch.arange(2, 66, device=device)[None]
    with torch.no_grad():
        merged, applied = found.model(ids).logits, again(ids).logits
    assert merged.dtype == getattr(torch, dtype)
    torch.testing.assert_close(applied, merged)
