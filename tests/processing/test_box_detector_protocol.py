"""Detectors of users: what they are called with, what they may return, and that they are never replaced."""

import copy
import os
import pickle
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor, Owlv2Config, Owlv2ForObjectDetection

from mgllava import BoxDetector, MGLlavaImageProcessor, MGLlavaProcessor
from mgllava.box_files import open_detector
from mgllava.processing.image_text_processor_common import ProcessLock
from tests.tiny import IMAGE_SIZE, NUM_FUSED_TOKENS, tiny_model

from .detectors import OWLV2, WholePicture, boxes_from_worker, boxes_of
from .test_processing import golden_tokenizer, small

LABELS = ["cat", "dog"]


class Unpicklable(WholePicture):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Derived(BoxDetector):
    """Derives from the package's detector, and finds other boxes."""

    def detect(self, images, **kwargs):
        return [{"boxes": [[0, 0, 7, 7]], "labels": ["x"], "scores": [1.0]} for _ in images]


def picture(width=30, height=20, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


@pytest.fixture
def processor():
    processor = small()
    processor.box_detector = WholePicture()
    return processor


def turned(path):
    """Write a 30 x 20 image whose EXIF orientation turns it by 90 degrees."""
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("way", ["detect", "call"])
@pytest.mark.parametrize(
    "form", ["path", "str", "image", "list", "nested", "gray", "16 bit", "array", "batch", "float"]
)
def test_a_detector_is_given_a_list_of_upright_rgb_pictures(processor, form, way, tmp_path):
    given = {
        "path": turned(tmp_path / "a.png"),
        "str": str(turned(tmp_path / "a.png")),
        "image": picture(20, 30),
        "list": [picture(20, 30)],
        "nested": [[picture(20, 30)]],
        "gray": picture(20, 30).convert("LA"),
        "16 bit": PIL.Image.fromarray(np.full((30, 20), 0x8080, np.uint16)),
        "array": np.asarray(picture(20, 30)),
        "batch": torch.from_numpy(np.array(picture(20, 30))).permute(2, 0, 1)[None],
        "float": np.asarray(picture(20, 30)) / 255.0,
    }[form]
    if way == "detect":
        (found,) = processor.detect(given)
        assert found["boxes"] == [[0, 0, 20, 30]]
    else:
        assert processor(given, "<image>")["num_boxes"] == [1]
    (seen,) = processor.box_detector.seen
    assert (seen.mode, seen.size) == ("RGB", (20, 30))
    if form == "16 bit":
        assert seen.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
def test_the_channel_order_of_arrays_reaches_the_detector(processor, order):
    """In an array of three rows, columns and channels, only the argument tells them apart."""
    values = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    wanted = values if order == "channels_last" else values.transpose(1, 2, 0)
    processor.detect(values, input_data_format=order)
    processor(values, "<image>", input_data_format=order)
    for seen in processor.box_detector.seen:
        assert np.array_equal(np.asarray(seen), wanted)
    with pytest.raises(ValueError, match="input_data_format"):
        processor.detect(values)
    detector = BoxDetector(LABELS, OWLV2)
    by_order = detector.detect(values, threshold=0.0, input_data_format=order)[0]
    by_image = detector.detect(PIL.Image.fromarray(wanted), threshold=0.0)[0]
    # The order of sums may differ between calls; another order of the channels changes scores by up to 0.07.
    torch.testing.assert_close(by_order["scores"], by_image["scores"], rtol=0, atol=1e-6)


RESULT = {"boxes": [[0, 0, 9, 9]], "labels": ["a"], "scores": [0.5]}


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "must return a list with one mapping per image, got NoneType"),
        (RESULT, TypeError, "must return a list with one mapping per image, got dict"),
        ([RESULT], ValueError, "one result per image, got 1 for 2 images"),
        ([RESULT, [[0, 0, 9, 9]]], TypeError, "got list for image 1"),
        ([RESULT, {"boxes": [[0, 0, 9, 9]], "scores": [0.5]}], ValueError, r"got none of \['labels'\] for image 1"),
        ([RESULT, {**RESULT, "scores": [0.5, 0.4]}], ValueError, "for image 1.* 2 scores for 1 boxes"),
        ([RESULT, {**RESULT, "labels": []}], ValueError, "for image 1.* 0 labels for 1 boxes"),
        ([RESULT, {**RESULT, "labels": "a"}], TypeError, "for image 1.* list of labels, .* got the string 'a'"),
        ([RESULT, {**RESULT, "boxes": [[0, 0, 9]]}], ValueError, r"for image 1.*shape \(num_boxes, 4\)"),
        ([RESULT, {**RESULT, "boxes": [[9, 9, 0, 0]]}], ValueError, "for image 1.*x1 <= x2"),
    ],
)
def test_wrong_results_name_the_detector_and_the_image(processor, monkeypatch, returned, error, message):
    monkeypatch.setattr(processor.box_detector, "detect", lambda images: returned)
    for use in (processor.detect, lambda images: processor(images, "<image><image>")):
        with pytest.raises(error, match="(?s)`WholePicture.detect`.*" + message):
            use([picture(), picture()])


