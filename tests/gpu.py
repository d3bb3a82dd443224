"""Ten minutes of one GPU: does what a CPU has proven hold there, and how fast is it? By hand:

    python tests/gpu.py                      # one card of 80 GB; docs/gpu.json, written as it goes
    python tests/gpu.py --seconds 240        # what no longer fits is skipped, and says so
    python tests/gpu.py --only caches,preset # some parts alone
    python tests/gpu.py --tiny               # the same parts at tiny sizes, on a CPU where no GPU
                                             # is; runs/gpu_cpu.json

torch from 2.11 and transformers from 5.17. A part that fails leaves its error in the file, prints
it, and the next one begins. Seconds are those of the wall, after a synchronisation.

    caches     fp32, a small model: a growing cache, a fixed one and the compiled one must give the
               same greedy tokens and the same samples, and see weights that change in place
    preset     both stages of the tiny preset (NCCL, one process) against --device cpu
    sampling   Qwen2.5-VL-3B at random weights, G samples of T tokens after P: each cache; what
               compiling cost; prefill and decoding apart
    step       fp32 masters and FSDP2 as train_rl.py has them: each part of a step, and its peak
               memory beside that of tests/plan.py
    update     AdamW and refresh; MFU of the update by train_rl.speed and by tests/plan.py
    profile    the ten kernels that take most time, in decoding and in a pass
    plain      the straightforward step of tests/benchmark.py, a sample at a time, beside ours; both
               in bf16 without FSDP
    attention  the kernels that completions and one new token take, three ways each
    share      sampling for four prompts at once, a GPU's share of 64 on 16

Memory: masters, gradients and Adam's state of 4.0 G parameters are 64 GB. The sampling copy and the
reference, 15 GB more, go before Adam's state comes; where it would not fit in what the card has,
the update is skipped with its numbers. By tests/plan.py it takes 69 GB after 1,400 tokens, and the
step before it, without Adam's state, 52.

A machine without a network. Where there is one, for the same Python and platform:

    pip download -d wheels "transformers>=5.17,<6" hydra-core omegaconf iopath pycocotools tqdm \\
        safetensors tokenizers huggingface_hub setuptools wheel
    pip download -d wheels --no-deps --no-binary :all: --no-build-isolation sam2==1.1.0

(antlr4-python3-runtime, portalocker and iopath come as sources: `pip wheel` makes wheels of them.)
There, beside an installed torch and torchvision:

    pip install --no-index --find-links wheels --no-build-isolation transformers hydra-core \\
        omegaconf iopath pycocotools
    SAM2_BUILD_CUDA=0 pip install --no-index --no-deps --no-build-isolation wheels/sam2-*.tar.gz
    HF_HUB_OFFLINE=1 python tests/gpu.py

Nothing else is downloaded: the tiny preset's stand-ins lie in tests/tiny, the real model's weights
are random. --compile needs a C compiler, for Triton.
"""
import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import benchmark
import parameters
import plan
import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText

from align import (SharedArgs, apply_update, make_optimizer, set_trainable, shard,
                   start_processes)
from data import write_whole
from grpo import policy_logits
from model import (FixedCache, Lens, draw_uniforms, generate, load_sam, pack_groups, pick_tokens,
                   prefill, prompt_positions)
from train_rl import (Groups, Reference, RLArgs, Scores, backward_pass, copy_mllm, parameter_groups,
                      refresh, share_mllm, speed)

CUDA = torch.cuda.is_available()
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181}    # bf16, dense
COMPARED = ("loss", "mask_iou", "grad_norm", "reward", "reward_format", "reward_box", "reward_mask",
            "kl", "sampler_gap", "completion_length")


@dataclass
class Size:
    """What is measured."""
    name: str
    sam: str
    prompts: dict    # tokens of a prompt -> its picture's (height, width) in tokens
    G: int
    T: int
    shared: SharedArgs


REAL = Size(f"{MODEL} and SAM2-Large, random weights", "sam2_hiera_large.pt",
            {600: (20, 20), 1400: (30, 40)}, 8, 200,
            SharedArgs(mllm=MODEL, max_prompt=1400, max_completion=200))
TINY = Size("the stand-in of tests/benchmark.py and tests/tiny/sam", str(ROOT / "tests/tiny/sam"),
            {64: (4, 6), 96: (6, 8)}, 4, 12,
            SharedArgs(max_prompt=96, max_completion=12, num_queries=8, connector_heads=4,
                       precision="fp32"))


