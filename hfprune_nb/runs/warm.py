"""Warm kernels: forked from a server that has imported the libraries once, where a cold one imports them itself for six seconds.

The server is multiprocessing's: it imports, runs nothing and has one thread. Its environment is that of the first kernel, it
never loads this package, so that edited code is read as ever, and it ends with the process whose kernels it forks.
"""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from hfprune_nb.runs.kernel import end_with_parent

LIBRARIES = ["ipykernel.kernelapp", "torch", "transformers", "datasets", "peft", "scipy.stats", "seaborn"]
LIBRARIES += ["lm_eval.tasks", "lm_eval.models.huggingface"]
# What a driver has set up does not survive a fork, and a library may ask for a GPU when it is imported.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def is_possible() -> bool:
    """Return whether a process that has loaded the libraries can be forked: on Linux, where no library finds a GPU."""
    return sys.platform == "linux" and not any(map(os.path.exists, _GPU_DRIVERS))


class Manager(AsyncKernelManager):
    """Starts kernels by forking; everything else is as ever."""

    async def _async_pre_start_kernel(self, **options):
        self.provisioner = self.provisioner or _Forked(kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**options)


class _Forked(LocalProvisioner):
    async def launch_kernel(self, cmd, *, env, cwd=None, **_):
        options, self.cwd = cmd[cmd.index("-f") :], Path(cwd or Path.cwd())
        multiprocessing.set_forkserver_preload(LIBRARIES)
        # The server, and with it each kernel, gets the path of this process.
        sys.path[:] = _path_of_a_kernel()
        process = multiprocessing.get_context("forkserver").Process(
            target=_become_kernel, args=(options, env, self.cwd), name="MainProcess", daemon=True
        )
        try:
            process.start()
        except (EOFError, OSError):
            # Not above: a kernel, which loads this module too, would spend two seconds on it.
            from nbclient.exceptions import DeadKernelError

            raise DeadKernelError("Kernel died") from None
        self.process = _Popen(process)
        self.pid = self.pgid = process.pid
        return self.connection_info


class _Popen:
    """A process of multiprocessing as jupyter_client sees one of subprocess."""

    stdin = stdout = stderr = None

    def __init__(self, process):
        self.pid, self.kill, self.terminate, self._process = process.pid, process.kill, process.terminate, process

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


@functools.cache
def _path_of_a_kernel() -> list[str]:
    return json.loads(subprocess.check_output([sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"]))


def _become_kernel(options: list[str], environment: dict[str, str], folder: Path) -> None:
    os.setsid()  # an interrupt of the runner is not the kernel's
    end_with_parent()
    # lm-eval has processes of its own, made as in any other kernel.
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)

    import numpy
    import torch
    from ipykernel.kernelapp import IPKernelApp

    # What they drew when the server imported them would be what every kernel draws.
    numpy.random.seed()
    torch.seed()

    IPKernelApp.launch_instance([*options, f"--IPKernelApp.parent_handle={os.getppid()}"])
