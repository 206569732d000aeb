"""What share of a model its neurons are, before it is loaded."""

import pytest

from hfprune_nb import models
from hfprune_nb.inputs import shares


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi3"])
def test_the_share_of_neurons_is_that_of_the_model(architecture, tiny, tmp_path):
    model = tiny(architecture)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    neurons = sum(mlp.width * mlp.parameters_per_neuron for mlp in models.gated_mlps(model))
    share = neurons / models.count_parameters(model)
    assert shares.share_of_neurons(str(tmp_path)) == pytest.approx(share)
    assert shares.warning(str(tmp_path), 0.66 * share) is None
    told = shares.warning(str(tmp_path), 0.75 * share)
    assert "is 75% of its MLP neurons" in told and f"half of them go at {share / 2:.2g}" in told
    assert "is more than its MLP neurons are" in shares.warning(str(tmp_path), share + 0.01)


def test_weights_that_are_not_here_have_no_share(tmp_path):
    assert shares.share_of_neurons("nobody/nothing") is None
    assert shares.warning(str(tmp_path), 0.9) is None