def test_objects_without_a_detect_method_are_refused():
    processor = small()
    with pytest.raises(TypeError, match=r"must have a method `detect\(images\)`, got function"):
        processor.box_detector = lambda images: []
    with pytest.raises(TypeError, match="`box_detector_config` must be a dict or None, got str"):
        processor.box_detector_config = "google/owlv2"


def survivors(processor):
    yield copy.deepcopy(processor)
    yield copy.copy(processor)
    yield pickle.loads(pickle.dumps(processor))


@pytest.mark.parametrize("detector", [WholePicture, lambda: Derived(LABELS, OWLV2)], ids=["own", "derived"])
def test_a_detector_that_replaces_the_configured_one_survives_copies_and_pickles(detector):
    processor = small(box_detector_config={"tagger": LABELS, "detector": str(OWLV2)})
    processor.box_detector = detector()
    assert processor.box_detector_config is None and processor.locate_box_detector() is None
    wanted = processor.detect(picture())
    for other in survivors(processor):
        assert type(other.box_detector) is type(processor.box_detector)
        assert other.detect(picture()) == wanted


def test_a_detector_reaches_workers_that_are_not_forked_from_here(processor):
    images = [picture(seed=0), picture(seed=1)]
    here = boxes_of(images, processor)
    assert torch.equal(boxes_from_worker(images, processor, "forkserver"), here) and here.any()


def test_a_detector_that_cannot_be_copied_is_named():
    processor = small()
    processor.box_detector = Unpicklable()
    with pytest.raises(TypeError, match=r"`box_detector` of type Unpicklable cannot be copied.* to None before"):
        copy.deepcopy(processor)
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(processor)
    assert processor.to_dict()["box_detector_config"] is None


@pytest.mark.parametrize("detector", [WholePicture, lambda: Derived(LABELS, OWLV2)], ids=["own", "derived"])
def test_saving_warns_that_a_detector_cannot_be_saved_and_saves_none(detector, tmp_path, monkeypatch):
    processor = small(box_detector_config={"tagger": LABELS, "detector": str(OWLV2)})
    processor.box_detector = mine = detector()
    said = []
    monkeypatch.setattr("mgllava.processing.processing_mgllava.logger.warning", said.append)
    processor.save_pretrained(tmp_path)
    assert len(said) == 1 and f"of type {type(mine).__name__}, which cannot be saved" in said[0]
    assert processor.box_detector is mine and not (tmp_path / "box_detector").exists()
    loaded = MGLlavaProcessor.from_pretrained(tmp_path)
    assert loaded.box_detector_config is None and loaded.box_detector is None


def test_the_detector_or_configuration_that_is_set_last_is_used():
    processor = small()
    processor.box_detector = WholePicture()
    processor.box_detector_config = {"tagger": LABELS, "detector": str(OWLV2), "mode": "clean"}
    assert processor.box_detector.mode == "clean"
    processor.box_detector_config["mode"] = "faithful"  # in place
    assert processor.box_detector.mode == "faithful"
    processor.box_detector = own = WholePicture()
    assert processor.box_detector is own


@pytest.mark.parametrize("options", [{"device": "cpu", "dtype": torch.float16}, {}])
def test_copies_load_the_detector_with_the_same_options(options):
    processor = small()
    processor.box_detector = BoxDetector(LABELS, OWLV2, **options)
    for other in survivors(processor):
        tower = other.box_detector._detector.model.owlv2.vision_model.encoder
        assert next(tower.parameters()).dtype == options.get("dtype", torch.float32)
    processor.box_detector_config = {"tagger": LABELS, "detector": str(OWLV2)}
    processor.load_box_detector(**options)
    tower = pickle.loads(pickle.dumps(processor)).box_detector._detector.model.owlv2.vision_model.encoder
    assert next(tower.parameters()).dtype == options.get("dtype", torch.float32)


@pytest.fixture(scope="module")
def quick_owlv2(tmp_path_factory):
    """OWLv2 with four patches."""
    folder = tmp_path_factory.mktemp("owlv2")
    processor = AutoProcessor.from_pretrained(OWLV2)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def run_threads(number, work):
    errors, results = [], {}
    start = threading.Barrier(number)

    def run(index):
        try:
            start.wait()
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[:3]
    return results


