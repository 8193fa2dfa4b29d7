"""A running server of each family answers like the model alone: two images, text, streams, many requests at once."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.hub.repositories import save_slime
from tests.serving.conftest import Server
from tests.serving.requests import as_data_url, image, text, user

# Later tokens of the random SliME are bytes of no character, of which a stream and a whole text may make other marks.
TOKENS = 3
QUESTION = "What is it?"
WIDE, TALL = (Image.linear_gradient("L").resize(size).convert("RGB") for size in ((120, 50), (40, 150)))
CASES = {"two images": (WIDE, TALL), "one image": (TALL,), "text": ()}


@pytest.fixture(scope="module", params=["mgllava", "slime"])
def served(request, tmp_path_factory):
    """The model folder of a family, a client of its server, and what an image needs besides."""
    if request.param == "mgllava":
        folder, server = (request.getfixturevalue(name) for name in ("served_repository", "server"))
    else:
        folder = save_slime(tmp_path_factory.mktemp("slime") / "model")
        server = Server(folder, folder.parent / "log.txt", "--served-model-name", "small")
        server.wait()
        request.addfinalizer(server.stop)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    return folder, client, {"boxes": [[0, 0, 30, 40]]} if request.param == "mgllava" else {}


@pytest.fixture(scope="module")
def alone(served):
    """Answers of the model without a server."""
    folder, _, extra = served
    model, processor = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(folder),
    )

    def answer(pictures):
        blocks = [{"type": "image", "image": picture, **extra} for picture in pictures]
        conversation = [user(*blocks, text(QUESTION))] if blocks else [{"role": "user", "content": QUESTION}]
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    answers = {name: answer(pictures) for name, pictures in CASES.items()}
    assert len(set(answers.values())) > 1
    return answers


def ask(served, name, **options):
    _, client, extra = served
    content = [*(image(as_data_url(picture), **extra) for picture in CASES[name]), text(QUESTION)]
    messages = [{"role": "user", "content": content}]
    options = {"model": "small", "max_tokens": TOKENS, "temperature": 0, **options}
    answer = client.chat.completions.create(messages=messages, **options)
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices).strip()
    return answer.choices[0].message.content.strip()


def test_answers_are_those_of_the_model_alone(served, alone):
    assert {name: ask(served, name) for name in CASES} == alone


def test_streams_at_once_are_those_of_the_model_alone(served, alone):
    names = [*CASES] * 3
    with ThreadPoolExecutor(len(names)) as threads:
        streamed = list(threads.map(lambda name: ask(served, name, stream=True), names))
    assert streamed == [alone[name] for name in names]


def test_boxes_are_refused_by_a_model_without_them(served):
    _, client, extra = served
    if extra:
        pytest.skip("this model takes boxes")
    content = [image(as_data_url(WIDE), boxes=[[1, 2, 3, 4]]), text(QUESTION)]
    for options in (
        {"messages": [user(*content)]},
        {"messages": [user(content[0] | {"boxes": None}, content[1])], "extra_body": {"boxes": [[[1, 2, 3, 4]]]}},
    ):
        with pytest.raises(openai.BadRequestError, match="must be absent: this model has no boxes"):
            client.chat.completions.create(model="small", **options)
