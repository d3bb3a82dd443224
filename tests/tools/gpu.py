"""Ten minutes of one GPU: does what the tests show on a CPU hold there too, and how fast is it?

    python tests/tools/gpu.py                    # writes docs/evidence/gpu.json as it goes
    python tests/tools/gpu.py --size 24gb        # 80gb, 48gb or 24gb; default: what the card holds
    python tests/tools/gpu.py --seconds 240      # a part that no longer fits is skipped
    python tests/tools/gpu.py --only caches,preset
    python tests/tools/gpu.py --tiny             # tiny sizes, also without a GPU; runs/gpu.json

Models have random weights, so nothing is downloaded. 80gb is LENS-3B. 48gb has 12 of its 36 text
layers, 24gb has 2 of them and 4 of its 32 vision blocks; all other shapes are the real ones. Before
each part the script looks whether the card has the memory for it and skips it if not. A part that
raises is a problem like a number that is wrong. With a problem the exit status is 1, and the next
part runs all the same. Seconds are those of the wall, after a synchronisation.

    caches     in fp32, with a small model: the growing cache, the fixed one and the compiled one
               give the same greedy tokens and the same samples, and see weights that change
    preset     a few steps of both stages (tiny preset) here and on the CPU; one image, for which
               nothing is compiled
    sampling   G completions of T tokens after P: each cache, what compiling costs, prefill and
               decoding apart, how often the CPU waits for the GPU
    step       one micro-batch as train_rl.py has it, part by part; its memory beside the plan's
    update     AdamW and the refresh of the sampler
    plain      one completion after another by model.forward_one, beside the packed row; in the
               compute precision, without FSDP
    attention  does attention with a mask take a fused kernel? What does it allocate?
    share      sampling for four prompts at once, the share of a GPU of 16 in a batch of 64

A machine without a network needs wheels beside its torch and torchvision: where there is a network,
`pip download -d wheels` the other packages of requirements.txt for the same Python and platform,
and sam2 with `--no-deps --no-binary :all: --no-build-isolation`; there, `pip install --no-index
--find-links wheels --no-build-isolation` them, sam2 last with SAM2_BUILD_CUDA=0 and --no-deps.
A compiled decoding step needs a C compiler, for Triton.
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
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import plan
import torch
import transformers
from transformers import AutoModelForImageTextToText

from align import SharedArgs, apply_update, make_optimizer, start_processes
from data import write_whole
from grpo import masked_attention
from model import (Lens, checkpoint_layers, forward_one, load_sam, prompt_positions, set_trainable,
                   shard)
from train_rl import (FixedCache, Reference, RLArgs, Samples, backward, copy_mllm, draw_uniforms,
                      generate, make_micro_batches, parameter_groups, refresh, score)

CUDA = torch.cuda.is_available()
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
COMPARED = ("loss", "mask_iou", "grad_norm", "reward", "reward_format", "reward_box", "reward_mask",
            "kl", "completion_length")                        # metrics of `preset`


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
    report.data |= {"size": size.what, "G": size.G, "T": size.T, "M": size.M}
    state = SimpleNamespace(size=size, device=None, mesh=None, sampler=None, lens=None,
                            reference=None, optimizer=None)
    longest, tiny = max(size.images), size is SIZES["tiny"]
    report.part("machine", 0, 0, machine)
    report.part("processes", 0, 0, processes, state)
    if state.device is None:
        return
    # name, seconds on an H100 (guessed), bytes, function and its arguments
    parts = [("caches", 60, 1e9, caches, report, state.device, tiny),
             ("preset", 90, 1e9, preset, report, tiny)]
    parts += [(f"sampling {P}", 90, needs(size, "sampling"), sampling, state, P)
              for P in size.images]
    parts += [(f"step {P}", 30, needs(size, "step"), step, state, P) for P in size.images]
    parts += [("update", 30, needs(size, "update"), update, state)]
    parts += [(f"plain {P}", 40, needs(size, "plain"), plain, state, P) for P in size.images]
    parts += [("attention", 10, 8e9, attention, state),
              ("share", 90, needs(size, "sampling", 4), sampling, state, longest, ["compiled"], 4)]
    for name, seconds, *rest in parts:
        report.part(name, 0 if tiny else seconds, *rest)
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
        if self.only and name.split()[0] not in (*self.only, "machine", "processes"):
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")

    def problem(self, text):
        self.data["problems"].append(text)
        print(f"PROBLEM {text}", flush=True)


def machine():
    described = {"torch": torch.__version__, "transformers": transformers.__version__,
                 "python": platform.python_version(), "cores": os.cpu_count(), "device": "cpu"}
    if CUDA:
        gpu = torch.cuda.get_device_properties(0)
        described |= {"device": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1),
                      "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                      "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return described


def processes(state):
    """One process of NCCL, and of gloo for what lies on the CPU."""
    _, world, state.device, state.mesh = start_processes(state.size.shared)
    for device in {state.device, torch.device("cpu")}:
        number = torch.ones(1, device=device)
        torch.distributed.all_reduce(number)
        assert number.item() == world
    return {"mesh": str(state.mesh), "device": str(state.device)}


# --- Time, memory, kernels ------------------------------------------------------------------------

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


def best(function, times=3):
    """-> the fewest seconds of some runs, after one that is not counted"""
    function()
    return min(timed(function)[1] for _ in range(times))


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def available_memory():
    """Bytes that are free, and those that this script holds, which a part replaces or uses."""
    free()
    return float("inf") if not CUDA else torch.cuda.mem_get_info()[0] + allocated()


def allocated():
    return torch.cuda.memory_allocated() if CUDA else 0


class Peak:
    """The most memory inside a `with`, above what was there before: .bytes, None on a CPU."""

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


def rounded(seconds):
    return {name: round(value, 4) for name, value in seconds.items()}


def host_syncs(function):
    """-> how often the CPU waits for the GPU, and where; None without one"""
    if not CUDA:
        return function() and None
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
    """What torch.compile has done so far: graphs, graph breaks, CUDA graphs that it refused."""
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"]}


# --- Models, prompts, and the memory that the plan foresees ---------------------------------------

def build_mllm(size, device, dtype):
    """Random weights, made where they stay. Its rotary frequencies stay fp32, as in load_mllm."""
    torch.manual_seed(0)
    with torch.device(device):
        mllm = AutoModelForImageTextToText.from_config(plan.mllm_config(MODEL, **size.config),
                                                       dtype=dtype)
    assert mllm.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    return mllm.eval()


def build_lens(size, device):
    mllm = build_mllm(size, device, size.dtype)
    sam = load_sam(size.sam, with_weights=False).to(device)
    with torch.device(device):
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        lens = Lens(mllm, sam, size.shared, forbidden, eos=-1)
    set_trainable(lens.train(), "rl")
    checkpoint_layers(lens.mllm)
    return lens


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


def stored_samples(size, seed=3):
    """G completions of T tokens, as if they had been sampled."""
    g = torch.Generator().manual_seed(seed)
    completions = [torch.randint(0, 1000, (size.T,), generator=g) for _ in range(size.G)]
    return Samples([completions], [[True] * size.G])


def sample(mllm, size, batch, cache, T=None):
    """`generate` as train_rl.py calls it; no token is -1, so all completions reach the limit."""
    T, device, B = T or size.T, batch["pixel_values"].device, len(batch["prompt_ids"])
    uniforms = draw_uniforms(0, 0, range(B), size.G, T).to(device)
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool, device=device)
    return generate(mllm, batch, prompt_positions(mllm, batch), size.G, T, -1, forbidden, uniforms,
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
    training, cache = phases["training"], phases["training"]["cache"]
    weights = z.width * (z.mllm + z.trained) + 4 * z.frozen
    return plan.CUDA + {
        "sampling": z.width * z.mllm + prompts * (cache + sum(
            phases["sampling"][name] for name in ("prompts' cache", "picking"))),
        "step": sum(training.values()) - training["Adam"] - cache,
        # by then sampler and reference are gone
        "update": sum(training.values()) - cache - 2 * z.width * z.mllm,
        "plain": weights + training["kept"] + sum(plan.training_moments(z, size.args).values()),
    }[part]


# --- caches ---------------------------------------------------------------------------------------

def caches(report, device, tiny):
    """A small fp32 model. The end token is one that the sampled completions hold, so some end early
    and the batch shrinks."""
    size = SIZES["tiny"]
    mllm = build_mllm(size, device, torch.float32)
    with torch.no_grad():                            # else it says one word over and over
        for parameter in mllm.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * (parameter.dim() > 1))
    batch = make_prompts(mllm, 128, 64, size.images[64], 2, device)
    positions, G, T = prompt_positions(mllm, batch), 2 if tiny else 8, 24
    uniforms = draw_uniforms(0, 0, range(2), G, T).to(device)
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool, device=device)
    ways = {"growing": None, "fixed": FixedCache(mllm, 2 * G, 64, T, compiled=False),
            "compiled": FixedCache(mllm, 2 * G, 64, T)}

    def completions(way, uniforms, eos=-1):
        samples = generate(mllm, batch, positions, G, T, eos, forbidden, uniforms, cache=ways[way])
        return [ids.tolist() for group in samples.completions for ids in group]

    tokens = Counter(token for ids in completions("growing", uniforms) for token in ids)
    eos, result = tokens.most_common(1)[0][0], {}

    def compare(name, uniforms):
        right = completions("growing", uniforms, eos)
        result[name] = {"lengths": sorted({len(ids) for ids in right})}
        for way in ("fixed", "compiled"):
            found, seconds = timed(completions, way, uniforms, eos)  # the first one compiles
            result[name][way] = {"same_tokens": found == right, "seconds": round(seconds, 2)}
            if found != right:
                report.problem(f"caches: {name}, {way}: other tokens than with the growing cache")
        return right
    before, once = compare("sampled", uniforms), compiler_counters()
    with torch.no_grad():
        for parameter in mllm.parameters():
            parameter.mul_(1.05)
    if compare("sampled after an update in place", uniforms) == before:
        report.problem("caches: the update changes no token, so it shows nothing")
    result["compiler"] = compiler_counters()
    result["host_syncs"] = host_syncs(partial(completions, "compiled", uniforms))
    again = result["compiler"]["graphs"] - once["graphs"]
    if again > 3:                                    # other completions may shrink it once more
        report.problem(f"caches: {again} graphs were compiled again for shapes seen before")
    if CUDA and result["compiler"]["cudagraph_skips"]:
        report.problem("caches: some compiled graph is not captured as a CUDA graph")
    return result


# --- preset ---------------------------------------------------------------------------------------

ONE_IMAGE = """import sys, torch, evaluate
sys.argv = ["evaluate.py", *sys.argv[1:]]
evaluate.main()
print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])"""


def preset(report, tiny):
    """Both scripts on the GPU and on the CPU; without a GPU, twice on the CPU."""
    result, steps = {}, "2" if tiny else "5"
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/shapes"
        call("tests/tiny/world.py", data)
        common = ["--preset", "tiny", "--steps", steps, "--max-completion", "24", "--limit", "32",
                  "--data", data]
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
        image = next(Path(data).rglob("*.jpg"), None) or next(Path(data).rglob("*.png"))
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
    """-> {metric: the values of both runs and the largest difference}"""
    result = {"seconds": [[row["seconds"] for row in rows] for rows in (on_cpu, here)]}
    for name in COMPARED:
        if name in on_cpu[0]:
            pairs = [(a[name], b[name]) for a, b in zip(on_cpu, here)]
            result[name] = {"cpu and here": pairs, "gap": max(abs(a - b) for a, b in pairs)}
            first, other = pairs[0]
            if abs(first - other) > 1e-3 * max(1, abs(first)):
                report.problem(f"preset: {script}: {name} of the first step {pairs[0]}")
    return result


# --- sampling -------------------------------------------------------------------------------------

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
        fixed = None
        if way != "growing":
            fixed = FixedCache(mllm, n, P, size.T, compiled=way == "compiled")
        _, first = timed(sample, mllm, size, batch, fixed)           # of `compiled` it compiles
        with Peak() as peak:
            _, whole = timed(sample, mllm, size, batch, fixed)
        _, prefill = timed(sample, mllm, size, batch, fixed, T=1)
        decoding = max(whole - prefill, 1e-9)
        result[way] = {"seconds": round(whole, 3), "prefill": round(prefill, 3),
                       "first_run": round(first, 2),
                       "tokens_per_second": round(n * size.T / whole, 1),
                       "decoded_per_second": round(n * (size.T - 1) / decoding, 1),
                       "ms_per_token": round(1e3 * decoding / (size.T - 1), 3),
                       "peak_gb": gigabytes(peak.bytes),
                       "cache_gb": gigabytes(fixed.memory.nbytes if fixed else None)}
    syncs = host_syncs(partial(sample, mllm, size, batch, fixed))
    return {**result, "compiler": compiler_counters(), f"host_syncs, {way}": syncs}


# --- step and update ------------------------------------------------------------------------------

def build_policy(state):
    """Policy, reference, sampler and optimizer through train_rl's own functions, on a mesh of
    one."""
    size, device = state.size, state.device
    lens = build_lens(size, device)
    frozen = [p for p in lens.parameters() if not p.requires_grad]
    state.reference = Reference(copy_mllm(lens.mllm, size.precision, device), lens.forbidden)
    if state.sampler is None:
        state.sampler = copy_mllm(lens.mllm, size.precision, device)
    state.lens = shard(lens, state.mesh, size.precision, frozen)
    shard(state.reference, state.mesh, size.precision)
    state.optimizer = make_optimizer(parameter_groups(lens, size.args), size.args, device)


def micro_batch(lens, reference, size, P, device, seconds):
    """Everything of a step but sampling and update, on stored completions. The seconds of each part
    go into `seconds`. -> MicroBatch"""
    batch = make_prompts(lens.mllm, lens.sam_size, P, size.images[P], 1, device)
    positions, samples = prompt_positions(lens.mllm, batch), stored_samples(size)
    texts, args = [["no box"] * size.G], size.args
    args.beta *= reference is not None
    (micro,), seconds["reference and SAM encoder"] = timed(
        make_micro_batches, lens, reference, batch, positions, samples, texts, args)
    out, seconds["forward"] = timed(lens, batch["pixel_values"], batch["grid_thw"], micro.packed,
                                    micro.features)
    _, seconds["rewards"] = timed(score, out, micro, args)
    _, seconds["backward"] = timed(backward, out, micro, args, 1)
    return micro


def step(state, P):
    """-> seconds of each part in the second of two runs; memory and arithmetic beside the plan's"""
    if state.lens is None:
        build_policy(state)
    size, lens, z = state.size, state.lens, planned(state.size, P)
    seconds, resident = {}, allocated()
    for _ in range(2):
        lens.zero_grad()
        with Peak() as peak:
            micro = micro_batch(lens, state.reference, size, P, state.device, seconds)
    training = plan.memory(z, size.args, on_gpu=False)["training"]
    always = ("weights", "frozen parts", "sampling copy", "reference")
    flops = plan.arithmetic(on_meta(size.what), z, size.args)
    tflop = (sum(flops.values()) - flops["sampling"]) / 1e12
    return {"row": micro.packed.ids.numel(), "seconds": rounded(seconds),
            "resident_gb": gigabytes(resident if CUDA else None),
            "plan_resident_gb": gigabytes(sum(training[part] for part in always)),
            "peak_above_gb": gigabytes(peak.bytes),
            "plan_above_gb": gigabytes(sum(size for part, size in training.items()
                                           if part not in (*always, "Adam"))),
            "tflop": round(tflop, 3),
            "tflop_per_second": round(tflop / sum(seconds.values()), 1)}


