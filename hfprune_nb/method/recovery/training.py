"""Recovery: LoRA or full fine-tuning of a pruned model, and of the dense one as its control, on instruction data.

The trainer is transformers', the adapters are peft's. The loss is a criterion of `criteria`: cross-entropy, or its mix
with the divergence from the dense model (distillation). Its closed-form gradient is taken in chunks of positions, so that
training, like scoring, never holds a (positions, vocabulary) float32 tensor larger than a chunk, and only positions with a label
get logits.

While it runs, the trainer keeps its checkpoint in a scratch folder: trained weights as safetensors, optimizer and random state in
torch's own format, which are local, transient and read with `weights_only`. Results hold safetensors only.
"""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hfprune_nb.errors import UserError
from hfprune_nb.files import claim, load_tensors, save_tensors
from hfprune_nb.inputs import instructions, tokenization
from hfprune_nb.method.recovery.loss import Objective
from hfprune_nb.method.recovery.recipes import Recipe
from hfprune_nb.models import check_tokens, context_length, count_parameters, head, reads_packed, weights_digest
from hfprune_nb.progress import bar

logger = logging.getLogger(__name__)

SAVE_EVERY = 100  # optimizer steps that a kill can lose at most
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")


@dataclasses.dataclass
class Recovered:
    """A tuned model.

    model : a plain model, adapters merged, frozen, in evaluation mode; weights : the tensors that were trained, by name.
    adapters : the peft configuration of the adapters, None after full tuning.
    curve : one row per measurement (step, split `train` or `held_out`, loss in nats per response token; for `train` under
        distillation the mixed loss). facts : recipe, steps, tokens, flops, seconds.
    """

    model: nn.Module
    weights: dict[str, torch.Tensor]
    adapters: dict | None
    curve: pd.DataFrame
    facts: dict

    def save(self, folder: Path) -> None:
        """Write `adapter/`, as peft does, or `weights.safetensors` after full tuning; raise UserError when the disk is full."""
        if self.adapters is None:
            save_tensors(self.weights, Path(folder) / "weights.safetensors")
            return
        target = Path(folder) / "adapter"
        target.mkdir(parents=True, exist_ok=True)
        save_tensors(self.weights, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(self.adapters, indent=1, sort_keys=True))


