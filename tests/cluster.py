"""A stand-in for a Kubernetes cluster: an HTTP server on loopback that knows the calls of Snakemake's executor and no more.

The container of a Job is a local process, and a volume is the folder whose path it is mounted at. Like a real API server it
refuses calls that the Role does not allow, GPUs without an equal limit, and the log of a container that was never restarted.
"""

import base64
import json
import os
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml


class Cluster:
    """A cluster; its folder is `scratch`, `image` is the environment that its one image gives, `rules` are those of a Role.

    When the file `evict` appears, the node of the newest pod is lost. `submitted` are the Jobs and `refused` the refusals.
    """

    def __init__(self, scratch: Path, image: dict[str, str], rules: list[dict], evict: Path):
        self.scratch, self.image, self.rules, self.evict = scratch, image, rules, evict
        self.submitted: list[dict] = []
        self.refused: list[str] = []
        self.secrets: dict[str, dict] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self.lost: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": self}))

    def __enter__(self) -> "Cluster":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        for process in self.processes.values():
            _kill(process)

    def configuration(self) -> Path:
        """Write the file that KUBECONFIG names and return its path."""
        server = {"server": f"http://127.0.0.1:{self.server.server_port}"}
        content = {
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": server}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "nobody"}}],
        }
        path = self.scratch / "kubeconfig"
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config"} | content))
        return path

    def answer(self, method: str, path: str, query: str, body: dict) -> tuple[int, dict]:
        """Return HTTP status and object for one call; raises ValueError with a refusal."""
        kind, name, *rest = [*path.partition("/namespaces/default/")[2].split("/"), ""]
        resource = f"{kind}/{rest[0]}" if rest and rest[0] else kind
        verb = {"POST": "create", "DELETE": "delete", "GET": "get" if name else "list"}[method]
        if not any(resource in rule["resources"] and verb in rule["verbs"] for rule in self.rules):
            raise ValueError(f"the Role does not allow to {verb} {resource}")
        match verb, resource:
            case "create", "secrets":
                self.secrets[body["metadata"]["name"]] = body
            case "create", "jobs":
                self._start(body)
            case "get", "jobs/status":
                return 200, {"status": self._status(name)}
            case "list", "pods":
                name = query.partition("job-name%3D")[2]
                return 200, {"items": [] if name in self.lost else [self._pod(name)]}
            case "get", "pods/log":
                raise ValueError(f'previous terminated container "snakemake" in pod "{name}" not found')
            case "delete", "jobs":
                _kill(self.processes[name])
        return 201 if verb == "create" else 200, body

    def _start(self, job: dict) -> None:
        name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        wanted = container["resources"]
        for resource, number in wanted["requests"].items():
            if "/" in resource and wanted.get("limits", {}).get(resource) != number:
                raise ValueError(f"{resource}: limit must be set for non overcommitable resources")
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        for mount in container["volumeMounts"]:
            if mount["name"] in claims and not Path(mount["mountPath"]).is_dir():
                raise ValueError(f"there is no volume for {mount['mountPath']}")
        folder = self.scratch / name
        folder.mkdir()
        environment = self.image | {entry["name"]: self._secret(entry) for entry in container.get("env") or ()}
        command = [*container["command"], *container["args"]]
        with (folder / "log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.submitted.append(job)

    def _secret(self, entry: dict) -> str:
        reference = entry["valueFrom"]["secretKeyRef"]
        return base64.b64decode(self.secrets[reference["name"]]["data"][reference["key"]]).decode()

    def _status(self, name: str) -> dict:
        newest = list(self.processes)[-1]
        if not self.lost and self.evict.exists():
            _kill(self.processes[newest])
            self.lost.add(newest)
        code = self.processes[name].poll()
        return {"active": 1} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}

    def _pod(self, name: str) -> dict:
        code = self.processes[name].poll()
        state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
        container = {"name": "snakemake", "image": "", "imageID": "", "ready": True, "restartCount": 0, "state": state}
        return {"metadata": {"name": name}, "status": {"containerStatuses": [container]}}


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def _answer(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        path, _, query = self.path.partition("?")
        try:
            status, answer = self.cluster.answer(self.command, path, query, body)
        except ValueError as error:
            self.cluster.refused.append(str(error))
            status, answer = 400, {"message": str(error)}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *_):
        pass


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