def update(state):
    """The refresh while the sampler is there. Then sampler and reference go, to make room for
    Adam's state, and of two updates the second counts."""
    if state.lens is None:
        build_policy(state)
    size, lens = state.size, state.lens
    seconds = {"refresh": best(lambda: refresh(state.sampler, lens), 2)}
    state.reference = state.sampler = None
    free()
    lens.zero_grad()
    with Peak() as peak:
        for i in range(2):
            micro_batch(lens, None, size, max(size.images), state.device, {})
            norm, seconds["update"] = timed(apply_update, lens, state.optimizer, 1.0, size.args,
                                            0.0, i)
    state.lens = state.optimizer = None              # the next parts need the room
    return {"seconds": rounded(seconds), "gradient_norm": norm,
            "peak_above_gb": gigabytes(peak.bytes)}


# --- plain ----------------------------------------------------------------------------------------

def plain(state, P):
    """Policy and segmentation, forward and backward, of one group: packed, and one completion after
    another. No reference."""
    size, device = state.size, state.device
    state.lens = state.optimizer = state.reference = state.sampler = None
    free()
    lens = build_lens(size, device)
    lens.connector.to(size.dtype)
    lens.queries.data = lens.queries.data.to(size.dtype)
    batch = make_prompts(lens.mllm, lens.sam_size, P, size.images[P], 1, device)
    [completions] = stored_samples(size).completions
    one = {name: [row.to(device) for row in batch[name]] for name in ("prompt_ids", "token_types")}

    def one_by_one():
        for completion in completions:
            out = forward_one(lens, {**batch, **one}, completion.to(device))
            loss = -out["log_probs"].mean() + out["mask_logits"].mean()
            (loss / size.G).backward()

    result = {}
    for name, function in (
            ("packed", lambda: micro_batch(lens, None, size, P, device, {})),
            ("one by one", one_by_one)):
        for _ in range(2):
            lens.zero_grad()
            with Peak() as peak:
                _, seconds = timed(function)
        result[name] = {"seconds": round(seconds, 3), "peak_above_gb": gigabytes(peak.bytes)}
    ratio = result["one by one"]["seconds"] / max(result["packed"]["seconds"], 1e-9)
    return {**result, "times_faster": round(ratio, 2)}


