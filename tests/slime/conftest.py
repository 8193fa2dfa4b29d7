"""The golden checkpoint as a model."""

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig

from mgllava import SlimeConfig, SlimeForConditionalGeneration, SlimeImageProcessorPil, SlimeProcessor
from mgllava.conversion.slime.processor import make_processor
from mgllava.model_files.vocabulary import load_tokenizer
from mgllava.processing import SLIME_CHAT_TEMPLATES
from tests import golden_cases
from tests.slime.golden import GOLDEN, VOCAB_SIZE, load_checkpoint
from tests.tiny import tiny_slime


@pytest.fixture(scope="session")
def golden_model():
    """Build the golden model; arguments are values of its configuration."""

    def build(**values):
        text_config = LlamaConfig.from_pretrained(GOLDEN / "checkpoint")
        text_config.vocab_size = VOCAB_SIZE + 4
        vision_config = CLIPVisionConfig.from_pretrained(GOLDEN / "checkpoint" / "vision_tower")
        vision_config.num_hidden_layers -= 1
        values = {"separator_token_id": 15, "num_local_queries": 16, **values}
        config = SlimeConfig(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=VOCAB_SIZE,
            unpadded_vocab_size=VOCAB_SIZE,
            **values,
        )
        model = SlimeForConditionalGeneration(config).float().eval()
        weights = load_checkpoint()
        if config.num_local_queries is None:
            weights = {name: value for name, value in weights.items() if "local_compressor" not in name}
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert not missing, missing
        return model

    return build


@pytest.fixture(scope="session")
def slime(golden_model):
    return golden_model()


@pytest.fixture(scope="session")
def slime_processor():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "checkpoint")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return SlimeProcessor(
        SlimeImageProcessorPil(), tokenizer, num_local_tokens=16, chat_template=SLIME_CHAT_TEMPLATES["v1"]
    )


@pytest.fixture(scope="session")
def slime_folder(tmp_path_factory):
    """A small SliME with the words of the golden set, whose gate is at zero as in a new model."""
    folder = tmp_path_factory.mktemp("slime") / "model"
    sizes = {"vocab_size": 448, "max_position_embeddings": 2048, "initializer_range": 0.1}
    model = tiny_slime(
        text_config=sizes, image_token_id=golden_cases.IMAGE_ID, unpadded_vocab_size=golden_cases.VOCAB_SIZE
    )
    model.save_pretrained(folder)
    make_processor(model.config, load_tokenizer(golden_cases.GOLDEN / "llm"), {}, "v1").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_noise():
    torch.manual_seed(0)