class Report:
    """The file, whole after every part, and the time that is left."""

    def __init__(self, path, seconds, only):
        self.path, self.seconds, self.only = Path(path), seconds, only
        self.began = perf_counter()
        self.data = {"parts": {}, "problems": []}

    def write(self):
        self.data["seconds"] = round(perf_counter() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.data, indent=1))

    def part(self, name, needs, function, *args):
        """Run one part, unless fewer than `needs` seconds are left or --only leaves it out."""
        if self.only and name.split()[0] not in (*self.only, "machine", "processes"):
            return
        left = self.seconds - (perf_counter() - self.began)
        if left < needs:
            result = f"skipped: {left:.0f} s left, about {needs} s needed"
        else:
            began = perf_counter()
            try:
                result = {**function(*args), "part_seconds": round(perf_counter() - began, 1)}
            except Exception:                        # whatever it is, the next part shall run
                result = {"error": traceback.format_exc()[-3000:]}
        self.data["parts"][name] = result
        print(f"--- {name}\n{result['error'] if 'error' in result else json.dumps(result)}",
              flush=True)
        self.write()
        free()

    def problem(self, text):
        self.data["problems"].append(text)
        print(f"PROBLEM {text}", flush=True)


# --- Time, memory, kernels ------------------------------------------------------------------------

def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def timed(function, *args, **kwargs):
    """-> its result, seconds"""
    synchronize()
    began = perf_counter()
    result = function(*args, **kwargs)
    synchronize()
    return result, perf_counter() - began


def best(function, times=3):
    """-> the shortest of some runs, after one that is not counted"""
    function()
    return min(timed(function)[1] for _ in range(times))


def allocated():
    return torch.cuda.memory_allocated() if CUDA else 0


class Peak:
    """The most memory inside a `with`, above what stood before: .bytes, None on a CPU."""

    def __enter__(self):
        synchronize()
        self.before, self.bytes = allocated(), None
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_):
        synchronize()
        if CUDA:
            self.bytes = torch.cuda.max_memory_allocated() - self.before


def gigabytes(number):
    return None if number is None else round(number / 1e9, 3)


def largest_kernels(function):
    """-> the ten kernels (on a CPU: operators) that take most of its time"""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with profile(activities=activities) as profiler:
        function()
        synchronize()
    clock = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [(getattr(event, clock) / 1e3, event.count, event.key[:90])
            for event in profiler.key_averages() if is_kernel(event)]
    total = sum(ms for ms, *_ in rows)
    return {"ms": round(total, 2),
            "largest": [{"kernel": key, "calls": calls, "ms": round(ms, 3),
                         "share": round(ms / max(total, 1e-9), 3)}
                        for ms, calls, key in sorted(rows, reverse=True)[:10]]}


def is_kernel(event):
    """On a GPU: what ran there, without the labels that cover several kernels."""
    if not CUDA:
        return True
    label = event.key.startswith(("##", "Torch-Compiled", "FSDP::", "autograd::"))
    return event.device_type == torch.autograd.DeviceType.CUDA and not label


def host_syncs(function):
    """-> how often, and where, the CPU waits for the GPU; None without one"""
    if not CUDA:
        function()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught
                     if "synchroniz" in str(warning.message))
    return {"all": sum(places.values()), "where": dict(places.most_common(10))}


def compiler_counters():
    """What torch.compile has done so far: graphs, graph breaks, CUDA graphs it refused."""
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"]}


# --- Models and prompts ---------------------------------------------------------------------------

def build_mllm(size, device, dtype):
    """Random weights, made where they stay. Its rotary frequencies stay fp32, as in load_mllm."""
    of = parameters.build_mllm(MODEL) if size is REAL else benchmark.build_mllm(0)
    torch.manual_seed(0)
    with torch.device(device):
        mllm = AutoModelForImageTextToText.from_config(of.config, dtype=dtype)
    assert mllm.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    return mllm.eval()


def build_lens(size, device, dtype):
    mllm = build_mllm(size, device, dtype)
    sam = load_sam(size.sam, with_weights=False).to(device)
    with torch.device(device):
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        lens = Lens(mllm, sam, size.shared, forbidden, eos=-1)
    set_trainable(lens.train(), "rl")
    return lens


def compute(size):
    return torch.bfloat16 if size.shared.precision == "bf16" else torch.float32


