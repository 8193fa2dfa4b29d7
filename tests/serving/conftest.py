"""A running server with a small model, a client, and a web site with images and hostile answers."""

import io
import logging
import socket
import struct
import threading
import time
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import psutil
import pytest
import uvicorn
from transformers import AutoProcessor
from typer.testing import CliRunner

from mgllava import BoxDetector
from mgllava.cli import app as commands
from tests import processes
from tests.processing.detectors import CASES, OWLV2, golden_image
from tests.serving.requests import as_data_url

MAX_REQUESTS, MAX_IMAGE_BYTES = 12, 400_000


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def picture():
    """A photograph of the golden data, as a PNG file."""
    file = io.BytesIO()
    golden_image(CASES[0]).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def data_url(picture):
    return as_data_url(picture)


class Site:
    """A host that clients name in image URLs; `seen` are the paths that the server requested, `headers` the last."""

    def __init__(self, picture):
        self.seen, self.picture = [], picture
        site = self

        answers = {
            "/picture.png": (200, picture, {}),
            "/text.png": (200, b"<html>no picture</html>", {}),
            "/to-picture": (302, b"", {"Location": "/picture.png"}),
            "/to-file": (302, b"", {"Location": "file:///etc/hostname"}),
            "/compressed": (200, picture, {"Content-Encoding": "gzip"}),
            "/announced": (200, picture, {"Content-Length": "99999999999"}),
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.seen.append(self.path)
                site.headers = dict(self.headers)
                if self.path == "/to-private":
                    self.answer(302, b"", {"Location": f"http://127.0.0.1:{site.port}/secret"})
                elif self.path == "/endless":
                    self.send_response(200)
                    self.end_headers()
                    while True:
                        self.wfile.write(bytes(2**16))
                elif self.path == "/slow":
                    time.sleep(20)
                else:
                    self.answer(*answers.get(self.path, (404, b"", {})))

            def answer(self, status, body, headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):  # the server hangs up on /endless
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://localhost:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="session")
def site(picture):
    site = Site(picture)
    yield site
    site.server.shutdown()


@pytest.fixture(scope="session")
def served_repository(convert):
    """A model folder with a box detector."""
    folder = convert()
    processor = AutoProcessor.from_pretrained(folder)
    labels = [prompt.removeprefix("a photo of ") for prompt in CASES[0]["prompts"]]
    processor.box_detector = BoxDetector(tagger=labels, detector=OWLV2)
    processor.save_pretrained(folder)
    return folder


class Server:
    """`mgllava serve` in a process of its own."""

    def __init__(self, repository, log, *options):
        self.port, self.log = free_port(), log
        self.url = f"http://localhost:{self.port}"
        command = ["-m", "mgllava", "serve", repository, "--port", self.port, *options]
        self.process = processes.start(*command, output=log, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        self.memory = psutil.Process(self.process.pid)

    def wait(self, seconds=120):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.is_alive():
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"The server does not answer:\n{self.log.read_text()}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.join(40)
            assert self.process.exitcode is not None
        finally:
            self.process.kill()


class Failures(logging.Handler):
    """Keeps the errors with a traceback that a thread logs."""

    def __init__(self, thread):
        super().__init__(logging.ERROR)
        self.found = []
        self.addFilter(lambda record: record.thread == thread.ident and record.exc_info)

    def emit(self, record):
        self.found.append(logging.Formatter().format(record))


class LocalServer:
    """`mgllava serve` in a thread of this process."""

    def __init__(self, repository, *options):
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        made = []

        def make(app, **options):
            made.append(uvicorn.Server(uvicorn.Config(app, log_config=None, **options)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uvicorn, "run", make)
            result = CliRunner().invoke(commands, ["serve", str(repository), "--port", str(self.port), *options])
        assert result.exit_code == 0, result.output
        self.server = made[0]
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.failures = Failures(self.thread)
        logging.getLogger().addHandler(self.failures)
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < deadline, "The server does not start."
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(40)
        logging.getLogger().removeHandler(self.failures)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def server(served_repository, site):
    server = LocalServer(
        served_repository,
        *("--allowed-image-hosts", f"public,localhost:{site.port}"),
        *("--served-model-name", "small", "--image-timeout", "2", "--max-images", "3", "--max-boxes", "50"),
        *("--max-image-bytes", str(MAX_IMAGE_BYTES), "--max-image-side", "2000"),
        *("--max-request-bytes", "2000000", "--max-concurrent-requests", str(MAX_REQUESTS)),
    )
    yield server
    server.stop()
    # No request of the tests caused an unexpected error.
    assert not server.failures.found, server.failures.found


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def large_picture():
    """The start of a PNG file that promises 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
