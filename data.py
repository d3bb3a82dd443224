"""Data: a picture, an expression, a mask and a box; the order of training.
In the paper: the inputs T and I of Eq. 1 and the truth M_gt of Eqs. 5 and 12.

    python data.py --check datasets     # reads every annotation: counts, and what is broken

Datasets are read where their authors put them; `--datasets NAME ...` mixes any of them:
    refcoco, refcoco+, refcocog (umd), refcocog-google
        ROOT/refer_seg/refcoco/{refs(unc).p, instances.json}
        ROOT/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg
    reasonseg
        ROOT/reason_seg/ReasonSeg/{train,val,test}/NAME.{jpg,json}
    groundingsuite (evaluation only)
        ROOT/[any/]GroundingSuite-Eval.jsonl, ROOT/{COCO,coco}/unlabeled2017/000000000267.jpg
    your own folder NAME, one line per object, paths from the folder
        ROOT/NAME/{train,val}.jsonl
        {"image": "a.jpg", "text": "the cup", "mask": "a.png", "box": [x1, y1, x2, y2]}
        text may be a list, mask COCO polygons or RLE; mask or box may be left out
    shapes: the laptop's world, in refcoco's layout; python tests/tiny/world.py ROOT writes it

Departures. The released code draws a random expression in `__getitem__`, so a GRPO group can mix an
object's expressions; here one is a function of (seed, epoch, object).

Boxes are (x1, y1, x2, y2). Three pixel frames occur and are named wherever a box is passed:
    picture frame   pixels of the original picture. Rewards and metrics live here.
    MLLM frame      what the language model reads and writes: pixels of the resized picture for
                    Qwen2.5-VL, thousandths of width and height for Qwen2-VL and Qwen3-VL.
    SAM frame       pixels of the square picture that SAM 2 sees (1024 x 1024 for the real one).
"""
import argparse
import gc
import io
import json
import math
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rewards import chat_messages


class LensError(Exception):
    """What a user can mend: the message names the file or flag and the way out."""


def write_whole(path, text):
    """Write beside and rename, so that a file that exists is complete."""
    path, unfinished = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(text)
    unfinished.replace(path)


# --- Frames of boxes ------------------------------------------------------------------------------

def rescale_box(box, source, target):
    """A box from a frame of `source` = (width, height) to one of `target` = (width, height). All
    changes of frame are this: picture -> MLLM (see `mllm_frame`), MLLM -> picture, MLLM -> SAM."""
    sx, sy = target[0] / source[0], target[1] / source[1]
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)


def mllm_frame(model_type, grid_thw, patch_size):
    """(width, height) of the frame in which a model family speaks of boxes: Qwen2.5-VL's resized
    picture, Qwen2-VL's and Qwen3-VL's thousandths. grid_thw counts patches: (1, height, width)."""
    if model_type == "qwen2_5_vl":
        return int(grid_thw[2]) * patch_size, int(grid_thw[1]) * patch_size
    return 1000, 1000


# --- Reading annotations: records are cheap, pictures and masks are decoded when asked for --------
#
# A record is {"id", "split", "image" (path), "texts" (its expressions), "size" ((height, width), or
# None where only the picture knows), "box" (picture frame, or None: the mask's extent),
# "segmentation" (see load_masks)}, and what evaluation counts apart: for GroundingSuite "class", in
# REFER's layout "kinds" (one per expression) and "layout", both None but in the shapes world. A
# reader yields a LensError in the place of a damaged one: training stops at the first, --check
# lists them all.
#
# Objects and expressions of each split, as published (None: not checked)
DATASETS = {
    "refcoco": {"train": (42404, 120624), "val": (3811, 10834),
                "testA": (1975, 5657), "testB": (1810, 5095)},
    "refcoco+": {"train": (42278, 120191), "val": (3805, 10758),
                 "testA": (1975, 5726), "testB": (1798, 4889)},
    "refcocog": {"train": (42226, 80512), "val": (2573, 4896), "test": (5023, 9602)},
    "refcocog-google": {"train": (44822, 85474), "val": (5000, 9536)},      # they share pictures
    "reasonseg": {"train": (239, None), "val": (200, 200), "test": (779, 779)},
    "groundingsuite": {"eval": (3715, 3715)},
    "shapes": dict(train=(4000, None), val=(700, None), testA=(300, None), testB=(300, None)),
}
REFS_FILES = {"refcocog": ("refcocog", "refs(umd).p"),            # else (dataset, "refs(unc).p")
              "refcocog-google": ("refcocog", "refs(google).p")}
