"""Draw the boxes of a box file: `python examples/draw_boxes.py boxes.parquet images/ 000000039769.jpg out.png`.

`mgllava detect IMAGES --output boxes.parquet` makes such a file; the id is the path of the image below IMAGES. Without
arguments it draws boxes that were chosen by hand in the photograph next to this script.
"""

import sys
from pathlib import Path

from PIL import Image

from mgllava.box_files import read_boxes
from mgllava.visualization import draw_boxes

COFFEE = Path(__file__).parent / "coffee.jpg"
BY_HAND = {
    "boxes": [[172, 17, 410, 308], [76, 68, 481, 390], [325, 66, 425, 328]],
    "labels": ["cup", "saucer", "spoon"],
}


def main() -> None:
    if len(sys.argv) == 5:
        box_file, folder, key, output = sys.argv[1:]
        image, found = Image.open(Path(folder) / key), read_boxes(box_file)[key]
    else:
        image, found, output = Image.open(COFFEE), BY_HAND, "boxes.png"
    draw_boxes(image, found).save(output)
    print(f"Drew {len(found['boxes'])} boxes in {output}")


if __name__ == "__main__":
    main()
