"""The plan's formulas against measured bytes and counted FLOPs, on real models small enough for a
CPU.

    torchrun --nproc_per_node=2 tests/test_plan.py OUT       # what the test of the shards runs
"""
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import END, IMAGE, SAM_SIDE, TORCHRUN, random_batch, random_sam, run, stored_samples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          Qwen2VLConfig, Qwen2VLForConditionalGeneration)

import align
import cluster
import model
import plan
import train_rl
from align import SharedArgs, apply_update, set_trainable, shard, start_processes
from data import LensError


def mllm(C=256, I=1376, layers=4, heads=4, V=2048, Cv=128, Iv=320, depth=3, old=False,
         dtype=torch.float32):
    d = C // heads
    rope = dict(rope_type="default", rope_theta=1e4,
                mrope_section=[d // 8, 3 * d // 16, 3 * d // 16])
    text = dict(vocab_size=V, hidden_size=C, intermediate_size=I, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=2, bos_token_id=None,
                eos_token_id=END, pad_token_id=0, rope_parameters=rope)
    vision = dict(depth=depth, num_heads=2, patch_size=8)
    if old:
        make_config, family = Qwen2VLConfig, Qwen2VLForConditionalGeneration
        vision |= dict(embed_dim=Cv, mlp_ratio=4, hidden_size=C)
    else:
        make_config, family = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        vision |= dict(hidden_size=Cv, intermediate_size=Iv, window_size=32, out_hidden_size=C,
                       fullatt_block_indexes=[1])
    config = make_config(text_config=text, vision_config=vision, image_token_id=IMAGE,
                         video_token_id=254, vision_start_token_id=252, vision_end_token_id=253,
                         tie_word_embeddings=True)
    torch.manual_seed(0)
    return family._from_config(config, attn_implementation="sdpa", dtype=dtype)


def setting(G=4, T=60, M=8, B=1, n=1, precision="bf16", gpus=1, side=16, dtype=torch.float32,
            args={}, **shape):
    """-> lens, batch of n prompts, completions, letters, arguments."""
    shared = SharedArgs(num_queries=M, connector_heads=4, max_completion=T, precision=precision)
    arguments = train_rl.RLArgs(batch=n * gpus, micro_batch=B, group_size=G, **args)
    made = mllm(dtype=dtype, **shape)
    forbidden = torch.arange(made.lm_head.out_features) >= 250
    lens = model.Lens(made, random_sam(), shared, forbidden, END)
    set_trainable(lens, "rl")
    batch = random_batch(grids=((1, side, side),) * n, texts=(60,) * n)
    completions = [[torch.randint(3, 250, (T,)) for _ in range(G)] for _ in range(n)]
    z = plan.letters(lens, shared, arguments, gpus, len(batch["ids"][0]), side * side)
    return lens, batch, completions, z, arguments


class Peak(TorchDispatchMode):
    """The most bytes that live tensors take at once: every storage that an operation returns, and
    those it was given."""

    def __init__(self, tensors=()):
        super().__init__()
        self.alive, self.peak = {}, 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))

    def now(self):
        storages = [reference() for reference in [*self.alive.values()]]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, largest = func(*args, **(kwargs or {})), 0
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
                largest = max(largest, tensor.nbytes)
        if largest > self.peak / 1000:           # small ones are counted with the next large one
            self.peak = max(self.peak, self.now())
        return out


class Received(TorchDispatchMode):
    """Bytes of all-gathers (what comes out) and reduce-scatters (what goes in), a process's own
    part included: {"gathered", "reduced"}"""

    def __init__(self):
        super().__init__()
        self.bytes = {"gathered": 0, "reduced": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in func.name():
            self.bytes["gathered"] += args[0].nbytes
        elif "reduce_scatter" in func.name():
            self.bytes["reduced"] += args[1].nbytes
        return func(*args, **(kwargs or {}))


class Saved:
    """Bytes that autograd keeps for the backward pass, those of `weights` left out."""

    def __init__(self, weights):
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.found = {}                  # the storages, held so that no address is used twice

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.found[storage._cdata] = storage
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def bytes(self):
        return sum(storage.nbytes() for storage in self.found.values())


def near(measured, planned, low, high):
    off = planned / measured - 1
    assert low <= off <= high, f"measured {measured}, planned {planned}: {off:+.3f}"


# --- What a pass keeps: within 3 % ----------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [
    dict(), dict(G=8, T=30, C=128, I=688, layers=3), dict(side=32, T=20), dict(old=True),
    dict(B=2, n=2, precision="fp32", dtype=torch.float32)])
