"""Assets are downloaded from a local index in these tests, which can break off, ignore ranges and serve wrong bytes."""

import errno
import hashlib
import io
import os
import re
import tarfile
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import assets

PROJECT = Path(__file__).resolve().parent.parent
FIRST, SECOND = os.urandom(200_000), os.urandom(120_000)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def wheel(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"inner/{name}.bin", content)
    return buffer.getvalue()


def source_archive(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"inner/{name}.bin")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


FILES = {
    "part-one-1.0-py3-none-any.whl": wheel(part=FIRST, other=b"not wanted"),
    "part-two-1.0.tar.gz": source_archive(part=SECOND, note=b"a second output"),
}


class Index(ThreadingHTTPServer):
    """A package index on this machine; `ranges` can be switched off, `break_after` cuts the next download there."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.ranges, self.break_after = dict(FILES), [], True, None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        kind, name = self.path.strip("/").split("/")
        if kind == "simple":
            hits = [file for file in self.server.files if file.startswith(name)]
            if not hits:
                return self.send_error(404)
            return self.answer(200, "".join(f'<a href="/files/{file}">{file}</a>' for file in hits).encode(), "text/html")
        content, wanted = self.server.files[name], self.headers.get("Range")
        self.server.requests.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        cut, self.server.break_after = self.server.break_after, None
        self.answer(206 if start else 200, content[start:], "application/octet-stream", cut)

    def answer(self, status, content, kind, cut=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut])


def listing():
    def package(name, file, *members):
        entry = {
            "package": name,
            "version": "1.0",
            "file": file,
            "size": len(FILES[file]),
            "sha256": sha256(FILES[file]),
        }
        return entry | {"members": [{"member": f"inner/{m}.bin", "size": len(c), "file": f} for m, c, f in members]}

    return {
        "toy": {
            **{"kind": "model", "description": "a toy", "licence": "none", "note": "", "hub": "owner/toy"},
            "packages": [
                package("part-one", "part-one-1.0-py3-none-any.whl", ("part", FIRST, "joined.bin")),
                package("part-two", "part-two-1.0.tar.gz", ("part", SECOND, "joined.bin")),
            ],
            "files": [{"name": "joined.bin", "size": len(FIRST + SECOND), "sha256": sha256(FIRST + SECOND)}],
        }
    }


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A project in an empty folder whose only package index is a local one."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "assets.yaml").write_text(yaml.safe_dump(listing()))
    server = Index()
    for name in [
        *(key for key in os.environ if key.startswith("PIP_")),
        "HF_HUB_OFFLINE",
        "HFPRUNE_OFFLINE",
        "HFPRUNE_CACHE",
    ]:
        monkeypatch.delenv(name, raising=False)
    settings = {"HFPRUNE_HOME": tmp_path, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{server.url}/simple"}
    for name, value in (settings | {"NO_PROXY": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(assets._search_index.retry, "sleep", lambda _: None)
    monkeypatch.setattr(assets._resume.retry, "sleep", lambda _: None)
    assets._pip_settings.cache_clear()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    assets._pip_settings.cache_clear()


def downloads():
    return sorted(file.name for file in (paths.cache() / "downloads").glob("*"))


def set_aside(name, content):
    file = paths.cache() / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_members_of_several_packages_are_joined(index):
    file = assets.fetch("toy", progress=False)
    assert file.read_bytes() == FIRST + SECOND
    assert downloads() == []
    assert [entry.name for entry in file.parent.iterdir()] == ["joined.bin"]
    assert assets.is_cached("toy") and assets.path("toy") == file and assets.size("toy") == len(FIRST + SECOND)


def test_a_cached_asset_needs_no_index(index):
    assets.fetch("toy", progress=False)
    index.requests.clear()
    assets.fetch("toy", progress=False)
    assert index.requests == []


def test_a_damaged_copy_is_replaced(index):
    file = assets.fetch("toy", progress=False)
    file.write_bytes(bytes(len(FIRST + SECOND)))
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND


def test_a_truncated_copy_is_not_cached(index):
    assets.fetch("toy", progress=False).write_bytes(FIRST)
    assert not assets.is_cached("toy")


def test_a_stopped_download_goes_on(index):
    name = "part-one-1.0-py3-none-any.whl"
    set_aside(f"downloads/{name}.part", FILES[name][:70_000])
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND
    assert index.requests[0] == (name, "bytes=70000-")


def test_a_broken_connection_is_retried_from_where_it_broke(index):
    index.break_after = 150_000
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND
    assert [wanted for _, wanted in index.requests] == [None, f"bytes={2 * assets.NETWORK_CHUNK}-", None]


def test_a_server_without_ranges_is_read_from_the_start(index):
    index.ranges, index.break_after = False, 150_000
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND


@pytest.mark.parametrize("left", [FIRST, FIRST + SECOND[:5_000]])
def test_finished_packages_are_not_downloaded_again(index, left):
    set_aside("assets/toy.partial/joined.bin", left)
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND
    assert [name for name, _ in index.requests] == ["part-two-1.0.tar.gz"]


def test_a_wrong_hash_is_refused_and_named(index):
    name = "part-one-1.0-py3-none-any.whl"
    good = FILES[name]
    index.files[name] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(UserError) as refusal:
        assets.fetch("toy", progress=False)
    for fact in ("part-one==1.0", sha256(good), sha256(index.files[name])):
        assert fact in str(refusal.value)
    assert downloads() == [] and not assets.is_cached("toy")


def test_a_wrong_content_is_refused(index, tmp_path):
    pins = listing()
    pins["toy"]["files"][0]["sha256"] = "0" * 64
    (tmp_path / "data" / "assets.yaml").write_text(yaml.safe_dump(pins))
    with pytest.raises(UserError, match="joined.bin has SHA-256 .*, not the pinned 0{64}"):
        assets.fetch("toy", progress=False)
    assert not (paths.cache() / "assets" / "toy.partial").exists()


def test_a_vanished_package_says_what_else_works(index):
    index.files.pop("part-two-1.0.tar.gz")
    with pytest.raises(UserError, match="part-two-1.0.tar.gz .*offered by no package index.*model=owner/toy"):
        assets.fetch("toy", progress=False)


def test_an_unreachable_index_is_told(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assets._pip_settings.cache_clear()
    with pytest.raises(UserError, match="check the connection and pip's index-url.*hfprune assets fetch toy"):
        assets.fetch("toy", progress=False)


@pytest.mark.parametrize("setting", ["PIP_FIND_LINKS", "PIP_INDEX_URL"])
def test_local_folders_of_the_users_pip_serve(index, monkeypatch, tmp_path, setting):
    mirror = tmp_path / "mirror"
    for name, content in FILES.items():
        project = re.match(r"part-(one|two)", name).group()
        (mirror / "simple" / project).mkdir(parents=True)
        (mirror / "simple" / project / "index.html").write_text(f'<a href="../../{name}">{name}</a>')
        (mirror / name).write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1" if setting == "PIP_FIND_LINKS" else "")
    monkeypatch.setenv(setting, str(mirror) if setting == "PIP_FIND_LINKS" else (mirror / "simple").as_uri())
    assets._pip_settings.cache_clear()
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND
    assert index.requests == [] and all((mirror / name).is_file() for name in FILES)


def test_a_page_of_links_serves(index, monkeypatch, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    page = tmp_path / "links.html"
    page.write_text("".join(f'<a href="{name}">{name}</a>' for name in FILES))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", page.as_uri())
    assets._pip_settings.cache_clear()
    assert assets.fetch("toy", progress=False).read_bytes() == FIRST + SECOND
    assert index.requests == []


@pytest.mark.parametrize("flag", ["HF_HUB_OFFLINE", "HFPRUNE_OFFLINE"])
def test_offline_and_not_cached_says_how_to_fetch(index, monkeypatch, flag):
    monkeypatch.setenv(flag, "1")
    with pytest.raises(UserError, match="run `hfprune assets fetch toy`"):
        assets.path("toy")
    assert index.requests == []


def test_too_little_disk_is_told_before_the_download(index, monkeypatch):
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1_000_000))
    with pytest.raises(UserError, match=r"needs \d+ MB of disk and .* has 1 MB"):
        assets.fetch("toy", progress=False)
    assert index.requests == []


def test_a_full_disk_leaves_no_asset(index, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left on device.*HFPRUNE_CACHE"):
        assets.fetch("toy", progress=False)
    assert not assets.is_cached("toy")


def test_an_unknown_asset_names_the_known_ones(index):
    with pytest.raises(UserError, match="asset 'tyo' is unknown: choose one of toy"):
        assets.get("tyo")


def test_the_pins_are_complete_and_consistent(monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(PROJECT))
    for asset in assets.list_assets():
        sizes = dict.fromkeys((file.name for file in asset.files), 0)
        for package in asset.packages:
            for member in package.members:
                sizes[member.file] += member.size
        assert sizes == {file.name: file.size for file in asset.files}, asset.name
        for pinned in [*asset.packages, *asset.files]:
            assert re.fullmatch("[0-9a-f]{64}", pinned.sha256)
        assert asset.kind in {"model", "text", "benchmark"} and asset.licence and asset.source
    assert "http" not in (PROJECT / "data" / "assets.yaml").read_text()


@pytest.mark.registry
def test_a_real_source_archive(registry, monkeypatch, tmp_path):
    monkeypatch.setenv("HFPRUNE_HOME", str(PROJECT))
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path))
    assert assets.fetch("c4-held-out", progress=False).read_bytes().count(b"\n") == 300
