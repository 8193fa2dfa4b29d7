"""Answer several prompts at once: `python examples/batch.py [--model FOLDER_OR_HUB_ID]`.

A batch may mix prompts with one image, with several and with none. Each prompt gets the same answer as alone.
The small model was trained with one image per prompt, so the first two answers are its best.
"""

from pathlib import Path

from PIL import Image
from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava  # noqa: F401  (registers MG-LLaVA with the Auto classes)

SHAPES = Image.open(Path(__file__).parent / "shapes.jpg")
WHOLE = {"type": "image", "image": SHAPES}
RIGHT_PART = {"type": "image", "image": SHAPES.crop((100, 0, 320, 240))}
PROMPTS = [
    [WHOLE, {"type": "text", "text": "Is there an orange heart?"}],
    [RIGHT_PART, {"type": "text", "text": "Is there an orange heart?"}],
    [WHOLE, RIGHT_PART, {"type": "text", "text": "Is there a pink star?"}],
    [{"type": "text", "text": "What color is the square?"}],
]


def main() -> None:
    name = model_name(__doc__)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(name)

    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in PROMPTS],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},  # answers start after the last column
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answers = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    for content, length, answer in zip(PROMPTS, inputs["attention_mask"].sum(dim=1).tolist(), answers, strict=True):
        print(f"{content[-1]['text']}  ({len(content) - 1} images, {length} tokens)\n    {answer}")


if __name__ == "__main__":
    main()
