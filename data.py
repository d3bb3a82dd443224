"""Data: a picture, an expression, a mask and a box; the prompt of Fig. 4; the order of training.

Where it stands in the paper: the inputs p_sys, T and I of Eq. 1 and the truth M_gt of Eqs. 5 and 12.

    python data.py --check datasets          # reads every annotation below datasets/: counts, and what is broken

Datasets are read where their authors put them; `--datasets NAME ...` mixes any of them:

    refcoco, refcoco+, refcocog (umd), refcocog-google
        ROOT/refer_seg/refcoco/{refs(unc).p, instances.json}
        ROOT/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg
    reasonseg
        ROOT/reason_seg/ReasonSeg/{train,val,test}/NAME.{jpg,json}
    groundingsuite (evaluation only)
        ROOT/GroundingSuite-Eval.jsonl (or in a folder of ROOT), ROOT/COCO/unlabeled2017/000000000267.jpg (or coco)
    your own folder NAME, one line per object, paths from the folder; text may be a list, and mask or box may be left out
        ROOT/NAME/{train,val}.jsonl
        {"image": "a.jpg", "text": "the cup", "mask": "a.png" or COCO polygons or RLE, "box": [x1, y1, x2, y2]}
    shapes
        the laptop's world, in refcoco's layout, written by tests/extras/shapes_world.py

Departures. The released code draws a random expression inside `__getitem__`, so one GRPO group can mix several
expressions of an object; here the expression is a function of (seed, epoch, object) and a group shares it. Its prompts
ask for a box, with reasoning or without (`--prompt released`, `released-cot`); ours is Fig. 4's.

Boxes are (x1, y1, x2, y2). Three pixel frames occur and are named wherever a box is passed:
    picture frame   pixels of the original picture. Rewards and metrics live here.
    MLLM frame      what the language model reads and writes: pixels of the resized picture for Qwen2.5-VL,
                    thousandths of width and height for Qwen2-VL and Qwen3-VL.
    SAM frame       pixels of the square picture that SAM 2 sees (1024 x 1024 for the real one).
"""
import argparse
import gc
import importlib
import io
import json
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset


class LensError(Exception):
    """What a user can mend: the message names the file or flag and the way out, and is printed without a traceback."""

    def __init__(self, message):                                  # a loader's process puts its traceback before it
        super().__init__(message.rpartition("LensError: ")[2].strip())


def extra(name):
    """A module of tests/extras/: what a user may need but the method does not (the shapes world, tables, the gallery)."""
    folder = str(Path(__file__).resolve().parent / "tests/extras")
    sys.path += [folder] * (folder not in sys.path)
    return importlib.import_module(name)


def write_whole(path, text):
    """Write beside and rename, so that a file that exists is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".tmp").write_text(text)
    path.with_name(path.name + ".tmp").replace(path)


# --- The prompt (Fig. 4) and the answer it asks for -----------------------------------------------

SYSTEM_PROMPT = '''You are a helpful assistant. Find the object that best matches "{object}" and provide its bounding box.

Please:
1. Analyze all objects in the image carefully
2. Compare candidates against the target description
3. Select the most closely matching object
4. Provide precise bounding box coordinates

Format your response as:
<think>
[Your step-by-step analysis and reasoning]
</think>
<answer>
```json
[
  {"bbox_2d": [x1,y1,x2,y2], "label": question}
]
```
</answer>'''


# What the released checkpoints were trained on, word for word (their constants.py): without reasoning, and with it
RELEASED_PROMPTS = {
    "released": "Output the bounding box of the {question} in the image.",
    "released-cot": 'Locate "{question}", report the bbox coordinates in JSON format.Compare the difference between objects '
                    "and find the most closely matched one.Output the thinking process in <think> </think> and final answer "
                    "in <answer> </answer> tags.Output the one bbox inside the interested object in JSON format.i.e., "
                    "<think>thinking process here</think><answer>answer here</answer>"}


def chat_messages(text, prompt="paper"):
    """The conversation of Fig. 4 for one expression: system prompt, then the picture and the bare expression; or one of
    the released code's."""
    system, user = SYSTEM_PROMPT.replace("{object}", text), text
    if prompt != "paper":
        system, user = "You are a helpful assistant. ", RELEASED_PROMPTS[prompt].replace("{question}", text)
    return [{"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user}]}]


def answer_text(box, label, reasoning=None, prompt="paper"):
    """The response Fig. 4 asks for, with `box` in the MLLM frame. Without `reasoning`, the answer block alone
    (stage 1's `--context true`), or with the released prompts what the released code forces there."""
    x1, y1, x2, y2 = (round(v) for v in box)
    if prompt != "paper":
        return f"<|object_ref_start|>{label}.<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    answer = ('<answer>\n```json\n[\n  {"bbox_2d": [%d, %d, %d, %d], "label": %s}\n]\n```\n</answer>'
              % (x1, y1, x2, y2, json.dumps(label, ensure_ascii=False)))
    return answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n{answer}"


def rescale_box(box, source, target):
    """A box from a frame of `source` = (width, height) to one of `target` = (width, height). All frame changes of
    this project are this function: picture -> MLLM (see `mllm_frame`), MLLM -> picture, MLLM -> SAM."""
    sx, sy = target[0] / source[0], target[1] / source[1]
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)


