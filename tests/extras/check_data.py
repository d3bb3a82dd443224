"""python data.py --check ROOT: read every annotation, count, and name what is broken."""
from PIL import Image
from tqdm import tqdm

from data import DATASETS, LensError, find_datasets, load_masks, read_dataset


def check(root):
    """Read every annotation below root, decode its mask, and print counts beside the published ones and what is broken.
    Of a picture only presence and size are looked at. -> 1 where something is broken, else 0."""
    found, bad = find_datasets(root), 0
    for dataset, split in ((dataset, split) for dataset, splits in found.items() for split in splits):
        objects = texts = empty = broken = 0
        try:
            for record in tqdm(read_dataset(root, dataset, [split]), desc=f"{dataset} {split}", leave=False):
                try:
                    if isinstance(record, LensError):
                        raise record
                    with Image.open(record["image"]) as picture:
                        size = picture.size[::-1]
                        if size != record["size"] and picture.getexif().get(0x0112, 1) > 4:        # as load_picture
                            size = size[::-1]
                    if size != (record["size"] or size):
                        raise LensError(f"{record['image']}: {size[::-1]} pixels, annotated as {record['size'][::-1]}.")
                    mask, ignore = load_masks(record, size)
                    objects, texts, empty = objects + 1, texts + len(record["texts"]), empty + (not (mask | ignore).any())
                except (LensError, OSError) as error:
                    tqdm.write(str(error))
                    broken += 1
        except LensError as error:                                                  # a whole split is missing
            tqdm.write(str(error))
            broken += 1
        published = "/".join(str(n or "?") for n in DATASETS.get(dataset, {}).get(split, "-"))
        print(f"{dataset:16s}{split:6s} {objects:6d} objects, {texts:6d} expressions (published: {published}), {empty} "
              f"without a mask, {broken} broken")
        bad += broken
    if not found:
        print(f"{root}: no dataset here. data.py's first lines show where each belongs.")
    return int(bad > 0 or not found)
