"""What LENS-3B costs on two clusters, by arithmetic. By hand:

    python tests/cluster.py            # writes docs/cluster.md, in seconds

Nothing here is measured. The formulas are those of tests/plan.py, whose letters they use; what is
assumed stands in Cluster, Work and the constants below, and on the page.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import plan
from align import AlignArgs, SharedArgs
from data import write_whole
from train_rl import RLArgs

OBJECTS, EXPRESSIONS = 126_908, 120_624 + 120_191 + 80_512      # RefCOCO, RefCOCO+, RefCOCOg
BANDWIDTH = 0.7            # share of a GPU's memory bandwidth that decoding achieves: assumed
MFU = 0.4, 0.3             # share of a GPU's peak that all else achieves, best and worst: assumed
EAGER = 0.03               # seconds of a decoding step that nothing captured: assumed


@dataclass
class Cluster:
    name: str
    gpus: int
    memory: float          # GB
    tflops: float          # bf16, dense: its data sheet
    bandwidth: float       # GB/s of its memory: its data sheet
    link: float            # GB/s that a GPU receives within its node
    network: float         # GB/s of a node, at line rate; 0: one node


@dataclass
class Work:
    name: str
    picture: int           # tokens of the picture
    T: int                 # tokens of every answer


ETHERNET = Cluster("16 L40S, 100 Gb/s Ethernet", 16, 48, 362, 864, 25, 12.5)
INFINIBAND = Cluster("16 L40S, 400 Gb/s InfiniBand", 16, 48, 362, 864, 25, 50)
NVLINK = Cluster("8 H100, NVLink", 8, 80, 989, 3350, 450, 0)
CLUSTERS = ETHERNET, INFINIBAND, NVLINK
COCO = Work("COCO, 640 x 480", round(640 / 28) * round(480 / 28), 200)
LARGE = Work("1,000,000 pixels", 1_000_000 // 28 ** 2, 200)
LIMIT = Work("the limits", 1_000_000 // 28 ** 2, 768)
WORKS = COCO, LARGE, LIMIT
SETTINGS = {"(as they are)": {}, "--reduce-once": dict(reduce_once=True),
            "--shard hybrid": dict(shard="hybrid"),
            "--shard hybrid --reduce-once": dict(shard="hybrid", reduce_once=True),
            "--micro-batch 4": dict(micro_batch=4),
            "--micro-batch 4 --shard hybrid": dict(micro_batch=4, shard="hybrid")}


class Costs:
    """The formulas, for one model."""

    def __init__(self):
        self.shared = SharedArgs()
        self.lens = plan.build(self.shared)
        self.paper, self.counted = RLArgs(), {}
        for work in WORKS:
            z = self.letters(ETHERNET, work, self.paper)
            flops = plan.arithmetic(self.lens, z, self.paper)
            self.counted[work.name] = {part: value / z.n for part, value in flops.items()}

    def letters(self, cluster, work, args):
        z = plan.letters(self.lens, self.shared, args, cluster.gpus, plan.TEXT + work.picture,
                         4 * work.picture)
        return replace(z, T=work.T)

    def prefill(self, z):
        """FLOPs of one prompt"""
        return plan.vision(z) + plan.language(z, z.P, z.P ** 2)

    def read(self, z, sequences):
        """Bytes that one decoding step reads: weights, and every slot of the cache"""
        a_slot = 2 * z.b * z.Ck * z.layers
        room = plan.slots(z.P, self.shared.max_completion)
        return z.b * plan.weights(z) + sequences * a_slot * room

    def decoding(self, cluster, z, sequences, mfu):
        """Seconds of one decoding step: memory or arithmetic, whichever is longer"""
        flops = 2 * plan.weights(z) * sequences
        memory = self.read(z, sequences) / (BANDWIDTH * cluster.bandwidth * 1e9)
        return max(memory, flops / (mfu * cluster.tflops * 1e12))

    def update(self, z, work):
        """FLOPs of a GPU and step"""
        return z.n * sum(value for part, value in self.counted[work.name].items()
                         if part != "sampling")

    def communication(self, cluster, z, args):
        """-> seconds of the update, of refresh. A ring is as slow as its slowest link; between
        nodes 8 GPUs share a network."""
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

    def step(self, cluster, work, args):
        """-> {part: seconds}, each from MFU 40 % to 30 %"""
        z = self.letters(cluster, work, args)
        speeds = [mfu * cluster.tflops * 1e12 for mfu in MFU]
        communication = sum(self.communication(cluster, z, args))
        adam = 28 * z.t / z.s / (BANDWIDTH * cluster.bandwidth * 1e9)
        return {"prefill": [z.n * self.prefill(z) / speed for speed in speeds],
                "decoding": [work.T * self.decoding(cluster, z, z.n * z.G, mfu) for mfu in MFU],
                "update": [self.update(z, work) / speed + adam for speed in speeds],
                "communication": [communication] * 2}

    def whole(self, cluster, work, args):
        """Seconds of a step: communication but refresh's hidden behind the update, and beside"""
        parts = self.step(cluster, work, args)
        best, worst = ({part: seconds[i] for part, seconds in parts.items()} for i in range(2))
        gathers, refresh = self.communication(cluster, self.letters(cluster, work, args), args)
        hidden = max(best["update"], gathers) + refresh
        return best["prefill"] + best["decoding"] + hidden, sum(worst.values())

    def stage_1(self, cluster, work):
        """-> {what: value} of the answers and the steps after them"""
        z, args = self.letters(cluster, work, self.paper), AlignArgs()
        resident = z.b * z.m + 4 * (z.f + z.t - z.m) + plan.CUDA
        free = cluster.memory * 1e9 - resident
        tokens = self.shared.max_prompt + self.shared.max_completion
        cache = 2 * z.b * z.Ck * z.layers * tokens
        size = int(min(256, free / 2 / (2 * cache + 12 * z.I * self.shared.max_prompt)))
        share = EXPRESSIONS / cluster.gpus
        answers = []
        for mfu in MFU:
            prompts = share * self.prefill(z) / (mfu * cluster.tflops * 1e12)
            tokens = share / size * work.T * self.decoding(cluster, z, size, mfu)
            answers.append(prompts + tokens)
        rows = args.batch // cluster.gpus
        waiting = waited(args) * work.T * max(EAGER, self.decoding(cluster, z, rows, MFU[1]))
        per_row = (plan.vision(z) + plan.language(z, z.P + z.T, (z.P + z.T) ** 2)
                   + 3 * plan.language(z, z.M, z.M * (z.P + z.T + z.M))
                   + self.counted[work.name]["SAM encoder"]
                   + self.counted[work.name]["SAM and connector"] / z.G)
        steps = args.epochs * OBJECTS // args.batch
        best, worst = (steps * rows * per_row / (mfu * cluster.tflops * 1e12) for mfu in MFU)
        # the connector and the queries alone are sharded, in passes of one row
        z = replace(z, t=z.connector + z.M * z.C, m=0, r=0, sam=0, n=rows)
        received, _ = self.communication(cluster, z, RLArgs(beta=0))
        received *= steps
        return {"batch": size, "answers": answers, "before": waiting, "received": received,
                "training": (max(best, received), worst + received)}


