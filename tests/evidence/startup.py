"""Seconds and memory that reading the annotations of RefCOCO, RefCOCO+ and RefCOCOg takes.

    python tests/evidence/startup.py         # two minutes; docs/evidence/startup.json

Nothing is downloaded. The annotations are synthetic, but as large as the real ones (images,
annotations, refs, expressions, numbers of a polygon). The images are empty files, since they are
only listed. Each step is a process of its own, because a process never gives back its peak memory.
"""
import json
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# images, annotations, {split: (objects, expressions)}
SERIES = {
    "refcoco": (19994, 196771, {"train": (42404, 120624), "val": (3811, 10834),
                                "testA": (1975, 5657), "testB": (1810, 5095)}),
    "refcoco+": (19992, 196737, {"train": (42278, 120191), "val": (3805, 10758),
                                 "testA": (1975, 5726), "testB": (1798, 4889)}),
    "refcocog": (25799, 208960, {"train": (42226, 80512), "val": (2573, 4896),
                                 "test": (5023, 9602)})}
TRAIN2014 = 82783                                                     # images in COCO's folder
WORDS = ("the left right man woman in red shirt of with cup front white on table second guy blue "
         "behind black dog").split()


def main():
    with tempfile.TemporaryDirectory() as root:
        def child(step):
            command = [sys.executable, __file__, root, step]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        child("write")
        size = sum(path.stat().st_size for path in Path(root).glob("refer_seg/ref*/*"))
        result = {"annotations_mb": size // 10 ** 6}
        for step in "train", "evaluation":
            result[step] = json.loads(child(step))
            print(step, result[step])
    (ROOT / "docs/evidence/startup.json").write_text(json.dumps(result, indent=1) + "\n")


def measure(root, step):
    """Print one line of JSON: what is read before the first image, its seconds, peak memory."""
    import data                          # with torch and all else, which every process pays anyway
    imported, start = peak_gigabytes(), time.perf_counter()
    if step == "train":
        records = data.read_records(root, list(SERIES), ["train"])
    else:                                # as evaluate.py --splits all reads them
        records = []
        for dataset, (*_, splits) in SERIES.items():
            records += data.read_records(root, [dataset], [*splits][1:])
    seconds = round(time.perf_counter() - start, 1)
    expressions = sum(len(record["expressions"]) for record in records)
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gigabytes(), "imports_gb": imported,
                      "objects": len(records), "expressions": expressions}))


def peak_gigabytes():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2)   # Linux: in KiB


# --- The synthetic series -------------------------------------------------------------------------

def write(root):
    from data import DATASETS
    images, rng = Path(root) / "refer_seg/images/mscoco/images/train2014", random.Random(0)
    images.mkdir(parents=True)
    for i in range(1, TRAIN2014 + 1):
        (images / file_name(i)).touch()
    for name, (number, annotations, splits) in SERIES.items():
        ids = rng.sample(range(1, TRAIN2014 + 1), number)
        objects = make_annotations(ids, annotations, rng)
        instances = {"info": {}, "images": [make_image(i) for i in ids], "annotations": objects,
                     "categories": []}
        refs = Path(root, DATASETS[name][0])
        refs.parent.mkdir(parents=True)
        refs.with_name("instances.json").write_text(json.dumps(instances))
        refs.write_bytes(pickle.dumps(make_refs(objects, splits, rng), 2))


def file_name(i):
    return f"COCO_train2014_{i:012d}.jpg"


def make_image(i):
    return {"license": 1, "file_name": file_name(i), "height": 480, "width": 640, "id": i,
            "coco_url": f"http://images.cocodataset.org/train2014/{file_name(i)}",
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": f"http://farm9.staticflickr.com/{i}/{i:020d}_z.jpg"}


def make_annotations(ids, number, rng):
    """Of the images `ids`; one in a hundred is a crowd."""
    def coordinate():
        return round(rng.uniform(0, 640), 2)
    annotations = []
    for i in range(number):
        crowd = i % 100 == 99
        polygons = [[coordinate() for _ in range(2 * rng.randint(20, 30))]]
        counts = [rng.randint(1, 2000) for _ in range(300)]
        annotations.append({
            "segmentation": {"size": [480, 640], "counts": counts} if crowd else polygons,
            "area": coordinate(), "iscrowd": int(crowd), "image_id": ids[i % len(ids)],
            "bbox": [coordinate() / 2, coordinate() / 2, 100.25, 90.5],
            "category_id": rng.randint(1, 90), "id": i + 1})
    return annotations


def make_refs(annotations, splits, rng):
    """splits: {name: (objects, expressions)}"""
    refs, sentence, order = [], 0, rng.sample(annotations, len(annotations))
    for split, (objects, expressions) in splits.items():
        for k in range(objects):
            annotation, sentences = order.pop(), []
            for _ in range(expressions // objects + (k < expressions % objects)):
                tokens = rng.choices(WORDS, k=rng.randint(1, 7))
                sentences.append({"tokens": tokens, "raw": " ".join(tokens), "sent_id": sentence,
                                  "sent": " ".join(tokens)})
                sentence += 1
            refs.append({"ref_id": len(refs) + 1, "ann_id": annotation["id"],
                         "image_id": annotation["image_id"], "split": split,
                         "sentences": sentences, "category_id": annotation["category_id"],
                         "sent_ids": [s["sent_id"] for s in sentences],
                         "file_name": "COCO_train2014_x.jpg"})
    return refs


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[2] == "write":
        write(sys.argv[1])
    else:
        measure(*sys.argv[1:])
