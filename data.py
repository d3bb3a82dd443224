"""Data: a picture, an expression, a mask and a box; the prompt of Fig. 4; the shapes world.

Where it stands in the paper: the inputs p_sys, T and I of Eq. 1 and the truth M_gt of Eqs. 5 and 12.

    python data.py --root runs/shapes            # write the shapes world there (the tiny preset does it by itself)

Real data is read where its authors put it (REFER's layout, for RefCOCO, RefCOCO+ and RefCOCOg):

    ROOT/refer_seg/refcoco/{refs(unc).p, instances.json}      also refcoco+ (unc), refcocog (umd)
    ROOT/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg

The shapes world is written to disk in that same layout, so the loader below is the only one there is.

Departures. The released code draws a random expression inside `__getitem__`, so one GRPO group can mix several
expressions of an object; here the expression is a function of (seed, epoch, object) and a group shares it. Its prompt
asks for a box without reasoning; ours is Fig. 4's.

Boxes are (x1, y1, x2, y2). Three pixel frames occur and are named wherever a box is passed:
    picture frame   pixels of the original picture. Rewards and metrics live here.
    MLLM frame      what the language model reads and writes: pixels of the resized picture for Qwen2.5-VL,
                    thousandths of width and height for Qwen2-VL and Qwen3-VL.
    SAM frame       pixels of the square picture that SAM 2 sees (1024 x 1024 for the real one).
"""
import argparse
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset


class LensError(Exception):
    """What a user can mend: the message names the file or flag and the way out, and is printed without a traceback."""

    def __init__(self, message):                                  # a loader's process puts its traceback before it
        super().__init__(message.rpartition("LensError: ")[2].strip())


# ----------------------------------------------------------------------------------------------------------------
# The prompt (Fig. 4) and the answer it asks for

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


