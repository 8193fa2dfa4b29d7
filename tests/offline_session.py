"""Use local model folders in a process that refuses network access and records each attempt.

test_offline.py runs it as `python -m tests.offline_session FOLDER`. The last line of its output is a JSON list of the
attempts (function, address, stack), since libraries may catch the error.
"""

import json
import socket
import sys
import traceback
from pathlib import Path

ATTEMPTS: list[list[str]] = []


def refuse(name, original):
    def refused(*arguments, **kwargs):
        is_socket = bool(arguments) and isinstance(arguments[0], socket.socket)
        if is_socket and arguments[0].family == socket.AF_UNIX:  # connections between processes of this machine
            return original(*arguments, **kwargs)
        ATTEMPTS.append(
            [name, str(arguments[1:] if is_socket else arguments), "".join(traceback.format_stack()[-12:])]
        )
        raise OSError("this process has no network")

    return refused


for _owner, _names in (
    (socket.socket, ("connect", "connect_ex", "sendto")),
    (socket, ("getaddrinfo", "gethostbyname")),
):
    for _name in _names:
        setattr(_owner, _name, refuse(_name, getattr(_owner, _name)))

import torch  # noqa: E402  (after the sockets were replaced)
from PIL import Image  # noqa: E402
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from mgllava import BoxDetector, MGLlavaConfig  # noqa: E402
from mgllava.cli import app  # noqa: E402
from tests.golden_cases import GOLDEN  # noqa: E402
from tests.ram_plus.golden import SOURCES  # noqa: E402

OWLV2 = GOLDEN.parent / "golden_ram" / "owlv2"
COFFEE = GOLDEN.parents[1] / "examples" / "coffee.jpg"


def command(name: str, *arguments: object, said: str | None = None, **options: object) -> None:
    named = [part for option, value in options.items() for part in ("--" + option.replace("_", "-"), value)]
    result = CliRunner().invoke(app, [name, *map(str, [*arguments, *named])], input=said, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def main(folder: Path) -> None:
    repository, tagger = folder / "model", folder / "tagger"
    command(
        "convert",
        checkpoint=GOLDEN / "xtuner" / "iter_10.pth",
        llm=GOLDEN / "llm",
        vision_tower=GOLDEN / "clip",
        high_res_tower=GOLDEN / "convnext",
        prompt_template="vicuna",
        output=repository,
    )
    command("convert-ram-plus", **SOURCES, output=tagger)

    assert isinstance(AutoConfig.from_pretrained(repository), MGLlavaConfig)
    model, processor = AutoModel.from_pretrained(repository), AutoProcessor.from_pretrained(repository)
    AutoImageProcessor.from_pretrained(repository)
    processor.box_detector = BoxDetector(tagger, OWLV2)
    content = [{"type": "image", "path": str(COFFEE)}, {"type": "text", "text": "What is on the table?"}]
    messages = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    answers = []
    for turn in ("before", "after"):
        inputs = processor.apply_chat_template(messages, **options)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(processor.post_process_image_text_to_text(output)[0])
        if turn == "before":  # load again what was saved, with the box detector
            model.save_pretrained(folder / "saved")
            processor.save_pretrained(folder / "saved")
            model = AutoModel.from_pretrained(folder / "saved")
            processor = AutoProcessor.from_pretrained(folder / "saved")
    assert answers[0] == answers[1]
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    assert answer(text=messages, max_new_tokens=2, do_sample=False)

    (folder / "images").mkdir()
    with Image.open(COFFEE) as coffee:
        coffee.resize((90, 60)).save(folder / "images" / "coffee.png")
    command("detect", folder / "images", processor=folder / "saved", output=folder / "boxes.json")
    # The check of the exported folder would run in a process that has a network.
    command("export", folder / "saved", "--no-verify", output=folder / "exported")
    options = {"image": folder / "images" / "coffee.png", "save_boxes": folder / "drawn"}
    command("chat", folder / "exported", said="What is it?\nEXIT\n", max_new_tokens=2, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print(json.dumps(ATTEMPTS))
