"""Load a model in 4 bits: `python examples/four_bit.py [--model FOLDER_OR_HUB_ID]`.

`mgllava.quantization_config(4)` quantizes the language model and leaves the vision modules in 16 bits. `mgllava chat`
and other commands have the option `--bits 4`.
"""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava

PICTURE = Path(__file__).parent / "shapes.jpg"


def main() -> None:
    name = model_name(__doc__)
    whole = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.bfloat16, device_map="auto")
    print(f"16 bits: {whole.get_memory_footprint() / 1e6:,.2f} MB")
    del whole

    model = AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.bfloat16, device_map="auto", quantization_config=mgllava.quantization_config(4)
    )
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    print(f" 4 bits: {model.get_memory_footprint() / 1e6:,.2f} MB, with {len(quantized)} quantized layers")

    processor = AutoProcessor.from_pretrained(name)
    prompt = "USER: <image>\nWhere is the pink star? ASSISTANT:"
    inputs = processor(PICTURE, prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print("Answer: ", processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0])


if __name__ == "__main__":
    main()
