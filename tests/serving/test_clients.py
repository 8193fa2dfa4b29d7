"""Other clients get the same answers as OpenAI's: to text, to an image, to boxes, and in a stream."""

import base64
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOXES = [[10, 20, 110, 70], [5, 5, 60, 90]]
QUESTION = "What is it?"
TOKENS = 8


def parts(data_url, **extra):
    return [{"type": "image_url", "image_url": {"url": data_url, **extra}}, {"type": "text", "text": QUESTION}]


@pytest.fixture(scope="module")
def expected(client, data_url):
    """What OpenAI's client gets: answers to text, to an image, and to an image with boxes."""

    def ask(content):
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(model="small", messages=messages, max_tokens=TOKENS, temperature=0)
        return answer.choices[0].message.content

    image, text = parts(data_url)
    answers = {"text": ask(QUESTION), "image": ask([image, text]), "boxes": ask([{**image, "boxes": BOXES}, text])}
    assert len(set(answers.values())) == 3
    return answers


def test_openai(client, expected, data_url):
    """What `test_server.py`, which uses this client too, does not cover."""
    options = {"model": "small", "max_output_tokens": TOKENS, "temperature": 0}
    image = {"type": "input_image", "image_url": data_url, "boxes": BOXES}
    content = [image, {"type": "input_text", "text": QUESTION}]
    assert client.responses.create(input=QUESTION, **options).output_text == expected["text"]
    response = client.responses.create(input=[{"role": "user", "content": content}], **options)
    assert response.output_text == expected["boxes"]
    # An answer is sent back unchanged.
    again = [{"role": "user", "content": QUESTION}, *response.output, {"role": "user", "content": "And?"}]
    assert client.responses.create(input=again, **options).output_text
    with client.responses.stream(input=QUESTION, **options) as stream:
        events = list(stream)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == events[-1].response.output_text == expected["text"]
    chat = {"model": "small", "max_tokens": TOKENS, "temperature": 0}
    messages = [{"role": "user", "content": parts(data_url)}]
    answer = client.chat.completions.create(messages=messages, extra_body={"boxes": [BOXES]}, **chat)
    assert answer.choices[0].message.content == expected["boxes"]
    turns = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(messages=turns, **chat).choices[0].finish_reason


def test_requests_of_the_page(server, tmp_path, capsys):
    """What docs/serving.md prints for openai and curl."""
    coffee = ROOT / "examples" / "coffee.jpg"
    page = (ROOT / "docs" / "serving.md").read_text()
    page = page.replace("http://localhost:8000", server.url).replace('"mg-llava-vicuna7b"', '"small"')
    data_url = "data:image/jpeg;base64," + base64.b64encode(coffee.read_bytes()).decode()
    page = page.replace("https://example.com/table.jpg", data_url)
    (python,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (curl,) = re.findall(r"^```\n(curl .*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(python, {})
    assert capsys.readouterr().out.strip()
    if shutil.which("curl"):
        shutil.copy(coffee, tmp_path / "table.jpg")
        done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("data: [DONE]\n\n"), done.stdout


def test_litellm(server, expected, data_url):
    litellm = pytest.importorskip("litellm")
    options = {
        "model": "openai/small",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "max_tokens": TOKENS,
        "temperature": 0,
    }

    def ask(content, **more):
        return litellm.completion(messages=[{"role": "user", "content": content}], **options, **more)

    assert ask(QUESTION).choices[0].message.content == expected["text"]
    assert ask(parts(data_url)).choices[0].message.content == expected["image"]
    assert ask(parts(data_url, boxes=BOXES)).choices[0].message.content == expected["boxes"]
    answer = ask(parts(data_url), extra_body={"boxes": [BOXES], "top_k": 5})
    assert answer.choices[0].message.content == expected["boxes"]
    chunks = ask(QUESTION, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected["text"]


def test_langchain(server, expected, data_url):
    langchain_openai = pytest.importorskip("langchain_openai")
    options = {"model": "small", "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0}
    model = langchain_openai.ChatOpenAI(max_tokens=TOKENS, **options)

    def ask(content, model=model):
        return model.invoke([{"role": "user", "content": content}]).text

    block = {"type": "image", "base64": data_url.partition(",")[2], "mime_type": "image/png"}
    question = {"type": "text", "text": QUESTION}
    assert ask(QUESTION) == expected["text"]
    assert ask(parts(data_url)) == ask([block, question]) == expected["image"]
    assert ask(parts(data_url, boxes=BOXES)) == expected["boxes"]
    # LangChain removes unknown keys from its own image blocks before it sends them.
    assert ask([block, question], model.bind(extra_body={"boxes": [BOXES]})) == expected["boxes"]
    pieces = model.stream([{"role": "user", "content": QUESTION}])
    assert "".join(piece.text for piece in pieces) == expected["text"]


def test_llama_index(server, expected, data_url):
    openai_like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock

    options = {"model": "small", "api_base": f"{server.url}/v1", "api_key": "none", "is_chat_model": True}
    model = openai_like.OpenAILike(max_tokens=TOKENS, temperature=0, context_window=4096, **options)
    with_image = [ChatMessage(role="user", blocks=[ImageBlock(url=data_url), TextBlock(text=QUESTION)])]
    assert model.chat([ChatMessage(role="user", content=QUESTION)]).message.content == expected["text"]
    assert model.chat(with_image).message.content == expected["image"]
    assert model.chat(with_image, extra_body={"boxes": [BOXES]}).message.content == expected["boxes"]
    pieces = model.stream_chat([ChatMessage(role="user", content=QUESTION)])
    assert "".join(piece.delta for piece in pieces) == expected["text"]
    assert model.complete(QUESTION).text == expected["text"]
