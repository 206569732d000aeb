"""The one door to the Hugging Face hub: which commit is read, patience with a busy hub, and errors in one sentence.

Everything is downloaded whole into the client's own cache and read from there, so that a second run asks the hub for nothing.
"""

import collections
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import time
import zlib
from pathlib import Path

from hfprune_nb import paths, text_files
from hfprune_nb.errors import UserError

REVISIONS = "HFPRUNE_REVISIONS"  # of the environment: which commits this process and its children read, as JSON
# Configuration, tokenizer, code and weights; never pickles, nor the same weights in another format.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
OTHER_WEIGHTS = ("original/*", "onnx/*", "*/*.safetensors")
TIMEOUT = 30.0  # seconds without an answer
PATIENCE = 600.0  # seconds for which a hub that is busy, or that answered before, is asked again
TRIES = 4  # how often a hub that never answered is asked
PAUSE = 60.0  # seconds after patience ran out in which nothing is asked twice
ADAPTERS = "adapter_config.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of the kit for repositories of the hub.
REPOSITORIES = {"c4": "allenai/c4:en", "lamini": "MBZUAI/LaMini-instruction", "alpaca": "tatsu-lab/alpaca"}


def repository(name: str) -> str:
    """Return the hub repository that a model, corpus or data name leads to; empty for what is local or the kit's own.

    A folder of adapters leads to that of their base model.

    >>> repository("c4"), repository("smollm2-135m"), repository("OWNER/NAME:en")
    ('allenai/c4', '', 'OWNER/NAME')
    """
    if place := next((place for place in (Path(name).expanduser(), paths.project() / name) if name and place.exists()), None):
        return repository(adapter_base(place))
    if not name:
        return ""
    found = REPOSITORIES.get(name, name).partition(":")[0]
    if found.endswith(".gguf"):
        return found.rpartition("/")[0]
    is_file = text_files.suffix(found) in (".txt", *text_files.RECORD_SUFFIXES)
    return found if re.fullmatch(r"[\w.-]+/[\w.-]+", found) and not is_file else ""


