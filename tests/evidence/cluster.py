"""How long LENS-3B would take on two clusters, by arithmetic.

    python tests/evidence/cluster.py         # writes docs/evidence/cluster.md, in seconds

Nothing here is measured. The formulas are those of tests/tools/plan.py. What is assumed stands in
Cluster, Work and the constants below, and on the page.
"""
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import plan

from align import SharedArgs, TrainArgs
from data import write_whole
from train_rl import RLArgs

OBJECTS = 126_908          # training objects of RefCOCO, RefCOCO+ and RefCOCOg together
BANDWIDTH = 0.7            # share of a GPU's memory bandwidth that decoding achieves: assumed
MFU = 0.4, 0.3             # share of a GPU's peak that all else achieves, best and worst: assumed
EAGER = 0.03               # seconds of a decoding step that is not compiled: assumed
FORCED = 50                # tokens of stage 1's forced completion: an estimate


@dataclass(frozen=True)
class Cluster:
    name: str
    gpus: int
    memory: float          # GB
    tflops: float          # bf16, dense: its data sheet
    bandwidth: float       # GB/s of its memory: its data sheet
    link: float            # GB/s that a GPU receives from others of its machine
    network: float         # GB/s of a machine, at line rate; 0: there is one machine


@dataclass(frozen=True)
class Work:
    name: str
    image: int             # tokens of the image
    T: int                 # tokens of every completion