def make_prompts(mllm, side, P, picture, B, device):
    """B times one prompt of P tokens with a picture, as Collator and to_device lay it out."""
    config, vision = mllm.config, mllm.config.vision_config
    g, (h, w), merge = torch.Generator().manual_seed(0), picture, vision.spatial_merge_size

    def words(n):
        return torch.randint(0, 1000, (n,), generator=g)
    ids = torch.cat([words(20), torch.tensor([config.vision_start_token_id]),
                     torch.full((h * w,), config.image_token_id),
                     torch.tensor([config.vision_end_token_id]), words(P - h * w - 22)])
    d = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    pixels = torch.randn(B * merge ** 2 * h * w, d, generator=g)
    grid = torch.tensor([[1, merge * h, merge * w]] * B)
    on_device = {"pixel_values": pixels, "grid_thw": grid,
                 "sam_pixels": torch.randn(B, 3, side, side, generator=g),
                 "low_masks": (torch.rand(B, side // 4, side // 4, generator=g) > 0.7).float(),
                 "low_weights": torch.ones(B, side // 4, side // 4)}
    return {"ids": [ids] * B, "types": [(ids == config.image_token_id).long()] * B,
            **{name: tensor.to(device) for name, tensor in on_device.items()}}


def make_completions(size, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1000, (size.T,), generator=g) for _ in range(size.G)]


def sample(mllm, size, batch, fixed, T=None, greedy=False):
    """`generate` as train_rl.py calls it; -1 ends nothing, so all run to the limit."""
    T, device, B = T or size.T, batch["pixel_values"].device, len(batch["ids"])
    uniforms = None if greedy else draw_uniforms(0, 0, range(B), size.G, T).to(device)
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool, device=device)
    return generate(mllm, batch, prompt_positions(mllm, batch), size.G, T, -1, forbidden, uniforms,
                    fixed=fixed)


# --- caches ---------------------------------------------------------------------------------------

def caches(report, device, tiny):
    """A small fp32 model on `device`. The end token is one that greedy answers hold, so that some
    end early and the batch is halved."""
    mllm = build_mllm(TINY, device, torch.float32)
    with torch.no_grad():                            # else it says one word over and over
        for parameter in mllm.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * (parameter.dim() > 1))
    batch = make_prompts(mllm, 128, 64, TINY.prompts[64], 2, device)
    positions, G, T = prompt_positions(mllm, batch), 2 if tiny else 8, 24
    uniforms = draw_uniforms(0, 0, range(2), G, T).to(device)
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool, device=device)
    ways = {"growing": None, "fixed": FixedCache(mllm, 2 * G, 64, T, compiled=False),
            "compiled": FixedCache(mllm, 2 * G, 64, T)}

    def texts(way, numbers, eos=-1):
        found = generate(mllm, batch, positions, G, T, eos, forbidden, numbers, fixed=ways[way])
        return [ids.tolist() for group in found.completions for ids in group], found.log_probs

    said = Counter(token for ids in texts("growing", uniforms)[0] for token in ids)
    eos, result = said.most_common(1)[0][0], {}

    def compare(name, numbers):
        right, right_log_probs = texts("growing", numbers, eos)
        result[name] = {"lengths": sorted({len(ids) for ids in right})}
        for way in ("fixed", "compiled"):
            (found, log_probs), seconds = timed(texts, way, numbers, eos)  # it may compile
            gap = (log_probs - right_log_probs).abs().max().item()
            result[name][way] = {"same_tokens": found == right, "log_prob_gap": gap,
                                 "seconds": round(seconds, 2)}
            if found != right or not gap < 1e-3:
                report.problem(f"caches: {name}, {way}: same tokens {found == right}, log-probs "
                               f"differ by {gap:.2g}")
        return right
    compare("greedy", None)
    before = compare("sampled", uniforms)
    once = compiler_counters()
    with torch.no_grad():
        for parameter in mllm.parameters():
            parameter.mul_(1.05)
    if compare("sampled after an update in place", uniforms) == before:
        report.problem("caches: the update changes no token, so it shows nothing")
    result["compiler"] = compiler_counters()
    result["host_syncs"] = host_syncs(partial(texts, "compiled", uniforms))
    again = result["compiler"]["graphs"] - once["graphs"]
    if again > 3:                                    # other texts may halve the batch once more
        report.problem(f"caches: {again} graphs were compiled again for shapes seen before")
    if CUDA and result["compiler"]["cudagraph_skips"]:
        report.problem("caches: some compiled graph is not captured as a CUDA graph")
    return result


