"""The sentences below the pictures of single runs follow their numbers."""

import numpy as np
import pandas as pd

from hfprune_nb.report import remarks, style


def test_each_sentence_has_the_numbers_of_its_picture():
    assert "Half of the 5 documents are longer than 30 tokens, 3.0 windows" in remarks.lengths(
        pd.Series([10, 20, 30, 40, 50]), 10
    )
    assert remarks.tokens([0.3, 0.5, 0.8, 1.0]).startswith(
        "2 of 4 distinct tokens make up half of the text, the most frequent one 30 %"
    )
    importance = {"entropy": [np.array([1.0, -5.0]), np.array([2.0, 1.0])], "random": [np.ones(2)] * 2}
    assert remarks.layers(importance, style.Legend()) == "Most of its importance has Entropy (HFPrune) layer 1 (75 %)."
    curve = pd.DataFrame({"split": ["held_out", "train", "held_out"], "step": [0, 5, 9], "loss": [2.0, 9.0, 1.5]})
    assert "from 2.000 to 1.500 nats per response token in 9 steps" in remarks.losses(curve)
    windows = pd.DataFrame({"corpus": ["c4", "c4", "wiki"], "nll": [10.0, 20.0, 9.0], "tokens": [10, 10, 3]})
    assert "c4 1.50 ± 0.71, wiki 3.00" in remarks.spread(windows)
    silenced = pd.DataFrame({"layer": [0, 1, 2], "size": [1, 1, 16], "kl": [0.1, 0.3, 9.0]})
    assert (
        remarks.depth(silenced)
        == "The single neuron that counts most is in layer 1, with a KL of 0.3 nats; the median of 2 is 0.2."
    )
