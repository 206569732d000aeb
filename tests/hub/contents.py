"""Tiny models and made-up records in the layouts of the real repositories, for `server.Hub`."""

import functools
import gzip
import io
import json
import random
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

GATED = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B")
OPEN = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-1.7B")
MEMBER, STRANGER, WRONG = "hf_member", "hf_stranger", "hf_wrong"
SHARDS = {"train": 1024, "validation": 8}
IN_A_SHARD = 24  # documents
SYLLABLES = [first + second for first in "bdfgklmnprstv" for second in "aeiou"]
CHOICES = "ABCD"


def text(rng, words):
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words))


def parquet(rows):
    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    return target.getvalue()


def card(configurations):
    """A README whose header names the files of every split of every configuration."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configurations.items()
    ]
    return f"---\nconfigs: {json.dumps(listed)}\n---\n\nMade up.\n".encode()


def folder_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def tokenizer(bos):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin|>", "<|end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    rng = random.Random(0)
    bpe.train_from_iterator([text(rng, 100) for _ in range(50)], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B:1", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", **({"bos_token": "<|begin|>"} if bos else {}))


def model(name, seed=0):
    """Files of a tiny random model of the named one's family, its weights in two shards."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    kind = LlamaConfig if "llama" in name else Qwen3Config if "Qwen3" in name else Qwen2Config
    sizes = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(kind(**sizes)).bfloat16().save_pretrained(folder, max_shard_size="50KB")
        tokenizer(bos="llama" in name).save_pretrained(folder)
        return folder_files(folder) | {"README.md": b"---\nlicense: other\n---\n", "original/consolidated.00.pth": b"pickle"}


def c4():
    """The layout of allenai/c4: gzipped JSON lines in many shards, and configurations besides `en`."""
    files = {}
    for split, count in SHARDS.items():
        for number in range(count):
            rng = random.Random(f"{split} {number}")
            lengths = [int(min(max(rng.lognormvariate(4.4, 0.9), 8), 600)) for _ in range(IN_A_SHARD)]
            lines = [{"text": f"{split} {number} {text(rng, length)}", "timestamp": "", "url": ""} for length in lengths]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            files[f"en/c4-{split}.{number:05d}-of-{count:05d}.json.gz"] = gzip.compress(content, 1, mtime=0)
    pattern = {name: {split: f"{name}/c4-{split}.*.json.gz" for split in SHARDS} for name in ("en", "realnewslike", "af")}
    return files | {"README.md": card(pattern)}


def table(configurations, splits, row, folder=""):
    """A data set of one parquet file a split; `row` makes a record from its random numbers and its number."""
    files, named = {}, {}
    for name in configurations:
        where = folder or name
        named[name] = {split: f"{where}/{split}-*" for split in splits}
        for split in splits:
            rng = random.Random(f"{name} {split}")
            files[f"{where}/{split}-00000-of-00001.parquet"] = parquet([row(rng, number) for number in range(6)])
    return files | {"README.md": card(named)}


def _lettered(rng):
    return {"choices": {"text": [text(rng, 3) for _ in CHOICES], "label": list(CHOICES)}, "answerKey": rng.choice(CHOICES)}


def _arc(rng, number):
    return {"id": f"Q{number}", "question": text(rng, 8), **_lettered(rng)}


def _boolq(rng, number):
    return {"question": text(rng, 6), "passage": text(rng, 20), "idx": number, "label": number % 2}


def _crows(rng, number):
    sentences = {"sent_more": text(rng, 8), "sent_less": text(rng, 8)}
    return {"id": number, **sentences, "stereo_antistereo": number % 2, "bias_type": "age"}


def _openbookqa(rng, number):
    return {"id": str(number), "question_stem": text(rng, 6), **_lettered(rng)}


def _piqa(rng, number):
    return {"goal": text(rng, 6), "sol1": text(rng, 6), "sol2": text(rng, 6), "label": number % 2}


def _race(rng, number):
    problems = [
        {"question": text(rng, 6) + " _ .", "answer": rng.choice(CHOICES), "options": [text(rng, 3) for _ in CHOICES]}
        for _ in range(2)
    ]
    return {"article": text(rng, 40), "problems": repr(problems)}


def _siqa(rng, number):
    answers = {f"answer{letter}": text(rng, 3) for letter in "ABC"}
    return {"context": text(rng, 8), "question": text(rng, 5), **answers, "label": str(1 + number % 3)}


def _truthfulqa(rng, number):
    def choices(right, wrong):
        return {"choices": [text(rng, 5) for _ in range(right + wrong)], "labels": [1] * right + [0] * wrong}

    return {"question": text(rng, 7), "mc1_targets": choices(1, 3), "mc2_targets": choices(2, 3)}


def _winogrande(rng, number):
    options = {"option1": text(rng, 1), "option2": text(rng, 1), "answer": str(1 + number % 2)}
    return {"sentence": f"{text(rng, 5)} _ {text(rng, 5)}.", **options}


def _instruction(rng, number):
    return {"instruction": text(rng, 8), "response": text(rng, 12), "instruction_source": "made up"}


def _alpaca(rng, number):
    return {"instruction": text(rng, 8), "input": text(rng, 3) if number % 2 else "", "output": text(rng, 8), "text": ""}


def _page(rng, number):
    return {"text": text(rng, 200)}


ALL = ("train", "validation", "test")


def lamini():
    parts = {}
    for part in range(3):
        rows = [_instruction(random.Random(f"{part} {number}"), number) for number in range(300)]
        parts[f"data/train-0000{part}-of-00003-0123456789abcdef.parquet"] = parquet(rows)
    return parts | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}


def alpaca():
    rows = [_alpaca(random.Random(number), number) for number in range(300)]
    return {"data/train-00000-of-00001-0123456789abcdef.parquet": parquet(rows)}


DATA_SETS = {
    "allenai/c4": c4,
    "MBZUAI/LaMini-instruction": lamini,
    "tatsu-lab/alpaca": alpaca,
    # What the harness's files of the paper's tasks name:
    "allenai/ai2_arc": lambda: table(("ARC-Challenge", "ARC-Easy"), ALL, _arc),
    "aps/super_glue": lambda: table(("boolq", "cb"), ALL, _boolq),
    "jannalu/crows_pairs_multilingual": lambda: table(("english", "french"), ("test",), _crows),
    "allenai/openbookqa": lambda: table(("additional", "main"), ALL, _openbookqa),
    "baber/piqa": lambda: table(("default",), ALL, _piqa, "data"),
    "EleutherAI/race": lambda: table(("high",), ("test",), _race),
    "lighteval/siqa": lambda: table(("default",), ("train", "validation"), _siqa, "data"),
    "truthfulqa/truthful_qa": lambda: table(("multiple_choice",), ("validation",), _truthfulqa),
    "allenai/winogrande": lambda: table(("winogrande_xl", "winogrande_xs"), ALL, _winogrande),
    "owner/pages": lambda: table(("default",), ("train", "test"), _page, "data"),
    "owner/scripted": lambda: {"scripted.py": b"raise SystemExit\n", "README.md": b"---\nlicense: other\n---\n"},
}


def fill(hub):
    """Put everything on `hub`; the member's token reads the gated models, the stranger's does not."""
    hub.tokens |= {MEMBER: set(GATED), STRANGER: set()}
    for name in (*GATED, *OPEN):
        hub.promise("model", name, functools.partial(model, name), gated=name in GATED)
    for name, make in DATA_SETS.items():
        hub.promise("dataset", name, make)
    return hub
