"""Convert a checkpoint with the command, and answer questions in a new process."""

import json

from tests import processes
from tests.golden_cases import GOLDEN, case

ANSWER = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
import mgllava

repository, questions = json.loads(sys.argv[1])
model = AutoModel.from_pretrained(repository, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(repository, backend="pil")
answers = []
for image, prompt, detections in questions:
    inputs = processor(Image.open(image), prompt, boxes=[detections], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    answers.append(output[0, inputs["input_ids"].shape[1]:].tolist())
print(json.dumps(answers))
"""


def test_converted_model_gives_the_original_answers_in_a_new_process(tmp_path):
    log = tmp_path / "log.txt"
    convert = (
        *("-m", "mgllava", "convert"),
        *("--checkpoint", GOLDEN / "xtuner" / "iter_10.pth", "--llm", GOLDEN / "llm"),
        *("--vision-tower", GOLDEN / "clip", "--high-res-tower", GOLDEN / "convnext"),
        *("--prompt-template", "vicuna", "--output", tmp_path / "model"),
    )
    assert processes.run(*convert, output=log) == 0, log.read_text()
    cases, questions = [case(name) for name in ("portrait_odd", "square_empty")], []
    for golden in cases:
        detections = {"boxes": golden["raw_boxes"], "labels": golden["raw_labels"], "scores": golden["raw_scores"]}
        questions.append([str(GOLDEN / golden["image"]), golden["prompt"], detections])
    answer = ("-c", ANSWER, json.dumps([str(tmp_path / "model"), questions]))
    assert processes.run(*answer, output=log) == 0, log.read_text()
    assert json.loads(log.read_text().splitlines()[-1]) == [golden["generated_ids"] for golden in cases]
