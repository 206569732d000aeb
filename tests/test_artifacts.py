"""Artifacts: one address per set of parameters, nothing counts before DONE, and no later change goes unnoticed."""

import errno
import json
import math
import os

import pytest
from hypothesis import strategies as st

from hfprune_nb import files
from hfprune_nb.errors import UserError
from hfprune_nb.runs import artifacts
from hfprune_nb.runs.artifacts import Artifact, Writer, canonical, finished, open_artifact

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study" / "scoring" / "0123456789abcdef"


def make(folder, text="value", inputs=None, card=None):
    writer = Writer(folder)
    writer.path("value.txt").write_text(text)
    writer.path("tables/deep.csv").write_text("1,2")
    return writer.finish({"seed": 0}, inputs or {}, card or {"seconds": 1.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}])
def test_only_plain_finite_values_have_an_address(value):
    with pytest.raises(UserError, match="plain finite"):
        canonical({"value": value})


def test_finished_artifact_is_complete(folder):
    artifact = make(folder)
    assert artifact.done and artifact.current
    assert artifact.reference == "scoring/0123456789abcdef"
    assert artifact.parameters == {"seed": 0}
    assert set(artifact.manifest) == {"value.txt", "tables/deep.csv", "params.json", "card.json"}
    assert not folder.with_name(folder.name + ".partial").exists()
    assert open_artifact(folder).path("value.txt").read_text() == "value"


def test_nothing_counts_before_finish_and_leftovers_are_cleared(folder):
    Writer(folder).path("leftover.txt").write_text("from a killed run")
    with pytest.raises(UserError, match="unfinished"):
        open_artifact(folder)
    assert finished(folder.parents[1], "scoring") == []
    assert "leftover.txt" not in make(folder).manifest


@pytest.mark.parametrize("edit", ["changed", "valu", ""])
def test_any_edit_is_damage(folder, edit):
    artifact = make(folder, "original")
    artifact.path("value.txt").write_text(edit)
    assert artifact.done and not artifact.current
    with pytest.raises(UserError, match="corrupt.*value.txt.*delete the folder"):
        open_artifact(folder)


def test_edit_of_equal_length_is_seen_without_hashing_everything(folder, monkeypatch):
    artifact = make(folder, "original")
    hashed = []
    monkeypatch.setattr(artifacts, "sha256", lambda path: hashed.append(path.name) or "other")
    assert artifact.current and hashed == []
    later = artifact.path("DONE").stat().st_mtime_ns + 10**9
    os.utime(artifact.path("value.txt"), ns=(later, later))
    assert not artifact.current and hashed == ["value.txt"]


def test_copied_artifact_with_new_times_stays_current(folder):
    artifact = make(folder)
    for name in artifact.manifest:
        os.utime(artifact.path(name))
    assert artifact.current


def test_lost_file_and_broken_manifest_are_damage(folder):
    artifact = make(folder)
    artifact.path("value.txt").unlink()
    with pytest.raises(UserError, match="corrupt"):
        artifact.check()
    artifact.path("DONE").write_text("{")
    with pytest.raises(UserError, match="corrupt"):
        artifact.check()


def test_digest_is_of_content_alone(folder):
    first = make(folder, card={"seconds": 1.0}).digest
    assert make(folder, card={"seconds": 2.0}).digest == first
    (folder / "notebook.ipynb").write_text("{}")
    assert Artifact(folder).digest == first
    assert make(folder, "other").digest != first


def test_artifact_is_stale_when_an_input_has_other_bytes(folder):
    source = folder.parents[1] / "calibration" / "fedcba9876543210"
    used = make(source)
    artifact = make(folder, inputs={used.reference: used.digest})
    assert artifact.current
    make(source)
    assert artifact.current, "an input recomputed to the same bytes changes nothing"
    make(source, "other")
    assert not artifact.current
    artifacts.shutil.rmtree(source)
    assert not artifact.current


def test_finish_replaces_an_older_artifact(folder):
    make(folder, "old")
    assert make(folder, "new").path("value.txt").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_full_disk_leaves_no_artifact(folder, monkeypatch):
    writer = Writer(folder)
    writer.path("value.txt").write_text("value")

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "write_json", full)
    with pytest.raises(UserError, match="no disk space"):
        writer.finish({}, {}, {})
    assert list(folder.parent.iterdir()) == []


def test_artifact_without_files_is_refused(folder):
    with pytest.raises(UserError, match="wrote no file"):
        Writer(folder).finish({}, {}, {})


def test_json_takes_numpy_scalars_and_is_sorted(tmp_path):
    import numpy

    files.write_json(tmp_path / "x.json", {"b": numpy.float32(0.5), "a": numpy.int64(3)})
    assert (tmp_path / "x.json").read_text() == json.dumps({"a": 3, "b": 0.5}, indent=1) + "\n"
