"""Which class loads a checkpoint: transformers' own, or one for layers of different widths."""

from pathlib import Path

from hfprune_nb.models.modeling_per_layer import with_widths


def model_class(source: str | Path, **settings) -> type:
    """Return the class whose `from_pretrained` loads the causal language model `source`, a folder or a hub id.

    settings : those of `AutoConfig.from_pretrained`, such as `revision` and `trust_remote_code`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, **settings)
    varying = config.get_text_config().per_layer_attributes or ()
    if "intermediate_size" in varying and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return with_widths(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return AutoModelForCausalLM
