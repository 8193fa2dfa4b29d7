"""Find the boxes of many images on a Ray cluster: `python examples/detect_with_ray.py IMAGES boxes.parquet`.

Ray Data schedules the batches; each actor loads the detector once. `mgllava detect` needs no cluster software and can
resume; use Ray if the images already come from a Ray pipeline. Needs Ray: see docs/detect.md.
"""

import argparse
import json
from typing import Any

from small_model import DEFAULT

from mgllava.box_files import detection_settings, list_images, open_detector, write_boxes


class FindBoxes:
    """Finds the boxes of a batch; `map_batches` makes one for each actor."""

    def __init__(self, folder: str, model: str):
        self.images, self.detector = list_images(folder), open_detector(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Take the numbers of some images, and return a dictionary of columns, as `map_batches` demands."""
        numbers, pictures = [], []
        for number in map(int, batch["id"]):
            try:
                pictures.append(self.images.load(number))
                numbers.append(number)
            except Exception as error:  # whatever a decoder raises
                print(f"Skipped {self.images.entries[number].image}: {error}")
        found = self.detector.detect(pictures, batch_size=max(1, len(pictures)))
        # As text, because Arrow cannot infer the type of the column if no image of a block has a box.
        records = [self._record(*row) for row in zip(numbers, pictures, found, strict=True)]
        return {"number": numbers, "record": [json.dumps(record) for record in records]}

    def _record(self, number: int, picture: Any, found: Any) -> dict[str, Any]:
        name = self.images.entries[number].image
        boxes, scores = found["boxes"].tolist(), found["scores"].tolist()
        size = {"width": picture.width, "height": picture.height}
        return {"id": name, "image": name, **size, "boxes": boxes, "labels": found["labels"], "scores": scores}


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder of images that all nodes see")
    parser.add_argument("output", help="box file: .parquet or .json")
    parser.add_argument("--model", default=str(DEFAULT), help="MG-LLaVA model with a box detector")
    parser.add_argument("--actors", type=int, default=1, help="detectors that are loaded")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each actor")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")
    options = parser.parse_args()

    rows = ray.data.range(len(list_images(options.images))).map_batches(
        FindBoxes,
        fn_constructor_args=(options.images, options.model),
        batch_size=options.batch_size,
        num_gpus=options.gpus,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
    )
    records = [row["record"] for row in sorted(rows.iter_rows(), key=lambda row: row["number"])]
    write_boxes(options.output, map(json.loads, records), detection_settings(open_detector(options.model)))
    print(f"Wrote {options.output}: {len(records)} records")


if __name__ == "__main__":
    main()
