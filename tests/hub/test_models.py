"""Models of the hub: one commit for everything that is read, nothing asked twice, and errors that say what to do."""

import re
from pathlib import Path

import pytest

from hub import contents

LLAMA, QWEN = "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-1.7B"


@pytest.fixture(autouse=True)
def made(hub):
    for name in (LLAMA, QWEN):
        hub.repository("model", name)


LOADED = """
from hfprune_nb import models
model, tokenizer = models.load(NAME, device="cpu")
answer = [hub.commit_of(model.config.name_or_path), int(sum(p.double().sum() for p in model.parameters()) * 1e6)]
"""


def test_a_model_is_read_at_one_commit_and_only_once(hub, answer):
    code = LOADED.replace("NAME", repr(QWEN))
    first = answer(code)
    commit = hub.repository("model", QWEN).branches["main"]
    assert first[0] == commit
    assert not hub.asked("consolidated") and hub.asked(r"GET store .*")
    hub.requests.clear()
    assert answer(code) == first
    assert len(hub.asked("models")) == 1, "only which commit is the newest"
    assert answer(code, offline=True) == first and len(hub.asked("models")) == 1
    hub.stop()
    try:
        assert answer(code) == first
    finally:
        hub.start()


def test_a_revision_is_kept_where_main_moves(hub, answer):
    code = """
    hub.pin({"owner/moving": hub.commit("owner/moving")})
    answer = [hub.commit_of(hub.model("owner/moving")), hub.commit("owner/moving"), hub.commit("owner/moving", revision="old")]
    """
    files = contents.model("Qwen/other", seed=3)
    old = hub.commit("model", "owner/moving", files)
    hub.commit("model", "owner/moving", files, branch="old")
    assert answer(code) == [old, old, old]
    new = hub.commit("model", "owner/moving", contents.model("Qwen/other", seed=4))
    assert new != old
    assert answer(code)[1:] == [new, old]


REFUSED = [
    (LLAMA, "", "is gated and no token was given: accept its licence on https://huggingface.co/meta-llama/.*hf auth login"),
    (LLAMA, contents.STRANGER, "is gated and your token has no access: accept its licence on https://"),
    (LLAMA, contents.WRONG, "the hub refuses your token, which is wrong or expired: `hf auth login`.* unset HF_TOKEN"),
    (QWEN, contents.WRONG, "the hub refuses your token, which is wrong or expired: `hf auth login`.* unset HF_TOKEN"),
    ("Qwen/Qwen3-1.7", "", "model 'Qwen/Qwen3-1.7' is not on the hub: did you mean Qwen/Qwen3-1.7B"),
    ("Qwen/Qwen3-1.7", contents.MEMBER, "is not on the hub: did you mean Qwen/Qwen3-1.7B"),
    ("no such folder", "", "is no local path and no hub name"),
    ("owner/pickled", "", "has no safetensors weights"),
]


def test_what_the_hub_refuses_is_one_sentence_with_the_remedy(hub, answer):
    hub.commit("model", "owner/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    code = f"""
    import os
    from hfprune_nb import models
    answer = []
    for name, token in {[case[:2] for case in REFUSED]!r}:
        os.environ["HF_TOKEN"] = token
        answer.append(said(models.load, name, device="cpu"))
    """
    for (name, token, message), told in zip(REFUSED, answer(code), strict=True):
        assert re.search(message, told) and "\n" not in told, (name, token, told)


def test_a_member_reads_a_gated_model(hub, answer):
    commit = hub.repository("model", LLAMA).branches["main"]
    assert answer(f"answer = hub.commit_of(hub.model({LLAMA!r}))", token=contents.MEMBER) == commit


def test_nothing_cached_and_no_connection(hub, answer):
    code = f"answer = said(hub.model, {QWEN!r})"
    assert "is not cached and HF_HUB_OFFLINE is set" in answer(code, offline=True)
    hub.stop()
    try:
        assert "is not cached and the hub is out of reach: connect once" in answer(code)
    finally:
        hub.start()


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("GET hub /api/models", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}}),
        ("GET hub /api/models", {"status": 503}),
        ("GET hub /api/models", {"cut": 20}),
        ("GET hub /api/models", {"silent": 5}),
        ("GET store", {"status": 503}),
        ("GET store", {"cut": 2000}),
        ("GET store", {"cut": 2000, "reset": True}),
        ("GET store", {"silent": 5}),
        ("GET store", {"flip": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_hub_that_fails_is_asked_again(hub, answer, pattern, what):
    hub.fail(pattern, times=1, **what)
    found = Path(answer(f"answer = str(hub.model({QWEN!r}))"))
    files = hub.repository("model", QWEN).files("main")
    assert all((found / path.name).read_bytes() == files[path.name].content for path in found.glob("*.safetensors"))
    assert all(fault.times == 0 for fault in hub.faults), "the fault was met"
