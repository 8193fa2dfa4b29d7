"""The main job as a user does it: the command, then new processes that know nothing of it."""

import json
import subprocess
import sys

import pytest

from tests.golden_cases import GOLDEN, case

ANSWER = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
import mgllava

repository, image, prompt, detections = json.loads(sys.stdin.read())
model = AutoModel.from_pretrained(repository, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(repository, backend="pil")
inputs = processor(Image.open(image), prompt, boxes=[detections], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
new = output[:, inputs["input_ids"].shape[1]:]
print(json.dumps({"ids": new[0].tolist(), "text": processor.post_process_image_text_to_text(new)[0]}))
"""


def run(*command, **kwargs):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "model"
    run(
        *("-m", "mgllava", "convert"),
        *("--checkpoint", GOLDEN / "xtuner" / "iter_10.pth", "--llm", GOLDEN / "llm"),
        *("--vision-tower", GOLDEN / "clip", "--high-res-tower", GOLDEN / "convnext"),
        *("--prompt-template", "vicuna", "--output", output),
    )
    return output


@pytest.mark.parametrize("name", ["portrait_odd", "square_empty"])
def test_command_then_new_process_gives_the_original_answer(converted, name):
    golden = case(name)
    detections = {"boxes": golden["raw_boxes"], "labels": golden["raw_labels"], "scores": golden["raw_scores"]}
    request = json.dumps([str(converted), str(GOLDEN / golden["image"]), golden["prompt"], detections])
    answer = json.loads(run("-c", ANSWER, input=request).splitlines()[-1])
    assert answer["ids"] == golden["generated_ids"]
    assert isinstance(answer["text"], str)
