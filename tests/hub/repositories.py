"""Small model folders of every kind, as the package saves them."""

import shutil

from transformers import AutoTokenizer

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor, SlimeImageProcessor, SlimeProcessor
from mgllava.processing import CHAT_TEMPLATES, SLIME_CHAT_TEMPLATES
from tests.golden_cases import GOLDEN
from tests.tiny import IMAGE_SIZE, NUM_FUSED_TOKENS, NUM_LOCAL_TOKENS, tiny_model, tiny_slime

# Chat template and language model of each family.
FAMILIES = {"vicuna": "llama", "llama3": "llama", "phi3": "phi3", "yi": "llama"}


def save_family(folder, family, seed=0, **options):
    """Save a random model of a family with its processor, as after training."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llm")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.padding_side = "left"
    model = tiny_model(
        FAMILIES[family],
        text_config={"vocab_size": 448},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        unpadded_vocab_size=420,
        seed=seed,
    )
    model.generation_config.suppress_tokens = model.config.unused_token_ids
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = MGLlavaProcessor(
        MGLlavaImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        num_tokens_per_box=model.config.num_tokens_per_box,
        chat_template=CHAT_TEMPLATES[family],
    )
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def save_slime(folder):
    """Save a random SliME model with its processor."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llm")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.padding_side = "left"
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = tiny_slime(text_config={"vocab_size": 448}, image_token_id=image_token_id, unpadded_vocab_size=420)
    size = {"height": 42, "width": 42}
    processor = SlimeProcessor(
        SlimeImageProcessor(size={"shortest_edge": 42}, crop_size=size),
        tokenizer,
        num_global_tokens=NUM_FUSED_TOKENS,
        num_local_tokens=NUM_LOCAL_TOKENS,
        chat_template=SLIME_CHAT_TEMPLATES["v1"],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def as_hub_cache(folder, cache, repo_id, revisions):
    """Copy a folder into a cache of the Hub as if it was downloaded, with the names of its revisions."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    for revision, commit in revisions.items():
        if not (repository / "snapshots" / commit).exists():
            shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository
