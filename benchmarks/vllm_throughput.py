"""Compare the throughput of `mgllava serve` with its two engines: requests that arrive at the same time.

Each server runs alone, in a process of its own, with the small model of this git repository. Requests have one image
with 0 to 5 boxes; a few are sent first, which are not counted. Answers are greedy, and must be equal in float32.
Usage: `python benchmarks/vllm_throughput.py` in an environment with vLLM (docs/vllm.md).
"""

import asyncio
import base64
import io
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import openai
import PIL.Image
import typer
from report import report

MODEL = Path(__file__).parents[1] / "small_world" / "model"
START_SECONDS = 300


def make_requests(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Make messages with one image each, and 0 to 5 boxes."""
    generator = np.random.default_rng(seed)
    conversations = []
    for index in range(count):
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).resize((256, 192), PIL.Image.Resampling.BICUBIC).save(file, "PNG")
        corners = np.sort(generator.integers(0, 190, (index % 6, 2, 2)), axis=1).reshape(-1, 4)
        boxes = (corners + np.array([0, 0, 2, 2])).tolist()
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}, "boxes": boxes}
        conversations.append(
            [{"role": "user", "content": [image, {"type": "text", "text": "What is in the picture?"}]}]
        )
    return conversations


@contextmanager
def server(*options: str) -> Iterator[int]:
    """Start `mgllava serve`, wait until it answers, and yield its port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mgllava", "serve", str(MODEL), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--allowed-image-hosts", "none", *options], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server with {options} did not start.") from None
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(60)


async def ask(port: int, conversations: list[list[dict[str, Any]]], most_tokens: int) -> tuple[float, int, list[str]]:
    """Send all requests at once; return the seconds, the number of generated tokens, and the answers."""
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=1000)
    start = time.perf_counter()
    found = await asyncio.gather(
        *(
            client.chat.completions.create(model=MODEL.name, messages=messages, temperature=0, max_tokens=most_tokens)
            for messages in conversations
        )
    )
    seconds = time.perf_counter() - start
    tokens = sum(answer.usage.completion_tokens for answer in found)
    return seconds, tokens, [answer.choices[0].message.content for answer in found]


def main(
    requests: Annotated[int, typer.Option(help="requests that arrive at once")] = 64,
    tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 64,
    dtype: Annotated[str, typer.Option(help="of both models")] = "float32",
    engine_options: Annotated[
        str, typer.Option(help="options of vLLM")
    ] = '{"max_num_seqs": 64, "enforce_eager": true}',
) -> None:
    """Measure both servers, and print and store the table."""
    engines = {
        "transformers": ["--max-concurrent-requests", str(max(requests, 32))],
        "vllm": ["--engine", "vllm", "--engine-options", engine_options],
    }
    rows: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    for engine, options in engines.items():
        with server("--dtype", dtype, *options) as port:
            asyncio.run(ask(port, make_requests(4, seed=1), tokens))
            seconds, generated, answers = asyncio.run(ask(port, make_requests(requests, seed=0), tokens))
        texts.append([answer.lstrip() for answer in answers])  # vLLM keeps the space before an answer
        rows.append({"engine": engine, "seconds": seconds, "requests/s": requests / seconds, "tokens": generated})
    for row, answers in zip(rows, texts, strict=True):
        row["times transformers"] = rows[0]["seconds"] / row["seconds"]
        row["equal answers"] = sum(ours == theirs for ours, theirs in zip(texts[0], answers, strict=True))
    if dtype == "float32" and any(row["equal answers"] < requests for row in rows):
        raise RuntimeError(f"The answers of both engines must be equal in float32, got {rows}.")
    title = f"{requests} requests at once, small model, {dtype}"
    report("vllm", title, rows)


if __name__ == "__main__":
    typer.run(main)
