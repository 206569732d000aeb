"""The harness that computes shared prefixes once, against lm-eval's own model, on the device."""

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hfprune_nb import models
from hfprune_nb.measure.harness import CACHED_TOKENS, SharedPrefixLM

pytestmark = pytest.mark.cuda

EXAMPLES = "".join(f"The opposite of {word} is not {word}. " for word in ("hot", "open", "late", "small", "first", "true"))
QUESTIONS = ("What is the opposite of near?", "Which month has 28 days?", "Why?", "Where does the water of this river go to?")
CHOICES = (" none", " all of them", " the second one, for which there is a reason", " far")


@pytest.mark.parametrize("beginning", ["", EXAMPLES], ids=["apart", "examples"])
def test_log_likelihoods_are_those_of_the_stock_model(beginning, checkpoint, device, record_property):
    model, tokenizer = models.load(checkpoint, device=device)
    assert not beginning or len(tokenizer(beginning)["input_ids"]) > CACHED_TOKENS
    pairs = [(f"{beginning}{question}", choice) for question in QUESTIONS for choice in CHOICES]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    ours = SharedPrefixLM(model, tokenizer, batch_size=3, max_length=512).loglikelihood(requests, disable_tqdm=True)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=3, max_length=512)
    theirs = stock.loglikelihood(requests, disable_tqdm=True)
    error = float(np.abs(np.subtract([value for value, _ in ours], [value for value, _ in theirs])).max())
    record_property("error", error)
    assert error < 1e-3 and [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
