"""Use a model of the toy family in all ways, and print its answer.

test_families.py runs this with the toy family in the package.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner


def make_checkpoint(folder, llm):
    """Save a random model as a checkpoint of the toy format, for the tokenizer of `llm`."""
    from mgllava.modeling.modeling_toy import ToyConfig, ToyForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ToyConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": 2, **sizes},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    torch.manual_seed(0)
    weights = ToyForConditionalGeneration(config).state_dict()
    content = {"config": json.dumps(config.to_dict()), "state_dict": {f"toy.{k}": v for k, v in weights.items()}}
    torch.save(content, folder / "toy.pth")
    return folder / "toy.pth"


def run(*arguments):
    """Run a command of `mgllava`."""
    from mgllava.cli import app

    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def main(folder, llm):
    checkpoint = make_checkpoint(folder, llm)
    image = folder / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(image)

    model_folder = folder / "model"
    arguments = ("--llm", llm, "--prompt-template", "toy", "--output", model_folder)
    run("convert", "--checkpoint", checkpoint, *arguments)
    run("export", model_folder, "--output", folder / "exported", "--no-verify")
    written = sorted(path.name for path in (folder / "exported").glob("*.py"))
    assert written == [
        "image_text_processor_common.py",
        "images_common.py",
        "modeling_toy.py",
        "processing_toy.py",
        "text_chunks_common.py",
    ], written

    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    inputs = processor(Image.open(image), "Q: <image>\nHello A:", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    from mgllava.chat import ChatSession

    session = ChatSession(model, processor, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))
    session.add_image(image)
    assert session.ask("Hello").num_tokens > 0 and session.ask("Again").num_tokens > 0

    serve(model_folder)
    train(folder, model_folder, image)
    return answer


def serve(model_folder):
    """Send a request to the application that `mgllava serve` runs."""
    from unittest import mock

    import uvicorn
    from fastapi.testclient import TestClient

    applications = []
    with mock.patch.object(uvicorn, "run", lambda application, **options: applications.append(application)):
        run("serve", model_folder, "--device", "cpu")
    client = TestClient(applications[0], base_url="http://localhost")
    request = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    reply = client.post("/v1/chat/completions", json=request)
    assert reply.status_code == 200, reply.text
    with_boxes = {"type": "image_url", "image_url": {"url": "data:,"}, "boxes": [[0, 0, 5, 5]]}
    request["messages"] = [{"role": "user", "content": [with_boxes]}]
    assert client.post("/v1/chat/completions", json=request).status_code == 400


def train(folder, model_folder, image):
    """Train the projector for one step by a recipe."""
    turns = [{"from": "human", "value": "<image>\nHello"}, {"from": "gpt", "value": "Yes."}]
    (folder / "samples.json").write_text(json.dumps([{"id": "1", "image": image.name, "conversations": turns}]))
    recipe = {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "train": ["multi_modal_projector"],
        "data": {"samples": str(folder / "samples.json"), "images": str(folder)},
        "training": {
            **{"output_dir": str(folder / "trained"), "max_steps": 1, "per_device_train_batch_size": 1},
            **{"learning_rate": 0.01, "use_cpu": True, "report_to": "none"},
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run("train", folder / "recipe.yaml")
    before = AutoModelForImageTextToText.from_pretrained(model_folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder / "trained").state_dict()
    changed = {name.rpartition(".linear")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.multi_modal_projector"}, changed


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
