"""Runs code from standard input, each piece in a fork of a process that has imported everything: the hub's clients once only."""

import json
import os
import signal
import sys
import traceback

import datasets
import huggingface_hub
import transformers  # noqa: F401

from hfprune_nb.errors import UserError
from hfprune_nb.inputs import calibration, hub, instructions  # noqa: F401
from hfprune_nb.models import loading  # noqa: F401


def said(function, *arguments, **options):
    """What the function returns, or the sentence that it refuses with."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        return str(error)


def run(job):
    signal.alarm(120)
    os.environ["HF_TOKEN"] = job["token"]
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = job["offline"]
    hub.PATIENCE, hub.TIMEOUT = job["patience"], 3.0
    names = {"hub": hub, "said": said}
    exec(job["code"], names)
    return {"answer": names["answer"]}


for line in sys.stdin:
    if (child := os.fork()) == 0:
        try:
            told = run(json.loads(line))
        except BaseException:
            told = {"error": traceback.format_exc()}
        sys.stdout.write("\n" + json.dumps(told) + "\n")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    sys.stdout.write("end\n")
    sys.stdout.flush()
