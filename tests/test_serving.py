"""A pruned checkpoint elsewhere: llama.cpp's own converter reads it, and its runtime gives the same next-token distributions.

The converter comes with the source distribution of one Python binding, the compiled runtime with the wheel of another.
"""

import json
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

pytestmark = [pytest.mark.serving, pytest.mark.registry, pytest.mark.timeout(1800)]

SOURCES = "llama_cpp_python-0.3.36"
SOURCES_DIGEST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
RUNTIME = "xllamacpp==2026.10.11549"
PROMPT = "The capital of France is Paris, and the capital of Italy is"
RUN = """
import json, sys
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = sys.argv[1], 512, 1, 2
request = {"prompt": sys.argv[2], "n_predict": 48, "temperature": 0.0, "n_probs": 20, "ignore_eos": True}
print(json.dumps(xllamacpp.Server(parameters).handle_completions(request)))
"""


@pytest.fixture(scope="module")
def llama():
    """The folder of llama.cpp's sources, and a Python that has its runtime."""
    folder = paths.cache() / "llama.cpp"
    python, sources = folder / "venv/bin/python", folder / SOURCES / "vendor/llama.cpp"
    if not (folder / "DONE").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*pip, SOURCES.replace("-", "==")], check=True)
        assert sha256(folder / f"{SOURCES}.tar.gz") == SOURCES_DIGEST, "these are not the sources that were pinned"
        with tarfile.open(folder / f"{SOURCES}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        venv.create(folder / "venv", with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", RUNTIME]
        subprocess.run(install, check=True)
        (folder / "DONE").touch()
    return sources, python


def served(llama, folder: Path, file: Path) -> tuple[list[dict], float]:
    """What llama.cpp makes of a checkpoint: each generated token with the likeliest ones beside it, and tokens per second."""
    sources, python = llama
    convert = [sys.executable, sources / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", file]
    subprocess.run(list(map(str, convert)), check=True, capture_output=True)
    answer = subprocess.run([str(python), "-c", RUN, str(file), PROMPT], check=True, capture_output=True, text=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    return found["choices"][0]["logprobs"]["content"], found["timings"]["predicted_per_second"]


def test_llama_cpp_converts_and_runs_a_pruned_model(registry, llama, tmp_path, capsys):
    small = ["--windows", "4", "--held-out-windows", "2", "--held-out", "wikitext", "--device", "cpu"]
    assert (
        main(["prune", "smollm2-135m", "--ratio", "0.2", "--multiple-of", "256", "--out", str(tmp_path / "pruned"), *small]) == 0
    )
    dense, tokenizer = models.load("smollm2-135m", dtype="bfloat16", device="cpu")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    prompt, speed = tokenizer(PROMPT, add_special_tokens=False).input_ids, {}
    for name in ("dense", "pruned"):
        steps, speed[name] = served(llama, tmp_path / name, tmp_path / f"{name}.gguf")
        network, _ = models.load(tmp_path / name, dtype="float32", device="cpu")
        ids = torch.tensor([[*prompt, *(step["id"] for step in steps)]])
        with torch.no_grad():
            ours = network(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        assert len(steps) == 48
        for row, step in zip(ours, steps, strict=True):
            theirs = {token["id"]: token["logprob"] for token in step["top_logprobs"]}
            difference = row[list(theirs)] - torch.tensor(list(theirs.values()), dtype=torch.float64)
            assert difference.abs().max() < 0.02, f"{name}: log-probabilities differ by {difference.abs().max():.3f}"
    with capsys.disabled():
        words = ", ".join(f"{name} {value:.1f}" for name, value in speed.items())
        sys.stdout.write(f"\nllama.cpp, float32, two threads, tokens per second: {words}\n")