def waited(args):
    """Steps of stage 1 in which some answer is new, each object having k expressions: its chance to
    show a new one in epoch e is (1 - 1/k)^(e - 1)"""
    k = EXPRESSIONS / OBJECTS
    steps = OBJECTS / args.batch
    return sum(steps * (1 - (1 - (1 - 1 / k) ** e) ** args.batch) for e in range(args.epochs))


# --- The page -------------------------------------------------------------------------------------

def between(pair, unit=1.0, digits=1):
    low, high = (f"{value / unit:,.{digits}f}" for value in pair)
    return low if low == high else f"{low} to {high}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def counts(costs):
    """Two clusters' bytes and FLOPs, which no assumption enters."""
    def row(name, formula, value):
        cells = [value(costs.letters(cluster, work, costs.paper), work)
                 for cluster in (ETHERNET, NVLINK) for work in WORKS]
        return [name, formula, *(f"{cell:,.1f}" for cell in cells)]
    head = ["per GPU and step", "formula"]
    head += [f"{cluster.gpus}: {work.name}" for cluster in (ETHERNET, NVLINK) for work in WORKS]
    return table(head, [
        ["tokens of a prompt P, of an answer T", "200 + tokens of the picture",
         *(f"{plan.TEXT + work.picture:,}, {work.T}" for _ in range(2) for work in WORKS)],
        row("TFLOP of prompts", "n (vision(z) + language(z, P, P^2))",
            lambda z, work: z.n * costs.prefill(z) / 1e12),
        row("GB read for a token of all n G", "b W + 2 b Ck layers n G (P up to 512s + 768)",
            lambda z, work: costs.read(z, z.n * z.G) / 1e9),
        row("TFLOP of the update", "`arithmetic` without sampling",
            lambda z, work: costs.update(z, work) / 1e12),
        row("GB received", "`communication`",
            lambda z, work: sum(plan.communication(z, costs.paper).values()) / 1e9)])