# --- preset ---------------------------------------------------------------------------------------

def preset(report, tiny):
    """Both scripts for a few steps, on the GPU and on the CPU; without a GPU, twice there."""
    data = ROOT / "runs/shapes"
    if not data.exists():
        subprocess.run([sys.executable, "tests/tiny/world.py", str(data)], cwd=ROOT, check=True,
                       capture_output=True)
    other = ["--device", "cuda" if CUDA else "auto"]
    stages = {"align.py": ["--batch", "8", "--micro-batch", "4", "--context", "own"],
              "train_rl.py": ["--batch", "4", "--micro-batch", "2", "--init", "none"]}
    steps, result = 2 if tiny else 5, {}
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for script, flags in stages.items():
            for name, where in (("cpu", ["--device", "cpu"]), ("other", other)):
                output = Path(folder) / f"{script}.{name}"
                command = [sys.executable, script, "--preset", "tiny", "--steps", str(steps),
                           "--max-completion", "24", "--limit", "32", "--data", str(data),
                           "--output", str(output), *flags, *where]
                running[script, name] = start(command, output)
                if not CUDA:
                    running[script, name][0].wait()
        for script in stages:
            rows = [finish(*running[script, name]) for name in ("cpu", "other")]
            result[script] = compare_rows(report, script, *rows)
    result["compared"] = ["--device cpu", " ".join(other)]
    return result


def start(command, output):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = open(f"{output}.log", "w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    return process, output


def finish(process, output):
    """-> the rows of its metrics.jsonl"""
    if process.wait(timeout=300):
        raise RuntimeError(Path(f"{output}.log").read_text()[-2500:])
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare_rows(report, script, right, found):
    """-> {name: both runs' values and the largest difference}"""
    result = {"seconds": {"cpu": [row["seconds"] for row in right],
                          "other": [row["seconds"] for row in found]}}
    for name in COMPARED:
        if name in right[0]:
            pairs = [(a[name], b[name]) for a, b in zip(right, found)]
            gap = max(abs(a - b) for a, b in pairs)
            result[name] = {"cpu": [a for a, _ in pairs], "other": [b for _, b in pairs],
                            "gap": gap}
            if abs(pairs[0][0] - pairs[0][1]) > 1e-3 * max(1, abs(pairs[0][0])):
                report.problem(f"preset: {script}: {name} of the first step {pairs[0]}")
    return result


# --- sampling -------------------------------------------------------------------------------------

def sampling(state, P, ways=("growing", "fixed", "compiled"), B=1):
    """-> {way: tokens per second, prefill and decoding apart}. Prefill is a generation of one
    token, decoding the rest of T."""
    size, device = state.size, state.device
    if state.sampler is None:
        state.sampler = build_mllm(size, device, compute(size)).requires_grad_(False)
    mllm, n = state.sampler, B * size.G
    batch = make_prompts(mllm, 16, P, size.prompts[P], B, device)
    result = {}
    for way in ways:
        fixed = None
        if way != "growing":
            fixed = FixedCache(mllm, n, P, size.T, compiled=way == "compiled")
        _, first = timed(sample, mllm, size, batch, fixed)           # of `compiled` it compiles
        with Peak() as peak:
            samples, whole = timed(sample, mllm, size, batch, fixed)
        _, prefill = timed(sample, mllm, size, batch, fixed, T=1)
        seconds = max(whole - prefill, 1e-9)
        result[way] = {"seconds": round(whole, 3), "prefill": round(prefill, 3),
                       "first_run": round(first, 2),
                       "tokens_per_second": round(n * size.T / whole, 1),
                       "decoded_per_second": round(n * (size.T - 1) / seconds, 1),
                       "ms_per_token": round(1e3 * seconds / (size.T - 1), 3),
                       "peak_gb": gigabytes(peak.bytes),
                       "cache_gb": gigabytes(fixed.whole.nbytes if fixed else None)}
        if way == ways[-1]:
            state.samples[P] = samples, whole
            steps = prepare_decoding(mllm, size, batch, fixed)
            result["host_syncs_of_8_tokens"] = host_syncs(steps)
            result["profile_of_8_tokens"] = largest_kernels(steps)
        del fixed
    result["compiler"] = compiler_counters()
    return result


@torch.no_grad()
def prepare_decoding(mllm, size, batch, fixed):
    """-> a function that decodes 8 tokens in shapes that are compiled already, as generate does"""
    hidden, prompt_cache, attention, after = prefill(mllm, batch, prompt_positions(mllm, batch))
    hidden, after = (x.repeat_interleave(size.G, 0) for x in (hidden, after))
    cache = fixed.begin(prompt_cache, attention, size.G)
    n, device = len(hidden), hidden.device
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool, device=device)
    uniforms = draw_uniforms(0, 0, [0], n, 8).to(device)

    @torch.no_grad()
    def steps(states=hidden):
        for t in range(min(8, size.T)):
            logits = policy_logits(mllm.lm_head, states, forbidden, 1.0)
            token = pick_tokens(logits, uniforms[:, t])
            states = cache.step(token, (after + t).expand(3, 1, -1).transpose(1, 2))
        cache.slot -= min(8, size.T)
    return steps


