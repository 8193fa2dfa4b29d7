"""The command `mgllava serve` before the server starts, and the example client."""

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from mgllava.cli import app
from mgllava.serving import server

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--allowed-image-hosts", "http://a"], "--allowed-image-hosts"),
        (["--max-images", "0"], "--max-images"),
        (["--log-level", "loud"], "--log-level"),
        (["--chat-template-kwargs", "[]"], "--chat-template-kwargs"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs must be a JSON object"),
        *[
            (["--chat-template-kwargs", f'{{"{name}": 1}}'], f"must hold variables of the template, got {name}")
            for name in (
                *("add_generation_prompt", "chat_template", "conversation", "continue_final_message", "messages"),
                *("processor", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
                *("sanitize_control_tokens", "tokenize", "tools"),
            )
        ],
        (["--allowed-hosts", "http://a"], "--allowed-hosts"),
        *[(["--api-key", "a", "--api-key", key], "--api-key must not be empty") for key in ("", " ")],
        *[(["--default-seed", str(seed)], "must have 64 bits") for seed in (2**63, -(2**63) - 1)],
        (["--engine-options", "{}"], "--engine-options must be left out without `--engine vllm`"),
        (["--max-pixels", "-1"], "--max-pixels"),
        (["--dtype", "floof"], "floof"),
        (["--image-timeout", "nan"], "--image-timeout"),
        (["--bits", "3"], "--bits must be 4 or 8, got 3"),
    ],
)
def test_bad_option_is_one_message(repository, options, message):
    result = CliRunner().invoke(app, ["serve", str(repository), *options])
    assert result.exit_code == 1 and message in " ".join(result.output.split()) and "Traceback" not in result.output


@pytest.fixture
def start(stand_in_path, monkeypatch):
    """Run the command up to its HTTP server; return the application and the options of uvicorn."""
    started = []
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: started.append((app, options)))

    def run(*options, model=stand_in_path):
        result = CliRunner().invoke(app, ["serve", str(model), *map(str, options)])
        assert result.exit_code == 0, result.output
        return started.pop()

    return run


def test_where_and_how_the_server_listens(start):
    """On SIGTERM, answers have 30 seconds to finish, as docs/serving.md says."""
    _, options = start()
    expected = {"host": "localhost", "port": 8000, "log_level": "info", "timeout_graceful_shutdown": 30}
    assert {name: options[name] for name in expected} == expected
    _, options = start("--host", "0.0.0.0", "--port", 80)
    assert (options["host"], options["port"]) == ("0.0.0.0", 80)
    assert issubclass(options["http"], server.H11Protocol)


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        ("folder/", [], "folder"),
        ("folder", ["--served-model-name", "mine"], "mine"),
        ("org/model", [], "org/model"),
    ],
)
def test_the_model_is_called_by_its_folder_or_id(start, tmp_path, monkeypatch, model, options, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    served, _ = start(*options, model=model)
    client = TestClient(served, base_url="http://localhost")
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == name and entry["max_model_len"] == client.get(f"/v1/models/{name}").json()["max_model_len"]


def test_hosts_keys_and_pages_are_those_of_the_options(start, monkeypatch):
    monkeypatch.setenv("MGLLAVA_API_KEY", "secret")
    served, _ = start("--host", "10.0.0.1", "--allowed-hosts", "a.test", "--enable-cors")
    headers = {"Authorization": "Bearer secret", "Origin": "http://page.test"}
    for host, status in (("10.0.0.1", 200), ("a.test", 200), ("b.test", 403)):
        answer = TestClient(served, base_url=f"http://{host}").get("/v1/models", headers=headers)
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")
    assert TestClient(served, base_url="http://localhost").get("/v1/models").status_code == 401
    monkeypatch.delenv("MGLLAVA_API_KEY")
    answer = TestClient(start()[0], base_url="http://localhost").get("/v1/models", headers=headers)
    assert answer.status_code == 200 and "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("level", ["error", "INFO"])
def test_log_level_is_that_of_this_package_and_transformers(start, level):
    loggers = [logging.getLogger(name) for name in ("transformers", "mgllava")]
    before = [logger.level for logger in loggers]
    try:
        start("--log-level", level)
        assert [logger.level for logger in loggers] == [getattr(logging, level.upper())] * 2
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


def test_the_server_may_open_as_many_files_as_the_system_allows(start, monkeypatch):
    """Even clients that send nothing hold a connection for a while."""
    resource, limits = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda *arguments: limits.append(arguments))
    start()
    assert limits == [(resource.RLIMIT_NOFILE, (1000, 1000))]


def ask(served, **body):
    body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 8, "temperature": 2, **body}
    answer = TestClient(served, base_url="http://localhost").post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_seed_of_requests_without_one(start, stand_in):
    served, _ = start("--default-seed", -(2**63))
    assert ask(served) == ask(served) == ask(served, seed=-(2**63)) != ask(served, seed=1)
    served, _ = start()
    assert len({str(ask(served)) for _ in range(4)}) > 1


def test_beams_are_those_of_the_model_alone(start, stand_in):
    model, processor = stand_in
    options = {"max_new_tokens": 2, "num_beams": 3, "do_sample": False}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Hello."}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    served, _ = start()
    body = {"generation_config": '{"num_beams": 3}', "max_tokens": 2, "temperature": 0}
    (choice,) = ask(served, **body)
    assert choice["message"]["content"] == processor.decode(output, skip_special_tokens=True).lstrip()


def test_variables_of_the_chat_template(start, stand_in):
    _, processor = stand_in
    processor.chat_template = "{{ manner or '' }}" + processor.chat_template
    body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}

    def length(*options):
        client = TestClient(start(*options)[0], base_url="http://localhost")
        return client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    assert length("--chat-template-kwargs", '{"manner": "one two three"}') > length()


def test_detector_is_loaded_before_the_first_request(served_repository, monkeypatch):
    processors, load = [], server.load

    def load_and_note(*arguments, **options):
        model, processor = load(*arguments, **options)
        processors.append(processor)
        return model, processor

    monkeypatch.setattr(server, "load", load_and_note)
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: None)
    result = CliRunner().invoke(app, ["serve", str(served_repository)])
    assert result.exit_code == 0, result.output
    assert processors[0]._box_detector is not None


def test_example_client(server):
    command = [sys.executable, ROOT / "examples" / "serve_client.py", f"{server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens in the prompt, 100 in the answer" in done.stdout


def test_connections_without_a_whole_head_are_closed(server, monkeypatch):
    """A fast sibling of `test_silent_clients_are_disconnected`."""
    monkeypatch.setattr("mgllava.serving.server.HEAD_TIMEOUT", 0.3)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def connect(data):
        connection = socket.create_connection(("localhost", server.port), timeout=20)
        connection.sendall(data)
        return connection

    def receive(connection):
        with connection:
            return connection.recv(1000)

    waiting = [connect(b""), connect(head)]
    with connect(head + b"Content-Length: 2\r\n\r\n{") as slow:
        assert [receive(connection) for connection in waiting] == [b"", b""]
        slow.settimeout(0.4)
        with pytest.raises(TimeoutError):
            slow.recv(1000)
        slow.settimeout(20)
        slow.sendall(b"}")  # its head was there in time
        assert slow.recv(1000).startswith(b"HTTP/1.1 400 ")
        slow.sendall(head)  # the next one has as long
        while slow.recv(1000):
            pass
