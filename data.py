"""Data: each training or evaluation row is an image, an expression, a mask and a box. In the paper
these are the inputs I and T of Eq. 1 and the ground truth M_gt of Eqs. 5 and 12.

`--data ROOT --datasets NAME ...` reads any of these datasets, in the layout of their authors:

    refcoco, refcoco+, refcocog (umd), refcocog-google
        ROOT/refer_seg/refcoco/{refs(unc).p, instances.json}
        ROOT/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg
    reasonseg
        ROOT/reason_seg/ReasonSeg/{train,val,test}/NAME.{jpg,json}
    groundingsuite (evaluation only)
        ROOT/GroundingSuite-Eval.jsonl
        ROOT/COCO/unlabeled2017/000000000267.jpg
    NAME, a folder of your own, one line per object; file names are relative to the folder
        ROOT/NAME/{train,val}.jsonl
        {"image": "a.jpg", "text": "the cup", "mask": "a.png", "box": [x1, y1, x2, y2]}
        text may be a list, mask may be COCO polygons or RLE; box may be left out
    shapes, a small synthetic dataset to try things on a laptop, in refcoco's layout
        python tests/tiny/world.py ROOT writes it

docs/data.md says where to download them and what is refused. `python tests/tools/check_data.py
ROOT` reads everything once, so that no damaged file stops a run after hours.

A box is (x1, y1, x2, y2) in one of three pixel frames, named wherever one is passed:
    image frame   pixels of the original image. Rewards and metrics are computed here.
    MLLM frame    what the MLLM reads and writes: pixels of the resized image for Qwen2.5-VL,
                  thousandths of width and height for Qwen2-VL and Qwen3-VL.
    SAM frame     pixels of the square image that SAM 2 sees (1024 x 1024 for the real one).

Departure from the released code: it draws an expression at random each time an item is loaded, so
the completions of one GRPO group can belong to different expressions. Here the expression depends
only on the seed, the epoch and the object.
"""
import gc
import hashlib
import io
import json
import math
import os
import pickle
import signal
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

from rewards import box_iou, chat_messages

# A record describes one object. Its image and its mask are loaded only when they are needed:
#     "id"            for example "refcoco/17"; errors name it
#     "split"         "train", "val", ...
#     "image"         path of the image
#     "expressions"   list of strings, each of which names the object
#     "size"          (H, W) of the image that was annotated, or None if the annotation does not say
#     "gt_box"        in the image frame, or None if it is the extent of the mask
#     "segmentation"  COCO polygons, COCO RLE, path of a mask file, or ReasonSeg's tuple of
#                     (label, points)
#     "groups"        one tuple of names per expression, such as ("part",), not GRPO's groups;
#                     evaluation also reports the rows of each name apart


def load_item(record, i):
    """A record with its expression i -> {"id", "expression", "image" (PIL, RGB), "gt_mask",
    "ignore_mask" (both (H, W) bool), "gt_box" (image frame)}. Raises LensError if a file is damaged
    or contradicts the rest."""
    # own polygons and mask files do not say if they mean the image as stored or as viewers turn it
    own = record["size"] is None and not isinstance(record["segmentation"], tuple)
    image = load_image(record["image"], record["size"], refuse_rotation=own)
    gt_mask, ignore_mask = load_masks(record, image.size[::-1])
    if record["gt_box"]:
        refuse_box(record, gt_mask)
    return {"id": f"{record['id']}/{i}", "expression": record["expressions"][i], "image": image,
            "gt_mask": gt_mask, "ignore_mask": ignore_mask,
            "gt_box": record["gt_box"] or extent(gt_mask)}


# --- Images, masks and boxes ----------------------------------------------------------------------