def mllm_frame(model_type, grid_thw, patch_size):
    """(width, height) of the frame in which a model family speaks of boxes: Qwen2.5-VL uses the pixels of the resized
    picture, Qwen2-VL and Qwen3-VL thousandths. grid_thw counts patches: (1, height, width)."""
    if model_type == "qwen2_5_vl":
        return int(grid_thw[2]) * patch_size, int(grid_thw[1]) * patch_size
    return 1000, 1000


# --- Reading annotations: records are cheap, pictures and masks are decoded when asked for ---------
#
# A record is {"id", "split", "image" (path), "texts" (its expressions), "size" ((height, width), or None where only the
# picture knows), "box" (picture frame, or None: the mask's extent), "segmentation" (see load_masks)}, and for
# GroundingSuite "class". A reader yields the records of the splits asked for, and in the place of a damaged one a
# LensError that names it: training stops at the first, --check lists them all.

# Objects and expressions of each split, as published (None: not checked)
DATASETS = {
    "refcoco": {"train": (42404, 120624), "val": (3811, 10834), "testA": (1975, 5657), "testB": (1810, 5095)},
    "refcoco+": {"train": (42278, 120191), "val": (3805, 10758), "testA": (1975, 5726), "testB": (1798, 4889)},
    "refcocog": {"train": (42226, 80512), "val": (2573, 4896), "test": (5023, 9602)},
    "refcocog-google": {"train": (44822, 85474), "val": (5000, 9536)},       # its train and val share pictures
    "reasonseg": {"train": (239, None), "val": (200, 200), "test": (779, 779)},
    "groundingsuite": {"eval": (3715, 3715)},
    "shapes": {"train": (4000, None), "val": (700, None), "testA": (300, None), "testB": (300, None)},
}
REFS_FILES = {"refcocog": ("refcocog", "refs(umd).p"), "refcocog-google": ("refcocog", "refs(google).p")}
CLASSES = {1: "stuff", 2: "part", 3: "multi", 4: "single"}       # of GroundingSuite's class_id, most likely