def seconds(costs):
    rows = [["*formula*", "", "TFLOP / (MFU peak)", "T GB / (0.7 bandwidth)",
             "TFLOP / (MFU peak) + AdamW's", "GB / slowest link", "sum", "31,727 steps"]]
    for cluster in CLUSTERS:
        for work in WORKS:
            parts = costs.step(cluster, work, costs.paper)
            whole = costs.whole(cluster, work, costs.paper)
            rows.append([cluster.name, work.name, *(between(pair) for pair in parts.values()),
                         between(whole), between(whole, 86400 / 31_727)])
    return table(["", "prompt and answer", "prompts", "decoding", "update", "communication",
                  "a step", "days"], rows)


def settings(costs):
    """What flags change: communication, at the price of memory."""
    rows = []
    for cluster in CLUSTERS:
        for flags, changed in SETTINGS.items():
            if "hybrid" in flags and cluster is not ETHERNET:
                continue         # one node: no difference; a fast network: no gain
            args = RLArgs(**changed)
            z = costs.letters(cluster, LIMIT, args)
            peak = max(sum(parts.values()) for parts in plan.memory(z, args).values()) + plan.CUDA
            scores = 12 * z.N * z.heads * z.S * (z.P + z.S)
            received = sum(plan.communication(z, args).values())
            takes = sum(costs.communication(cluster, z, args))
            whole = costs.whole(cluster, COCO, args)
            rows.append([cluster.name, flags, f"{peak / 1e9:.1f}", f"{(peak + scores) / 1e9:.1f}",
                         f"{received / 1e9:.1f}", f"{takes:.1f}",
                         between(whole), between(whole, 86400 / 31_727)])
    return table(["", "flags", "GB, the plan", "unfused", "GB received", "its seconds",
                  "a step, COCO", "days"], rows)


def before_and_now(costs):
    rows = []
    for cluster in (ETHERNET, NVLINK):
        for flags, changed in SETTINGS.items():
            if flags not in ("(as they are)", "--reduce-once"):
                continue
            args = RLArgs(**changed)
            z = costs.letters(cluster, COCO, args)
            before, now = plan.communication(z, args, True), plan.communication(z, args)
            rows += [[f"{z.s}", flags, when, *(f"{value / 1e9:.1f}" for value in parts.values()),
                      f"{sum(parts.values()) / 1e9:.1f}"]
                     for when, parts in (("before", before), ("now", now))
                     if when == "now" or not changed]
    return table(["GPUs", "flags", "", "policy gathered", "reference gathered",
                  "gradients reduced", "refresh", "all"], rows)


def host(costs):
    z = costs.letters(ETHERNET, COCO, costs.paper)
    files, own = plan.host(z)
    whole = plan.host_before(z, costs.paper)
    rows = [["mapped files, once per machine", "2 m", "none", f"{files / 1e9:.1f} GB"],
            ["of its own, per process",
             "now the larger of 4 (f + t - m + u) and 4 r; before 4 (t + f) + b m",
             f"{whole / 1e9:.1f} GB", f"{own / 1e9:.1f} GB"],
            ["a machine of 8", "files + 8 of its own", f"{8 * whole / 1e9:.0f} GB",
             f"{(files + 8 * own) / 1e9:.0f} GB"]]
    return table(["CPU memory while it starts", "formula", "before", "now"], rows)


def first_stage(costs):
    rows = []
    for cluster in CLUSTERS:
        for work in (COCO, LIMIT):
            found = costs.stage_1(cluster, work)
            of_stage_2 = costs.whole(cluster, work, costs.paper)
            days = [(answers + steps + 31_727 * step) / 86400 for answers, steps, step
                    in zip(found["answers"], found["training"], of_stage_2)]
            rows.append([cluster.name, work.name, found["batch"], between(found["answers"], 3600),
                         f"{found['before'] / 3600:.1f}", between(found["training"], 3600),
                         f"{found['received'] / 3600:.1f}", between(days)])
    return table(["", "prompt and answer", "answers at once", "hours of the pass",
                  "hours waited before", "hours of its steps", "communication in them",
                  "days, both stages"], rows)


