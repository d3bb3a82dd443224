"""Read every annotation, image and mask below a data folder, and name what is broken.

    python tests/tools/check_data.py datasets                 # RefCOCO takes minutes per core
    python tests/tools/check_data.py datasets --workers 32

Run it before a long training run. Training stops at the first damaged file that it meets, and that
can be after hours. This script loads each object in the same way, goes on, and ends with status 1
if anything was broken. It also prints the counts that were published, and how many training images
of one dataset are evaluation images of another: RefCOCO, RefCOCO+ and RefCOCOg share images.
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data
from data import LensError, find_datasets, load_item, read_dataset

# Objects and expressions of each split, as published. None: not stated
PUBLISHED = {
    "refcoco": {"train": (42404, 120624), "val": (3811, 10834),
                "testA": (1975, 5657), "testB": (1810, 5095)},
    "refcoco+": {"train": (42278, 120191), "val": (3805, 10758),
                 "testA": (1975, 5726), "testB": (1798, 4889)},
    "refcocog": {"train": (42226, 80512), "val": (2573, 4896), "test": (5023, 9602)},
    "refcocog-google": {"train": (44822, 85474), "val": (5000, 9536)},
    "reasonseg": {"train": (239, None), "val": (200, 200), "test": (779, 779)},
    "groundingsuite": {"eval": (3715, 3715)},
    "shapes": {"train": (4000, None), "val": (700, None), "testA": (300, None),
               "testB": (300, None)}}


def check(root, workers):
    """Print one line per split, what is broken, and which images sets share. -> whether anything is
    broken, or nothing was there"""
    datasets = find_datasets(root)
    if not datasets:
        print(f"{root}: no dataset here. data.py's first lines show where each belongs.")
    broken, images = 0, {}
    for dataset, splits in datasets.items():
        for split in splits:
            errors, images[dataset, split] = check_split(root, dataset, split, workers)
            broken += errors
    for line in shared_images(images):
        print(line)
    return broken > 0 or not datasets


def check_split(root, dataset, split, workers):
    """-> number of broken records, set of the images of the others"""
    records, errors = [], []
    try:
        for record in read_dataset(root, dataset, [split]):
            (errors if isinstance(record, LensError) else records).append(record)
    except LensError as error:  # the whole split is missing
        errors.append(error)
    for error in errors:
        tqdm.write(str(error))
    records.sort(key=lambda record: record["image"])  # neighbours share an image: decoded once
    broken, empty, expressions, images = len(errors), 0, 0, set()
    bar = tqdm(load_all(records, workers), total=len(records), desc=f"{dataset} {split}",
               leave=False)
    for record, (error, has_mask) in zip(records, bar):
        if error:
            tqdm.write(error)
            broken += 1
            continue
        empty += not has_mask
        expressions += len(record["expressions"])
        images.add(record["image"])
    published = PUBLISHED.get(dataset, {}).get(split, "-")
    print(f"{dataset:16s}{split:6s} {len(records) + len(errors) - broken:6d} objects, "
          f"{expressions:6d} expressions (published: "
          f"{'/'.join(str(number or '?') for number in published)}), {empty} without a mask, "
          f"{broken} broken")
    return broken, images


def load_all(records, workers):
    """-> iterator of load_one(record) for each record"""
    if not workers:
        yield from map(load_one, records)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(load_one, records, chunksize=16)
        except BrokenProcessPool:
            sys.exit("A process that reads images was killed, perhaps because memory ran out: try "
                     "fewer --workers, or --workers 0, which shows the file that does it.")


def load_one(record):
    """Load a record as training does. -> the error or None, whether any pixel belongs to the object
    or is ignored"""
    data.load_image = load_image_once
    try:
        item = load_item(record, 0)
    except LensError as error:
        return str(error) if record["id"] in str(error) else f"{record['id']}: {error}", False
    return None, bool((item["gt_mask"] | item["ignore_mask"]).any())


load_image_once = lru_cache(maxsize=1)(data.load_image)


def shared_images(images):
    """{(dataset, split): its images} -> a line for each two datasets of which one trains on images
    that the other evaluates on"""
    train, evaluation = {}, {}
    for (dataset, split), paths in images.items():
        (train if split == "train" else evaluation).setdefault(dataset, set()).update(paths)
    return [f"{len(train[a] & evaluation[b])} of the {len(train[a])} training images of {a} are "
            f"evaluation images of {b}"
            for a in train for b in evaluation if train[a] & evaluation[b]]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", metavar="ROOT", help="the folder that --data names")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes that read; 0 reads in this one")
    args = parser.parse_args(arguments)
    return int(check(args.root, args.workers))


if __name__ == "__main__":
    sys.exit(main())
