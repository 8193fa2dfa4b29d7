"""Print the answer of a model of the toy family that is loaded by its own code, where the package is missing."""

import sys

sys.modules["mgllava"] = None

from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

folder, image = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(Image.open(image), "Q: <image>\nHello A:", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