def recover(
    model,
    tokenizer,
    train: list[instructions.Record],
    held_out: list[instructions.Record],
    chosen: Recipe,
    *,
    bos: bool | str = tokenization.AUTO,
    max_steps: int = 0,
    micro_batch: int = 1,
    teacher=None,
    distillation: float = 0.0,
    temperature: float = 1.0,
    measurements: int = 5,
    seed: int = 0,
    scratch: Path,
    chunk_size: int = 256,
    progress: bool = True,
) -> Recovered:
    """Tune `model` in place on the responses of `train`.

    Parameters
    ----------
    bos : what stands in front of every example, as in `tokenization.prefix`.
    max_steps : optimizer steps; 0 makes the recipe's epochs. The schedule always ends at 0.
    micro_batch : packed rows in one forward pass, a divisor of the recipe's rows per step; results change by float error, and
        where the recipe has dropout by other draws of it, as with another seed.
    teacher, distillation, temperature : the loss is `(1 - distillation) CE + distillation KL(teacher || model)`, with the
        teacher's logits divided by the temperature, as in the criterion `self_distillation`; the teacher is the dense model.
    measurements : how often the loss on `held_out` is measured during training; it is measured before as well.
    scratch : folder for the trainer's checkpoints. What is there is resumed, to the same weights as without an interruption; that
        of another training is refused.

    Examples share rows where `models.reads_packed` says so, otherwise each has one of its own, and a step holds fewer of them.
    Full tuning keeps float32 weights, computes under autocast in the model's dtype, and gives the weights back in that dtype.
    Raises UserError for settings that do not fit each other, and when the loss stops being a number.
    """
    _check(chosen, model, teacher, distillation, micro_batch, max_steps, measurements)
    dtype, started, size = model.dtype, time.perf_counter(), count_parameters(model)
    context = context_length(model.config)
    alone = not (reads_packed(model) and (teacher is None or reads_packed(teacher)))
    if alone:
        logger.warning("every example has a row of its own: %s would read on from one into the next", type(model).__name__)
    rows, held_out_rows = (instructions.pack(tokenizer, side, chosen.seq_len, bos, context, alone) for side in (train, held_out))
    check_tokens(model.config, np.array([max(row.input_ids) for row in rows + held_out_rows]))
    total_steps = max_steps or math.ceil(math.ceil(len(rows) / chosen.rows_per_step) * chosen.epochs)
    settings = dataclasses.asdict(chosen) | {"steps": total_steps, "micro_batch": micro_batch, "distillation": distillation}
    settings |= {"temperature": temperature, "measurements": measurements, "seed": seed, "dtype": str(dtype)}
    claim(Path(scratch), settings | {"model": weights_digest(model), "data": _rows_digest(rows + held_out_rows)})
    # A process-wide generator draws dropout and adapters: the caller's state comes back afterwards.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        set_seed(seed)
        adapted = _add_adapters(model, chosen)
        teachers = (teacher, head(teacher)) if distillation else None
        objective = Objective(model, head(model), teachers, distillation, temperature, chunk_size)
        autocast = not chosen.rank and dtype == torch.bfloat16
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            first = {"step": 0, "split": "held_out", "loss": objective.held_out_loss(held_out_rows, micro_batch)}
        every = max(1, total_steps // measurements)
        arguments = TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=micro_batch,
            max_steps=total_steps,
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            lr_scheduler_type="cosine",
            bf16=autocast,
            eval_strategy="steps",
            eval_steps=every,
            save_steps=min(every, SAVE_EVERY),
            save_total_limit=2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="all",
            remove_unused_columns=False,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type == "cuda",
            disable_tqdm=True,
            report_to="none",
            seed=seed,
        )
        # One notebook trains on one device; more of them are reached by one process each.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        arguments.gradient_accumulation_steps = max(1, chosen.rows_per_step // (micro_batch * arguments.world_size))
        with bar(total_steps, "step", "recovery", enabled=progress) as progress_bar:
            trainer = _Trainer(
                objective,
                arguments,
                data_collator=instructions.collate,
                train_dataset=rows,
                eval_dataset=held_out_rows,
                callbacks=[_Watch(chosen, progress_bar)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=_last_checkpoint(Path(scratch)))
    weights, configuration = _harvest(model, adapted, dtype)
    tokens = int(trainer.state.num_input_tokens_seen)
    facts = {
        "recipe": dataclasses.asdict(chosen),
        "bos": bool(tokenization.prefix(tokenizer, bos)),
        "steps": total_steps,
        "rows": len(rows),
        "packed": not alone,
        "tokens": tokens,
        "share_of_response_tokens": instructions.count_tokens(rows)[1] / instructions.count_tokens(rows)[0],
        "trained_parameters": sum(tensor.numel() for tensor in weights.values()),
        "flops": flops(size, sum(w.numel() for w in weights.values()), tokens, count_parameters(teacher) if distillation else 0),
        "seconds": time.perf_counter() - started,
    }
    return Recovered(model, weights, configuration, _curve(first, trainer.state.log_history), facts)


def flops(parameters: int, trained: int, tokens: int, teacher: int = 0) -> float:
    """Return the floating-point operations of training: `tokens * (4 N + 2 N_trained + 2 N_teacher)`.

    Two per weight and token for each of the forward pass and the gradient of the activations, two more for the gradient of each
    trained weight (so `6 N` for full tuning), two for a teacher's forward pass. Attention scores are left out.
    """
    extra = trained if trained >= parameters else 3 * trained  # adapters come on top of N and are run forward and back as well
    return float(tokens) * (4 * parameters + 2 * extra + 2 * teacher)


def apply(model, folder: Path):
    """Give `model`, in place, what a finished recovery stage learned, and return it frozen and in evaluation mode.

    model : the dense or rebuilt pruned model that was tuned. Raises UserError for weights that are missing, damaged or of another
    model.
    """
    from peft import PeftModel

    folder = Path(folder)
    adapter, full = folder / "adapter", folder / "weights.safetensors"
    load_tensors(adapter / "adapter_model.safetensors" if adapter.is_dir() else full)  # says what is missing or truncated
    try:
        if adapter.is_dir():
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        else:
            model.load_state_dict(load_tensors(full), strict=False)
    except RuntimeError as error:  # what torch raises for other shapes
        raise UserError(f"recovered: {folder.name} does not fit this model: name the recovery of exactly this model.") from error
    return model.eval().requires_grad_(False)


class _Trainer(Trainer):
    """transformers' Trainer, its checkpoints reduced to what is trained, its evaluation to the held-out loss per token."""

    _measured_at = -1

    def evaluate(self, *_, **__):
        if self._measured_at == self.state.global_step:  # the trainer asks once more at the end
            return {}
        self._measured_at = self.state.global_step
        with self.compute_loss_context_manager():
            metrics = {"eval_loss": self.model.held_out_loss(self.eval_dataset, self.args.per_device_train_batch_size)}
        self.log(metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_tensors(_trained(self.model.network), Path(output_dir) / "trained.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.network.load_state_dict(load_tensors(Path(resume_from_checkpoint) / "trained.safetensors"), strict=False)


class _Watch(TrainerCallback):
    """Shows progress and ends a training whose loss is no number any more."""

    def __init__(self, chosen: Recipe, progress_bar):
        self._recipe, self._bar = chosen, progress_bar

    def on_log(self, args, state, control, logs=None, **_):
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(
                    f"recovery diverged: the {name} of step {state.global_step} is {logs[name]}; lower learning_rate "
                    f"({self._recipe.learning_rate:g}) or check the weights that it starts from."
                )
        if "loss" in (logs or {}):
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_step_end(self, args, state, control, **_):
        self._bar.update(state.global_step - self._bar.n)


def _check(chosen, model, teacher, distillation, micro_batch, max_steps, measurements):
    if model.dtype == torch.float16:
        raise UserError("dtype float16 underflows in training: choose bfloat16 or float32.")
    if model.device.type == "cuda" and model.device.index:
        raise UserError(f"device {model.device} is not the first one: set CUDA_VISIBLE_DEVICES to choose the GPU that trains.")
    if micro_batch < 1 or chosen.rows_per_step % micro_batch:
        raise UserError(f"micro_batch {micro_batch} must divide the {chosen.rows_per_step} rows of a step.")
    if max_steps < 0:
        raise UserError(f"max_steps {max_steps} is negative: give the number of steps, or 0 for the recipe's epochs.")
    if measurements < 1:
        raise UserError(f"measurements {measurements} is too small: it must be at least 1.")
    if not 0 <= distillation <= 1:
        raise UserError(f"distillation {distillation} is outside [0, 1]: it is the weight of the divergence against the loss.")
    if distillation and teacher is None:
        raise UserError("distillation needs the dense model as its teacher: give it, or set distillation to 0.")


def _add_adapters(model, chosen: Recipe):
    """Make what is to be trained trainable; return the peft model, or None where every weight is trained."""
    from peft import LoraConfig, get_peft_model

    if not chosen.rank:
        _cast(model, torch.float32)
        model.requires_grad_(True)
        return None
    model.requires_grad_(False)
    present = {name.rpartition(".")[2] for name, module in model.get_decoder().named_modules() if isinstance(module, nn.Linear)}
    configuration = LoraConfig(
        r=chosen.rank,
        lora_alpha=chosen.alpha,
        lora_dropout=chosen.dropout,
        target_modules=[name for name in PROJECTIONS if name in present],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, configuration)


def _cast(model, dtype: torch.dtype) -> None:
    # Parameters only: rotary frequencies are float32 buffers in every model.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _trained(network) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in network.named_parameters() if parameter.requires_grad}


def _harvest(model, adapted, dtype) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Turn the trained model, in place, into a plain one; return the trained weights and the adapters' configuration."""
    from peft import get_peft_model_state_dict

    if adapted is None:
        _cast(model, dtype)
        weights, configuration = _trained(model), None
    else:
        found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        weights = {name: tensor.detach().cpu() for name, tensor in found.items()}
        configuration = json.loads(json.dumps(adapted.peft_config["default"].to_dict(), default=sorted))
        adapted.merge_and_unload()
    model.eval().requires_grad_(False)
    return weights, configuration


def _rows_digest(rows: list[instructions.Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.input_ids)
        digest.update(row.labels)
    return digest.hexdigest()[:16]


def _last_checkpoint(scratch: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and remove any that was not."""
    whole = {}
    for folder in scratch.glob("checkpoint-*"):
        try:
            whole[json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]] = str(folder)
        except (OSError, ValueError, KeyError):  # the trainer writes its state last
            shutil.rmtree(folder)
    return whole[max(whole)] if whole else None


def _curve(first: dict, history: list[dict]) -> pd.DataFrame:
    rows = [first]
    for entry in history:
        for name, split in (("loss", "train"), ("eval_loss", "held_out")):
            if name in entry:
                rows.append({"step": entry["step"], "split": split, "loss": float(entry[name])})
    return pd.DataFrame(rows)
