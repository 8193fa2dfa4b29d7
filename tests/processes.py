"""Python processes that start within milliseconds: a server that has imported the package forks them.

A new interpreter takes seconds to import PyTorch and transformers, so a test starts one only where importing, the
environment of the Hugging Face libraries or a real terminal is what it is about.
"""

import multiprocessing
import os
import runpy
import socket
import sys

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["mgllava.cli", "mgllava.conversion", "tests.box_files.stub_detector", "tests.training.worker"]


def start(*command, output=os.devnull, **environment):
    """Start `-m MODULE ...` or `-c CODE ...`, as `python` takes them; what the process says goes to a file."""
    arguments = ([str(part) for part in command], {**os.environ, **environment}, str(output))
    process = SERVER.Process(target=_be, args=arguments, daemon=True)
    process.start()
    return process


def run(*command, **options):
    """Return the exit code of such a process, the negative number of a signal if it was killed."""
    process = start(*command, **options)
    process.join(300)
    return process.exitcode


def group(size):
    """The environment of each process of a group on this machine, as `torchrun` sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _be(command, environment, output):
    import torch

    os.environ.clear()
    os.environ.update(environment)
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    kind, code, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