def load_image(path, size=None, refuse_rotation=False):
    """-> RGB image. It is turned upright as its EXIF orientation says, like in a viewer, unless the
    annotated `size` (H, W) is the size of the stored pixels. Raises LensError if the file cannot be
    read, has another size, or is to be turned although that is refused."""
    try:
        image = Image.open(path)
        orientation = image.getexif().get(0x0112, 1)
        if refuse_rotation and orientation in range(2, 9):
            raise LensError(
                f"{path}: its camera's rotation (EXIF orientation {orientation}) leaves open what "
                "was annotated. If it was the image as viewers show it, turn the pixels (mogrify "
                "-auto-orient FILE); else remove the rotation (exiftool -Orientation= FILE).")
        if size is None or image.size != tuple(size)[::-1]:
            image = ImageOps.exif_transpose(image)
        if size and image.size != tuple(size)[::-1]:
            raise LensError(f"{path}: {image.size} pixels, annotated as {tuple(size)[::-1]}. Take "
                            "the original.")
        if max(image.size) > 200 * min(image.size):     # Qwen's image processors raise
            raise LensError(f"{path}: {image.size} pixels. The MLLM takes no image whose long side "
                            "is above 200 times the short one: crop it, or leave it out.")
        return to_rgb(image)
    except LensError:
        raise
    except Exception as error:                  # a damaged file can raise nearly anything
        raise LensError(f"{path}: no readable image ({error}). Download it again, or save a copy "
                        "in another size or format.") from None


def to_rgb(image):
    """PIL image of any mode -> RGB. 16 bits become 8, and transparent pixels become white, as in
    Qwen's own tools. (Pillow's convert would clip the former and ignore the latter.)"""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image.convert("RGB")


def load_masks(record, size):
    """-> mask of the object, mask of the ignored pixels, each (H, W) bool."""
    segmentation = record["segmentation"]
    mask, ignore = np.zeros((2, *size), bool)
    try:
        if isinstance(segmentation, tuple):
            mask, ignore = draw_reasonseg(segmentation, size)
        elif isinstance(segmentation, str):
            mask = read_mask_file(segmentation)
        else:
            mask = decode_mask(segmentation, size)
        if mask.shape != tuple(size):
            raise ValueError(f"{mask.shape[::-1]} pixels")
    except Exception as error:
        raise LensError(f"{record['id']} ({record['image']}, {size[1]} x {size[0]} pixels): its "
                        f"segmentation is damaged or of another size ({type(error).__name__}: "
                        f"{error}). Download or make it again.") from None
    return mask, ignore