def adapter_base(folder: str | Path) -> str:
    """Return the model on which a folder of adapters was trained: a name, or a folder, sought beside them too; or ""."""
    try:
        found = json.loads((Path(folder) / ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    except (OSError, ValueError):
        return ""
    beside = Path(folder) / found
    return str(beside) if found and beside.is_dir() and not Path(found).is_dir() else found


@functools.cache
def task_data(task: str) -> str:
    """Return the repository of the records of one of the harness's tasks, from its own file, before the harness is loaded.

    Empty for groups, for what the harness has not, and for records that are no repository.
    """
    harness = importlib.util.find_spec("lm_eval")
    folder, name = Path(harness.origin if harness else "").parent / "tasks", glob.escape(task)
    file = next((file for pattern in (f"{name}.yaml", f"{name}/default.yaml") for file in folder.rglob(pattern)), None)
    while file and file.is_file():
        text = file.read_text(encoding="utf-8")
        named, included = (
            re.search(rf"""^["']?{key}["']?:\s*["']?([\w./-]+)""", text, re.MULTILINE) for key in ("dataset_path", "include")
        )
        if named:
            return named[1] if "/" in named[1] else ""
        file = file.parent / included[1] if included else None
    return ""


def commit(repository: str, kind: str = "model", revision: str = "") -> str:
    """Return the commit (40 hex digits) of a hub repository at a branch, tag or commit.

    kind : model or dataset; revision : empty for the one that this run is pinned to (`pin`), else the newest of `main`.
    A process keeps to what it resolved first. Without the hub, the commit that was resolved last time is taken. Raises UserError.
    """
    wanted = revision or pins().get(repository, "") or "main"
    if COMMIT.fullmatch(wanted):
        return wanted
    return _resolved(repository, kind, wanted)


@functools.cache
def _resolved(repository: str, kind: str, wanted: str) -> str:
    with errors(kind, repository, wanted):
        return str(_api().resolve_revision(repository, repo_type=kind, revision=wanted).resolved)


def pin(revisions: dict[str, str]) -> None:
    """Read these repositories (name -> branch, tag or commit) at these revisions from now on, in child processes too."""
    os.environ[REVISIONS] = json.dumps(revisions)


def pins() -> dict[str, str]:
    """Return what was given to `pin`."""
    return json.loads(os.environ.get(REVISIONS) or "{}")


def model(name: str, revision: str = "") -> Path:
    """Return the folder of a hub model's files at one commit, downloaded where they are not cached yet.

    Raises UserError for a model that the hub does not give, or that has no safetensors weights.
    """
    from huggingface_hub import snapshot_download

    pinned = commit(name, "model", revision)
    with errors("model", name, pinned):
        patterns = {"allow_patterns": list(MODEL_FILES), "ignore_patterns": list(OTHER_WEIGHTS)}
        folder = Path(patiently(snapshot_download, name, revision=pinned, **patterns))
        weights = sorted(folder.glob("*.safetensors"))
        if any([_discarded(path) for path in weights]):
            patiently(snapshot_download, name, revision=pinned, **patterns)
            _refuse_corrupt(weights)
    if not weights:
        raise UserError(f"model '{name}' has no safetensors weights on the hub: choose a revision or a model that has them.")
    return folder


def file(name: str, path: str, kind: str = "model", revision: str = "") -> Path:
    """Return one file of a repository, downloaded where it is not cached yet; raises UserError."""
    from huggingface_hub import hf_hub_download

    pinned = commit(name, kind, revision)
    with errors(kind, name, pinned):
        found = Path(patiently(hf_hub_download, name, path, repo_type=kind, revision=pinned))
        if _discarded(found):
            patiently(hf_hub_download, name, path, repo_type=kind, revision=pinned)
            _refuse_corrupt([found])
        return found


def _discarded(path: Path) -> bool:
    """Whether a large file of the cache was corrupt, and is gone now: the client itself compares sizes only."""
    blob = path.resolve()  # a large file's blob is named by its SHA-256
    checked = paths.cache() / "hub" / "checked" / blob.name
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name) or checked.is_file():
        return False
    if not _is_intact(path, blob.name):
        path.unlink()
        blob.unlink()
        return True
    checked.parent.mkdir(parents=True, exist_ok=True)
    checked.touch()
    return False


def _is_intact(path: Path, sha256: str) -> bool:
    if path.suffix != ".gz":
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == sha256
    try:
        with gzip.open(path) as content:  # which carries a checksum of its own
            while content.read(1 << 20):
                pass
        return True
    except (OSError, EOFError, zlib.error):
        return False


def _refuse_corrupt(found: list[Path]) -> None:
    if corrupt := [path.name for path in found if _discarded(path)]:
        raise UserError(f"{corrupt[0]} came corrupt from the hub twice: try again later, or through another network.")


def patiently(download, *arguments, **options):
    """Call a function that downloads; where its transfer breaks off it is called again and goes on with what it has."""
    import tenacity

    _api()
    broken = tenacity.retry_if_exception_type(_transport_errors()) | tenacity.retry_if_exception_message(
        match="Consistency check"
    )
    return tenacity.Retrying(
        retry=broken, wait=tenacity.wait_exponential(0.5, 30), stop=tenacity.stop_after_attempt(6), reraise=True
    )(download, *arguments, **options)


def cache() -> Path:
    """Return the folder in which the hub's client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def commit_of(folder: str | Path) -> str:
    """Return the commit whose files `folder` holds, empty for a folder that is not the hub cache's."""
    name = Path(folder).name
    return name if COMMIT.fullmatch(name) and Path(folder).parent.name == "snapshots" else ""


@contextlib.contextmanager
def errors(kind: str, name: str, revision: str = ""):
    """Turn whatever the hub's clients raise about a repository into one sentence that says what to do."""
    try:
        yield
    except UserError:
        raise
    # The clients of the hub raise many types that share no base class.
    except Exception as error:
        raise UserError(_sentence(error, kind, name, revision)) from error


def _sentence(error: Exception, kind: str, name: str, revision: str) -> str:
    from huggingface_hub import errors as raised

    chain = list(_causes(error))
    status = next((cause.response.status_code for cause in chain if isinstance(cause, raised.HfHubHTTPError)), 0)
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    shown = f"{kind} '{name}'"

    def caused_by(*kinds):
        return any(isinstance(cause, kinds) for cause in chain)

    if caused_by(raised.GatedRepoError):
        if not has_token():
            return f"{shown} is gated and no token was given: accept its licence on {page}, then `hf auth login` or set HF_TOKEN."
        return f"{shown} is gated and your token has no access: accept its licence on {page} with the account of the token."
    if status == 401 and has_token():
        return f"{shown}: the hub refuses your token, which is wrong or expired: `hf auth login` again, or unset HF_TOKEN."
    if caused_by(raised.RepositoryNotFoundError):
        login = "" if has_token() else " If it is private, `hf auth login` first."
        return f"{shown} is not on the hub: {_near(kind, name)}.{login}"
    if caused_by(raised.RevisionNotFoundError):
        return f"{shown} has no revision '{revision}': give a branch, tag or commit of {page}."
    told = " ".join(str(error).split())
    if missing := re.search(r"BuilderConfig '?(.+?)'? not found\. Available: \[(.*?)\]", told):
        return f"{shown} has no configuration '{missing[1]}': choose one of {_listed(missing[2])}."
    if several := re.search(r"Config name is missing.*?\[(.*?)\]", told):
        first = re.findall(r"'(.*?)'", several[1])[0]
        return f"{shown} has several configurations: name one of {_listed(several[1])}, as in {name}:{first}."
    if "scripts are no longer supported" in told:
        return (
            f"{shown} is a script, which the datasets library no longer runs: choose a copy of the data in Parquet, often this "
            "repository at revision refs/convert/parquet."
        )
    if caused_by(raised.HFValidationError):
        return f"{shown} is no local path and no hub name: give an existing path or OWNER/NAME."
    if status == 429 or status >= 500:
        return f"{shown}: the hub stayed busy or out of order (HTTP {status}) for {PATIENCE / 60:.0f} minutes: try later."
    if caused_by(raised.OfflineModeIsEnabled):
        return f"{shown} is not cached and HF_HUB_OFFLINE is set: unset it once to download."
    if caused_by(raised.LocalEntryNotFoundError, raised.RevisionResolutionError, ConnectionError, *_transport_errors()):
        return f"{shown} is not cached and the hub is out of reach: connect once, or give a local path."
    if status == 403:
        return f"{shown}: the hub forbids it ({error}): check the permissions of your token."
    return f"{shown} could not be read from the hub ({type(error).__name__}: {told[:300]})."


def _listed(names: str) -> str:
    found = re.findall(r"'(.*?)'", names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _near(kind: str, name: str) -> str:
    """Return the end of a sentence: names on the hub that are like `name`."""
    import difflib

    api, word = _api(), name.rpartition("/")[2]
    listing = api.list_models if kind == "model" else api.list_datasets
    with contextlib.suppress(Exception):  # the search is a courtesy
        listed = [found.id for found in listing(search=re.split(r"[-_.]", word)[0], limit=100)]
        if near := difflib.get_close_matches(name, listed, n=3, cutoff=0.4):
            return f"did you mean {' or '.join(near)}?".removesuffix("?")
    return "check the spelling of OWNER/NAME"


def has_token() -> bool:
    """Return whether the user gave the hub's client a token."""
    from huggingface_hub import get_token

    return get_token() is not None


def _transport_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.utils import httpx

    return (httpx.TransportError,)


@functools.cache
def _api():
    """Return the hub's API, after giving every library that asks the hub one patient client."""
    from huggingface_hub import HfApi, get_session, set_client_factory
    from huggingface_hub.utils import httpx

    hooks = get_session().event_hooks

    class Client(httpx.Client):
        def send(self, request, **options):
            # Most callers set no timeout, and a hub that never answers would hold a study for ever.
            given = request.extensions.get("timeout", {})
            request.extensions["timeout"] = {part: given.get(part) or TIMEOUT for part in ("connect", "read", "write", "pool")}
            return _patience[request.url.host].send(functools.partial(super().send, request, **options))

    set_client_factory(lambda: Client(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT))
    return HfApi()


class _Patience:
    """Asks again while the hub is busy, out of order or silent: as long as it says, else in growing steps.

    A hub that never answered is down, not busy: that is told soon. When patience ran out, further requests are asked once
    each for a while, so that several layers of callers do not wait one after the other.
    """

    def __init__(self):
        self.answered, self.gave_up = False, float("-inf")

    def send(self, ask):
        import tenacity

        transient = tenacity.retry_if_exception_type(_transport_errors()) | tenacity.retry_if_result(_is_busy)
        retrying = tenacity.Retrying(retry=transient, wait=_wait, stop=self._stop, retry_error_callback=self._give_up)
        response = retrying(ask)
        if not _is_busy(response):
            self.answered, self.gave_up = True, float("-inf")
        return response

    def _stop(self, state) -> bool:
        if time.monotonic() < self.gave_up + PAUSE:
            return True
        if state.outcome.failed and not self.answered:
            return state.attempt_number >= TRIES
        return state.seconds_since_start + state.upcoming_sleep > PATIENCE

    def _give_up(self, state):
        self.gave_up = time.monotonic()
        return state.outcome.result()  # raises what the last request raised


# Host -> its own: libraries ask others than the hub, too.
_patience: collections.defaultdict[str, _Patience] = collections.defaultdict(_Patience)


def _is_busy(response) -> bool:
    return response.status_code in (408, 429) or response.status_code >= 500


def _wait(state) -> float:
    """Return the seconds until the next try: what a busy hub asks for, else 0.5, 1, 2 ... 30."""
    if not state.outcome.failed:
        response = state.outcome.result()
        response.close()
        headers = response.headers
        told = headers.get("Retry-After", "") or (re.findall(r";t=(\d+)", headers.get("RateLimit", "")) or [""])[0]
        if told.isdigit():
            return int(told) + 0.5
    return min(0.5 * 2 ** (state.attempt_number - 1), 30.0)