# --- step and update ------------------------------------------------------------------------------

def rl_settings(size):
    tflops = next((peak for name, peak in TFLOPS.items() if CUDA
                   and name in torch.cuda.get_device_name()), 0.0)
    return RLArgs(group_size=size.G, batch=1, gpu_tflops=float(tflops))


def build_policy(state):
    """Policy, reference and optimizer through train_rl's own functions, on a mesh of one."""
    size, device = state.size, state.device
    lens = build_lens(size, device, compute(size))
    frozen = [p for p in lens.parameters() if not p.requires_grad]
    state.reference = Reference(share_mllm(lens.mllm), lens.forbidden)
    if state.sampler is None:
        state.sampler = copy_mllm(lens.mllm, size.shared.precision, device)
    lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    state.lens = shard(lens, state.mesh, size.shared.precision, frozen)
    shard(state.reference, state.mesh, size.shared.precision)
    state.optimizer = make_optimizer(parameter_groups(lens, state.args), state.args, device)


def make_group(lens, size, P, device):
    """-> a batch of one prompt, its positions and its packed row"""
    batch = make_prompts(lens.mllm, lens.sam_size, P, size.prompts[P], 1, device)
    positions = prompt_positions(lens.mllm, batch)
    packed = pack_groups(batch["ids"], positions, [make_completions(size)], lens.M, device)
    return batch, positions, packed


def run_pass(lens, reference, batch, packed, args, seconds):
    """A step's passes over one group; each part's time goes into `seconds`. -> Groups"""
    G, device = args.group_size, packed.ids.device
    picture = batch["pixel_values"], batch["grid_thw"]
    features, seconds["SAM encoder"] = timed(lens.encode_pictures, batch["sam_pixels"])
    ref = torch.full(packed.mask.shape, -7.6, device=device)
    if reference is not None:
        ref, seconds["reference"] = timed(reference, *picture, packed)
    zero = torch.zeros(1, G, device=device)
    groups = Groups(batch, packed, features, ref, ref, zero, zero, zero.bool())
    out, seconds["forward"] = timed(lens, *picture, packed, features)
    scores = Scores(out["log_probs"].detach(), zero, zero,
                    torch.linspace(-1.5, 1.5, G, device=device)[None])
    _, seconds["backward"] = timed(backward_pass, out, groups, scores, args, 1)
    return groups


def step(state, P):
    """-> seconds of each part, the second of two runs; peak memory beside the plan's"""
    if state.lens is None:
        build_policy(state)
    size, lens, args, device = state.size, state.lens, state.args, state.device
    batch, _, packed = make_group(lens, size, P, device)
    seconds, resident = {}, allocated()
    for _ in range(2):
        lens.zero_grad()
        with Peak() as peak:
            groups = run_pass(lens, state.reference, batch, packed, args, seconds)
    state.passes[P] = groups, dict(seconds)
    vision, seconds["vision tower alone"] = timed(vision_alone, state.sampler, batch)
    phases = plan.memory(letters(state, P), args, fixed=False)
    always = phases["update"].keys() & phases["training"].keys() - {"Adam", "gradients"}
    momentary = {part: value for part, value in phases["training"].items()
                 if part not in phases["sampling"]}
    return {"row": packed.ids.numel(), "seconds": rounded(seconds),
            "resident_gb": gigabytes(resident if CUDA else None),
            "plan_resident_gb": gigabytes(sum(phases["training"][part] for part in always)),
            "peak_above_gb": gigabytes(peak.bytes),
            "plan_above_gb": gigabytes(sum(momentary.values())),
            "plan": {part: gigabytes(value) for part, value in momentary.items()}}


