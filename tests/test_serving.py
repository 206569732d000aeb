"""A pruned checkpoint elsewhere: llama.cpp's own converter reads it, and its runtime gives the same next-token distributions.

The sources of llama.cpp come with the source distribution of its Python binding, which is built once into the cache: some twenty
minutes on two cores, with CMake and a C++ compiler.
"""

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from hfprune_nb import models, paths
from hfprune_nb.cli.main import main
from hfprune_nb.files import sha256

pytestmark = [pytest.mark.serving, pytest.mark.registry, pytest.mark.timeout(7200)]

BINDING, DIGEST = "llama_cpp_python-0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PROMPT = "The capital of France is Paris, and the capital of Italy is"
RUN = """
import json, sys, time
import numpy as np
from llama_cpp import Llama

file, text = sys.argv[1:]
model = Llama(file, n_ctx=512, logits_all=True, n_threads=2, verbose=False, seed=0)
tokens = model.tokenize(text.encode(), add_bos=False)
model.eval(tokens)
logits = np.array(model.scores[: len(tokens)], dtype=np.float64).tolist()
model.reset()
began = time.perf_counter()
for count, token in enumerate(model.generate(tokens, temp=0.0), 1):
    if count == 64:
        break
print(json.dumps({"tokens": tokens, "logits": logits, "tokens_per_second": count / (time.perf_counter() - began)}))
"""


@pytest.fixture(scope="module")
def llama():
    """The folder of llama.cpp's sources, and a Python that has its binding."""
    folder = paths.cache() / BINDING
    python = folder / "venv/bin/python"
    if not (folder / "DONE").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"{BINDING}.tar.gz"
        package = BINDING.replace("-", "==")
        if not source.is_file():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", package, "-d", folder]
            subprocess.run(list(map(str, pip)), check=True)
        assert sha256(source) == DIGEST, "the registry gives other sources than those that were pinned"
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        venv.create(folder / "venv", with_pip=True)
        off = " ".join(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "TOOLS", "SERVER"))
        environment = os.environ | {"CMAKE_ARGS": off, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(source)], env=environment, check=True)
        (folder / "DONE").touch()
    return folder / BINDING / "vendor/llama.cpp", python


def served(llama, folder: Path, file: Path) -> dict:
    """What llama.cpp makes of a checkpoint: the prompt's tokens, their logits, tokens per second."""
    sources, python = llama
    convert = [sys.executable, sources / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", file]
    subprocess.run(list(map(str, convert)), check=True, capture_output=True)
    answer = subprocess.run([str(python), "-c", RUN, str(file), PROMPT], check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def test_llama_cpp_converts_and_runs_a_pruned_model(llama, tmp_path, capsys):
    small = ["--windows", "4", "--held-out-windows", "2", "--held-out", "wikitext", "--device", "cpu"]
    assert main(["prune", "smollm2-135m", "--ratio", "0.2", "--multiple-of", "256", "--out", str(tmp_path / "pruned"), *small]) == 0
    dense, tokenizer = models.load("smollm2-135m", dtype="bfloat16", device="cpu")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    speed = {}
    for name in ("dense", "pruned"):
        found = served(llama, tmp_path / name, tmp_path / f"{name}.gguf")
        network, _ = models.load(tmp_path / name, dtype="float32", device="cpu")
        assert found["tokens"] == tokenizer(PROMPT, add_special_tokens=False).input_ids
        with torch.no_grad():
            ours = network(input_ids=torch.tensor([found["tokens"]])).logits[0].double().log_softmax(-1)
        theirs = torch.tensor(found["logits"], dtype=torch.float64).log_softmax(-1)
        divergence = (ours.exp() * (ours - theirs)).sum(-1)
        assert divergence.max() < 1e-3, f"{name}: KL(ours, llama.cpp) {divergence.max():.2e} nats"
        speed[name] = found["tokens_per_second"]
    with capsys.disabled():
        sys.stdout.write(f"\nllama.cpp, float32, tokens per second: {speed}\n")