def read_mask_file(path):
    """Path of an image -> (H, W) bool. In an image with a palette, the mask is every index but 0.
    Else it is alpha where alpha varies, or else the brightness. What lies above half of the range
    is the object; if nothing does, one value beside 0 may occur, and is the object."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "P" and not image.has_transparency_data:
        return np.asarray(image) > 0
    values, half = np.asarray(image), 32767                 # 16 bits
    if image.mode[0] != "I":
        values, half = np.asarray(image.convert("RGBA")), 127
        alpha = values[..., 3]
        values = alpha if alpha.min() < alpha.max() else values[..., :3].max(-1)
    top = values.max()
    if top > half:
        return values > half
    if not np.isin(values, (0, top)).all():
        raise ValueError(f"its brightest value is {top}, and it holds others beside 0: write one "
                         "mask per object, with 0 and 255")
    return values > 0


def decode_mask(segmentation, size):
    """COCO polygons (their union) or RLE, compressed or not -> (H, W) bool. No polygon, or empty
    counts, is an empty mask."""
    if isinstance(segmentation, list):
        if any(np.ndim(polygon) != 1 for polygon in segmentation):
            raise ValueError("polygons are a list of lists: [[x, y, x, y, ...], ...]")
        xy = np.array([v for polygon in segmentation for v in polygon], float)
        if not (abs(xy) <= 2 * max(size)).all():                # NaN as well
            raise ValueError("a polygon lies far outside the image, or holds what is no number")
        if xy.size and xy.max() <= 1:
            raise ValueError("a polygon in fractions of the image: it needs pixels")
        # pycocotools would take a first polygon of two points for a box
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.zeros(size, bool)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    else:
        rle, counts = segmentation, segmentation["counts"]
        if isinstance(counts, list):
            # what the counts do not reach would be random
            if counts and sum(counts) != math.prod(segmentation["size"]):
                raise ValueError("its counts do not add up to its size")
            rle = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(rle).astype(bool) if rle["counts"] else np.zeros(size, bool)


def draw_reasonseg(shapes, size):
    """ReasonSeg's tuple of (label, points) -> mask, ignored pixels, each (H, W) bool. Shapes are
    drawn from the largest to the smallest. "flag" is no object, and a label with "ignore" in it
    hides what is below; every other shape is the object. OpenCV draws interior and outline, as in
    LISA and the released code, because the published numbers depend on its pixels. (They call
    polylines as well, which changes nothing: no pixel of 80,000 random polygons.)"""
    drawn = []
    for label, points in shapes:
        if points and label != "flag":
            filled = cv2.fillPoly(np.zeros(size, np.uint8), [np.array(points, np.int32)], 1)
            drawn.append((filled > 0, "ignore" in label))
    mask, ignore = np.zeros((2, *size), bool)
    for filled, hides in sorted(drawn, key=lambda pair: pair[0].sum())[::-1]:
        mask[filled], ignore[filled] = not hides, hides
    return mask, ignore


def extent(mask):
    """The box (image frame) that encloses a mask, max + 1; (0, 0, 0, 0) for an empty mask."""
    return Image.fromarray(mask).getbbox() or (0, 0, 0, 0)


def refuse_box(record, mask):
    """Raise LensError if the ground-truth box cannot be (x1, y1, x2, y2) in the image frame."""
    x1, y1, x2, y2 = box = record["gt_box"]
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    inside = mask[top:max(0, math.ceil(y2)), left:max(0, math.ceil(x2))]
    wrong = ""
    if max(box) <= 1:
        wrong = "is given in fractions of the image"
    elif not inside.size:
        wrong = "lies outside the image"
    elif mask.any() and not inside.any():
        wrong = "and the mask have no pixel in common"
    elif (box_iou(box, extent(mask)) < 0.5
          and box_iou((x1, y1, x1 + x2, y1 + y2), extent(mask)) > 0.9):
        wrong = "fits its mask only as x, y, width, height"
    if wrong:
        raise LensError(f"{record['id']} ({record['image']}, {mask.shape[1]} x {mask.shape[0]} "
                        f"pixels): its box {box} {wrong}. It must be x1, y1, x2, y2 in pixels.")


def rescale_box(box, source, target):
    """A box from a frame of `source` = (width, height) to one of `target` = (width, height). Every
    change of frame is this one: image -> MLLM (see `mllm_frame`), MLLM -> image, MLLM -> SAM."""
    sx, sy = target[0] / source[0], target[1] / source[1]
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)


def mllm_frame(model_type, grid_thw, patch_size):
    """(width, height) of the MLLM frame: Qwen2.5-VL's resized image, or Qwen2-VL's and Qwen3-VL's
    thousandths. grid_thw counts the patches of the image: (1, height, width)."""
    if model_type == "qwen2_5_vl":
        return int(grid_thw[2]) * patch_size, int(grid_thw[1]) * patch_size
    return 1000, 1000


# --- Annotation files -> records ------------------------------------------------------------------

# Of each dataset below ROOT: the place of its annotations, and its splits
DATASETS = {
    "refcoco": ("refer_seg/refcoco/refs(unc).p", ["train", "val", "testA", "testB"]),
    "refcoco+": ("refer_seg/refcoco+/refs(unc).p", ["train", "val", "testA", "testB"]),
    "refcocog": ("refer_seg/refcocog/refs(umd).p", ["train", "val", "test"]),
    # its train and val share images
    "refcocog-google": ("refer_seg/refcocog/refs(google).p", ["train", "val"]),
    "shapes": ("refer_seg/shapes/refs(unc).p", ["train", "val", "testA", "testB"]),
    "reasonseg": ("reason_seg/ReasonSeg", ["train", "val", "test"]),
    "groundingsuite": ("GroundingSuite-Eval.jsonl", ["eval"])}
CLASSES = {1: "stuff", 2: "part", 3: "multi", 4: "single"}       # GroundingSuite's; names guessed
IMAGE_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG")


def read_records(root, datasets, splits):
    """Records of several datasets and splits, in order. Raises LensError for what is missing or
    damaged. Two things are left out, and named: ReasonSeg's unreadable files (two of the published
    ones are) and, in training, objects without a segmentation."""
    records, left_out = [], []
    gc.disable()        # with millions of objects, the collector takes as long as reading them
    try:
        for dataset in datasets:
            before = len(records)
            for record in read_dataset(root, dataset, splits):
                if isinstance(record, LensError):
                    if dataset != "reasonseg":
                        raise record
                    left_out.append(str(record))
                elif record["split"] == "train" and record["segmentation"] == []:
                    left_out.append(f"{record['id']}: no segmentation, left out of training")
                else:
                    records.append(record)
            for split in set(splits) - {record["split"] for record in records[before:]}:
                known = ", ".join(find_datasets(root).get(dataset, ()))
                raise LensError(f"{root}: no split '{split}' in {dataset}. It has {known}.")
    finally:
        gc.enable()
    if left_out and os.environ.get("RANK", "0") == "0":
        print("\n".join(["left out:", *left_out]), file=sys.stderr)
    return records


def read_dataset(root, dataset, splits):
    """-> generator of one dataset's records. In the place of a damaged record it yields a
    LensError: training stops at the first, tests/tools/check_data.py lists them all."""
    if dataset == "reasonseg":
        return read_reasonseg(root, dataset, splits)
    if dataset in DATASETS and dataset != "groundingsuite":
        return read_refcoco(root, dataset, splits)
    return read_lines(root, dataset, splits)


def read_refcoco(root, dataset, splits):
    """RefCOCO, RefCOCO+, RefCOCOg and the shapes world: REFER's layout."""
    refs_file = Path(root, DATASETS[dataset][0])
    instances_file = refs_file.with_name("instances.json")
    folder = Path(root) / "refer_seg/images/mscoco/images/train2014"
    way_out = f"Download REFER's {refs_file.parent.name}.zip and COCO's train2014 images"
    if dataset == "shapes":
        way_out = f"Write the shapes world: python tests/tiny/world.py {root}"
    require(way_out, refs_file, instances_file, folder)
    try:
        instances = json.loads(instances_file.read_bytes())
        images = {image["id"]: image for image in instances["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    except Exception as error:
        raise LensError(f"{instances_file}: damaged ({error!r}). Download it again.") from None
    present = set(os.listdir(folder))
    for n, ref in enumerate(read_refs(refs_file)):
        try:
            if ref["split"] not in splits:
                continue
            image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
            name = image.get("file_name")       # of images that are not COCO's
            if name not in present:
                name = f"COCO_train2014_{ref['image_id']:012d}.jpg"
            if name not in present:
                raise ValueError(f"its image {folder}/{name} is missing: download COCO's train2014")
            yield refer_record(ref, image, annotation, dataset, f"{folder}/{name}")
        except Exception as error:
            yield LensError(f"{refs_file}, record {n}: damaged, or missing in {instances_file} "
                            f"({error!r}). Download both.")


def refer_record(ref, image, annotation, dataset, path):
    """One ref with its entries in instances.json and the path of its image -> a record. Blank
    expressions are left out of training; in evaluation they count, as in the published numbers."""
    x, y, w, h = annotation["bbox"]
    sentences = [sentence for sentence in ref["sentences"]
                 if sentence["sent"].strip() or ref["split"] != "train"]
    if not (sentences and x < x + w < math.inf and y < y + h < math.inf):
        raise ValueError(f"no expression, or the box {x, y, w, h} is empty")
    return {"id": f"{dataset}/{ref['ref_id']}", "split": ref["split"], "image": path,
            "expressions": [sentence["sent"] for sentence in sentences],
            "size": (image["height"], image["width"]), "gt_box": (x, y, x + w, y + h),
            "segmentation": annotation["segmentation"],
            "groups": [tuple(sentence.get("groups", ())) for sentence in sentences]}


def read_refs(path):
    """refs(*).p -> list of dicts. Python 2 pickled the originals, hence latin1."""
    try:
        return PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except Exception as error:                  # a broken pickle can raise nearly anything
        raise LensError(f"{path}: no readable refs file ({error}). Download it again.") from None


class PlainUnpickler(pickle.Unpickler):
    """refs(*).p is a pickle from the internet, so nothing but plain data is accepted."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which annotations never need")


def read_reasonseg(root, dataset, splits):
    """ReasonSeg: a json beside every image. Training uses all its texts, evaluation the first."""
    for split in splits:
        folder = Path(root) / "reason_seg/ReasonSeg" / split
        require("Download ReasonSeg, to which LISA's repository links", folder)
        for path in sorted(folder.glob("*.json")):
            try:
                expressions, shapes = reasonseg_annotation(path.read_bytes())
                image, *_ = filter(Path.exists, map(path.with_suffix, IMAGE_SUFFIXES))
                expressions = expressions if split == "train" else expressions[:1]
                yield {"id": f"reasonseg/{split}/{path.stem}", "split": split, "image": str(image),
                       "expressions": expressions, "size": None, "gt_box": None,
                       "segmentation": shapes, "groups": [()] * len(expressions)}
            except Exception as error:
                yield LensError(f"{path}: damaged, or its image is missing ({error!r}).")


def reasonseg_annotation(content):
    """The bytes of a file, UTF-8 or cp1252 -> its texts, and a tuple of (label, points), where
    points is a list of [x, y]."""
    try:
        annotation = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        annotation = json.loads(content.decode("cp1252"))
    shapes = []
    for shape in annotation["shapes"]:
        points = np.array(shape["points"], float).reshape(-1, 2)
        if not (abs(points) < 1e5).all():                       # NaN as well
            raise ValueError("a point lies far outside the image, or is no number")
        if shape.get("shape_type", "polygon") != "polygon":     # labelme's rectangles and circles
            raise ValueError(f"a shape of type {shape['shape_type']!r}: draw a polygon")
        shapes.append((shape["label"].lower(), points.astype(np.int32).tolist()))
    return list_of_expressions(annotation["text"]), tuple(shapes)


def list_of_expressions(text):
    """One expression or a list of them -> list. Raises ValueError for anything else."""
    expressions = [text] if isinstance(text, str) else text
    if not expressions or not all(isinstance(e, str) and e.strip() for e in expressions):
        raise ValueError("it needs a text that is not blank")
    return expressions


def read_lines(root, dataset, splits):
    """One json per line: GroundingSuite-Eval, whose boxes are looser than the masks' extents,
    and folders of one's own."""
    suite = dataset == "groundingsuite"
    if suite:                                   # it is never training data
        splits = ["eval"] if "eval" in splits else []
    for split in splits:
        path = Path(root) / dataset / f"{split}.jsonl"
        images, way_out = path.parent, "Put your own data there"
        if suite:
            path, images = Path(root, DATASETS[dataset][0]), Path(root, "COCO")
            way_out = "Download GroundingSuite-Eval.jsonl and COCO's unlabeled2017 images"
        require(way_out, path, images)
        for n, line in enumerate(path.read_bytes().splitlines(), 1):    # U+2028 ends no line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if suite:
                    row = {"image": row["image_path"], "text": row["caption"], "box": row["box"],
                           "mask": row["segmentation"], "groups": [CLASSES[row["class_id"]]]}
                record = line_record(row, path.parent, images)
                yield {"id": f"{dataset}/{split}/{n}", "split": split, **record}
            except Exception as error:
                yield LensError(f"{path}, line {n}: damaged ({error!r}). "
                                f"data.py's first lines show what a line holds.")


def line_record(row, folder, images):
    """One line -> a record but for its id and split. Names of mask files are relative to `folder`,
    those of images to `images`."""
    expressions, mask, box = list_of_expressions(row["text"]), row.get("mask"), row.get("box")
    image = images / row["image"]
    if not mask:
        raise ValueError("it needs a mask; a box alone does not say what to segment")
    if not image.exists():
        raise ValueError(f"its image {image} is missing")
    if box:
        x1, y1, x2, y2 = box = tuple(map(float, box))
        if not (x1 < x2 and y1 < y2 and all(map(math.isfinite, box))):
            raise ValueError(f"{box} is no box (x1, y1, x2, y2)")
    return {"image": str(image), "expressions": expressions, "gt_box": box or None,
            "size": tuple(mask["size"]) if isinstance(mask, dict) else None,
            "segmentation": str(folder / mask) if isinstance(mask, str) else mask,
            "groups": [tuple(row.get("groups", ()))] * len(expressions)}


def find_datasets(root):
    """{dataset: its splits} for everything that lies below root."""
    datasets = {name: list(splits) for name, (place, splits) in DATASETS.items()
                if Path(root, place).exists()}
    for path in sorted(Path(root).glob("*/*.jsonl")):       # folders of one's own
        datasets.setdefault(path.parent.name, []).append(path.stem)
    return datasets


def require(way_out, *paths):
    """Raise LensError for the first path that does not exist."""
    for path in paths:
        if not path.exists():
            raise LensError(f"{path} is missing. {way_out} (data.py's first lines show the place), "
                            "or begin with --preset tiny.")


def take_evenly(records, limit):
    """`limit` of the records, spread evenly over all of them (--limit); 0 takes all."""
    if not limit or limit >= len(records):
        return records
    return [records[i] for i in np.linspace(0, len(records) - 1, limit).astype(int)]


def fingerprint(records):
    """A short hex string of the annotations that decide the training data, in their order. It does
    not depend on where they lie, and it does not see whether a file of an image or mask changed."""
    digest = hashlib.sha256()
    for record in records:
        content = [record[name] for name in ("id", "expressions", "size", "gt_box")]
        digest.update(repr(content).encode())
        if not isinstance(record["segmentation"], str):
            digest.update(pickle.dumps(record["segmentation"], 4))      # repr is slow
    return digest.hexdigest()[:16]


# --- Order and batches ----------------------------------------------------------------------------

class EvaluationRows(Dataset):
    """Evaluation has one row for every expression of every object, as is usual in the field. A row
    is (record, index of one of its expressions); it is loaded when asked for. `limit` takes some of
    the rows, evenly."""

    def __init__(self, records, limit=0):
        rows = [(record, i) for record in records for i in range(len(record["expressions"]))]
        self.rows = take_evenly(rows, limit)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return load_item(*self.rows[k])


class TrainingStream(Dataset):
    """Training data as one endless sequence, in which each epoch has every object once, with one of
    its expressions. Item k depends only on (records, seed, k), so a run that resumes, on any number
    of processes, goes on with the same data."""

    def __init__(self, records, seed):
        self.records, self.seed = records, seed
        self.epoch, self.order = None, None

    def __getitem__(self, k):
        epoch, place = divmod(k, len(self.records))
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
            self.epoch = epoch
        index = int(self.order[place])
        record = self.records[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return load_item(record, int(rng.integers(len(record["expressions"]))))


class Collator:
    """Items -> one batch of B prompts. It runs in the processes that load images.

    prompt_ids, token_types     lists of B (P_b,) long: the prompt's tokens, and 1 where a token is
                                a piece of the image
    pixel_values                (patches of all images, values per patch), for the MLLM
    grid_thw                    (B, 3): each image's patches, as (1, height, width)
    sam_pixels                  (B, 3, S, S): the square image for SAM, S = sam_size
    low_res_masks               (B, S/4, S/4) float in [0, 1]: the ground truth, averaged over the
                                pixels of each cell of SAM's decoder that are not ignored
    low_res_weights             (B, S/4, S/4) float in [0, 1]: how much of a cell is not ignored
    gt_masks, ignore_masks      lists of B (H_b, W_b) bool, at the size of the images
    gt_boxes                    list of B, image frame
    mllm_frames                 list of B (width, height), see `mllm_frame`
    expressions, row_ids        lists of B strings
    """

    def __init__(self, processor, model_type, sam_size, max_prompt, prompt="paper"):
        self.processor, self.model_type, self.sam_size = processor, model_type, sam_size
        self.max_prompt, self.prompt = max_prompt, prompt

    def __call__(self, items):
        images, expressions = zip(*[(item["image"], item["expression"]) for item in items])
        special = self.processor.tokenizer.get_added_vocab()        # "<|image_pad|>": its id, ...
        for item in items:
            if any(token in item["expression"] for token in special):
                raise LensError(f"{item['id']}: its expression {item['expression']!r} holds a "
                                "special token of the MLLM. Write it in other words.")
        prompts = [self.processor.apply_chat_template(
            chat_messages(expression, self.prompt), add_generation_prompt=True)
            for expression in expressions]
        encoded = self.processor(text=prompts, images=list(images), return_mm_token_type_ids=True)
        prompt_ids = [torch.as_tensor(ids) for ids in encoded["input_ids"]]
        for item, ids in zip(items, prompt_ids):
            if len(ids) > self.max_prompt:      # never cut: half an image is not a prompt
                raise LensError(f"{item['id']}: its prompt has {len(ids)} tokens, the limit is "
                                f"{self.max_prompt}. Raise --max-prompt or lower --max-pixels.")
        grids = torch.as_tensor(encoded["image_grid_thw"])
        patch_size = self.processor.image_processor.patch_size
        gt_masks = [torch.from_numpy(item["gt_mask"]) for item in items]
        ignore_masks = [torch.from_numpy(item["ignore_mask"]) for item in items]
        weights = average_down([~ignore for ignore in ignore_masks], self.sam_size // 4)
        return {
            "prompt_ids": prompt_ids,
            "token_types": [torch.as_tensor(row) for row in encoded["mm_token_type_ids"]],
            "pixel_values": torch.as_tensor(encoded["pixel_values"]), "grid_thw": grids,
            "sam_pixels": torch.stack([sam_image(image, self.sam_size) for image in images]),
            "low_res_masks": (average_down(gt_masks, self.sam_size // 4)
                              / weights.clamp(min=1e-6)),
            "low_res_weights": weights, "gt_masks": gt_masks, "ignore_masks": ignore_masks,
            "gt_boxes": [item["gt_box"] for item in items],
            "mllm_frames": [mllm_frame(self.model_type, grid, patch_size) for grid in grids],
            "expressions": list(expressions), "row_ids": [item["id"] for item in items],
        }


SAM_MEAN, SAM_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def sam_image(image, size):
    """PIL image -> (3, size, size) float, resized to SAM's square and normalised as sam2 does."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
    return (pixels - SAM_MEAN[:, None, None]) / SAM_STD[:, None, None]


def average_down(masks, side):
    """B masks (H_b, W_b) bool -> (B, side, side) float: the share of each cell that is true."""
    cells = [F.adaptive_avg_pool2d(mask[None].float(), (side, side))[0] for mask in masks]
    return torch.stack(cells)


def select(batch, indices):
    """The smaller batch of some of a batch's prompts. Only pixel_values has no leading B."""
    patches = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    selected = {}
    for name, value in batch.items():
        if name == "pixel_values":
            selected[name] = torch.cat([patches[i] for i in indices])
        elif torch.is_tensor(value):
            selected[name] = value[indices]
        else:
            selected[name] = [value[i] for i in indices]
    return selected


def to_device(batch, device):
    """Move what the models read. Token ids stay on the CPU, where grpo.pack_groups reads them."""
    read = ("pixel_values", "grid_thw", "sam_pixels", "low_res_masks", "low_res_weights")
    return {**batch, **{name: batch[name].to(device, non_blocking=True) for name in read}}


# --- Loading in other processes -------------------------------------------------------------------

def training_batches(stream, collate, start, steps, batch, rank, world, workers, device,
                     received=()):
    """-> iterator of this rank's batch in each step, from step `start` on. Step s takes items
    s * batch and on, and rank r its r-th share, so the data of a step does not depend on the number
    of processes. `received`: see load_batches."""
    share = batch // world
    firsts = range(start * batch + rank * share, steps * batch, batch)
    batches = [range(first, first + share) for first in firsts]
    return load_batches(stream, batches, collate, workers, device, received)


POLL, PATIENCE = 1, 600     # seconds: between two looks at `received`, and without any batch
LOADER_HELP = ("The processes that load images (--workers) died, cannot send their batches or are "
               "stuck. Allow more open files (ulimit -n 65536), give a container more shared "
               "memory (docker run --shm-size 16g), or load in this process (--workers 0).")


def load_batches(rows, batches, collate, workers, device, received=()):
    """-> iterator of a batch for each list of indices in `batches`, loaded by `workers` processes.

    Raises LensError if the processes die, or send nothing for PATIENCE seconds, or for two POLLs
    once a signal has come. `received` is a list that a signal handler fills, see
    align.watch_signals."""
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                        worker_init_fn=prepare_worker, timeout=POLL if workers else 0,
                        pin_memory=device.type == "cuda")
    try:
        iterator = iter(loader)
        for _ in batches:
            yield next_batch(iterator, received)
    except (RuntimeError, OSError) as error:
        if not workers or str(error).startswith("Caught"):  # an error of the data, not of loading
            raise
        raise LensError(f"{LOADER_HELP} ({error})") from None


def next_batch(iterator, received):
    """The next batch of a DataLoader whose timeout is POLL."""
    signalled = False
    for _ in range(0, PATIENCE, POLL):
        try:
            return next(iterator)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
        if signalled:
            raise LensError(f"stopped by signal {received[0]} while waiting for a batch: go on "
                            "from the last checkpoint with --resume")
        signalled = bool(received)  # a batch may be on its way: wait one POLL more
    raise RuntimeError(f"No batch for {PATIENCE} seconds.")


def prepare_worker(worker):
    """A process that loads images ignores the signals that torchrun sends to everyone: the training
    process still needs it to finish its step. It sends tensors through its pipe, as NumPy arrays.
    By default they would lie in shared memory, each with a file descriptor of its own, about 500
    for a batch of 128 prompts."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


# --- Errors and files -----------------------------------------------------------------------------

class LensError(Exception):
    """An error that the user can mend. The message names the file or flag and the way out."""


def write_whole(path, text):
    """Write a file under another name and rename it, so that it is never found half-written."""
    path, unfinished = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(text)
    unfinished.replace(path)
