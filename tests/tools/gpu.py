"""Ten minutes of one GPU: does what the tests show on a CPU hold there too, and how fast is it?

    python tests/tools/gpu.py                    # writes docs/evidence/gpu.json as it goes
    python tests/tools/gpu.py --size 24gb        # 80gb, 48gb or 24gb; default: what the card holds
    python tests/tools/gpu.py --seconds 240      # a part that no longer fits is skipped
    python tests/tools/gpu.py --only caches,preset
    python tests/tools/gpu.py --tiny             # tiny sizes, also without a GPU; runs/gpu.json

    caches     a small model in fp32: the growing cache, the fixed one and the compiled one give the
               same greedy tokens and the same samples, and see weights that change in place
    preset     a few steps of both stages (tiny preset) here and on the CPU; and one image, for
               which nothing may be compiled
    sampling   G completions of T tokens after P, with each cache; prefill and decoding apart
    step       one micro-batch as train_rl.py has it, part by part, and its completions one by one
               (each with its own forward of prompt and image); memory beside the plan's, which is
               exceeded where attention with a mask takes no fused kernel
    update     the refresh of the sampler, and AdamW
    share      sampling for four prompts at once, the share of a GPU of 16 in a batch of 64

Models have random weights, so nothing is downloaded. 80gb is LENS-3B. 48gb has 12 of its 36 text
layers, 24gb has 2 of them and 4 of its 32 vision blocks; all other shapes are the real ones. Before
each part the script looks whether the card has the memory for it, and skips it if not. A part that
raises is a problem like a number that is wrong: the exit status is 1 then, and the next part runs
all the same. Seconds are those of the wall, after a synchronisation. A compiled step needs a C
compiler, for Triton.

A machine without a network needs wheels beside its torch and torchvision. Where there is one,
`pip download -d wheels` the other packages of requirements.txt for the same Python and platform,
and sam2 with `--no-deps --no-binary :all: --no-build-isolation`. There, `pip install --no-index
--find-links wheels --no-build-isolation` them, sam2 last with SAM2_BUILD_CUDA=0 and --no-deps.
"""
import argparse
import functools
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools"), str(ROOT / "tests/tiny")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import plan
import torch
import transformers
from transformers import AutoModelForImageTextToText
from world import write_shapes_world

from align import SharedArgs, apply_update, make_optimizer, start_processes
from data import write_whole
from model import Lens, checkpoint_layers, load_sam, prompt_positions, set_trainable, shard
from train_rl import (FixedCache, Reference, RLArgs, Samples, backward, copy_mllm, draw_uniforms,
                      generate, make_micro_batches, parameter_groups, refresh, score)

CUDA = torch.cuda.is_available()
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
COMPARED = ("loss", "mask_iou", "grad_norm", "reward", "reward_format", "reward_box", "reward_mask",
            "kl", "completion_length")                               # metrics of `preset`


@dataclass
class Size:
    """What is measured."""
    what: str
    config: dict = field(default_factory=dict)       # changes to the MLLM, see plan.mllm_config
    sam: str = "sam2_hiera_large.pt"
    # tokens of a prompt: (height, width) of its image in tokens
    images: dict = field(default_factory=lambda: {600: (20, 20), 1400: (30, 40)})
    G: int = 8
    T: int = 200
    M: int = 64
    precision: str = "bf16"

    @property
    def shared(self):
        return SharedArgs(mllm=MODEL, sam=self.sam, max_prompt=max(self.images),
                          max_completion=self.T, num_queries=self.M, precision=self.precision)

    @property
    def dtype(self):
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def args(self):
        return RLArgs(batch=1, micro_batch=1, group_size=self.G)