# --- attention ------------------------------------------------------------------------------------

def attention(state):
    """The masked attention of a group's completions with the 3B model's heads, forward and
    backward. A kernel that is not fused allocates the scores, at least once."""
    size, device = state.size, state.device
    P, N, heads, key_heads, d = max(size.images), size.G, 16, 2, 128
    length, g = size.T + size.M, torch.Generator(device=device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g, device=device, dtype=size.dtype).requires_grad_()
    query = random(N, heads, length, d)
    key, value = random(N, key_heads, P + length, d), random(N, key_heads, P + length, d)
    mask = torch.ones(length, P + length, dtype=torch.bool, device=device).tril(P)
    mask = mask.expand(N, 1, -1, -1)

    def both():
        masked_attention(query, key, value, mask, d ** -0.5).float().sum().backward()
    seconds = best(both)
    with Peak() as peak:
        both()
    scores = N * heads * length * (P + length) * query.element_size()
    return {"ms": round(1e3 * seconds, 3), "peak_gb": gigabytes(peak.bytes),
            "scores_gb": gigabytes(scores), "fused": peak.bytes < scores if CUDA else None}


def largest_size():
    """The name of the largest size whose update the card holds."""
    if not CUDA:
        return "tiny"
    return next((name for name, size in SIZES.items() if needs(size, "update") < available_memory()),
                "24gb")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="default: the largest that the card holds")
    parser.add_argument("--tiny", action="store_true", help="--size tiny, always without a GPU")
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
    problems = report.data["problems"]
    print(f"{len(problems)} problems; {report.path}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