def test_activations(shape, checkpointing):
    lens, batch, completions, z, _ = setting(**{"dtype": torch.bfloat16, **shape})
    made = lens.mllm.train()
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    positions = model.prompt_positions(made, batch)
    packed = model.pack_groups(batch["ids"], positions, completions, z.M)
    with Saved(made.parameters()) as saved:
        hidden = model.group_hidden(made, batch["pixel_values"], batch["grid_thw"], packed,
                                    lens.queries)
        states = hidden[packed.queries]
        log_probs = model.token_log_probs(made.lm_head, hidden[packed.predictors], packed.targets,
                                          lens.forbidden)
    near(saved.bytes(), plan.kept(z, checkpointing), -0.03, 0.03)
    del states, log_probs                                # their graph had to live until here


def test_sam_head():
    """SAM2-Large at its full size, on the meta device: within 5 %, for the formula leaves the
    prompt's tokens out."""
    lens = plan.build(SharedArgs())
    z = plan.letters(lens, SharedArgs(), train_rl.RLArgs(), 16)
    with torch.device("meta"):
        features = [torch.empty(1, 256, z.side // k, z.side // k) for k in (4, 8, 16)]
        prompts = torch.empty(1, z.G, z.M, 256, requires_grad=True)

    def fused(q, k, v, dropout_p=0.0):                   # meta tensors would take the unfused path
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(q, k, v, dropout_p, False)[0]

    with pytest.MonkeyPatch.context() as patch, Saved(lens.sam.parameters()) as saved:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
        lens.sam(features, prompts)
    near(saved.bytes(), 4 * z.A * (24 * z.N + 20 * z.B), -0.05, 0.05)


# --- The cache, exactly ---------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_cache(precision, monkeypatch):
    lens, batch, _, z, args = setting(n=2, precision=precision)
    caches = []

    def make_cache(**options):
        caches.append(DynamicCache(**options))
        return caches[-1]
    monkeypatch.setattr(model, "DynamicCache", make_cache)
    sampler = train_rl.copy_mllm(lens.mllm, precision)
    positions, no_token = model.prompt_positions(lens.mllm, batch), -5
    model.generate(sampler, batch, positions, z.G, z.T, no_token, lens.forbidden)
    measured = sum(tensor.untyped_storage().nbytes() for layer in caches[0].layers
                   for tensor in (layer.keys, layer.values))
    planned = plan.memory(z, args, fixed=False)["sampling"]["cache"]
    assert measured == round(planned / (1 + 1 / z.layers))

    z.longest = 700                      # what GPUs decode in, for prompts up to here
    fixed = model.FixedCache(sampler, z.n * z.G, z.longest, z.T, compiled=False)
    for phase in plan.memory(z, args).values():
        assert fixed.whole.nbytes == phase["cache"]
    assert fixed.whole.shape[4] == plan.slots(z.longest, z.T) == 1024 + 64


# --- A whole step on one process or two -----------------------------------------------------------

def local_bytes(tensors):
    """Of this process's part of each."""
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def add_truth(batch, n):
    batch["masks"] = [torch.rand(40, 50) > 0.6 for _ in range(n)]
    batch["ignores"] = [torch.rand(40, 50) > 0.9 for _ in range(n)]
    batch["boxes"], batch["frames"] = [(10, 10, 30, 30)] * n, [(128, 128)] * n
    batch["low_masks"], batch["low_weights"] = torch.rand(2, n, SAM_SIDE // 4, SAM_SIDE // 4)


def step(lens, batch, completions, args, precision, world, mesh):
    """Two steps, as main() takes them; the memory of `lens` stands for the mapped files. -> {phase:
    the most bytes alive}, exact bytes of the parts after the second"""
    peaks, n, G = {}, len(completions), args.group_size
    add_truth(batch, n)
    lens.train()
    frozen = [p for p in lens.parameters() if not p.requires_grad]
    with Peak(lens.parameters()) as seen:
        sampler = train_rl.copy_mllm(lens.mllm, precision)
        reference = train_rl.Reference(train_rl.share_mllm(lens.mllm), lens.forbidden)
        if args.gradient_checkpointing:
            lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
        shard(lens, mesh, precision, frozen, args.reshard)
    peaks["start"] = seen.peak
    shard(reference, mesh, precision, (), args.reshard)
    groups = train_rl.parameter_groups(lens, args)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, foreach=True)      # with its temporary
    positions = model.prompt_positions(lens.mllm, batch)
    uniforms = model.draw_uniforms(0, 0, range(n), G, len(completions[0][0]))
    texts, finished, no_token = [["no"] * G] * n, [[True] * G] * n, -5
    for _ in range(2):
        states = [t for state in optimizer.state.values() for t in state.values()]
        held = [*lens.parameters(), *reference.parameters(), *sampler.parameters(), *states]
        with Peak(held) as seen:
            model.generate(sampler, batch, positions, G, uniforms.shape[1], no_token,
                           lens.forbidden, uniforms)
            peaks["sampling"], seen.peak = seen.peak, 0
            samples = stored_samples(completions, finished)
            passes = train_rl.make_groups(lens, reference, batch, positions, samples, texts, args)
            for groups in passes:
                out = lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
                           groups.features, args.temperature)
                scores = train_rl.score(out, groups, args)
                train_rl.backward_pass(out, groups, scores, args, world)
            peaks["training"], seen.peak = seen.peak, 0
            gradients = local_bytes(p.grad for p in lens.parameters() if p.grad is not None)
            apply_update(lens, optimizer, 1.0, args, 0.0, 0)
            peaks["update"] = seen.peak
    trained = [p for p in lens.parameters() if p.requires_grad]
    adam = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    exact = {"weights": local_bytes(trained), "gradients": gradients, "Adam": local_bytes(adam),
             "frozen parts": local_bytes(frozen),
             "sampling copy": local_bytes(sampler.parameters()),
             "reference": local_bytes(reference.parameters())}
    return peaks, exact


def exact_parts(z, args):
    phases = plan.memory(z, args, fixed=False)
    return {name: size for parts in phases.values() for name, size in parts.items()}


@pytest.mark.parametrize("shape", [
    dict(G=8, T=30), dict(T=12, V=16384, C=128, I=688), dict(T=20, precision="fp32", old=True)])
def test_one_process(shape):
    """Weights, gradients, optimizer and copies to the byte; each phase's peak within -5 % and
    +15 %, and the part of training's that is not among those within -15 % and +40 %: it adds things
    that do not all coincide."""
    precision = shape.get("precision", "bf16")
    lens, batch, completions, z, args = setting(**shape, n=2, side=8, layers=3,
                                                dtype=torch.bfloat16)
    _, world, _, mesh = start_processes(SharedArgs())
    try:
        peaks, exact = step(lens, batch, completions, args, precision, world, mesh)
    finally:
        dist.destroy_process_group()
    planned, named = plan.memory(z, args, fixed=False), exact_parts(z, args)
    assert exact == {name: named[name] for name in exact}
    at_start = sum(plan.host(z, moved=False)) + named["sampling copy"]   # all on the CPU here
    near(peaks.pop("start"), at_start, -0.01, 0.01)
    for phase, peak in peaks.items():
        near(peak, sum(planned[phase].values()), -0.05, 0.15)
    fixed = sum(exact.values())
    near(peaks["training"] - fixed, sum(planned["training"].values()) - fixed, -0.15, 0.4)


def test_two_processes_hold_half(tmp_path):
    """Sums over both to the byte: a dimension that does not split evenly gives one process more."""
    out = tmp_path / "two.pt"
    run(*TORCHRUN, "--nproc_per_node=2", "tests/test_plan.py", out)
    both, planned, received, communication = torch.load(out, weights_only=True)
    for name in ("weights", "gradients", "Adam", "reference"):
        assert sum(part[name] for part in both) == 2 * planned[name], name
        assert abs(both[0][name] / planned[name] - 1) < 0.02
    for name in ("frozen parts", "sampling copy"):
        assert both[0][name] == both[1][name] == planned[name]
    # of two steps, a process's own half included
    gathered = communication["policy gathered"] + communication["reference gathered"]
    near(received["gathered"], 2 * 2 * gathered, -0.03, 0.03)
    near(received["reduced"], 2 * 2 * communication["gradients reduced"], -0.03, 0.03)


def main(out):
    rank, world, _, mesh = start_processes(SharedArgs())
    lens, batch, completions, z, args = setting(T=3, G=2, gpus=2, side=4, layers=2,
                                                dtype=torch.bfloat16)
    with Received() as seen:
        _, exact = step(lens, batch, completions, args, "bf16", world, mesh)
    both = [None] * world
    dist.all_gather_object(both, exact)
    if rank == 0:
        torch.save((both, exact_parts(z, args), seen.bytes, plan.communication(z, args)), out)


# --- Arithmetic: against torch's own counter, within 3 % ------------------------------------------

@pytest.mark.parametrize("old", [False, True])
def test_arithmetic(old):
    lens, batch, completions, z, args = setting(old=old, precision="fp32", side=16)
    positions = model.prompt_positions(lens.mllm, batch)
    packed = model.pack_groups(batch["ids"], positions, completions, z.M)
    picture = batch["pixel_values"], batch["grid_thw"]
    unfused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with unfused, torch.no_grad():
        with FlopCounterMode(display=False) as of_vision:
            lens.mllm.model.get_image_features(*picture)
        with FlopCounterMode(display=False) as of_all:
            model.group_hidden(lens.mllm, *picture, packed, lens.queries)
    counted, whole = of_vision.get_total_flops(), of_all.get_total_flops()
    near(counted, plan.vision(z), -0.03, 0.03)
    near(whole - counted, plan.group(z), -0.03, 0.03)
    lens.to("meta")
    flops = plan.arithmetic(lens, z, args)
    logits = 2 * z.V * z.C * z.G * z.T
    assert flops["policy"] == 4 * (plan.vision(z) + plan.group(z) + logits) * z.n
    assert all(flops.values())


# --- The pages ------------------------------------------------------------------------------------

def printed(capsys, monkeypatch, *flags):
    """From the command line, on which any flag of train_rl.py may stand."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    plan.main()
    return capsys.readouterr().out


def test_printed_plan(capsys, monkeypatch):
    text = printed(capsys, monkeypatch)
    assert "on 16 GPUs of 48 GB: 3.96 G parameters train" in text
    assert f"rows of {1475 + 8 * (768 + 64)}" in text and "4 prompts per GPU" in text
    assert "rows of 8704" in printed(capsys, monkeypatch, "--max-pixels", 0)
    once = printed(capsys, monkeypatch, "--reduce-once")
    assert "unreduced" not in text and "unreduced" in once
    assert "between nodes" in printed(capsys, monkeypatch, "--shard", "hybrid")
    assert "DOES NOT FIT" in printed(capsys, monkeypatch, "--gpus", 1, "--gpu-memory", 24)
    text = printed(capsys, monkeypatch, "--preset", "2b", "--group-size", 2, "--max-pixels",
                   1_000_000)
    assert "Qwen2-VL-2B" in text and f"rows of {1475 + 2 * (768 + 64)}" in text
    with pytest.raises(LensError, match="does not split over 3"):
        printed(capsys, monkeypatch, "--gpus", 3)
    with pytest.raises(SystemExit):
        printed(capsys, monkeypatch, "--gpus", 0)
    assert "--gpus must be at least 1" in capsys.readouterr().err


def test_page():
    """docs/cluster.md is what its script writes."""
    assert (plan.ROOT / "docs/cluster.md").read_text() == cluster.page()


if __name__ == "__main__":
    align.run(lambda: main(*sys.argv[1:]))


def test_the_dry_run_of_a_tiny_model():
    """tests/dry_run.py on rank 0 of 4, with fake tensors: what is held all along to 1 %, and the
    moment of a layer within 10 %. (SAM's unit, which the plan leaves out, is a third of all that
    comes and goes in so small a model, so the other moments are not compared.)"""
    import dry_run
    case = dry_run.quick()
    rows = dry_run.compare(case)
    for part in ("weights", "Adam", "gradients", "frozen parts", "sampling copy", "reference"):
        planned, found = rows[part]
        assert abs(planned / found - 1) < 0.01, part
    planned, found = dry_run.compare_moments(case)["layer"]
    assert abs(planned / found - 1) < 0.1