SIZES = {
    "80gb": Size(f"{MODEL} and SAM2-Large"),
    "48gb": Size(f"{MODEL} with 12 text layers, and SAM2-Large",
                 {"text": dict(num_hidden_layers=12)}),
    "24gb": Size(f"{MODEL} with 2 text layers and 4 vision blocks, and SAM2-Large",
                 {"text": dict(num_hidden_layers=2),
                  "vision": dict(depth=4, fullatt_block_indexes=[3])}),
    "tiny": Size("a model of two small layers, and tests/tiny/sam",
                 {"text": dict(vocab_size=2048, hidden_size=128, intermediate_size=256,
                               num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                               bos_token_id=None, eos_token_id=2, pad_token_id=0,
                               rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                    mrope_section=[4, 6, 6])),
                  "vision": dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2,
                                 out_hidden_size=128, fullatt_block_indexes=[1]),
                  "image_token_id": 2047, "video_token_id": 2046, "vision_start_token_id": 2045,
                  "vision_end_token_id": 2044},
                 str(ROOT / "tests/tiny/sam"), {64: (4, 6), 96: (6, 8)}, 4, 12, 8, "fp32")}


def measure(report, size):
    report.data |= {"size": size.what, "G": size.G, "T": size.T, "M": size.M, **machine()}
    _, _, device, mesh = start_processes(size.shared)                # one process, of NCCL and gloo
    state = SimpleNamespace(size=size, device=device, mesh=mesh, sampler=None, lens=None,
                            reference=None, optimizer=None)
    # name, seconds on an H100 (guessed), bytes, function and its arguments
    parts = [("caches", 60, 1e9, caches, report, state),
             ("preset", 90, 1e9, preset, report, state)]
    parts += [(f"sampling {P}", 90, needs(size, "sampling"), sampling, state, P)
              for P in size.images]
    parts += [(f"step {P}", 60, needs(size, "step"), step, state, P) for P in size.images]
    parts += [("update", 30, needs(size, "update"), update, state),
              ("share", 90, needs(size, "sampling", 4), sampling, state, max(size.images),
               ["compiled"], 4)]
    for name, seconds, *rest in parts:
        report.part(name, seconds * (size is not SIZES["tiny"]), *rest)
    torch.distributed.destroy_process_group()


class Report:
    """The file, complete after every part, and the time that is left."""

    def __init__(self, path, seconds, only):
        self.path, self.seconds, self.only = Path(path), seconds, only
        self.began = perf_counter()
        self.data = {"parts": {}, "problems": []}

    def part(self, name, seconds, memory, function, *args):
        """Run one part, unless --only leaves it out or it needs more seconds or bytes than are
        left."""
        if self.only and name.split()[0] not in self.only:
            return
        left = self.seconds - (perf_counter() - self.began)
        if left < seconds:
            result = f"skipped: {left:.0f} s left, about {seconds} s needed"
        elif memory > available_memory():
            result = (f"skipped: about {memory / 1e9:.1f} GB needed, "
                      f"{available_memory() / 1e9:.1f} GB available")
        else:
            began = perf_counter()
            try:
                result = {**function(*args), "part_seconds": round(perf_counter() - began, 1)}
            except Exception as error:               # whatever it is, the next part shall run
                result = {"error": traceback.format_exc()[-3000:]}
                self.problem(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        self.data["parts"][name] = result
        print(f"--- {name}\n{result['error'] if 'error' in result else json.dumps(result)}",
              flush=True)
        self.data["seconds"] = round(perf_counter() - self.began, 1)
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")

    def problem(self, text):
        self.data["problems"].append(text)
        print(f"PROBLEM {text}", flush=True)


def machine():
    described = {"torch": torch.__version__, "transformers": transformers.__version__,
                 "python": platform.python_version(), "device": "cpu"}
    if CUDA:
        gpu = torch.cuda.get_device_properties(0)
        described |= {"device": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1),
                      "cuda": torch.version.cuda}
    return described


# --- Time and memory ------------------------------------------------------------------------------

def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def timed(function, *args, **kwargs):
    """-> its result, seconds"""
    synchronize()
    began = perf_counter()
    result = function(*args, **kwargs)
    synchronize()
    return result, perf_counter() - began


