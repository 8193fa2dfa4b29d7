"""Makes torchvision usable next to a PyTorch for CPUs: its wheels of the package index are built for CUDA.

Their operators cannot be loaded there, and `import torchvision` fails. Python imports this file at its start if this
folder is in `PYTHONPATH`; the operator that is missing is then defined in Python before torchvision is imported.
"""

import importlib.abc
import importlib.machinery
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not hasattr(_define_operators, "library"):  # also asked for without an import
            _define_operators()
        if name != "torchvision.extension":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module._assert_has_ops = lambda: None

        spec.loader.exec_module = exec_module
        return spec


def _define_operators():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # torchvision describes both, and we use one
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    def nms(boxes, scores, iou_threshold):
        order, kept = scores.argsort(descending=True, stable=True).tolist(), []
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        while order:
            first, *rest = order
            kept.append(first)
            corner = torch.maximum(boxes[first, :2], boxes[rest, :2])
            size = (torch.minimum(boxes[first, 2:], boxes[rest, 2:]) - corner).clamp(min=0)
            shared = size.prod(1)
            overlap = shared / (areas[first] + areas[rest] - shared)
            order = [index for index, value in zip(rest, overlap.tolist(), strict=True) if value <= iou_threshold]
        return torch.tensor(kept, dtype=torch.long)

    library.impl("nms", nms, "CPU")
    _define_operators.library = library  # the definition ends with its library


sys.meta_path.insert(0, _Finder())