def chat_messages(text):
    """The conversation of Fig. 4 for one expression: system prompt, then the picture and the bare expression."""
    return [{"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT.replace("{object}", text)}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def answer_text(box, label, reasoning=None):
    """The response Fig. 4 asks for, with `box` in the MLLM frame. Without `reasoning`, the answer block alone
    (stage 1's `--context true`, as the released code forces it)."""
    x1, y1, x2, y2 = (round(v) for v in box)
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


# ----------------------------------------------------------------------------------------------------------------
# Reading RefCOCO's layout: records are cheap, pictures and masks are decoded when asked for

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


SPLIT_BY = {"refcocog": "umd"}          # the others use unc; refcocog's google split shares pictures with its val


def read_refcoco(root, dataset, split):
    """All referred objects of one split, one record per object, nothing decoded yet.

    A record is {"id", "image" (path), "texts" (its expressions), "size" (height, width), "box" (picture frame),
    "segmentation" (COCO polygons or RLE)}. Raises LensError naming the file at fault.
    """
    folder = Path(root) / "refer_seg" / dataset
    pictures = Path(root) / "refer_seg/images/mscoco/images/train2014"
    refs_file, instances_file = folder / f"refs({SPLIT_BY.get(dataset, 'unc')}).p", folder / "instances.json"
    for path in (refs_file, instances_file, pictures):
        if not path.exists():
            raise LensError(
                f"{path} is missing. Download {dataset}'s annotations (REFER: refcoco.zip, refcoco+.zip, refcocog.zip) "
                f"and COCO's train2014 pictures, and lay them out as data.py's first lines show below --data {root}; "
                f"or try the method without any download: --preset tiny.")
    try:
        instances = json.loads(instances_file.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in instances["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    except (ValueError, KeyError, TypeError) as error:
        raise LensError(f"{instances_file}: not a readable COCO annotation file ({error!r}). Download it again.") from None
    present, records = set(os.listdir(pictures)), []
    for n, ref in enumerate(read_refs(refs_file)):
        try:
            if ref["split"] == split:
                records.append(make_record(ref, images[ref["image_id"]], annotations[ref["ann_id"]], dataset, pictures))
        except (KeyError, TypeError, ValueError) as error:
            name = f"ref_id {ref.get('ref_id')}, ann_id {ref.get('ann_id')}" if isinstance(ref, dict) else f"record {n}"
            raise LensError(f"{refs_file}, {name}: damaged, or missing in {instances_file} ({error!r}). Download both again."
                            ) from None
        if ref["split"] == split and Path(records[-1]["image"]).name not in present:
            raise LensError(f"{refs_file}, ref_id {ref['ref_id']}: its picture {records[-1]['image']} is missing. Download "
                            f"COCO's train2014 pictures.")
    if not records:
        raise LensError(f"{refs_file}: no object of split '{split}'. RefCOCO and RefCOCO+ have train, val, testA, testB; "
                        f"RefCOCOg has train, val, test.")
    return records


def make_record(ref, image, annotation, dataset, pictures):
    """One ref with its COCO image and annotation -> a record. The picture is named from image_id: file_name names a crop."""
    height, width, (x, y, w, h) = image["height"], image["width"], annotation["bbox"]
    if not (w > 0 and h > 0 and -w < x < width and -h < y < height and annotation["segmentation"] and ref["sentences"]):
        raise ValueError(f"no segmentation, no expression, or the box {x, y, w, h} lies outside the picture")
    return {"id": f"{dataset}/{ref['ref_id']}", "image": str(pictures / f"COCO_train2014_{ref['image_id']:012d}.jpg"),
            "size": (height, width), "texts": [sentence["sent"] for sentence in ref["sentences"]],
            "box": (x, y, x + w, y + h), "segmentation": annotation["segmentation"]}


def read_records(root, datasets, split):
    """Records of several datasets, in order. The dataset `shapes` is the one we can make: it is written if absent."""
    if "shapes" in datasets and not (Path(root) / "refer_seg/shapes").exists():
        write_shapes_world(root)
    return [record for dataset in datasets for record in read_refcoco(root, dataset, split)]


def load_picture(path):
    """-> RGB picture; a missing or corrupt file is one error that names it."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise LensError(f"{path}: missing or not a readable picture ({error}). Download or copy it again.") from None


def decode_mask(segmentation, size):
    """COCO polygons (their union) or RLE, compressed or not -> (H, W) bool."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(segmentation).astype(bool)


def load_item(record, text_index):
    """Decode one record with one of its expressions.

    -> {"id", "text", "image" (PIL, RGB), "mask" (H, W) bool, "box" (picture frame)}; LensError for a corrupt picture,
    one whose size is not the annotated one, or a mask without a pixel.
    """
    image = load_picture(record["image"])
    if image.size != record["size"][::-1]:
        raise LensError(f"{record['image']}: {image.size} pixels, annotated as {record['size'][::-1]}. Take the original.")
    mask = decode_mask(record["segmentation"], record["size"])
    if mask.shape != tuple(record["size"]) or not mask.any():
        raise LensError(f"{record['id']} ({record['image']}): the segmentation is of another size or covers no pixel. "
                        f"Download the annotations again.")
    return {"id": f"{record['id']}/{text_index}", "text": record["texts"][text_index], "image": image, "mask": mask,
            "box": record["box"]}


# ----------------------------------------------------------------------------------------------------------------
# Order and batches

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
    masks          list of B (H_b, W_b) bool, at the pictures' size
    boxes, frames  lists of B: true box in the picture frame; (width, height) of the MLLM frame
    texts, keys    lists of B strings
    """

    def __init__(self, processor, model_type, sam_size, max_prompt):
        self.processor, self.model_type, self.sam_size, self.max_prompt = processor, model_type, sam_size, max_prompt

    def __call__(self, items):
        texts = [self.processor.apply_chat_template(chat_messages(item["text"]), add_generation_prompt=True)
                 for item in items]
        encoded = self.processor(text=texts, images=[item["image"] for item in items], return_mm_token_type_ids=True)
        ids = [torch.as_tensor(row) for row in encoded["input_ids"]]
        for item, row in zip(items, ids):
            if len(row) > self.max_prompt:        # never cut: half a picture is not a prompt
                raise LensError(f"{item['id']}: its prompt has {len(row)} tokens, the limit is {self.max_prompt}. Raise "
                                 f"--max-prompt, or lower --max-pixels so that a picture takes fewer tokens.")
        grids = torch.as_tensor(encoded["image_grid_thw"])
        patch = self.processor.image_processor.patch_size
        low = self.sam_size // 4
        masks = [torch.from_numpy(item["mask"]) for item in items]
        return {
            "ids": ids, "types": [torch.as_tensor(row) for row in encoded["mm_token_type_ids"]],
            "pixel_values": torch.as_tensor(encoded["pixel_values"]), "grid_thw": grids,
            "sam_pixels": torch.stack([sam_picture(item["image"], self.sam_size) for item in items]),
            "low_masks": torch.stack([F.adaptive_avg_pool2d(m[None].float(), (low, low))[0] for m in masks]),
            "masks": masks, "boxes": [item["box"] for item in items],
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
    read = ("pixel_values", "grid_thw", "sam_pixels", "low_masks")
    return {**batch, **{name: batch[name].to(device, non_blocking=True) for name in read}}


def training_batches(stream, collate, start, steps, batch, rank, world, workers):
    """One batch of this rank's prompts per step, from step `start` on. Step s takes items s*batch ... (s+1)*batch of
    the stream and rank r the r-th contiguous share, so that the data of a step does not depend on the world size."""
    share = batch // world
    indices = [range(step * batch + rank * share, step * batch + (rank + 1) * share) for step in range(start, steps)]
    return DataLoader(stream, batch_sampler=indices, collate_fn=collate, num_workers=workers)


# ----------------------------------------------------------------------------------------------------------------
# The shapes world: pictures of coloured shapes, expressions that name exactly one, exact masks and boxes

SIDE = 128
COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 215, 40)}
SHAPES = ["circle", "square", "triangle", "diamond"]
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
EXTREMES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1),
            "smallest": ("r", 1), "largest": ("r", -1)}
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
MARGIN = {"x": 10, "y": 10, "r": 4}          # a comparison counts only when it is clear by so many pixels


def shape_mask(thing):
    """One shape -> (SIDE, SIDE) bool, drawn at twice the size and averaged."""
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    x, y, r = 2 * thing["x"], 2 * thing["y"], 2 * thing["r"]
    corners = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "triangle": [(0, -1), (1, 1), (-1, 1)],
               "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)]}.get(thing["shape"])
    if corners is None:
        ImageDraw.Draw(canvas).ellipse([x - r, y - r, x + r, y + r], fill=255)
    else:
        ImageDraw.Draw(canvas).polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=255)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.BOX)) > 127


def draw_scene(rng):
    """Two to four shapes that do not touch -> (SIDE, SIDE, 3) uint8 and a list of things with mask and box."""
    things, count = [], rng.randint(2, 4)
    for _ in range(200):                                          # four large ones may leave no room: then three do
        if len(things) == count:
            break
        r = rng.uniform(12, 24)
        thing = {"r": r, "x": rng.uniform(r + 1, SIDE - r - 1), "y": rng.uniform(r + 1, SIDE - r - 1),
                 "color": rng.choice(list(COLORS)), "shape": rng.choice(SHAPES)}
        if all(max(abs(thing["x"] - o["x"]), abs(thing["y"] - o["y"])) >= r + o["r"] + 2 for o in things):
            things.append(thing)
    noise = np.random.default_rng(rng.randrange(2 ** 31))
    picture = rng.uniform(60, 110) + noise.normal(0, 4, (SIDE, SIDE, 1)).repeat(3, 2)
    for thing in things:
        thing["mask"] = mask = shape_mask(thing)
        rows, columns = np.where(mask)
        thing["box"] = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        color = np.array(COLORS[thing["color"]]) + noise.normal(0, 8, 3)
        picture[mask] = color + noise.normal(0, 4, (int(mask.sum()), 1))
    return picture.clip(0, 255).astype(np.uint8), things


def full_name(thing):
    return f"{thing['color']} {thing['shape']}"


def place(thing):
    return f"{ROWS[int(thing['y'] * 3 / SIDE)]} {COLUMNS[int(thing['x'] * 3 / SIDE)]}"


def describe(things):
    """Every expression that names exactly one thing: (kind, index, expression, true reasoning)."""
    found = []
    names = [full_name(thing) for thing in things]
    for i, name in enumerate(names):
        if names.count(name) == 1:
            found.append(("attribute", i, f"the {name}", f"The {name} is at the {place(things[i])}."))
    groups = {"shape": range(len(things))}                       # "shape" alone, a kind of shape, "red shape", ...
    groups |= {s: [i for i, t in enumerate(things) if t["shape"] == s] for s in SHAPES}
    groups |= {f"{c} shape": [i for i, t in enumerate(things) if t["color"] == c] for c in COLORS}
    groups |= {name: [i for i, n in enumerate(names) if n == name] for name in sorted(set(names))}
    for group, members in groups.items():
        for word, (axis, sign) in EXTREMES.items():
            ranked = sorted(members, key=lambda i: sign * things[i][axis])
            if len(ranked) > 1 and abs(things[ranked[0]][axis] - things[ranked[1]][axis]) >= MARGIN[axis]:
                i = ranked[0]
                found.append(("size" if axis == "r" else "position", i, f"the {word} {group}",
                              f"The {word} {group} is the {names[i]} at the {place(things[i])}."))
        for j, anchor in enumerate(names):
            others = [i for i in members if i != j]
            if names.count(anchor) > 1 or len(members) < 2:
                continue
            for word, (axis, sign) in RELATIONS.items():
                ahead = [i for i in others if sign * (things[i][axis] - things[j][axis]) >= 0]
                if len(ahead) == 1 and abs(things[ahead[0]][axis] - things[j][axis]) >= MARGIN[axis]:
                    i = ahead[0]
                    found.append(("relation", i, f"the {group} {word} the {anchor}",
                                  f"The {anchor} is at the {place(things[j])}. The {group} {word} it is the {names[i]} at "
                                  f"the {place(things[i])}."))
    return found


def pick_expression(found, rng):
    """A kind first, then one of its expressions, so that the many relations do not crowd out the rest."""
    kinds = sorted({kind for kind, *_ in found})
    kind = rng.choices(kinds, [{"attribute": 3, "position": 2, "size": 2, "relation": 2}[k] for k in kinds])[0]
    return rng.choice([f for f in found if f[0] == kind])


SHAPES_SPLITS = {"train": 4000, "val": 700, "testA": 300, "testB": 300}      # pictures; testA has 2 things, testB 4


def write_shapes_world(root, seed=7, splits=SHAPES_SPLITS):
    """Write ROOT/refer_seg/shapes and its pictures in REFER's layout. Built beside its place and renamed, so that what
    exists is whole; the same seed writes the same files."""
    root, building = Path(root), Path(root) / f"refer_seg.building.{os.getpid()}"
    pictures = building / "images/mscoco/images/train2014"
    pictures.mkdir(parents=True)
    (building / "shapes").mkdir()
    images, annotations, refs, sentence = [], [], [], 0
    for split, count in splits.items():
        rng = random.Random(f"{seed}/{split}")
        for _ in range(count):
            picture, things = draw_scene(rng)
            while {"testA": 2, "testB": 4}.get(split, len(things)) != len(things) or not describe(things):
                picture, things = draw_scene(rng)
            found, image_id = describe(things), len(images) + 1
            Image.fromarray(picture).save(pictures / f"COCO_train2014_{image_id:012d}.jpg", quality=95)
            images.append({"id": image_id, "file_name": f"COCO_train2014_{image_id:012d}.jpg", "height": SIDE,
                           "width": SIDE})
            chosen = pick_expression(found, rng)[1]                # one object of the picture, up to three expressions
            own, texts = [f for f in found if f[1] == chosen], []
            while len(texts) < min(3, len(own)):
                text = pick_expression(own, rng)[2]
                texts += [text] if text not in texts else []
            thing, ann_id = things[chosen], len(annotations) + 1
            rle = coco_mask.encode(np.asfortranarray(thing["mask"].astype(np.uint8)))
            x1, y1, x2, y2 = thing["box"]
            annotations.append({"id": ann_id, "image_id": image_id, "category_id": SHAPES.index(thing["shape"]) + 1,
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(thing["mask"].sum()), "iscrowd": 0,
                                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})
            sentences = [{"sent_id": sentence + n, "sent": t, "raw": t, "tokens": t.split()} for n, t in enumerate(texts)]
            sentence += len(texts)
            refs.append({"ref_id": ann_id, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": sentences,
                         "category_id": SHAPES.index(thing["shape"]) + 1, "sent_ids": [s["sent_id"] for s in sentences],
                         "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"})
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    (building / "shapes/instances.json").write_text(json.dumps({"images": images, "annotations": annotations,
                                                                "categories": categories}))
    (building / "shapes/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    try:
        building.rename(root / "refer_seg")
    except OSError:                                               # another process was first
        shutil.rmtree(building)
        if not (root / "refer_seg/shapes").exists():
            raise LensError(f"{root / 'refer_seg'} holds other data: give the shapes world a folder of its own") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the shapes world in RefCOCO's own layout.")
    parser.add_argument("--root", required=True, help="folder to write to")
    write_shapes_world(parser.parse_args().root)
