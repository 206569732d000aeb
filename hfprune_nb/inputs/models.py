"""Causal language models by alias, hub id or folder, and the gated MLPs inside them."""

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from hfprune_nb import paths
from hfprune_nb.errors import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
TINY = "tiny-random-llama"
_TILE = 2048  # rows of a half-precision head that are float32 at once on the CPU: such a tile stays in its cache
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
    from transformers import AutoModelForCausalLM

    placement = {"device_map": "auto"} if device == "balanced" else {}
    with _one_sentence(name):
        model = AutoModelForCausalLM.from_pretrained(
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


def tokenizer(name: str, trust_remote_code: bool = False):
    """Load only the tokenizer of a model; `name` as in `load`."""
    return _load_tokenizer(name, _source(name), trust_remote_code)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, a tensor shared by two modules (tied embeddings) counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


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


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """One layer's gated MLP, `h = act(gate x) * up x`, `output = down h`, with h of shape (batch, seq, intermediate_size).

    `gate` and `up` are separate linear modules, or both None where `fused` holds their rows one after the other (Phi-3).
    """

    layer: int
    down: nn.Linear
    gate: nn.Linear | None = None
    up: nn.Linear | None = None
    fused: nn.Linear | None = None

    @property
    def width(self) -> int:
        """Number of neurons (intermediate_size)."""
        return self.down.in_features

    @property
    def inputs(self) -> list[nn.Linear]:
        """The linear modules whose rows produce h."""
        return [self.fused] if self.fused is not None else [self.gate, self.up]

    @property
    def parameters_per_neuron(self) -> int:
        """Parameters that go when one neuron is removed: its rows, their biases, and its column of `down`."""
        rows = sum(module.in_features + (module.bias is not None) for module in self.inputs)
        return rows * (2 if self.fused is not None else 1) + self.down.out_features


def gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """Return the gated MLP of every decoder layer, first to last; raise UserError naming what was looked for otherwise."""
    layers = getattr(model.get_decoder(), "layers", None)
    architecture = type(model).__name__
    if not layers:
        raise UserError(f"model: {architecture} is not supported: no `layers` list was found in its decoder.")
    found = []
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        parts = {name: getattr(mlp, name, None) for name in ("down_proj", "gate_proj", "up_proj", "gate_up_proj")}
        linear = {name for name, module in parts.items() if isinstance(module, nn.Linear)}
        if {"down_proj", "gate_proj", "up_proj"} <= linear:
            found.append(GatedMLP(index, parts["down_proj"], gate=parts["gate_proj"], up=parts["up_proj"]))
        elif {"down_proj", "gate_up_proj"} <= linear:
            found.append(GatedMLP(index, parts["down_proj"], fused=parts["gate_up_proj"]))
        else:
            raise UserError(
                f"model: {architecture} is not supported: layer {index} has no gated MLP (looked for linear modules "
                "`mlp.down_proj` with `mlp.gate_proj` and `mlp.up_proj`, or with a fused `mlp.gate_up_proj`)."
            )
    return found


@dataclasses.dataclass(frozen=True)
class Head:
    """The map from final hidden states to float32 logits of one model, with the model's own logit scaling and capping."""

    module: nn.Linear
    multiplier: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (vocabulary, hidden), in the dtype of the model."""
        return self.module.weight

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (positions, vocabulary) of final hidden states (positions, hidden), in float32 or wider.

        Half-precision inputs are multiplied exactly and summed in float32. out : memory for them where no
        gradient is asked for, of that dtype and shape.
        """
        hidden = hidden.to(self.weight.device)
        if self.weight.dtype in (torch.float32, torch.float64):
            scores = torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=out)
        elif torch.is_grad_enabled() and hidden.requires_grad:
            scores = torch.mm(hidden.float(), self.weight.float().t())
        elif hidden.is_cuda and hidden.dtype == self.weight.dtype:
            scores = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
        else:
            scores = self._logits_in_tiles(hidden, out)
        if self.module.bias is not None:
            scores = scores + self.module.bias
        if self.multiplier != 1:
            scores = scores * self.multiplier
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def _logits_in_tiles(self, hidden, out):
        """Multiply as on CUDA, one small float32 tile of the head after the other: no float32 copy of the head."""
        scores = hidden.new_empty(len(hidden), len(self.weight), dtype=torch.float32) if out is None else out
        wide, tile = hidden.float(), self.weight.new_empty(_TILE, self.weight.shape[1], dtype=torch.float32)
        with matmul_precision(torch.promote_types(hidden.dtype, self.weight.dtype)):
            for start in range(0, len(self.weight), _TILE):
                rows = self.weight[start : start + _TILE]
                torch.mm(wide, tile[: len(rows)].copy_(rows).t(), out=scores[:, start : start + _TILE])
        return scores

    def hidden_gradient(self, logits: torch.Tensor, logit_gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (positions, hidden) for the hidden states, given `logits` and the gradient for them."""
        return torch.mm(self.product_gradient(logits, logit_gradient).to(self.weight.dtype), self.weight)

    def product_gradient(self, logits: torch.Tensor, logit_gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (positions, vocabulary) for the plain product with the head, before scaling and capping."""
        if self.softcap:
            logit_gradient = logit_gradient * (1 - (logits / self.softcap) ** 2)
        return logit_gradient * self.multiplier if self.multiplier != 1 else logit_gradient


@contextlib.contextmanager
def matmul_precision(dtype: torch.dtype):
    """Within the context, products of float32 tensors on the CPU are exact for values that `dtype` can hold.

    Of bfloat16 values nothing is lost when products take bfloat16 inputs, and the CPU's bfloat16 unit sums in float32: the same
    logits 2.4 times as fast. A CPU without that unit ignores the setting.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def head(model: nn.Module) -> Head:
    """Return the language-model head of `model`; raise UserError for a model that treats its logits in a way unknown here."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    multiplier = 1.0
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        multiplier /= scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        multiplier *= scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    found = Head(module, multiplier, softcap)
    probe = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        expected, hidden = _logits_and_final_hidden(model, probe)
        actual = found.logits(hidden[0]).float()
    expected = expected[0].float()
    if (actual.to(expected.device) - expected).abs().max() > 0.03 * expected.abs().max():
        raise UserError(
            f"model: {type(model).__name__} is not supported: it changes its logits after `lm_head` in an unknown way."
        )
    return found


def _logits_and_final_hidden(model, token_ids):
    """Return the logits of the model's own forward pass and the hidden states that its head saw, in one reading."""
    seen = []
    handle = model.get_decoder().register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        return model(input_ids=token_ids, use_cache=False).logits, seen[0]
    finally:
        handle.remove()


def final_hidden(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden states (batch, seq, hidden) that enter the language-model head, of token_ids (batch, seq)."""
    return model.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state


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
    if name.endswith(".gguf"):
        parent, _, file = name.rpartition("/")
        local = Path(name).expanduser()
        state = f"{local.resolve()}:{local.stat().st_size}:{local.stat().st_mtime_ns}" if local.is_file() else name
        key = f"{local.stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
        with _one_sentence(name):
            return str(_cached(key, lambda folder: _convert_gguf(parent or ".", file, folder, False)))
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


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

    with _one_sentence(name):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


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
