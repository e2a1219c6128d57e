"""Segment the photos of packs by IS-Net at a smaller input than it was exported with, as masks to learn from.

    python studies/network_masks.py --data /photos --network isnet.onnx --side 512 --out /second

The published network takes 1,024 px. Photos of 128 px, enlarged so far, get vague masks from it; at 512 px they do not,
and a photo takes a fifth of the time. Its resize layers hold sizes as constants, which are scaled. OpenVINO runs it, in
bf16 where the processor has it. `--out` gets a folder of a pack's name for each pack, of masks that are not corrected;
`--second` of studies/mask_corrector.py takes it. Masks that are there already are kept."""

import argparse
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.masks import mask_name
from carproto.data.segmenter import Segmenter, _open_openvino
from carproto.data.store import PictureStore
from carproto.files import import_extra
from carproto.images import open_picture

PACKS = ("common_cars_train", "common_cars_heldout", "concept_cars_train", "concept_cars_heldout")
EXPORTED = 1024  # side of the published network's input
COLOURS = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))  # mean and deviation


def shrink_network(file: Path, side: int, target: Path) -> Path:
    """Write a copy of a network whose input and resized maps are smaller; raise `CarprotoError` for another network."""
    model = onnx.load(file)
    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    scaled = set()
    for node in graph.node:
        if node.op_type != "Resize" or len(node.input) < 4 or node.input[3] not in made:
            continue
        for name in made[node.input[3]].input:
            source = made.get(name)
            if source is None or source.op_type != "Constant" or name in scaled:
                continue
            size = numpy_helper.to_array(source.attribute[0].t)
            if size.size == 2:
                size = (size * side // EXPORTED).astype(size.dtype)
                source.attribute[0].t.CopyFrom(numpy_helper.from_array(size))
                scaled.add(name)
    if not scaled:
        raise CarprotoError(f"{file} has no resize layers of fixed size: give the file of isnet-general-use")
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim[2:]:
            dimension.dim_value = dimension.dim_value * side // EXPORTED
    del graph.value_info[:]
    onnx.save(model, target)
    return target


def main() -> None:
    """Segment all packs that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(PACKS)} as zip")
    parser.add_argument("--network", type=Path, required=True, help="file of isnet-general-use")
    parser.add_argument("--side", type=int, default=512, help="of the network's input, a multiple of 64 pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the masks")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    small = shrink_network(arguments.network, arguments.side, arguments.out / f"isnet_{arguments.side}.onnx")
    runtime = import_extra("openvino", "openvino")
    network, precision = _open_openvino(runtime, small, arguments.side, arguments.threads)
    segment = Segmenter(network, arguments.side, *COLOURS, precision=precision)
    for pack in (name for name in PACKS if (arguments.data / f"{name}.zip").is_file()):
        store, folder = PictureStore(arguments.data / f"{pack}.zip"), arguments.out / pack
        folder.mkdir(exist_ok=True)
        for name in tqdm(store.names, desc=pack, unit="photo"):
            content = store.read(name)
            target = folder / mask_name(content)
            if not target.exists():
                segment(open_picture(content)).save(target)


if __name__ == "__main__":
    main()