def rounded(seconds):
    return {name: round(value, 4) for name, value in seconds.items()}


def available_memory():
    """Bytes that are free, and those that this script holds, which a part replaces or uses."""
    gc.collect()
    if not CUDA:
        return float("inf")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()


class Peak:
    """Gigabytes: what is allocated at the start of a `with`, and the most inside it above that;
    both None on a CPU."""
    at_start = above = None

    def __enter__(self):
        synchronize()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self.at_start = round(torch.cuda.memory_allocated() / 1e9, 3)
        return self

    def __exit__(self, *_):
        synchronize()
        if CUDA:
            self.above = round(torch.cuda.max_memory_allocated() / 1e9 - self.at_start, 3)


# --- Models, prompts, and the memory that the plan foresees ---------------------------------------

def build_mllm(size, device, dtype):
    """Random weights, made where they stay. Its rotary frequencies stay fp32, as in load_mllm."""
    torch.manual_seed(0)
    with torch.device(device):
        mllm = AutoModelForImageTextToText.from_config(plan.mllm_config(MODEL, **size.config),
                                                       dtype=dtype)
    assert mllm.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    return mllm.eval()


def make_prompts(mllm, S, P, image, B, device):
    """B times one prompt of P tokens with an image, as data.Collator and to_device lay it out."""
    config, vision = mllm.config, mllm.config.vision_config
    g, (h, w), merge = torch.Generator().manual_seed(0), image, vision.spatial_merge_size

    def words(n):
        return torch.randint(0, 1000, (n,), generator=g)
    ids = torch.cat([words(20), torch.tensor([config.vision_start_token_id]),
                     torch.full((h * w,), config.image_token_id),
                     torch.tensor([config.vision_end_token_id]), words(P - h * w - 22)])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    on_device = {"pixel_values": torch.randn(B * merge ** 2 * h * w, patch, generator=g),
                 "grid_thw": torch.tensor([[1, merge * h, merge * w]] * B),
                 "sam_pixels": torch.randn(B, 3, S, S, generator=g),
                 "low_res_masks": (torch.rand(B, S // 4, S // 4, generator=g) > 0.7).float(),
                 "low_res_weights": torch.ones(B, S // 4, S // 4)}
    return {"prompt_ids": [ids] * B, "token_types": [(ids == config.image_token_id).long()] * B,
            "gt_masks": [torch.rand(480, 640, generator=g) > 0.7] * B,
            "ignore_masks": [torch.zeros(480, 640, dtype=torch.bool)] * B,
            "gt_boxes": [(10, 10, 100, 100)] * B, "mllm_frames": [(640, 480)] * B,
            **{name: tensor.to(device) for name, tensor in on_device.items()}}


def sample(mllm, batch, G, T, cache, greedy=False, eos=-1):
    """`generate` as train_rl.py calls it. No token is -1, so all completions reach the limit."""
    B, device = len(batch["prompt_ids"]), batch["pixel_values"].device
    uniforms = None if greedy else draw_uniforms(0, 0, range(B), G, T).to(device)
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool, device=device)
    return generate(mllm, batch, prompt_positions(mllm, batch), G, T, eos, forbidden, uniforms,
                    cache=cache)


@functools.cache
def on_meta(what):
    """The whole model without memory, for what is counted. what: that of a Size"""
    size, = (size for size in SIZES.values() if size.what == what)
    return plan.build(size.shared, plan.mllm_config(MODEL, **size.config))


def planned(size, P):
    """-> plan.Sizes of a step of one prompt"""
    (h, w), lens = size.images[P], on_meta(size.what)
    merge = lens.mllm.config.vision_config.spatial_merge_size ** 2
    return plan.sizes(lens, size.shared, size.args, 1, P, merge * h * w)


def needs(size, part, prompts=1):
    """-> bytes of a part after the longest prompt, by the plan"""
    z = planned(size, max(size.images))
    phases = plan.memory(z, size.args)
    training, sampler = phases["training"], z.width * z.mllm
    cache = training.pop("cache")
    completions = cache + phases["sampling"]["prompts' cache"] + phases["sampling"]["picking"]
    return plan.CUDA + {
        "sampling": sampler + prompts * completions,
        "step": sum(training.values()) - training["Adam"],
        "update": sum(training.values()) - 2 * sampler,      # sampler and reference are gone
    }[part]


# --- caches ---------------------------------------------------------------------------------------

def caches(report, state):
    """The end token is one that the samples hold, so some end early and the batch shrinks."""
    size, device, T = SIZES["tiny"], state.device, 24
    G = 2 if state.size is size else 8
    mllm = build_mllm(size, device, torch.float32)
    with torch.no_grad():                            # else it says one word over and over
        for parameter in mllm.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * (parameter.dim() > 1))
    batch = make_prompts(mllm, 128, 64, size.images[64], 2, device)
    ways = {"growing": None, "fixed": FixedCache(mllm, 2 * G, 64, T, compiled=False),
            "compiled": FixedCache(mllm, 2 * G, 64, T)}

    def completions(way, greedy=False, eos=-1):
        samples = sample(mllm, batch, G, T, ways[way], greedy, eos)
        return [ids.tolist() for group in samples.completions for ids in group]

    tokens = Counter(token for ids in completions("growing") for token in ids)
    eos, result = tokens.most_common(1)[0][0], {}

    def compare(name, greedy=False):
        right = completions("growing", greedy, eos)
        result[name] = {"lengths": sorted({len(ids) for ids in right})}
        for way in ("fixed", "compiled"):
            found, seconds = timed(completions, way, greedy, eos)    # the first one compiles
            result[name][way] = {"same_tokens": found == right, "seconds": round(seconds, 2)}
            if found != right:
                report.problem(f"caches: {name}, {way}: other tokens than with the growing cache")
        return right
    compare("greedy", greedy=True)
    before, counters = compare("sampled"), torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for parameter in mllm.parameters():
            parameter.mul_(1.05)
    if compare("sampled after an update in place") == before:
        report.problem("caches: the update changes no token, so it shows nothing")
    again = counters["stats"]["unique_graphs"] - graphs
    if again > 3:                                    # other completions may shrink it once more
        report.problem(f"caches: {again} graphs were compiled again for shapes seen before")
    if CUDA and counters["inductor"]["cudagraph_skips"]:
        report.problem("caches: some compiled graph is not captured as a CUDA graph")
    return {**result, "graphs": graphs + again}


# --- preset ---------------------------------------------------------------------------------------

ONE_IMAGE = """import sys, torch, evaluate
sys.argv = ["evaluate.py", *sys.argv[1:]]
evaluate.main()
print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])"""


def preset(report, state):
    """Both scripts on the CPU and here; without a GPU, twice on the CPU."""
    result, steps = {}, "2" if state.size is SIZES["tiny"] else "5"
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/shapes"
        write_shapes_world(data, splits={"train": 32, "val": 1, "testA": 1, "testB": 1})
        common = ["--preset", "tiny", "--steps", steps, "--max-completion", "24", "--data", data]
        for script, *flags in (["align.py", "--batch", "8", "--micro-batch", "4"],
                               ["train_rl.py", "--batch", "4", "--micro-batch", "2", "--init",
                                f"{folder}/align.py.cpu"]):
            rows = []
            for place, hidden in (("cpu", {"CUDA_VISIBLE_DEVICES": ""}), ("here", {})):
                output = f"{folder}/{script}.{place}"
                call(script, *common, *flags, "--output", output, **hidden)
                lines = Path(output, "metrics.jsonl").read_text().splitlines()
                rows.append([json.loads(line) for line in lines])
            result[script] = compare_rows(report, script, *rows)
        image = next(path for path in Path(data).rglob("*") if path.suffix in (".jpg", ".png"))
        said = call("-c", ONE_IMAGE, "--preset", "tiny", "--checkpoint",
                    f"{folder}/train_rl.py.here", "--image", str(image), "--text", "the red circle",
                    "--output", f"{folder}/overlay.png")
    graphs = int(said.rpartition("graphs:")[2])
    if graphs:
        report.problem(f"preset: {graphs} graphs were compiled for one image")
    return {**result, "graphs compiled for one image": graphs}


def call(*command, **environment):
    """-> what it prints"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, timeout=300,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2500:])
    return done.stdout


def compare_rows(report, script, on_cpu, here):
    """-> {metric: the values of both runs}"""
    result = {"seconds": [[row["seconds"] for row in rows] for rows in (on_cpu, here)]}
    for name in COMPARED:
        if name in on_cpu[0]:
            result[name] = pairs = [(a[name], b[name]) for a, b in zip(on_cpu, here)]
            first, other = pairs[0]
            if abs(first - other) > 1e-3 * max(1, abs(first)):
                report.problem(f"preset: {script}: {name} of the first step {pairs[0]}")
    return result


# --- sampling and share ---------------------------------------------------------------------------

def sampling(state, P, ways=("growing", "fixed", "compiled"), B=1):
    """-> {way: tokens per second, prefill and decoding apart}. Prefill is a generation of one
    token, decoding the rest of T."""
    size, device = state.size, state.device
    if state.sampler is None:
        state.sampler = build_mllm(size, device, size.dtype).requires_grad_(False)
    mllm, n = state.sampler, B * size.G
    batch = make_prompts(mllm, 16, P, size.images[P], B, device)
    result = {}
    for way in ways:
        cache = None
        if way != "growing":
            cache = FixedCache(mllm, n, P, size.T, compiled=way == "compiled")
        _, first = timed(sample, mllm, batch, size.G, size.T, cache)     # `compiled` compiles here
        with Peak() as peak:
            _, whole = timed(sample, mllm, batch, size.G, size.T, cache)
        _, prefill = timed(sample, mllm, batch, size.G, 1, cache)
        decoding = max(whole - prefill, 1e-9)
        result[way] = {"seconds": round(whole, 3), "prefill": round(prefill, 3),
                       "first_run": round(first, 2),
                       "tokens_per_second": round(n * size.T / whole, 1),
                       "ms_per_token": round(1e3 * decoding / (size.T - 1), 3),
                       "gb": [peak.at_start, peak.above]}
    return result


# --- step and update ------------------------------------------------------------------------------

def build_policy(state):
    """Policy, reference, sampler and optimizer through train_rl's own functions, on a mesh of
    one."""
    size, device = state.size, state.device
    mllm, sam = build_mllm(size, device, size.dtype), load_sam(size.sam, with_weights=False)
    with torch.device(device):
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        lens = Lens(mllm, sam.to(device), size.shared, forbidden, eos=-1)
    frozen = set_trainable(lens.train(), "rl")
    checkpoint_layers(lens.mllm)
    reference = Reference(copy_mllm(lens.mllm, size.precision, device), lens.forbidden)
    if state.sampler is None:
        state.sampler = copy_mllm(lens.mllm, size.precision, device)
    state.lens = shard(lens, state.mesh, size.precision, frozen)
    state.reference = shard(reference, state.mesh, size.precision)
    state.optimizer = make_optimizer(parameter_groups(lens, size.args), size.args, device)


def forward_backward(state, P, seconds, first=0, n=None):
    """Everything of a step but sampling and update, for n of the G stored completions. The seconds
    of each part are added to `seconds`. -> tokens of the packed row"""
    size, lens, device, g = state.size, state.lens, state.device, torch.Generator().manual_seed(3)
    batch = make_prompts(lens.mllm, lens.sam_size, P, size.images[P], 1, device)
    completions = [*torch.randint(0, 1000, (size.G, size.T), generator=g)]
    completions = completions[first:first + (n or size.G)]
    samples, args = Samples([completions], [[True] * len(completions)]), size.args
    args.group_size, args.beta = len(completions), args.beta * (state.reference is not None)

    def part(name, function, *inputs):
        result, taken = timed(function, *inputs)
        seconds[name] = seconds.get(name, 0) + taken
        return result
    [micro] = part("reference and SAM encoder", make_micro_batches, lens, state.reference, batch,
                   prompt_positions(lens.mllm, batch), samples, [["no box"] * len(completions)],
                   args)
    out = part("forward", lens, batch["pixel_values"], batch["grid_thw"], micro.packed,
               micro.features)
    part("rewards", score, out, micro, args)
    part("backward", backward, out, micro, args, 1)
    return micro.packed.ids.numel()


def step(state, P):
    """-> seconds of each part in the second of two runs, for the whole group and for its
    completions one by one; memory and arithmetic beside the plan's"""
    if state.lens is None:
        build_policy(state)
    size, z = state.size, planned(state.size, P)
    for _ in range(2):
        state.lens.zero_grad()
        seconds, one_by_one = {}, {}
        with Peak() as peak:
            tokens = forward_backward(state, P, seconds)
    for _ in range(2):
        one_by_one = {}
        for i in range(size.G):
            forward_backward(state, P, one_by_one, i, 1)
    training = plan.memory(z, size.args, on_gpu=False)["training"]
    always = ("weights", "frozen parts", "sampling copy", "reference")
    at_start = sum(training[part] for part in always)
    flops = plan.arithmetic(on_meta(size.what), z, size.args)
    tflop = (sum(flops.values()) - flops["sampling"]) / 1e12
    total = sum(seconds.values())
    return {"row": tokens, "seconds": rounded(seconds), "one by one": rounded(one_by_one),
            "times_faster": round(sum(one_by_one.values()) / total, 2),
            "gb": [peak.at_start, peak.above],
            "plan_gb": [round(at_start / 1e9, 3),
                        round((sum(training.values()) - training["Adam"] - at_start) / 1e9, 3)],
            "tflop_per_second": round(tflop / total, 1)}


def update(state):
    """The refresh while the sampler is there. Then sampler and reference go, to make room for
    Adam's state, and of two updates the second counts."""
    if state.lens is None:
        build_policy(state)
    size, lens, seconds = state.size, state.lens, {}
    for _ in range(2):
        _, seconds["refresh"] = timed(refresh, state.sampler, lens)
    state.reference = state.sampler = None
    available_memory()
    lens.zero_grad()
    with Peak() as peak:
        for i in range(2):
            forward_backward(state, max(size.images), {})
            norm, seconds["update"] = timed(apply_update, lens, state.optimizer, 1.0, size.args,
                                            0.0, i)
    state.lens = state.optimizer = None              # the next part needs the room
    return {"seconds": rounded(seconds), "gradient_norm": norm, "gb": [peak.at_start, peak.above]}


def largest_size():
    """The name of the largest size whose update the card holds."""
    names = [name for name, size in SIZES.items() if needs(size, "update") < available_memory()]
    return names[0] if CUDA else "tiny"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="default: the largest that the card holds")
    parser.add_argument("--tiny", action="store_true", help="--size tiny, also without a GPU")
    parser.add_argument("--seconds", type=float, default=540, help="skip what no longer fits")
    parser.add_argument("--out", help="default docs/evidence/gpu.json; of tiny sizes runs/gpu.json")
    parser.add_argument("--only", default="", help="parts to run, separated by commas")
    args = parser.parse_args()
    name = "tiny" if args.tiny else args.size or largest_size()
    if name != "tiny" and not CUDA:
        parser.error("there is no GPU here: --tiny runs on a CPU")
    out = args.out or ROOT / ("runs/gpu.json" if name == "tiny" else "docs/evidence/gpu.json")
    report = Report(out, args.seconds, [part for part in args.only.split(",") if part])
    measure(report, SIZES[name])
    print(f"{len(report.data['problems'])} problems; {report.path}")
    sys.exit(bool(report.data["problems"]))


if __name__ == "__main__":
    main()