@torch.no_grad()
def vision_alone(mllm, batch):
    return mllm.model.get_image_features(batch["pixel_values"], batch["grid_thw"])


def rounded(seconds):
    return {name: round(value, 4) for name, value in seconds.items()}


def letters(state, P):
    h, w = state.size.prompts[P]
    merge = state.sampler.config.vision_config.spatial_merge_size ** 2
    lens = state.lens if state.lens is not None else plan_model(state.size)
    return plan.letters(lens, state.size.shared, state.args, 1, P, merge * h * w)


def plan_model(size):
    """The whole model on the meta device, for what is counted."""
    if size is REAL:
        return plan.build(size.shared)
    config, sam = benchmark.build_mllm(0).config, parameters.build_sam(size.sam)
    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(config)
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        lens = Lens(mllm, sam, size.shared, forbidden, eos=0)
    set_trainable(lens, "rl")
    return lens


def profile_pass(state, P):
    batch, _, packed = make_group(state.lens, state.size, P, state.device)
    once = partial(run_pass, state.lens, state.reference, batch, packed, state.args, {})
    return {"host_syncs": host_syncs(once), **largest_kernels(once)}


def update(state):
    """refresh while the sampling copy is there; then room for Adam's state, and two updates, of
    which the second counts. -> seconds, MFU"""
    lens, args, size = state.lens, state.args, state.size
    seconds = {"refresh": best(lambda: refresh(state.sampler, lens), 2)}
    merge = state.sampler.config.vision_config.spatial_merge_size ** 2
    P = max(size.prompts)
    z, counted = letters(state, P), plan_model(size)
    state.reference = state.sampler = None           # 4 bytes of each 4 G parameters
    free()
    lens.zero_grad()
    need = sum(plan.memory(z, args)["training"].values()) - z.b * z.m * 2
    if CUDA and need > torch.cuda.get_device_properties(0).total_memory - 6e9:
        return {"seconds": rounded(seconds), "skipped": f"an update takes {need / 1e9:.0f} GB"}
    batch, _, packed = make_group(lens, size, P, state.device)
    with Peak() as peak:
        for i in range(2):
            run_pass(lens, None, batch, packed, args, {})
            norm, seconds["update"] = timed(apply_update, lens, state.optimizer, 1.0, args, 0.0, i)
    result = {"seconds": rounded(seconds), "gradient_norm": norm,
              "peak_above_weights_gb": gigabytes(peak.bytes),
              "plan_gb": gigabytes(8 * z.t + 4 * z.t)}
    for P, (groups, of_pass) in state.passes.items():
        result[f"P={P}"] = utilisation(state, P, groups, of_pass, seconds["update"], counted, merge)
    return result


def utilisation(state, P, groups, of_pass, seconds_update, counted, merge):
    """-> what train_rl.speed says of a step, and what tests/plan.py's arithmetic does"""
    h, w = state.size.prompts[P]
    z = plan.letters(counted, state.size.shared, state.args, 1, P, merge * h * w)
    flops = plan.arithmetic(counted, z, state.args)
    trained = sum(of_pass.values()) + seconds_update
    # without sampling, which is memory's, and without what is computed again
    useful = sum(value for part, value in flops.items() if part != "sampling")
    useful -= plan.vision(z) + plan.group(z)
    row = {"plan_tflop": {part: round(value / 1e12, 3) for part, value in flops.items()},
           "plan_tflops": round(useful / 1e12 / trained, 3)}
    if state.args.gpu_tflops:
        row["plan_mfu"] = round(row["plan_tflops"] / state.args.gpu_tflops, 4)
    if P in state.samples:
        samples, sampled = state.samples[P]
        row["train_rl"] = speed(state.lens, [groups], samples, sampled, trained, state.args, 1)
        row["step_seconds"] = round(sampled + trained, 3)
    return row


# --- plain ----------------------------------------------------------------------------------------

def masks(w, prompts):
    """benchmark.masks, with SAM's encoder in the precision that ours has."""
    pictures = w.batch["sam_pixels"].repeat(len(prompts), 1, 1, 1)
    return w.lens.sam(w.lens.encode_pictures(pictures), prompts[:, None])


