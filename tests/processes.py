"""Python processes that start within milliseconds: a server that has imported other packages forks them.

A new interpreter takes seconds to import PyTorch and transformers, so a test starts one only where importing, or
Python's own start, is what it is about. The server has not imported this package: a process imports it itself, or
hides it, or has another copy of it. The processes of `tests/hub`, which hide it, are new interpreters in
`make hub-check` only.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["tests.imported"]
# Variables that libraries have read when they were imported. As their constants, they are strings or booleans.
READ_AT_IMPORT = ("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE")


class Done(NamedTuple):
    """What `subprocess.run` says about a process."""

    returncode: int
    stdout: str
    stderr: str


def start(*command, output=os.devnull, errors=None, said=os.devnull, cwd=None, terminal=None, env=None, **environment):
    """Start `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`, as `python` takes them.

    Output and errors go to files, by default to the same one, and `said` is the file that it reads. With `terminal`
    all three are that device, in a session of its own. `env` are all variables of the environment, `environment` are
    more of them.
    """
    streams = (terminal,) * 3 if terminal else (said, output, errors or output)
    variables = {name: str(value) for name, value in {**(os.environ if env is None else env), **environment}.items()}
    arguments = ([str(part) for part in command], variables, [str(stream) for stream in streams], cwd or os.getcwd())
    process = SERVER.Process(target=_be, args=arguments, kwargs={"is_terminal": terminal is not None}, daemon=True)
    process.start()
    return process


def run(*command, **options):
    """Return the exit code of such a process, the negative number of a signal if it was killed."""
    process = start(*command, **options)
    process.join(300)
    return process.exitcode


def capture(*command, input="", **options):
    """Return the exit code and the texts of a process, which reads `input`."""
    with tempfile.TemporaryDirectory() as folder:
        said, output, errors = (Path(folder, name) for name in ("input", "output", "errors"))
        said.write_bytes(input.encode() if isinstance(input, str) else input)
        code = run(*command, said=said, output=output, errors=errors, **options)
        return Done(code, output.read_text(errors="replace"), errors.read_text(errors="replace"))


def group(size):
    """The environment of each process of a group on this machine, as `torchrun` sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _be(command, environment, streams, cwd, is_terminal):
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for name in READ_AT_IMPORT:
        _set_constants(name, environment.get(name))
    if is_terminal:
        os.setsid()
    for number, (path, mode) in enumerate(zip(streams, ("r", "w", "w"), strict=True)):
        is_shared = number == 2 and streams[1] == streams[2]
        with open(path, "r+b" if is_terminal else mode + "b", buffering=0) as file:
            os.dup2(1 if is_shared else file.fileno(), number)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = os.fdopen(1, "w", 1 if is_terminal else -1, encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    kind, *arguments = command
    if kind == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = [kind, *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")


def _set_constants(name, value):
    """Make the modules that have read a variable of the environment read it again."""
    for module in list(sys.modules.values()):
        old = vars(module).get(name) if module is not None else None
        if isinstance(old, bool):
            setattr(module, name, str(value or "").upper() in ("1", "ON", "YES", "TRUE"))
        elif isinstance(old, str) and value is not None:
            setattr(module, name, str(value))