def page():
    costs = Costs()
    z = costs.letters(ETHERNET, COCO, costs.paper)
    k, args = EXPRESSIONS / OBJECTS, AlignArgs()
    drawn, steps = args.epochs * OBJECTS, args.epochs * OBJECTS // args.batch
    likely = EXPRESSIONS * (1 - (1 - 1 / k) ** args.epochs)
    return f"""# What LENS-3B costs on 16 GPUs of 48 GB and on 8 of 80 GB

Written by `python tests/cluster.py`. **Nothing on this page is measured** but one line on memory
of the host. It is arithmetic: formulas and letters of [tests/plan.py](../tests/plan.py), and these
assumptions:

| assumed | L40S, two nodes of 8 | H100, one node of 8 |
| --- | --- | --- |
| peak in bf16, dense; memory's bandwidth (data sheets) | 362 TFLOP/s, 864 GB/s | 989 TFLOP/s, \
3,350 GB/s |
| link of a GPU within its node | PCIe 4 x16, 25 GB/s | NVLink, 450 GB/s |
| network of a node, line rate | 100 Gb/s = 12.5 GB/s, or 400 Gb/s = 50 GB/s | none |
| arithmetic achieves, of the peak (MFU; what is computed again counts) | 40 to 30 % | 40 to 30 % |
| decoding achieves, of the bandwidth | 70 % | 70 % |

Also assumed: decoding compiled, every answer T tokens long, 200 tokens of text in a prompt;
loading, rewards and checkpoints cost no time. The lower figure hides communication (not refresh's)
behind the update and takes MFU 40 %, the higher adds it and takes 30 %. How much is hidden is not
known.

The model: t = {z.t / 1e9:.2f} G trained, f = {z.f / 1e9:.2f} G frozen, m = {z.m / 1e9:.2f} G of \
the MLLM, r = {z.r / 1e9:.2f} G in FSDP's root,
u = {z.u / 1e9:.2f} G in its largest block, W = {plan.weights(z) / 1e9:.2f} G that a decoded token \
passes through; b = 2 bytes.
64 prompts a step, G = 8, so n = 4 prompts a GPU on 16 and 8 on 8. A COCO picture has 23 * 17 =
391 tokens; at 1,000,000 pixels, the default cap, it is 1,000,000 / 28^2 = 1,275. T = 200 is a
guess, 768 the limit.

## What a step of stage 2 does

{counts(costs)}

## How long it takes, in seconds

{seconds(costs)}

AdamW's: 28 t / s bytes through the GPU's memory. Decoding is T times the larger of its bytes and
its arithmetic 2 W n G. The slowest link of a ring over two nodes is the smaller of PCIe and
network. The paper's 31,727 steps are 126,908 objects * 16 epochs / 64. With `--compile off` a token
may take {EAGER * 1000:.0f} ms (assumed), 200 tokens {200 * EAGER:.0f} s. Decoding lasts as long \
as the longest answer of all
GPUs, for the update waits: where few answers reach the limit it is still that of "the limits".

## What flags change

The plan's GB are at the limits, with 2 for CUDA; "unfused" adds the scores 12 N heads S (P + S),
if no fused kernel takes a mask on that GPU (tests/gpu.py measures it).

{settings(costs)}

`--micro-batch 4` gathers the weights once for four prompts. Hybrid receives within the node
alone, and sums 4 t / s bytes of gradients between nodes (8 GPUs share the network);
with 400 Gb/s it gains nothing. What is above 48 GB does not fit an L40S.

## Bytes that a GPU receives in a step, before and now, in GB

x (s - 1) / s each; now: policy b (2 t - r) a pass, reference b m a pass, gradients 4 t a pass or
once, refresh b m. Before: policy 2 b t a pass, refresh b t.

{before_and_now(costs)}

## Memory of the host

{host(costs)}

Not in it: Python, CUDA and the loaders' processes. tests/host_memory.py measured it with 4
processes on a CPU and a model of 0.28 G parameters (docs/host_memory.json): 2.93 GB each and 11.43
together before, 1.82 and 7.40 now; there the shards and the sampling copy lie in CPU memory too.

## Stage 1

{args.epochs} epochs * {OBJECTS:,} objects draw {drawn:,} answers, of at most {EXPRESSIONS:,} \
expressions (RefCOCO 120,624,
RefCOCO+ 120,191, RefCOCOg 80,512). If each object has k = {k:.2f} of them, all but \
{EXPRESSIONS - likely:.0f} are drawn,
objects * k (1 - 1/k)^{args.epochs}. All are counted here.

{first_stage(costs)}

The pass: expressions / GPUs * (TFLOP of a prompt / (MFU peak) + T / batch * seconds of a decoding
step); the batch is align.answer_batch's, half of the free memory. Before, a step waited for its
slowest new answer: {waited(args):,.0f} of {steps:,} steps had one, the sum over epochs e of
991 (1 - (1 - (1 - 1/k)^(e-1))^128), times T times a decoding step of {EAGER * 1000:.0f} ms \
(eager, assumed).
Its own steps: forward of prompt and answer, 3 times the queries' pass, SAM; the connector and the
queries gathered and reduced every pass of one row (`--micro-batch 8` or `--reduce-once` spare it).
Both stages: the pass, these steps, and 31,727 of stage 2.
"""


def main():
    path = ROOT / "docs/cluster.md"
    write_whole(path, page())
    print(path)


if __name__ == "__main__":
    main()