def plain(state, P):
    """Ours and tests/benchmark.py's straightforward one, unsharded and with the same checkpointing:
    reference, policy forward and backward, segmentation. Its sampling: one sample of 24 tokens by
    transformers' generate, scaled to T and G."""
    size, device, args = state.size, state.device, state.args
    if state.unsharded is None:
        state.lens = state.optimizer = state.reference = state.sampler = None
        state.passes.clear()
        free()
        print(f"{allocated() / 1e9:.1f} GB are still held", flush=True)
        lens = build_lens(size, device, compute(size))
        lens.connector.to(compute(size))
        lens.queries.data = lens.queries.data.to(compute(size))
        lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
        state.unsharded = lens
    lens, seconds, result = state.unsharded, {}, {}
    batch, positions, packed = make_group(lens, size, P, device)
    reference = Reference(copy_view(lens.mllm), lens.forbidden)
    for _ in range(2):
        lens.zero_grad()
        with Peak() as peak:
            run_pass(lens, reference, batch, packed, args, seconds)
    result["ours"] = {"seconds": round(sum(seconds.values()), 3), "parts": rounded(seconds),
                      "peak_above_gb": gigabytes(peak.bytes)}
    on_device = {**batch, "ids": [ids.to(device) for ids in batch["ids"]],
                 "types": [types.to(device) for types in batch["types"]]}
    completions = [ids.to(device) for ids in make_completions(size)]
    old = torch.full((size.G, size.T), -7.6, device=device)
    w = SimpleNamespace(
        lens=lens, reference=reference, batch=on_device, completions=completions, G=size.G, old=old,
        positions=[p.to(device) for p in positions], mask=torch.ones_like(old, dtype=torch.bool),
        advantages=torch.linspace(-1.5, 1.5, size.G, device=device)[None], args=args)
    result |= straightforward(w, size, device)
    for way in ("single", "batch"):
        if "seconds" in result[way]:
            result[way]["over_ours"] = round(result[way]["seconds"] / result["ours"]["seconds"], 2)
    return result


def copy_view(mllm):
    """The same weights behind another module, which keeps its own attention implementation."""
    return share_mllm(mllm).eval()


def straightforward(w, size, device):
    """-> {"single", "batch": seconds and peak memory, "sampling"}"""
    result, image = {}, w.lens.mllm.config.image_token_id
    with (mock.patch.object(benchmark, "IMAGE", image), mock.patch.object(benchmark, "M", w.lens.M),
          mock.patch.object(benchmark, "masks", masks), torch.device(device)):
        for mllm in (w.lens.mllm, w.reference.mllm):
            mllm.set_attn_implementation({"text_config": "sdpa"})
        for way, n in (("single", 1), ("batch", size.G)):
            try:
                for _ in range(2):
                    w.lens.zero_grad()
                    with Peak() as peak:
                        _, seconds = timed(benchmark.full_policy, w, n, with_rest=True)
                result[way] = {"seconds": round(seconds, 3), "peak_above_gb": gigabytes(peak.bytes)}
            except Exception as error:               # out of memory, most likely
                result[way] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                free()
        inputs, T = benchmark.copies(w, 1), min(24, size.T)
        w.lens.mllm.eval()
        options = dict(do_sample=True, top_k=0, max_new_tokens=T, min_new_tokens=T)
        with torch.no_grad():
            w.lens.mllm.generate(**inputs, **options)
            _, seconds = timed(w.lens.mllm.generate, **inputs, **options)
        w.lens.train()
    result["sampling"] = {"seconds_of_one_cut": round(seconds, 3), "tokens": T,
                          "seconds_scaled": round(seconds / T * size.T * size.G, 1)}
    return result


# --- attention ------------------------------------------------------------------------------------

def attention(state):
    """The 3B model's heads after P tokens: a step's completions with their mask, forward and
    backward, and one new token; each as it is, with keys repeated for every head, and with the
    heads of a key as rows of one query. -> ms and the largest difference"""
    size, device, dtype = state.size, state.device, compute(state.size)
    P, N, heads, kept, d = max(size.prompts), size.G, 16, 2, 128
    S, g = size.T + size.shared.num_queries, torch.Generator(device=device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g, device=device, dtype=dtype)
    lower = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    mask = torch.cat([torch.ones(S, P, dtype=torch.bool, device=device), lower], 1)
    result = {}
    for name, rows, seen in (("completions", S, mask), ("one new token", 1, mask[-1:])):
        query, (key, value) = random(N, heads, rows, d), random(2, N, kept, P + S, d)
        seen, right, found = seen.expand(N, 1, -1, -1), None, {}
        for way in (as_it_is, keys_repeated, heads_as_rows):
            leaves = [x.clone().requires_grad_(rows > 1) for x in (query, key, value)]
            out = way(*leaves, seen)
            right = out.detach() if right is None else right
            with Peak() as peak:
                ms = 1e3 * best(lambda: run_attention(way, leaves, seen))
            found[way.__name__] = {"ms": round(ms, 3), "peak_gb": gigabytes(peak.bytes),
                                   "gap": (out - right).abs().max().item()}
        result[name] = found
    return result


