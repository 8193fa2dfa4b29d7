"""Answer conversations with vLLM's own backend for models of transformers, and the code in the model folder."""

import json
import sys

from vllm import LLM, SamplingParams

CODE = {"AutoConfig": "configuration_mgllava.MGLlavaConfig", "AutoModel": "modeling_mgllava.MGLlavaModel"}


def main(folder, file):
    with open(file) as stored:
        conversations = json.load(stored)
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=4,
        model_impl="transformers",
        trust_remote_code=True,
        hf_overrides={"auto_map": CODE},
    )
    assert "mgllava" not in sys.modules, "the code in the folder is used"
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    with open(file, "w") as answers:
        json.dump([(output.prompt_token_ids, list(output.outputs[0].token_ids)) for output in outputs], answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
