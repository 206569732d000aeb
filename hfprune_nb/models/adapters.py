"""LoRA adapters given as a model: merged into the model that they were trained on."""

from pathlib import Path

from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub

_CONFIGURATION, _WEIGHTS = hub.ADAPTERS, "adapter_model.safetensors"


def is_adapter(source: str) -> bool:
    """Return whether a model's folder holds adapters; raise UserError where it holds whole weights too."""
    folder = Path(source)
    found = (folder / _CONFIGURATION).is_file()
    if found and (whole := [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        raise UserError(
            f"model '{source}' holds {whole[0].name} and adapters, which may be merged in it or not: remove {_CONFIGURATION} "
            "if they are, else the whole weights."
        )
    return found


def has_tokenizer(source: str) -> bool:
    """Return whether a tokenizer lies beside the adapters."""
    return (Path(source) / "tokenizer_config.json").is_file()


def base(name: str | Path, source: str) -> str:
    """Return the model that the adapters were trained on: a name, or a folder, sought beside the adapters too."""
    if not (found := hub.adapter_base(source)):
        raise UserError(f"model '{name}' holds adapters of no base model: set base_model_name_or_path in {_CONFIGURATION}.")
    return found


def merge(name: str | Path, model, source: str):
    """Return `model` with the adapters in `source` merged into its weights, frozen.

    Raises UserError for adapters that cannot be merged or do not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    file = Path(source) / _WEIGHTS
    if not file.is_file():
        raise UserError(f"model '{name}' is a folder of adapters without {_WEIGHTS}: save them as safetensors.")
    adapted = PeftModel.from_pretrained(model, source)
    if not hasattr(adapted, "merge_and_unload"):
        raise UserError(
            f"model '{name}' holds adapters of type {adapted.active_peft_config.peft_type.value}, which cannot be merged into "
            "weights: give LoRA adapters or a whole model."
        )
    with safe_open(file, framework="pt") as tensors:
        unknown = set(tensors.keys()) ^ set(get_peft_model_state_dict(adapted))
    if unknown:
        raise UserError(
            f"model '{name}': its adapters do not fit {type(model).__name__} ({sorted(unknown)[0]}): name the model that they "
            f"were trained on as base_model_name_or_path in {_CONFIGURATION}."
        )
    merged = adapted.merge_and_unload()
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:  # trained beside the adapters
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
    return merged.eval().requires_grad_(False)