CLASSES = {1: "stuff", 2: "part", 3: "multi", 4: "single"}       # GroundingSuite's, most likely
# What a damaged annotation makes its reader raise
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


class PlainUnpickler(pickle.Unpickler):
    """refs(*).p is a pickle from the internet: one that is more than plain data is not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which annotations never need")


def read_refs(path):
    """refs(*).p -> list of dicts. The originals were pickled by Python 2, hence latin1."""
    try:
        return PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except Exception as error:                      # a broken pickle can raise nearly anything
        raise LensError(f"{path}: no readable refs file ({error}). Download it again.") from None


def require(dataset, source, *paths):
    """Every path must exist: else one error that says what to download."""
    for path in paths:
        if not path.exists():
            raise LensError(f"{path} is missing. Download {dataset}'s annotations and pictures "
                            f"({source}; see data.py's first lines) or begin with --preset tiny.")


def refs_path(root, dataset):
    """Where a dataset in REFER's layout has its expressions."""
    return Path(root, "refer_seg", *REFS_FILES.get(dataset, (dataset, "refs(unc).p")))


def read_refcoco(root, dataset, splits):
    """RefCOCO, RefCOCO+, RefCOCOg and the shapes world: REFER's layout."""
    refs_file = refs_path(root, dataset)
    instances_file = refs_file.with_name("instances.json")
    pictures = Path(root) / "refer_seg/images/mscoco/images/train2014"
    if dataset == "shapes" and not refs_file.exists():
        raise LensError(f"{refs_file} is missing. Write the shapes world first: "
                        f"python tests/tiny/world.py {root}")
    source = f"REFER's {refs_file.parent.name}.zip, COCO's train2014 pictures"
    require(dataset, source, refs_file, instances_file, pictures)
    try:
        instances = json.loads(instances_file.read_bytes())
        images = {image["id"]: image for image in instances["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    except DAMAGED as error:
        raise LensError(f"{instances_file}: damaged ({error!r}). Download it again.") from None
    present = set(os.listdir(pictures))
    for n, ref in enumerate(read_refs(refs_file)):
        try:
            if ref["split"] not in splits:
                continue
            image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
            record = refer_record(ref, image, annotation, dataset, pictures)
            if os.path.basename(record["image"]) not in present:
                record = LensError(f"{refs_file}, ref_id {ref['ref_id']}: its picture "
                                   f"{record['image']} is missing. Download COCO's train2014.")
        except DAMAGED as error:
            name = f"record {n}"
            if isinstance(ref, dict):
                name = f"ref_id {ref.get('ref_id')}, ann_id {ref.get('ann_id')}"
            record = LensError(f"{refs_file}, {name}: damaged, or missing in {instances_file} "
                               f"({error!r}). Download both.")
        yield record


def refer_record(ref, image, annotation, dataset, pictures):
    """One ref with its COCO image and annotation -> a record. Its file_name names a crop."""
    height, width, (x, y, w, h) = image["height"], image["width"], annotation["bbox"]
    if not (w > 0 and h > 0 and -w < x < width and -h < y < height and ref["sentences"]):
        raise ValueError(f"no expression, or the box {x, y, w, h} lies outside the picture")
    return {"id": f"{dataset}/{ref['ref_id']}", "split": ref["split"],
            "image": f"{pictures}/COCO_train2014_{ref['image_id']:012d}.jpg",
            "texts": [sentence["sent"] for sentence in ref["sentences"]],
            "kinds": [sentence.get("kind") for sentence in ref["sentences"]],
            "layout": annotation.get("layout"),
            "size": (height, width), "box": (x, y, x + w, y + h),
            "segmentation": annotation["segmentation"]}


def read_reasonseg(root, dataset, splits):
    """ReasonSeg: a json beside every picture. Training uses all its texts, evaluation the first."""
    for split in splits:
        folder = Path(root) / "reason_seg/ReasonSeg" / split
        require(dataset, "ReasonSeg's train, val and test, linked from LISA's repository", folder)
        stems = {path.stem for path in folder.iterdir() if path.suffix in (".json", ".jpg")}
        for stem in sorted(stems):
            path, picture = folder / f"{stem}.json", folder / f"{stem}.jpg"
            try:
                texts, shapes = reasonseg_annotation(path.read_bytes())
                if not picture.exists():
                    raise ValueError("no picture")
                yield {"id": f"reasonseg/{split}/{stem}", "split": split, "image": str(picture),
                       "texts": texts if split == "train" else texts[:1], "size": None,
                       "box": None, "segmentation": shapes}
            except DAMAGED as error:
                yield LensError(f"{path}: damaged, or {picture.name} is missing ({error!r}).")


def reasonseg_annotation(content):
    """A file's bytes, UTF-8 or cp1252 -> its texts, and a tuple of (label, points (n, 2))."""
    try:
        annotation = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        annotation = json.loads(content.decode("cp1252"))
    shapes = []
    for shape in annotation["shapes"]:
        points = np.array(shape["points"]).astype(np.int32).reshape(-1, 2)
        shapes.append((shape["label"].lower(), points))
    return list_of_texts(annotation["text"]), tuple(shapes)


def list_of_texts(texts):
    """One expression or a list of them -> list. Raises ValueError for anything else."""
    texts = [texts] if isinstance(texts, str) else texts
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("it needs a text")
    return texts


def read_lines(root, dataset, splits):
    """One json per line: GroundingSuite-Eval, whose boxes are loose, and folders of one's own."""
    suite = dataset == "groundingsuite"
    if suite:                                       # it is never training data
        splits = ["eval"] if "eval" in splits else []
    for split in splits:
        path = Path(root) / dataset / f"{split}.jsonl"
        pictures, source = path.parent, "your own"
        if suite:
            path, pictures = suite_paths(Path(root))
            source = "GroundingSuite-Eval.jsonl, COCO's unlabeled2017"
        require(dataset, source, path, pictures)
        for n, line in enumerate(path.read_bytes().splitlines(), 1):    # U+2028 in a text ends none
            try:
                row = json.loads(line)
                if suite:
                    row = {"image": row["image_path"], "text": row["caption"], "box": row["box"],
                           "mask": row["segmentation"], "class": CLASSES[row["class_id"]]}
                record = line_record(row, path.parent, pictures)
                yield {"id": f"{dataset}/{split}/{n}", "split": split, **record}
            except DAMAGED as error:
                yield LensError(f"{path}, line {n}: damaged ({error!r}). "
                                f"data.py's first lines show what a line holds.")


def line_record(row, folder, pictures):
    """One line -> a record but for its id and split. Paths of masks count from `folder`."""
    texts, mask, box = list_of_texts(row["text"]), row.get("mask"), row.get("box")
    picture = pictures / row["image"]
    if not mask and not box:
        raise ValueError("it needs a mask or a box")
    if not picture.exists():
        raise ValueError(f"its picture {picture} is missing")
    if box:
        box = tuple(map(float, box))
        x1, y1, x2, y2 = box
        if not (x1 < x2 and y1 < y2 and all(map(math.isfinite, box))):
            raise ValueError(f"{box} is no box (x1, y1, x2, y2)")
    return {"image": str(picture), "texts": texts, "box": box or None, "class": row.get("class"),
            "size": tuple(mask["size"]) if isinstance(mask, dict) else None,
            "segmentation": str(folder / mask) if isinstance(mask, str) else mask}


def suite_paths(root):
    """GroundingSuite's file and its pictures' folder, as the suite or the released code do."""
    file = root / "GroundingSuite-Eval.jsonl"
    if not file.exists():
        file = next(iter(sorted(root.glob("*/GroundingSuite-Eval.jsonl"))), file)
    return file, root / ("coco" if (root / "coco").exists() else "COCO")


def read_dataset(root, dataset, splits):
    """-> generator of one dataset's records and errors, see above."""
    if dataset == "reasonseg":
        return read_reasonseg(root, dataset, splits)
    if dataset in DATASETS and dataset != "groundingsuite":
        return read_refcoco(root, dataset, splits)
    return read_lines(root, dataset, splits)


def read_records(root, datasets, splits):
    """Records of several datasets and splits, in order. LensError for what is missing or damaged.
    Left out, and named: ReasonSeg's unreadable files (two of those published are) and, from
    training, an object without a segmentation."""
    records, left_out = [], []
    gc.disable()        # millions of objects: the collector would take as long as reading them does
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


def find_datasets(root):
    """{dataset: its splits} of all that lies below root."""
    root = Path(root)
    suite_file, _ = suite_paths(root)
    places = {name: refs_path(root, name) for name in DATASETS}
    places |= {"reasonseg": root / "reason_seg/ReasonSeg", "groundingsuite": suite_file}
    found = {name: list(DATASETS[name]) for name, place in places.items() if place.exists()}
    for path in sorted(root.glob("*/*.jsonl")):     # folders of one's own
        if path != suite_file:
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


# --- Pictures and masks ---------------------------------------------------------------------------

def refuse_size(path, size, annotated):
    """LensError for a picture of `size` (H, W) that is not the annotated one or too long."""
    if annotated and size != tuple(annotated):
        raise LensError(f"{path}: {size[::-1]} pixels, annotated as {annotated[::-1]}. "
                        f"Take the original.")
    if max(size) > 200 * min(size):                 # Qwen's image processors raise
        raise LensError(f"{path}: {size[::-1]} pixels. The MLLM takes no picture whose long side "
                        f"is above 200 times the short one: crop it, or leave it out.")


def load_picture(path, size=None):
    """-> RGB picture; a missing or corrupt file is one error that names it. A camera's rotation is
    followed, as viewers do, unless the annotated `size` (H, W) is that of the pixels as stored."""
    try:
        picture = Image.open(path)
        if size is None or picture.size != tuple(size)[::-1]:
            picture = ImageOps.exif_transpose(picture)
        refuse_size(path, picture.size[::-1], size)
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise LensError(f"{path}: no readable picture ({error}). Download it again.") from None


def decode_mask(segmentation, size):
    """COCO polygons (their union) or RLE, compressed or not -> (H, W) bool."""
    rle = segmentation
    if isinstance(segmentation, list):
        if any(np.ndim(polygon) != 1 for polygon in segmentation):
            raise ValueError("a polygon is a flat list x, y, x, y, ...")
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]   # 2 enclose nothing
        if not polygons:
            return np.zeros(size, bool)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    elif isinstance(segmentation["counts"], list):
        counts = segmentation["counts"]
        if counts and sum(counts) != math.prod(segmentation["size"]):     # the rest is random
            raise ValueError("its counts do not add up to its size")
        rle = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(rle).astype(bool) if rle["counts"] else np.zeros(size, bool)


def draw_reasonseg(shapes, size):
    """ReasonSeg's (label, points) -> mask, ignored pixels, both (H, W) bool. The largest is drawn
    first; "flag" is no object, "ignore" in a label hides what is below, all else is the object."""
    drawn = [(fill_polygon(points, size), "ignore" in label)
             for label, points in shapes if label != "flag"]
    mask, ignore = np.zeros(size, bool), np.zeros(size, bool)
    for i in np.argsort([filled.sum() for filled, _ in drawn])[::-1]:
        filled, hides = drawn[i]
        mask[filled] = not hides
        ignore[filled] = hides
    return mask, ignore


def fill_polygon(points, size):
    """points (n, 2) x, y, fractions dropped, anywhere; size (H, W) -> (H, W) bool: outline and
    even-odd interior, as cv2.polylines and cv2.fillPoly of OpenCV 4.11, 4.13 and 5.0 draw them: no
    pixel differs on 40,400 random polygons each. ReasonSeg's published numbers rest on it: 4.8 to
    4.10 differ by about 18 pixels in a large outline, Pillow by about 230."""
    mask = np.zeros(size, dtype=bool)
    crossings = [[] for _ in range(size[0])]        # where a row meets the sides, x in 1/65536
    corners = np.asarray(points, dtype=np.int64)
    for side in np.stack([np.roll(corners, 1, axis=0), corners], axis=1):   # (2, 2): both its ends
        ends = cut_side(side, size)
        if ((ends >= 0) & (ends < size[::-1])).all():
            # Outline: Bresenham from the left end, where a tie keeps the pixel already reached
            start, stop = ends[np.argsort(ends[:, 0], kind="stable")]
            run = stop - start
            steps = np.abs(run).max()
            k = np.arange(steps + 1)[:, None]
            x, y = (start + (2 * run * k + steps - (run > 0)) // max(2 * steps, 1)).T
            mask[y, x] = True
        if ends[0, 1] == ends[1, 1]:                # cut to one row: OpenCV keeps the uncut y
            ends[:, 1] = side[:, 1]
        run = ends[1] - ends[0]
        slope = int((run[0] << 16) / (run[1] or 1))
        x, y = ends[0] if side[0, 1] < side[1, 1] else ends[1]
        for row in range(*np.clip(sorted(side[:, 1]), 0, size[0])):
            crossings[row].append(int(x << 16) + int(row - y) * slope)
    for row, xs in zip(mask, crossings):            # interior: first crossing to second and so on
        xs.sort()
        for begin, end in zip(xs[::2], xs[1::2]):
            row[max(-(-begin >> 16), 0):max((end >> 16) + 1, 0)] = True
    return mask


def cut_side(side, size):
    """Both ends of a side (2, 2), cut at the picture's border; whole if all beyond one border."""
    ends = side.copy()
    for axis in (1, 0):             # OpenCV's order, for every cut shifts a side a little
        inside = np.clip(ends, 0, np.array(size[::-1]) - 1)
        beyond = ends - inside
        if (np.sign(beyond).prod(0) > 0).any():
            return ends
        for end in (0, 1):
            if beyond[end, axis]:
                run = ends[1] - ends[0]
                ends[end, 1 - axis] -= int(beyond[end, axis] * run[1 - axis] / run[axis])
                ends[end, axis] = inside[end, axis]
    return ends


def load_masks(record, size):
    """-> mask, ignored pixels, each (H, W) bool. Of a record with a box alone all is ignored, so
    that neither loss nor reward nor metric looks at its mask."""
    segmentation = record["segmentation"]
    mask, ignore = np.zeros(size, bool), np.zeros(size, bool)
    try:
        if segmentation is None:
            ignore[:] = True
        elif isinstance(segmentation, tuple):
            mask, ignore = draw_reasonseg(segmentation, size)
        elif isinstance(segmentation, str):
            picture = Image.open(segmentation)      # what is not black is the object
            if picture.mode not in ("1", "L", "P", "I;16", "I"):
                picture = picture.convert("RGB")
            mask = np.asarray(picture) != 0
            mask = mask.any(-1) if mask.ndim == 3 else mask
        else:
            mask = decode_mask(segmentation, size)
        if mask.shape != tuple(size):
            raise ValueError(f"{mask.shape[::-1]} pixels")
    except DAMAGED as error:
        raise LensError(f"{record['id']} ({record['image']}, {size[1]} x {size[0]} pixels): its "
                        f"segmentation is damaged or of another size ({type(error).__name__}: "
                        f"{error}). Download or make it again.") from None
    return mask, ignore


def extent(mask):
    """The box (picture frame) that encloses a mask, max + 1; (0, 0, 0, 0) for an empty one."""
    return Image.fromarray(mask).getbbox() or (0, 0, 0, 0)


def load_item(record, text_index):
    """One record with one of its expressions, decoded -> {"id", "text", "image" (PIL, RGB), "mask",
    "ignore" (both (H, W) bool), "box" (picture frame)}. LensError for what is damaged."""
    image = load_picture(record["image"], record["size"])
    mask, ignore = load_masks(record, image.size[::-1])
    return {"id": f"{record['id']}/{text_index}", "text": record["texts"][text_index],
            "image": image, "mask": mask, "ignore": ignore, "box": record["box"] or extent(mask)}


# --- Order and batches ----------------------------------------------------------------------------

class EvaluationRows(Dataset):
    """(record, index of one of its texts), decoded when asked for. Every expression of every object
    is a row (the field's metric); `limit` takes rows evenly, `rows` gives them as they are."""

    def __init__(self, records=(), limit=None, rows=None):
        self.rows = rows or [(record, i) for record in records for i in range(len(record["texts"]))]
        self.total = len(self.rows)
        if limit and limit < self.total:
            keep = np.linspace(0, self.total - 1, limit).astype(int)
            self.rows = [self.rows[i] for i in keep]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return load_item(*self.rows[k])

    def key(self, k):
        record, text = self.rows[k]
        return f"{record['id']}/{text}"


class TrainingStream(Dataset):
    """Training as one endless sequence, one expression per object and epoch. Item k is a function
    of (records, seed, k): a run that resumes, on any number of processes, goes on with its data."""

    def __init__(self, records, seed):
        self.records, self.seed = records, seed
        self.epoch, self.order = None, None

    def choose(self, k):
        """-> the record and the index of its text that item k is"""
        epoch, place = divmod(k, len(self.records))
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
            self.epoch = epoch
        index = int(self.order[place])
        record = self.records[index]
        text = np.random.default_rng([self.seed, epoch, index]).integers(len(record["texts"]))
        return record, int(text)

    def __getitem__(self, k):
        return load_item(*self.choose(k))

    def rows(self, first, last):
        """What the items first, ..., last - 1 are, each once, the largest pictures first."""
        chosen = {}
        for k in range(first, last):
            record, text = self.choose(k)
            chosen[record["id"], text] = math.prod(record["size"] or (0,)), (record, text)
        largest_first = sorted(chosen.values(), key=lambda sized: sized[0], reverse=True)
        return EvaluationRows(rows=[row for _, row in largest_first])


SAM_MEAN, SAM_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def sam_picture(image, size):
    """PIL -> (3, size, size) float, squashed to SAM's square and normalised as sam2 does."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
    return (pixels - SAM_MEAN[:, None, None]) / SAM_STD[:, None, None]


def shrink(masks, side):
    """B masks (H_b, W_b) bool -> (B, side, side) float: the share of each cell that is true."""
    cells = [F.adaptive_avg_pool2d(mask[None].float(), (side, side))[0] for mask in masks]
    return torch.stack(cells)


class Collator:
    """Items -> the tensors of one batch of B prompts. Runs in the loader's workers.

    ids, types     lists of B (P_b,) long: prompt tokens, and 1 where one is a piece of the picture
    pixel_values   (patches of all pictures, D); grid_thw (B, 3), in patches
    sam_pixels     (B, 3, S, S)
    low_masks      (B, S/4, S/4) float in [0, 1]: the truth at the decoder's resolution, averaged
    low_weights    (B, S/4, S/4) float in [0, 1]: how much of each cell is not ignored
    masks, ignores lists of B (H_b, W_b) bool, at the pictures' size
    boxes, frames  lists of B: true box in the picture frame; (width, height) of the MLLM frame
    """

    def __init__(self, processor, model_type, sam_size, max_prompt, prompt="paper"):
        self.processor, self.model_type, self.sam_size = processor, model_type, sam_size
        self.max_prompt, self.prompt = max_prompt, prompt

    def __call__(self, items):
        images, texts = [item["image"] for item in items], [item["text"] for item in items]
        prompts = [self.processor.apply_chat_template(
            chat_messages(text, self.prompt), add_generation_prompt=True) for text in texts]
        encoded = self.processor(text=prompts, images=images, return_mm_token_type_ids=True)
        ids = [torch.as_tensor(row) for row in encoded["input_ids"]]
        for item, row in zip(items, ids):
            if len(row) > self.max_prompt:          # never cut: half a picture is not a prompt
                raise LensError(f"{item['id']}: its prompt has {len(row)} tokens, the limit is "
                                f"{self.max_prompt}. Raise --max-prompt or lower --max-pixels.")
        grids = torch.as_tensor(encoded["image_grid_thw"])
        patch = self.processor.image_processor.patch_size
        masks = [torch.from_numpy(item["mask"]) for item in items]
        ignores = [torch.from_numpy(item["ignore"]) for item in items]
        low_weights = shrink([~ignore for ignore in ignores], self.sam_size // 4)
        low_masks = shrink(masks, self.sam_size // 4) / low_weights.clamp(min=1e-6)
        return {
            "ids": ids, "types": [torch.as_tensor(row) for row in encoded["mm_token_type_ids"]],
            "pixel_values": torch.as_tensor(encoded["pixel_values"]), "grid_thw": grids,
            "sam_pixels": torch.stack([sam_picture(image, self.sam_size) for image in images]),
            "low_masks": low_masks, "low_weights": low_weights, "masks": masks, "ignores": ignores,
            "boxes": [item["box"] for item in items],
            "frames": [mllm_frame(self.model_type, grid, patch) for grid in grids],
            "texts": texts, "keys": [item["id"] for item in items],
        }


def select(batch, indices):
    """The sub-batch of some of a batch's prompts; only pixel_values has no leading B."""
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
    """Move what the models read; token ids stay on the CPU, where groups are packed."""
    read = ("pixel_values", "grid_thw", "sam_pixels", "low_masks", "low_weights")
    return {**batch, **{name: batch[name].to(device, non_blocking=True) for name in read}}


def training_batches(stream, collate, start, steps, batch, rank, world, workers, device):
    """One batch of this rank's prompts per step, from step `start` on. Step s takes items s*batch
    and on, rank r its r-th share: a step's data does not depend on the number of processes."""
    share = batch // world
    firsts = range(start * batch + rank * share, steps * batch, batch)
    batches = [range(first, first + share) for first in firsts]
    return load_batches(stream, batches, collate, workers, device)


def load_batches(rows, batches, collate, workers, device):
    """A DataLoader over lists of indices. Its processes ignore the signals that end a run (see
    align.watch_signals): torchrun sends them to every process, and without loaders a run dies."""
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")


def ignore_signals(worker):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# --- python data.py --check ROOT ------------------------------------------------------------------

def check(root):
    """Read every annotation below root, decode its mask, and print counts beside the published ones
    and what is broken. -> 1 where something is broken, else 0."""
    found = find_datasets(root)
    broken = sum(check_split(root, name, split) for name in found for split in found[name])
    if not found:
        print(f"{root}: no dataset here. data.py's first lines show where each belongs.")
    return int(broken > 0 or not found)


def check_split(root, dataset, split):
    """Print a split's counts. -> how many of its records are broken."""
    objects = texts = empty = broken = 0
    records = tqdm(read_dataset(root, dataset, [split]), desc=f"{dataset} {split}", leave=False)
    try:
        for record in records:
            try:
                mask, ignore = check_record(record)
                objects += 1
                texts += len(record["texts"])
                empty += not (mask | ignore).any()
            except (LensError, OSError) as error:
                tqdm.write(str(error))
                broken += 1
    except LensError as error:                      # the whole split is missing
        tqdm.write(str(error))
        broken += 1
    published = "/".join(str(n or "?") for n in DATASETS.get(dataset, {}).get(split, "-"))
    print(f"{dataset:16s}{split:6s} {objects:6d} objects, {texts:6d} expressions (published: "
          f"{published}), {empty} without a mask, {broken} broken")
    return broken


def check_record(record):
    """-> mask, ignored pixels. Of the picture only presence and size are looked at."""
    if isinstance(record, LensError):
        raise record
    with Image.open(record["image"]) as picture:
        size = picture.size[::-1]
        if size != record["size"] and picture.getexif().get(0x0112, 1) > 4:   # as load_picture
            size = size[::-1]
    refuse_size(record["image"], size, record["size"])
    return load_masks(record, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read all annotations, name what is broken.")
    parser.add_argument("--check", required=True, metavar="ROOT", help="what --data names")
    sys.exit(check(parser.parse_args().check))