ETHERNET = Cluster("2 x 8 L40S, 100 Gb/s Ethernet", 16, 48, 362, 864, 25, 12.5)
INFINIBAND = Cluster("2 x 8 L40S, 400 Gb/s InfiniBand", 16, 48, 362, 864, 25, 50)
NVLINK = Cluster("8 H100, NVLink", 8, 80, 989, 3350, 450, 0)
CLUSTERS = ETHERNET, INFINIBAND, NVLINK
COCO = Work("COCO, 640 x 480", round(640 / 28) * round(480 / 28), 200)
LARGE = Work("1,000,000 pixels", 1_000_000 // 28 ** 2, 200)
LIMIT = Work("the limits", 1_000_000 // 28 ** 2, 768)
WORKS = COCO, LARGE, LIMIT
SETTINGS = [{"micro_batch": 1}, {"micro_batch": 2}, {"micro_batch": 4},
            {"micro_batch": 1, "shard": "hybrid"}, {"micro_batch": 4, "shard": "hybrid"}]
SHARED, PAPER, STAGE_1 = SharedArgs(), RLArgs(), TrainArgs()
STEPS = PAPER.epochs * OBJECTS // PAPER.batch                        # of stage 2


# --- The formulas ---------------------------------------------------------------------------------

@cache
def model():
    return plan.build(SHARED)


def sizes(cluster, work, args):
    z = plan.sizes(model(), SHARED, args, cluster.gpus, plan.TEXT + work.image, 4 * work.image)
    return replace(z, T=work.T)


@cache
def prompt_flops(work):
    """-> {part: FLOPs of one prompt}"""
    z = sizes(ETHERNET, work, PAPER)
    return {part: flops / z.prompts for part, flops in plan.arithmetic(model(), z, PAPER).items()}


def prefill_flops(z):
    """Of one prompt."""
    return plan.vision_flops(z) + plan.language_flops(z, z.P, z.P ** 2)


def update_flops(z, work):
    """Of a GPU and step: everything but sampling."""
    return z.prompts * sum(flops for part, flops in prompt_flops(work).items()
                           if part != "sampling")


def decoding_bytes(z):
    """What one decoding step reads: the weights, and every slot of the cache."""
    cache = z.prompts * z.G * plan.cached_token(z) * plan.slots(z.P, SHARED.max_completion)
    return z.width * plan.token_weights(z) + cache


def decoding_seconds(cluster, z, mfu):
    """Of one decoding step: memory or arithmetic, whichever takes longer."""
    flops = 2 * plan.token_weights(z) * z.prompts * z.G
    return max(decoding_bytes(z) / (BANDWIDTH * cluster.bandwidth * 1e9),
               flops / (mfu * cluster.tflops * 1e12))


def communication_seconds(cluster, z, args):
    """-> seconds of the update's, of refresh's. A ring is as slow as its slowest link. With --shard
    hybrid the rings stay within a machine, and the 8 GPUs of a machine share its network."""
    received = plan.communication(z, args)
    between = received.pop("between nodes", 0)
    slowest = cluster.link
    if cluster.network and not between:
        slowest = min(cluster.link, cluster.network)
    refresh = received.pop("refresh") / slowest / 1e9
    seconds = sum(received.values()) / slowest / 1e9
    if between:
        seconds += between / min(cluster.link, cluster.network / plan.NODE) / 1e9
    return seconds, refresh


def step_parts(cluster, work, args):
    """-> {part of a step: its seconds at both values of MFU}"""
    z = sizes(cluster, work, args)
    speeds = [mfu * cluster.tflops * 1e12 for mfu in MFU]
    adam = 28 * z.trained / z.shards / (BANDWIDTH * cluster.bandwidth * 1e9)
    return {"prompts": [z.prompts * prefill_flops(z) / speed for speed in speeds],
            "decoding": [work.T * decoding_seconds(cluster, z, mfu) for mfu in MFU],
            "update": [update_flops(z, work) / speed + adam for speed in speeds],
            "communication": [sum(communication_seconds(cluster, z, args))] * 2}


def step_seconds(cluster, work, args):
    """-> the best case, in which communication (not refresh's) hides behind the update, and the
    worst, in which it adds to it."""
    parts = step_parts(cluster, work, args)
    best, worst = ({part: seconds[i] for part, seconds in parts.items()} for i in range(2))
    gathers, refresh = communication_seconds(cluster, sizes(cluster, work, args), args)
    hidden = max(best["update"], gathers) + refresh
    return best["prompts"] + best["decoding"] + hidden, sum(worst.values())


def stage_1_hours(cluster, work):
    """-> (best, worst) of all of stage 1, and communication in it"""
    z, rows = sizes(cluster, work, PAPER), STAGE_1.batch // cluster.gpus
    length = z.P + FORCED
    flops = prompt_flops(work)
    per_row = (plan.vision_flops(z) + plan.language_flops(z, length, length ** 2)
               + 3 * plan.language_flops(z, z.M, z.M * (length + z.M))
               + flops["SAM encoder"] + flops["SAM and connector"] / z.G)
    steps = STAGE_1.epochs * OBJECTS // STAGE_1.batch
    best, worst = (steps * rows * per_row / (mfu * cluster.tflops * 1e12) for mfu in MFU)
    # only the connector and the queries are sharded
    z = replace(z, trained=z.connector + z.M * z.C, mllm=0, root=0, sam=0, prompts=rows,
                B=STAGE_1.micro_batch)
    received = steps * communication_seconds(cluster, z, RLArgs(beta=0))[0]
    return [max(best, received) / 3600, (worst + received) / 3600], received / 3600


# --- The page -------------------------------------------------------------------------------------

def between(pair, unit=1.0):
    low, high = (f"{value / unit:,.1f}" for value in pair)
    return low if low == high else f"{low} to {high}"


def days(step):
    return between(step, 86400 / STEPS)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def seconds_table():
    rows = [["*formula*", "", "TFLOP / (MFU peak)", "T GB / (0.7 bandwidth)",
             "TFLOP / (MFU peak) + AdamW's", "GB / slowest link", "sum", f"{STEPS:,} steps"]]
    for cluster in CLUSTERS:
        for work in WORKS:
            step = step_seconds(cluster, work, PAPER)
            parts = step_parts(cluster, work, PAPER)
            rows.append([cluster.name, work.name, *(between(pair) for pair in parts.values()),
                         between(step), days(step)])
    return table(["", "prompt and completion", "prompts", "decoding", "update", "communication",
                  "a step", "days"], rows)


def settings_table():
    """What flags change: communication, at the price of memory."""
    rows = []
    for cluster in CLUSTERS:
        for changed in SETTINGS:
            if "shard" in changed and cluster is not ETHERNET:
                continue         # one machine: no difference; a fast network: no gain
            args = replace(PAPER, **changed)
            z = sizes(cluster, LIMIT, args)
            peak = max(sum(parts.values()) for parts in plan.memory(z, args).values()) + plan.CUDA
            flags = " ".join(f"--{name.replace('_', '-')} {value}"
                             for name, value in changed.items())
            if changed == {"micro_batch": PAPER.micro_batch}:
                flags += " (default)"
            received = sum(plan.communication(z, args).values())
            step = step_seconds(cluster, COCO, args)
            rows.append([cluster.name, flags, f"{peak / 1e9:.1f}",
                         f"{(peak + plan.scores(z)) / 1e9:.1f}", f"{received / 1e9:.1f}",
                         f"{sum(communication_seconds(cluster, z, args)):.1f}", between(step),
                         days(step)])
    return table(["", "flags", "GB, the plan", "unfused", "GB received", "its seconds",
                  "a step, COCO", "days"], rows)


def both_stages_table():
    rows = []
    for cluster in CLUSTERS:
        for work in (COCO, LIMIT):
            hours, received = stage_1_hours(cluster, work)
            step = step_seconds(cluster, work, PAPER)
            both = [hour / 24 + STEPS * second / 86400 for hour, second in zip(hours, step)]
            rows.append([cluster.name, work.name, between(hours), f"{received:.1f}",
                         between(both)])
    return table(["", "prompt and completion", "hours of stage 1", "communication in them",
                  "days, both stages"], rows)


ASSUMED = table(["assumed", "L40S, two machines of 8", "H100, one machine of 8"], [
    ["peak in bf16, dense (data sheet)", "362 TFLOP/s", "989 TFLOP/s"],
    ["memory bandwidth (data sheet)", "864 GB/s", "3,350 GB/s"],
    ["link of a GPU within its machine", "PCIe 4 x16, 25 GB/s", "NVLink, 450 GB/s"],
    ["network of a machine, line rate", "100 Gb/s = 12.5 GB/s, or 400 Gb/s = 50 GB/s", "none"],
    ["share of the peak that arithmetic achieves (MFU)", "40 to 30 %", "40 to 30 %"],
    ["share of the bandwidth that decoding achieves", "70 %", "70 %"]])


def page():
    z = sizes(ETHERNET, COCO, PAPER)
    steps_1 = STAGE_1.epochs * OBJECTS // STAGE_1.batch
    paragraphs = [
        "Written by `python tests/evidence/cluster.py`. **Nothing on this page is measured.** It "
        "is arithmetic from the formulas of [tests/tools/plan.py](../../tests/tools/plan.py) and "
        "from these assumptions:",
        ASSUMED,
        "We also assume that decoding is compiled, that every completion has T tokens, that a "
        "prompt has 200 tokens of text, and that loading, rewards and checkpoints cost no time. In "
        "the lower figure, communication (but not refresh's) hides behind the update, and MFU is "
        "40 %. In the higher one it adds to the update, and MFU is 30 %. Nobody knows yet how much "
        "is hidden. What is computed again counts as arithmetic.",
        f"The model has {z.trained / 1e9:.2f} G trained and {z.frozen / 1e9:.2f} G frozen "
        f"parameters. A step has {PAPER.batch} prompts with G = {PAPER.group_size}, so n = 4 "
        f"prompts per GPU on 16 and 8 on 8, in micro-batches of {PAPER.micro_batch}. A COCO image "
        f"has 23 * 17 = 391 tokens. At 1,000,000 pixels, the default cap, it has 1,275. T = 200 is "
        f"a guess, 768 is the limit.",
        "## How long a step of stage 2 takes, in seconds",
        seconds_table(),
        f"Every decoding step reads the cache and the W = {plan.token_weights(z) / 1e9:.2f} G "
        f"weights that a token passes through, and computes 2 W n G FLOPs; the longer of the two "
        f"counts. AdamW moves 28 bytes per trained parameter of a shard. The slowest link of a "
        f"ring over two machines is the slower of PCIe and network. The paper's {STEPS:,} steps "
        f"are {OBJECTS:,} objects * {PAPER.epochs} epochs / {PAPER.batch}.",
        f"Without compiling a token may take {EAGER * 1000:.0f} ms (assumed), so 200 tokens "
        f"take {200 * EAGER:.0f} s. The update waits for the longest completion of all GPUs. So "
        f"where a few completions reach the limit, decoding lasts as long as in the rows of \"the "
        f"limits\".",
        "## What flags change",
        "The plan's GB are at the limits, with 2 for CUDA. \"Unfused\" adds the scores of "
        "attention, if no fused kernel takes a mask on that GPU (tests/tools/gpu.py finds out).",
        settings_table(),
        "`--micro-batch 4` gathers the weights once for four prompts. `--shard hybrid` gathers "
        "within the machine only and sums gradients between the machines, whose 8 GPUs share one "
        "network. With 400 Gb/s it gains nothing. Rows above 48 GB do not fit an L40S.",
        "## Stage 1, and both stages",
        f"Stage 1 has {steps_1:,} steps ({OBJECTS:,} objects * {STAGE_1.epochs} epochs / "
        f"{STAGE_1.batch}). The MLLM reads the prompt and the forced completion (about {FORCED} "
        f"tokens) once without gradients. The queries' pass is counted three times. The connector "
        f"and the queries are gathered and reduced for every micro-batch of {STAGE_1.micro_batch}.",
        both_stages_table()]
    text = [part if part.startswith(("|", "#")) else textwrap.fill(part, 100)
            for part in paragraphs]
    return "\n\n".join(["# What LENS-3B costs on 16 GPUs of 48 GB and on 8 of 80 GB", *text]) + "\n"


def main():
    path = ROOT / "docs/evidence/cluster.md"
    write_whole(path, page())
    print(path)


if __name__ == "__main__":
    main()
