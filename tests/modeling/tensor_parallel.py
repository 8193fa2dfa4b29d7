"""One process of `test_devices.py`: compare a model split across processes with a whole one, from a model folder."""

import sys

import torch
from torch import distributed

from mgllava import MGLlavaForConditionalGeneration
from tests.tiny import tiny_inputs

inputs = tiny_inputs([[3], [], [1, 5]])
whole = MGLlavaForConditionalGeneration.from_pretrained(sys.argv[1])
split = MGLlavaForConditionalGeneration.from_pretrained(sys.argv[1], tp_plan="auto")
layer = split.model.language_model.layers[0]
for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
    assert 2 * weight.to_local().numel() == weight.numel()
with torch.no_grad():
    torch.testing.assert_close(split(**inputs).logits, whole(**inputs).logits, rtol=1e-4, atol=1e-4)
options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
assert split.generate(**inputs, **options).tolist() == whole.generate(**inputs, **options).tolist()
print("equal", flush=True)
distributed.barrier()
distributed.destroy_process_group()