def run_attention(way, leaves, mask):
    out = way(*leaves, mask)
    if out.requires_grad:
        out.float().sum().backward()


def as_it_is(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def keys_repeated(query, key, value, mask):
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def heads_as_rows(query, key, value, mask):
    """(N, heads, S, d) -> (N, kv heads, heads of each * S, d): no key is repeated."""
    N, heads, S, d = query.shape
    times = heads // key.shape[1]
    rows = query.reshape(N, key.shape[1], times * S, d)
    mask = mask[:, :, None].expand(-1, -1, times, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask)
    return out.reshape(N, heads, S, d)


# --- All of it ------------------------------------------------------------------------------------

def machine():
    found = {"torch": torch.__version__, "transformers": transformers.__version__,
             "python": platform.python_version(), "cores": os.cpu_count(), "device": "cpu"}
    if CUDA:
        gpu = torch.cuda.get_device_properties(0)
        found |= {"device": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1),
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def processes(state):
    """One process of NCCL (and gloo, for what lies on the CPU)."""
    _, world, state.device, state.mesh = start_processes(state.size.shared)
    for device in {state.device, torch.device("cpu")}:
        number = torch.ones(1, device=device)
        torch.distributed.all_reduce(number)
        assert number.item() == world
    everyone = [None]
    torch.distributed.all_gather_object(everyone, "here")
    torch.distributed.barrier()
    return {"mesh": str(state.mesh), "device": str(state.device), "said": everyone}


def measure(report, tiny):
    size = TINY if tiny else REAL
    report.data |= {"size": size.name, "G": size.G, "T": size.T, "M": size.shared.num_queries}
    report.part("machine", 0, machine)
    state = SimpleNamespace(size=size, args=rl_settings(size), device=None, mesh=None, samples={},
                            sampler=None, lens=None, reference=None, optimizer=None, passes={},
                            unsharded=None)
    report.part("processes", 0, processes, state)
    if state.device is None:
        return
    # needs: seconds on an H100, guessed
    report.part("caches", 0 if tiny else 60, caches, report, state.device, tiny)
    report.part("preset", 0 if tiny else 60, preset, report, tiny)
    for P in size.prompts:
        report.part(f"sampling {P}", 0 if tiny else 90, sampling, state, P)
    for P in size.prompts:
        report.part(f"step {P}", 0 if tiny else 30, step, state, P)
    report.part("profile", 0 if tiny else 15, profile_pass, state, max(size.prompts))
    report.part("update", 0 if tiny else 30, update, state)
    for P in sorted(size.prompts, reverse=True):
        report.part(f"plain {P}", 0 if tiny else 40, plain, state, P)
    report.part("attention", 0 if tiny else 10, attention, state)
    state.unsharded = None
    report.part("share", 0 if tiny else 90, sampling, state, max(size.prompts), ["compiled"], 4)
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; always without CUDA")
    parser.add_argument("--seconds", type=float, default=540, help="skip what no longer fits")
    parser.add_argument("--out", help="default docs/gpu.json; of a CPU or --tiny runs/gpu_cpu.json")
    parser.add_argument("--only", default="", help="parts to run, with commas between")
    args = parser.parse_args()
    tiny = args.tiny or not CUDA
    out = ROOT / ("runs/gpu_cpu.json" if tiny else "docs/gpu.json")
    if not CUDA and args.out and Path(args.out).resolve() == ROOT / "docs/gpu.json":
        parser.error("docs/gpu.json is what a GPU has shown")
    report = Report(args.out or out, args.seconds, [name for name in args.only.split(",") if name])
    measure(report, tiny)
    print(f"{len(report.data['problems'])} problems; {report.path}")


if __name__ == "__main__":
    main()
