"""Seconds and memory to read the annotations of the RefCOCO series at its published size. By hand:

    python tests/startup.py                  # two minutes; prints, and writes docs/startup.json

No download: the series is synthetic, but as large as the real one (images, annotations, refs,
expressions, numbers in a polygon), in a temporary folder; its pictures are empty files, for they
are only listed. Each step is a process of its own, for peak memory never falls and a child starts
with its parent's.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SERIES = {"refcoco": (19994, 196771), "refcoco+": (19992, 196737),
          "refcocog": (25799, 208960)}                                # images, annotations
TRAIN2014 = 82783                                                     # pictures in COCO's folder
WORDS = ("the left right man woman in red shirt of with cup front white on table second guy blue "
         "behind black dog").split()


def make_annotations(ids, annotations, rng):
    """Of the pictures `ids`; one in a hundred is a crowd."""
    def number():
        return round(rng.uniform(0, 640), 2)
    made = []
    for i in range(annotations):
        crowd = i % 100 == 99
        polygons = [[number() for _ in range(2 * rng.randint(20, 30))]]
        counts = [rng.randint(1, 2000) for _ in range(300)]
        x, y = number() / 2, number() / 2
        made.append({"segmentation": {"size": [480, 640], "counts": counts} if crowd else polygons,
                     "area": number(), "iscrowd": int(crowd), "image_id": ids[i % len(ids)],
                     "bbox": [x, y, 100.25, 90.5], "category_id": rng.randint(1, 90), "id": i + 1})
    return made


def make_images(ids):
    entries = []
    for i in ids:
        name = f"COCO_train2014_{i:012d}.jpg"
        entries.append({"license": 1, "file_name": name, "height": 480, "width": 640, "id": i,
                        "coco_url": f"http://images.cocodataset.org/train2014/{name}",
                        "date_captured": "2013-11-14 11:18:45",
                        "flickr_url": f"http://farm9.staticflickr.com/{i}/{i:020d}_z.jpg"})
    return entries


def make_refs(made, splits, rng):
    """splits {name: (objects, expressions)}"""
    refs, sentence, free = [], 0, rng.sample(range(len(made)), len(made))
    for split, (objects, texts) in splits.items():
        for k in range(objects):
            annotation, sentences = made[free.pop()], []
            for _ in range(texts // objects + (k < texts % objects)):
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


def write_dataset(folder, refs_name, images, annotations, splits, rng):
    """One data set of its published size."""
    ids = rng.sample(range(1, TRAIN2014 + 1), images)
    made = make_annotations(ids, annotations, rng)
    whole = {"info": {}, "images": make_images(ids), "annotations": made, "categories": []}
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text(json.dumps(whole))
    (folder / refs_name).write_bytes(pickle.dumps(make_refs(made, splits, rng), 2))


def peak_gigabytes():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2)   # Linux: in KiB


def measure(root, what):
    """In a fresh process: what is read before the first picture, its seconds, and memory's peak, as
    one line of json."""
    import data                                  # torch and all else: paid by every process anyway
    imported, start = peak_gigabytes(), time.perf_counter()
    if what == "train":
        records = data.read_records(root, list(SERIES), ["train"])
    else:                                        # as evaluate.py --splits all reads them
        records = []
        for dataset in SERIES:
            splits = [split for split in data.DATASETS[dataset] if split != "train"]
            records += data.read_records(root, [dataset], splits)
    seconds = round(time.perf_counter() - start, 1)
    expressions = sum(len(record["texts"]) for record in records)
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gigabytes(), "imports_gb": imported,
                      "objects": len(records), "expressions": expressions}))


def write(root):
    from data import DATASETS, REFS_FILES
    pictures, rng = Path(root) / "refer_seg/images/mscoco/images/train2014", random.Random(0)
    pictures.mkdir(parents=True)
    for i in range(1, TRAIN2014 + 1):
        (pictures / f"COCO_train2014_{i:012d}.jpg").touch()
    for name, counts in SERIES.items():
        refs_name = REFS_FILES.get(name, (name, "refs(unc).p"))[1]
        write_dataset(Path(root) / "refer_seg" / name, refs_name, *counts, DATASETS[name], rng)


def main():
    with tempfile.TemporaryDirectory() as root:
        def child(what):
            command = [sys.executable, __file__, root, what]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        child("write")
        size = sum(path.stat().st_size for path in Path(root).glob("refer_seg/ref*/*"))
        result = {"annotations_mb": size // 10 ** 6}
        for what in "train", "evaluation":
            result[what] = json.loads(child(what))
            print(what, result[what])
    (ROOT / "docs/startup.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        main()
    else:
        write(sys.argv[1]) if sys.argv[2] == "write" else measure(*sys.argv[1:])