@pytest.mark.parametrize("threads", [6, pytest.param(16, marks=pytest.mark.slow)])
def test_threads_find_what_one_thread_finds(quick_owlv2, monkeypatch, threads):
    """Each thread has labels of its own, so that all embed prompts at once; padding differs between calls."""
    config = {"tagger": LABELS, "detector": quick_owlv2}
    calls = 3
    pictures = [picture(24, 16, seed) for seed in range(2)]
    words = ["a cat", "some dogs", "the red bus", "a cup of tea", "x y z", "one two three four"]

    def ask(processor, thread):
        answers = []
        for call in range(calls):
            labels = [words[(thread + call + step) % 6] + f" {thread % 4}" for step in range(1 + call % 3)]
            (found,) = processor.detect(pictures[call % 2], labels=labels, threshold=0.0)
            texts = ["<image> " + labels[0], "<image> b"][: 1 + call % 2]
            inputs = processor(
                pictures[: len(texts)], texts, boxes=[found] * len(texts), padding="longest" if call % 2 else False
            )
            answers.append((found["labels"], found["scores"], inputs["input_ids"]))
        return answers

    loaded = []
    original = BoxDetector.__init__

    def count(self, *args, **kwargs):
        loaded.append(1)
        original(self, *args, **kwargs)

    alone = small(box_detector_config=config)
    wanted = {thread: ask(alone, thread) for thread in range(threads)}
    monkeypatch.setattr(BoxDetector, "__init__", count)
    together = small(box_detector_config=config)
    found = run_threads(threads, lambda thread: ask(together, thread))
    assert loaded == [1]
    for thread in range(threads):
        for (labels, scores, ids), (other_labels, other_scores, other_ids) in zip(
            found[thread], wanted[thread], strict=True
        ):
            assert labels == other_labels and ids == other_ids
            torch.testing.assert_close(scores, other_scores, rtol=0, atol=1e-5)


def test_threads_load_the_detector_of_a_job_once(quick_owlv2, monkeypatch):
    loaded = []
    from_config = BoxDetector.from_config
    monkeypatch.setattr(BoxDetector, "from_config", lambda *args, **kwargs: loaded.append(1) or from_config(*args))
    detector = open_detector(detector=quick_owlv2)
    run_threads(8, lambda thread: detector.detect([picture()], labels=["cat"]))
    assert loaded == [1]


def test_a_lock_that_another_thread_holds_is_free_after_a_fork():
    lock, held, done = ProcessLock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with lock:
            os._exit(7)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
        with other, lock:
            pass


def test_a_forked_worker_loads_on_the_cpu_or_says_that_it_cannot():
    def in_fork(detect):
        def labels_or_error(images):
            try:
                return detect(images)[0]["labels"]
            except RuntimeError as error:
                return str(error)

        (found,) = torch.utils.data.DataLoader(
            [picture()], num_workers=1, multiprocessing_context="fork", collate_fn=labels_or_error
        )
        return found

    processor = small(box_detector_config={"tagger": LABELS, "detector": str(OWLV2)})
    labels = processor.detect(picture())[0]["labels"]
    processor.box_detector.device = torch.device("cuda")
    assert in_fork(processor.detect) == labels
    alone = BoxDetector(LABELS, OWLV2)
    alone.device = torch.device("cuda")
    said = in_fork(alone.detect)
    assert "put on cuda before this process was forked" in said and "spawn" in said


def test_the_model_accepts_everything_that_the_processor_returns():
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = MGLlavaProcessor(
        MGLlavaImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        golden_tokenizer(),
        image_seq_length=NUM_FUSED_TOKENS,
    )
    processor.box_detector = WholePicture()
    options = {"text_config": {"vocab_size": 448}, "unpadded_vocab_size": 420}
    model = tiny_model(image_token_id=processor.image_token_id, **options)
    extra = {"return_box_labels": True, "return_mm_token_type_ids": True}
    texts = ["<image> a b", "<image> a"]
    inputs = processor([picture(), picture(seed=1)], texts, padding=True, return_tensors="pt", **extra)
    assert inputs["box_labels"] == [["all"], ["all"]] and inputs["mm_token_type_ids"].any()
    plain = {key: value for key, value in inputs.items() if key not in ("box_labels", "mm_token_type_ids")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**plain).logits)
        assert torch.equal(model.model(**inputs)[0], model.model(**plain)[0])
    for beams in (1, 2):
        generate = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
        assert torch.equal(model.generate(**inputs, **generate), model.generate(**plain, **generate))
    with pytest.raises(ValueError, match="box_lables"):
        model.generate(**plain, box_lables=[["typo"]])
