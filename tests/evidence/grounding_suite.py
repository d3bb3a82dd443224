"""Read the real annotation file of GroundingSuite-Eval and decode every mask, without its images.

    python tests/evidence/grounding_suite.py GroundingSuite-Eval.jsonl    # ten seconds

The file is that of github.com/hustvl/GroundingSuite. Empty files stand in for the images. Writes
docs/evidence/grounding_suite.json.
"""
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from data import extent, load_masks, read_records
from rewards import box_iou


def check(path):
    """-> counts, seconds, and the mean IoU of annotated boxes with the extents of their masks"""
    with tempfile.TemporaryDirectory() as root:
        for line in path.read_text().splitlines():
            image = Path(root) / "COCO" / json.loads(line)["image_path"]
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
        (Path(root) / path.name).write_bytes(path.read_bytes())
        start = time.time()
        records = read_records(root, ["groundingsuite"], ["eval"])
        read = time.time()
        masks = [load_masks(record, record["size"])[0] for record in records]
        decoded = time.time()
    assert all(mask.shape == record["size"] and mask.any() for mask, record in zip(masks, records))
    ious = [box_iou(record["gt_box"], extent(mask)) for mask, record in zip(masks, records)]
    classes = Counter(name for record in records for groups in record["groups"] for name in groups)
    return {"records": len(records), "images": len({record["image"] for record in records}),
            "classes": classes, "seconds to read": round(read - start, 2),
            "seconds to decode": round(decoded - read, 2),
            "mean IoU of box and mask extent": round(float(np.mean(ious)), 3)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    text = json.dumps(check(Path(sys.argv[1])), indent=1) + "\n"
    (ROOT / "docs/evidence/grounding_suite.json").write_text(text)
    print(text)
