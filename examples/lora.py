"""Teach a model an answer with LoRA: `python examples/lora.py [--model FOLDER_OR_HUB_ID]`.

A model with its own code (`trust_remote_code=True`) does not need mgllava installed.
"""

from contextlib import suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_model import ROOT, model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

with suppress(ImportError):
    import mgllava  # noqa: F401  (for models without code)

ADAPTER = ROOT / "demo-output" / "lora"
PICTURE = Path(__file__).parent / "shapes.jpg"
CONVERSATION = [
    {
        "role": "user",
        "content": [
            {"type": "image", "path": str(PICTURE), "boxes": [[228, 49, 303, 122], [201, 170, 227, 193]]},
            {"type": "text", "text": "Where is the treasure?"},
        ],
    },
    {"role": "assistant", "content": "Below the cyan square."},
]


def answer(model, processor) -> str:
    inputs = processor.apply_chat_template(
        CONVERSATION[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.eval().generate(**inputs, max_new_tokens=30, do_sample=False)
    return processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]


def main() -> None:
    name = model_name(__doc__)
    load = {"dtype": torch.float32, "device_map": "auto", "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    base = AutoModelForImageTextToText.from_pretrained(name, **load)
    print("Before:", answer(base, processor))

    torch.manual_seed(0)
    layers = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
    model.print_trainable_parameters()

    batch = processor.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    ).to(base.device)
    # Only the tokens of the answer are learned.
    labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    for step in range(25):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")

    print("After: ", answer(model, processor))
    model.save_pretrained(ADAPTER)
    # Load the adapter onto a fresh copy of the model.
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(name, **load), ADAPTER)
    print("Loaded:", answer(again, processor))


if __name__ == "__main__":
    main()
