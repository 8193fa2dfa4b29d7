"""SliME in vLLM: it keeps the tokens and gives the answers of `generate`, with its router and without."""

import pytest

pytest.importorskip("vllm")

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError as VLLMError

from mgllava import SlimeImageProcessor, SlimeProcessor
from mgllava.processing import SLIME_CHAT_TEMPLATES
from tests.tiny import NUM_FUSED_TOKENS, NUM_LOCAL_TOKENS, tiny_slime

from .conftest import MODEL, answer, ask, picture

pytestmark = pytest.mark.slow
GREEDY = SamplingParams(temperature=0, max_tokens=12)
TRAINED = MODEL.parent / "slime_model"
# A size of attention heads that vLLM has on CPUs.
TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save the same model with and without a router."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    size = {"height": 42, "width": 42}
    processor = SlimeProcessor(
        SlimeImageProcessor(size={"shortest_edge": 42}, crop_size=size),
        tokenizer,
        num_global_tokens=NUM_FUSED_TOKENS,
        num_local_tokens=NUM_LOCAL_TOKENS,
        chat_template=SLIME_CHAT_TEMPLATES["v1"],
    )
    text = {**TEXT, "vocab_size": 512, "max_position_embeddings": 1024}
    ids = {"image_token_id": processor.image_token_id, "unpadded_vocab_size": 511}
    saved = []
    for top_p in (0.6, 1.0):
        saved.append(tmp_path_factory.mktemp("slime"))
        model = tiny_slime(text_config=text, router_top_p=top_p, **ids)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(saved[-1])
        processor.save_pretrained(saved[-1])
    return saved


@pytest.mark.parametrize("kind", ["routed", "all tokens", "trained"])
def test_tokens_and_answers_of_generate(folders, generate, kind):
    folder, same = {"routed": folders[:1] * 2, "all tokens": folders, "trained": [TRAINED] * 2}[kind]
    options = {"hf_overrides": {"router_top_p": 1.0}} if kind == "all tokens" else {}
    llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_num_seqs=8, **options)
    first, second = picture(1), picture(2, (300, 60))
    asked = [
        [ask("What is in the picture?", (first, None))],
        [ask("What color?", (second, None))],
        [ask("How many circles are left of the red rectangle?", (second, None))],
        [ask("Compare.", (second, None), (first, None))],
        [ask("What?", (first, None)), answer("a circle"), ask("Sure?", (picture(3, (70, 200)), None))],
        [ask("Hello.")],
    ]
    expected = [generate(conversation, folder=same, max_new_tokens=12) for conversation in asked]
    placeholder = AutoTokenizer.from_pretrained(MODEL).convert_tokens_to_ids("<image>")
    counts = [prompt.count(placeholder) for prompt, _ in expected]
    if kind == "trained":
        assert counts[1] != counts[2], "the same image with another text"
    for _ in range(2):
        for output, (prompt, tokens) in zip(llm.chat(asked, GREEDY, use_tqdm=False), expected, strict=True):
            assert output.prompt_token_ids == prompt
            assert [token for token in output.outputs[0].token_ids if token != 2] == tokens
    with pytest.raises(VLLMError, match="takes no boxes"):
        llm.chat([ask("What?", (first, [[1, 2, 30, 40]]))], GREEDY, use_tqdm=False)