class PlainUnpickler(pickle.Unpickler):
    """refs(*).p is a pickle that people download. Plain containers, numbers and strings need no global at all, so a
    file that asks for one is not a refs file, and is not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which plain annotations never need")


def read_refs(path):
    """refs(*).p -> list of dicts. The originals were pickled by Python 2, hence latin1."""
    try:
        return PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except Exception as error:                                    # a broken pickle can raise nearly anything
        raise LensError(f"{path}: not a readable refs file ({error}). Download it again.") from None


def require(dataset, source, *paths):
    """Every path must exist: else one error that says what to download."""
    for path in paths:
        if not path.exists():
            raise LensError(f"{path} is missing. Download {dataset}'s annotations and pictures ({source}) and lay them out "
                            f"below --data as data.py's first lines show; or try the method without any download: "
                            f"--preset tiny.")


def read_refcoco(root, dataset, splits):
    """RefCOCO, RefCOCO+, RefCOCOg and the shapes world: REFER's layout."""
    name, refs_name = REFS_FILES.get(dataset, (dataset, "refs(unc).p"))
    folder, pictures = Path(root) / "refer_seg" / name, Path(root) / "refer_seg/images/mscoco/images/train2014"
    refs_file, instances_file = folder / refs_name, folder / "instances.json"
    require(dataset, f"REFER's {name}.zip, COCO's train2014 pictures", refs_file, instances_file, pictures)
    gc.disable()                              # else the collector walks through millions of objects again and again
    try:
        instances = json.loads(instances_file.read_bytes())
        images = {image["id"]: image for image in instances["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
        refs = read_refs(refs_file)
    except (ValueError, KeyError, TypeError) as error:
        raise LensError(f"{instances_file}: not a readable COCO annotation file ({error!r}). Download it again.") from None
    finally:
        gc.freeze(), gc.enable()
    present = set(os.listdir(pictures))
    for n, ref in enumerate(refs):
        try:
            if ref["split"] not in splits:
                continue
            record = make_record(ref, images[ref["image_id"]], annotations[ref["ann_id"]], dataset, pictures)
        except (KeyError, TypeError, ValueError) as error:
            name = f"ref_id {ref.get('ref_id')}, ann_id {ref.get('ann_id')}" if isinstance(ref, dict) else f"record {n}"
            yield LensError(f"{refs_file}, {name}: damaged, or missing in {instances_file} ({error!r}). Download both.")
            continue
        yield record if os.path.basename(record["image"]) in present else LensError(
            f"{refs_file}, ref_id {ref['ref_id']}: its picture {record['image']} is missing. Download COCO's train2014.")
    gc.unfreeze()


def make_record(ref, image, annotation, dataset, pictures):
    """One ref with its COCO image and annotation -> a record. The picture is named from image_id: file_name names a crop."""
    height, width, (x, y, w, h) = image["height"], image["width"], annotation["bbox"]
    if not (w > 0 and h > 0 and -w < x < width and -h < y < height and ref["sentences"]):
        raise ValueError(f"no expression, or the box {x, y, w, h} lies outside the picture")
    return {"id": f"{dataset}/{ref['ref_id']}", "image": f"{pictures}/COCO_train2014_{ref['image_id']:012d}.jpg",
            "size": (height, width), "texts": [sentence["sent"] for sentence in ref["sentences"]],
            "box": (x, y, x + w, y + h), "segmentation": annotation["segmentation"], "split": ref["split"]}


def read_reasonseg(root, dataset, splits):
    """ReasonSeg: a json beside every picture, UTF-8 or cp1252. Training uses all its texts, evaluation the first."""
    for split in splits:
        folder = Path(root) / "reason_seg/ReasonSeg" / split
        require(dataset, "ReasonSeg's train, val and test, linked from LISA's repository", folder)
        for stem in sorted({path.stem for path in folder.iterdir() if path.suffix in (".json", ".jpg")}):
            path, picture = folder / f"{stem}.json", folder / f"{stem}.jpg"
            try:
                content = path.read_bytes()
                try:
                    content = content.decode("utf-8-sig")
                except UnicodeDecodeError:
                    content = content.decode("cp1252")
                annotation = json.loads(content)
                texts = [annotation["text"]] if isinstance(annotation["text"], str) else annotation["text"]
                if not texts or not all(isinstance(text, str) for text in texts) or not picture.exists():
                    raise ValueError("no text, or no picture")
                shapes = tuple((shape["label"].lower(), np.array(shape["points"]).astype(np.int32).reshape(-1, 2))
                               for shape in annotation["shapes"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                yield LensError(f"{path}: not a readable ReasonSeg annotation of {picture.name} ({error!r}).")
                continue
            yield {"id": f"reasonseg/{split}/{stem}", "split": split, "image": str(picture), "size": None, "box": None,
                   "texts": texts if split == "train" else texts[:1], "segmentation": shapes}


def read_lines(root, dataset, splits):
    """One json per line: GroundingSuite-Eval (its boxes are loose: mean IoU 0.90 with the mask's extent) and folders of
    one's own."""
    suite = dataset == "groundingsuite"
    for split in ["eval"] * ("eval" in splits) if suite else splits:        # the suite is never training data
        path = Path(root) / dataset / f"{split}.jsonl"
        path, pictures = suite_paths(Path(root)) if suite else (path, path.parent)
        require(dataset, "GroundingSuite-Eval.jsonl, COCO's unlabeled2017" if suite else "your own", path, pictures)
        for n, line in enumerate(path.read_bytes().splitlines(), 1):        # of bytes: U+2028 in a text ends no line
            try:
                row = json.loads(line)
                if suite:
                    row = {"image": row["image_path"], "text": row["caption"], "mask": row["segmentation"],
                           "box": row["box"], "class": CLASSES[row["class_id"]]}
                texts = [row["text"]] if isinstance(row["text"], str) else row["text"]
                mask, box, picture = row.get("mask"), row.get("box") and picture_box(row["box"]), pictures / row["image"]
                if not texts or not all(isinstance(text, str) for text in texts) or not (mask or box):
                    raise ValueError("it needs a text, and a mask or a box")
                if not picture.exists():
                    raise ValueError(f"its picture {picture} is missing")
                yield {"id": f"{dataset}/{split}/{n}", "split": split, "image": str(picture), "texts": texts, "box": box,
                       "size": tuple(mask["size"]) if isinstance(mask, dict) else None, "class": row.get("class"),
                       "segmentation": str(path.parent / mask) if isinstance(mask, str) else mask}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                yield LensError(f"{path}, line {n}: damaged ({error!r}). data.py's first lines show what a line holds.")


def suite_paths(root):
    """GroundingSuite's file and the folder of its pictures, under the names that the suite and the released code use."""
    files = [root / "GroundingSuite-Eval.jsonl", *sorted(root.glob("*/GroundingSuite-Eval.jsonl"))]
    return ([file for file in files if file.exists()] or files)[0], root / ("coco" if (root / "coco").exists() else "COCO")


def picture_box(values):
    """A box as a file gives it -> tuple. Raises ValueError for what is no box."""
    x1, y1, x2, y2 = map(float, values)
    if not (x1 < x2 and y1 < y2 and all(map(math.isfinite, (x1, y1, x2, y2)))):
        raise ValueError(f"{values} is no box (x1, y1, x2, y2)")
    return x1, y1, x2, y2


def read_dataset(root, dataset, splits):
    """-> generator of one dataset's records, see above. The shapes world is the one we can make: it is written if absent."""
    if dataset == "shapes" and not (Path(root) / "refer_seg/shapes").exists():
        extra("shapes_world").write_shapes_world(root)
    if dataset == "reasonseg":
        return read_reasonseg(root, dataset, splits)
    return (read_refcoco if dataset in DATASETS and dataset != "groundingsuite" else read_lines)(root, dataset, splits)


def read_records(root, datasets, splits):
    """Records of several datasets and splits, in order. Raises LensError for what is missing and at the first damaged
    record. Left out, and named: ReasonSeg's unreadable files (two of those published are) and, from training, an
    object without a segmentation."""
    records, out = [], []
    for dataset in datasets:
        before = len(records)
        for record in read_dataset(root, dataset, splits):
            if isinstance(record, LensError):
                if dataset != "reasonseg":
                    raise record
                out.append(str(record))
            elif record["split"] == "train" and record["segmentation"] == []:
                out.append(f"{record['id']}: no segmentation, left out of training")
            else:
                records.append(record)
        for split in set(splits) - {record["split"] for record in records[before:]}:
            raise LensError(f"{root}: no object of split '{split}' in {dataset}. It has "
                            f"{', '.join(find_datasets(root).get(dataset, ()))}.")
    if out and os.environ.get("RANK", "0") == "0":
        print("\n".join(["left out:", *out]), file=sys.stderr)
    return records


def find_datasets(root):
    """{dataset: its splits} of all that lies below root."""
    root, found = Path(root), {}
    for name, splits in DATASETS.items():
        place = {"reasonseg": root / "reason_seg/ReasonSeg", "groundingsuite": suite_paths(root)[0]}.get(
            name, Path(root, "refer_seg", *REFS_FILES.get(name, (name, "refs(unc).p"))))
        found |= {name: list(splits)} if place.exists() else {}
    for path in sorted(root.glob("*/*.jsonl")):                                     # folders of one's own
        if path != suite_paths(root)[0]:
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


# --- Pictures and masks ---------------------------------------------------------------------------

def load_picture(path, size=None):
    """-> RGB picture; a missing or corrupt file is one error that names it. A camera's EXIF rotation is followed, as
    viewers do, unless the annotated `size` (H, W) is that of the pixels as they are stored."""
    try:
        picture = Image.open(path)
        upright = picture if size is not None and picture.size == tuple(size)[::-1] else ImageOps.exif_transpose(picture)
        return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise LensError(f"{path}: missing or not a readable picture ({error}). Download or copy it again.") from None


def decode_mask(segmentation, size):
    """COCO polygons (their union) or RLE, compressed or not -> (H, W) bool."""
    if isinstance(segmentation, list):
        if any(np.ndim(polygon) != 1 for polygon in segmentation):
            raise ValueError("a polygon is a flat list x, y, x, y, ...")
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]       # two points enclose nothing
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if polygons else {"size": size, "counts": b""}
    elif isinstance(segmentation["counts"], list):
        if segmentation["counts"] and sum(segmentation["counts"]) != math.prod(segmentation["size"]):   # the rest is random
            raise ValueError("its counts do not add up to its size")
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(segmentation).astype(bool) if segmentation["counts"] else np.zeros(size, bool)


def draw_reasonseg(shapes, size):
    """ReasonSeg's (label, points) -> mask, ignored pixels, both (H, W) bool. The largest is drawn first; "flag" is no
    object, a label with "ignore" in it hides what lies below, and any other label is the object."""
    fill = extra("polygons").fill_polygon
    drawn = [(fill(points, size), "ignore" in label) for label, points in shapes if label != "flag"]
    mask, ignore = np.zeros(size, bool), np.zeros(size, bool)
    for i in np.argsort([filled.sum() for filled, _ in drawn])[::-1]:
        filled, hides = drawn[i]
        mask[filled], ignore[filled] = not hides, hides
    return mask, ignore


def load_masks(record, size):
    """-> mask, ignored pixels, each (H, W) bool. A record without a segmentation has a box alone: all of it is ignored, so
    that neither loss nor reward nor metric looks at its mask. LensError where it is damaged or of another size."""
    segmentation = record["segmentation"]
    try:
        ignore = np.zeros(size, bool)
        if segmentation is None:
            return ignore, ~ignore
        if isinstance(segmentation, tuple):
            return draw_reasonseg(segmentation, size)
        if isinstance(segmentation, str):                                           # a picture: not black is the object
            picture = Image.open(segmentation)
            pixels = np.asarray(picture if picture.mode in ("1", "L", "P", "I;16", "I") else picture.convert("RGB")) != 0
            mask = pixels.any(-1) if pixels.ndim == 3 else pixels
        else:
            mask = decode_mask(segmentation, size)
        if mask.shape != tuple(size):
            raise ValueError(f"{mask.shape[::-1]} pixels")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise LensError(f"{record['id']} ({record['image']}, {size[1]} x {size[0]} pixels): its segmentation is damaged or "
                        f"of another size ({type(error).__name__}: {error}). Download or make it again.") from None
    return mask, ignore


def extent(mask):
    """The box (picture frame) that encloses a mask, max + 1; (0, 0, 0, 0) for an empty one."""
    rows, columns = np.where(mask)
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def load_item(record, text_index):
    """Decode one record with one of its expressions.

    -> {"id", "text", "image" (PIL, RGB), "mask", "ignore" (H, W) bool, "box" (picture frame)}; LensError for a corrupt
    picture or mask, or a picture whose size is not the annotated one.
    """
    image = load_picture(record["image"], record["size"])
    if image.size[::-1] != tuple(record["size"] or image.size[::-1]):
        raise LensError(f"{record['image']}: {image.size} pixels, annotated as {record['size'][::-1]}. Take the original.")
    mask, ignore = load_masks(record, image.size[::-1])
    return {"id": f"{record['id']}/{text_index}", "text": record["texts"][text_index], "image": image, "mask": mask,
            "ignore": ignore, "box": record["box"] or extent(mask)}


# --- Order and batches ----------------------------------------------------------------------------

class TrainingStream(Dataset):
    """Training as one endless, indexable sequence: item k is a pure function of (records, seed, k), so a run that
    resumes at any k, on any number of processes, goes on with the same data. One expression per object and epoch."""

    def __init__(self, records, seed):
        self.records, self.seed = records, seed
        self.epoch, self.order = None, None

    def __getitem__(self, k):
        epoch, place = divmod(k, len(self.records))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
        index = int(self.order[place])
        texts = len(self.records[index]["texts"])
        return load_item(self.records[index], int(np.random.default_rng([self.seed, epoch, index]).integers(texts)))


class EvaluationRows(Dataset):
    """Every expression of every object is one row (the field's metric). `limit` takes rows evenly over the split."""

    def __init__(self, records, limit=None):
        rows = [(record, i) for record in records for i in range(len(record["texts"]))]
        keep = range(len(rows)) if not limit or limit >= len(rows) else np.linspace(0, len(rows) - 1, limit).astype(int)
        self.rows, self.total = [rows[i] for i in keep], len(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return load_item(*self.rows[k])


SAM_MEAN, SAM_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def sam_picture(image, size):
    """PIL -> (3, size, size) float, squashed to SAM's square and normalised, as sam2's own transform does."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
    return (pixels - SAM_MEAN[:, None, None]) / SAM_STD[:, None, None]


class Collator:
    """Items -> the tensors of one batch of B prompts. Runs in the loader's workers.

    ids, types     lists of B (P_b,) long: prompt tokens, and 1 where a token is a piece of the picture
    pixel_values   (patches of all pictures, D); grid_thw (B, 3), in patches
    sam_pixels     (B, 3, S, S)
    low_masks      (B, S/4, S/4) float in [0, 1]: the truth at the decoder's own resolution, area-averaged
    low_weights    (B, S/4, S/4) float in [0, 1]: how much of each cell is not ignored
    masks, ignores lists of B (H_b, W_b) bool, at the pictures' size
    boxes, frames  lists of B: true box in the picture frame; (width, height) of the MLLM frame
    texts, keys    lists of B strings
    """

    def __init__(self, processor, model_type, sam_size, max_prompt, prompt="paper"):
        self.processor, self.model_type, self.sam_size = processor, model_type, sam_size
        self.max_prompt, self.prompt = max_prompt, prompt

    def __call__(self, items):
        texts = [self.processor.apply_chat_template(chat_messages(item["text"], self.prompt), add_generation_prompt=True)
                 for item in items]
        encoded = self.processor(text=texts, images=[item["image"] for item in items], return_mm_token_type_ids=True)
        ids = [torch.as_tensor(row) for row in encoded["input_ids"]]
        for item, row in zip(items, ids):
            if len(row) > self.max_prompt:        # never cut: half a picture is not a prompt
                raise LensError(f"{item['id']}: its prompt has {len(row)} tokens, the limit is {self.max_prompt}. Raise "
                                 f"--max-prompt, or lower --max-pixels so that a picture takes fewer tokens.")
        grids = torch.as_tensor(encoded["image_grid_thw"])
        patch = self.processor.image_processor.patch_size
        masks, ignores = ([torch.from_numpy(item[name]) for item in items] for name in ("mask", "ignore"))
        to_low = lambda m: F.adaptive_avg_pool2d(m[None].float(), (self.sam_size // 4,) * 2)[0]
        weights = torch.stack([to_low(~ignore) for ignore in ignores])
        return {
            "ids": ids, "types": [torch.as_tensor(row) for row in encoded["mm_token_type_ids"]],
            "pixel_values": torch.as_tensor(encoded["pixel_values"]), "grid_thw": grids,
            "sam_pixels": torch.stack([sam_picture(item["image"], self.sam_size) for item in items]),
            "low_masks": torch.stack([to_low(m) for m in masks]) / weights.clamp(min=1e-6), "low_weights": weights,
            "masks": masks, "ignores": ignores, "boxes": [item["box"] for item in items],
            "frames": [mllm_frame(self.model_type, grid, patch) for grid in grids],
            "texts": [item["text"] for item in items], "keys": [item["id"] for item in items],
        }


def select(batch, indices):
    """The sub-batch of some of a batch's prompts; pixel_values is the one entry without a leading B."""
    patches = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    take = lambda value: value[indices] if torch.is_tensor(value) else [value[i] for i in indices]
    return {name: torch.cat([patches[i] for i in indices]) if name == "pixel_values" else take(value)
            for name, value in batch.items()}


def to_device(batch, device):
    """Move what the models read; token ids stay on the CPU, where groups are packed."""
    read = ("pixel_values", "grid_thw", "sam_pixels", "low_masks", "low_weights")
    return {**batch, **{name: batch[name].to(device, non_blocking=True) for name in read}}


def training_batches(stream, collate, start, steps, batch, rank, world, workers):
    """One batch of this rank's prompts per step, from step `start` on. Step s takes items s*batch ... (s+1)*batch of
    the stream and rank r the r-th contiguous share, so that the data of a step does not depend on the world size."""
    share = batch // world
    indices = [range(step * batch + rank * share, step * batch + (rank + 1) * share) for step in range(start, steps)]
    return DataLoader(stream, batch_sampler=indices, collate_fn=collate, num_workers=workers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read every annotation, count, and name what is broken.")
    parser.add_argument("--check", required=True, metavar="ROOT", help="folder that holds refer_seg/, reason_seg/, ...")
    sys.exit(extra("check_data").check(parser.parse_args().check))
