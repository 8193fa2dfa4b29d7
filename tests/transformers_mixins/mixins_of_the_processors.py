"""`ProcessorTesterMixin` and `ImageProcessingTestMixin` of transformers on our processors."""

import tempfile
import unittest
import unittest.mock
from pathlib import Path

import PIL.Image
from transformers import AutoTokenizer

from mgllava import (
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    MGLlavaProcessor,
    RamPlusImageProcessor,
    RamPlusImageProcessorPil,
)
from mgllava.processing import CHAT_TEMPLATES
from tests.golden_cases import GOLDEN
from tests.transformers_mixins.source import mixins, skip

SMALL = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}

processing = mixins("test_processing_common")
image_processing = mixins("test_image_processing_common")


_PICTURE = "it downloads an image; test_backends_equivalence_batched makes its own"
_FOUR_CHANNELS = "images always become RGB; alpha is dropped, as in the original"
_KWARGS_CLASS = "it expects the class of the options in the file of the image processor; ours is in another file"


@skip(
    {
        "test_call_arguments_default_none": "a convention inside transformers; two of our options default to False",
        "test_get_num_multimodal_tokens_matches_processor_call": "the planned number assumes `box_limit` boxes",
        "test_processor_from_and_save_pretrained*": "saving sets `auto_map` on the saved object, as all remote code",
        "test_if_input_has_mismatching_tokens_and_mm_data": "it expects the error messages of transformers",
    }
)
class MGLlavaProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = MGLlavaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return MGLlavaImageProcessor(**SMALL)

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llm")
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        return tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 9, "chat_template": CHAT_TEMPLATES["vicuna"]}

    def prepare_videos_inputs(self, batch_size=None):
        return None  # the mixin passes them because the signature names them; they must be None

    def prepare_audio_inputs(self, batch_size=None):
        return None

    def setUp(self):
        # The images of the mixin are on the Hub.
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        PIL.Image.new("RGB", (50, 40), "teal").save(folder / "image.png")
        local = {"images": [str(folder / "image.png")] * 2}
        self.enterContext(unittest.mock.patch.dict(processing.MODALITY_INPUT_DATA, local))
        self.enterContext(unittest.mock.patch.object(processing, "url_to_local_path", lambda url: local["images"][0]))


_OF_IMAGE_PROCESSORS = {
    "test_backends_equivalence": _PICTURE,
    "test_call_numpy_4_channels": _FOUR_CHANNELS,
    "test_valid_kwargs_set": _KWARGS_CLASS,
}


class MGLlavaImageProcessingTester(image_processing.ImageProcessingTester):
    def _get_image_processing_classes(self):
        return {"torchvision": MGLlavaImageProcessor, "pil": MGLlavaImageProcessorPil}

    def __init__(self, parent):
        super().__init__(parent, **SMALL)

    def expected_output_image_shape(self, images):
        return 3, 42, 42


@skip(_OF_IMAGE_PROCESSORS)
class MGLlavaImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MGLlavaImageProcessingTester


class RamPlusImageProcessingTester(image_processing.ImageProcessingTester):
    def _get_image_processing_classes(self):
        return {"torchvision": RamPlusImageProcessor, "pil": RamPlusImageProcessorPil}

    def expected_output_image_shape(self, images):
        return 3, 384, 384


@skip(_OF_IMAGE_PROCESSORS)
class RamPlusImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = RamPlusImageProcessingTester
