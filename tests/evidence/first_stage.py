"""Does stage 1 begin calmly, and does it end alike on every machine?

    python tests/evidence/first_stage.py                                 # half an hour of two cores
    python tests/evidence/first_stage.py --seeds 1 2 3
    ATEN_CPU_CAPABILITY=default python tests/evidence/first_stage.py     # the same, slower
    python tests/evidence/first_stage.py --page                          # no training, only the page

Stage 1 of the tiny preset with several seeds. With ATEN_CPU_CAPABILITY=default PyTorch uses other
kernels, which round differently; that stands for a second machine. A start in which gradients
explode makes such a difference large.

It uses the runs of proof.py, and adds what is missing. Writes docs/evidence/first_stage.json, a
line for each run, and first_stage.md.
"""
import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tiny_runs import (EVIDENCE, PROOF, ROOT, ROUNDING, markdown_table, read_json, read_lines,
                       train, write_json, write_world)

LARGE, LAST = 20, 50                   # a large gradient norm; the steps of the final mask IoU


def measure(seed):
    """-> a finished run's line"""
    metrics = read_lines(ROOT / "runs" / PROOF / f"align-{seed}/metrics.jsonl")
    norms = [step["grad_norm"] for step in metrics]
    return {"kernels": ROUNDING or "of this machine", "seed": seed, "steps": len(metrics),
            "largest norm": round(max(norms), 1), "at step": int(np.argmax(norms)) + 1,
            "above 20": sum(norm > LARGE for norm in norms),
            "mask IoU": round(float(np.mean([s["mask_iou"] for s in metrics[-LAST:]])), 4)}


def page(lines):
    header = list(lines[0])
    ious = [line["mask IoU"] for line in lines]
    return f"""# Stage 1 from several seeds

Made by `python tests/evidence/first_stage.py`, with and without ATEN_CPU_CAPABILITY=default. The
gradient norm is that before clipping. The mask IoU is that of training, behind true completions,
in the mean of the last {LAST} steps. It lies between {min(ious):.3f} and {max(ious):.3f}.

{markdown_table(header, [[line[key] for key in header] for line in lines])}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    if not args.page:
        write_world()
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(train, "align.py", ROOT / "runs" / PROOF / f"align-{seed}",
                                "--seed", seed) for seed in args.seeds]
        for job in jobs:
            job.result()
        path = EVIDENCE / "first_stage.json"
        lines = [measure(seed) for seed in args.seeds]
        others = [line for line in (read_json("first_stage") if path.exists() else [])
                  if line["kernels"] != lines[0]["kernels"]]
        write_json("first_stage", others + lines)
    (EVIDENCE / "first_stage.md").write_text(page(read_json("first_stage")))


if __name__ == "__main__":
    main()
