"""How much CPU memory the processes of one machine take until stage 2's models are sharded.

    python tests/evidence/host_memory.py     # 4 processes, a minute; docs/evidence/host_memory.json

A Qwen2.5-VL of random weights is written in bf16, as the published ones are, and loaded in two
ways, one after the other:

    mapped   train_rl.load_models: every process maps the files, and casts and cuts them unit by
             unit. Only the sampling copy (on a GPU, where there is one) is a process's own.
    whole    every process loads the whole in fp32, with a reference in bf16 beside it, then cuts

Measured are the peak of a process's own memory (anonymous pages, which no other process shares) and
the peak of all together (proportional shares, so a mapped page counts once), read from /proc while
they run. So this needs Linux.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import torch
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import train_rl
from align import SharedArgs, start_processes
from data import write_whole
from model import build_lens, set_trainable, shard

STAND_IN = ROOT / "tests/tiny/mllm"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--out", default=str(ROOT / "docs/evidence/host_memory.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return load_and_wait(*args.child)
    with tempfile.TemporaryDirectory() as folder:
        result = {"command": "python tests/evidence/host_memory.py", "processes": args.processes,
                  "parameters": write_model(folder, args.layers), "torch": torch.__version__}
        for way in ("whole", "mapped"):
            each, together = measure(folder, way, args.processes)
            result[way] = {"each_GB": round(each / 1e9, 2), "all_GB": round(together / 1e9, 2)}
            print(way, result[way], flush=True)
    write_whole(args.out, json.dumps(result, indent=2) + "\n")


def measure(folder, way, processes):
    """-> peaks in bytes: the largest of a process's own, and all together"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", __file__, "--child", str(folder), way]
    torchrun = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    each = together = 0
    while torchrun.poll() is None:
        listed = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
        memory = [memory_of(pid) for pid in listed.stdout.split()]
        each = max([each, *(process["Anonymous"] for process in memory)])
        together = max(together, sum(process["Pss"] for process in memory))
        time.sleep(0.05)
    if torchrun.returncode:
        sys.exit(f"{' '.join(command)} ended with {torchrun.returncode}")
    return each, together


def memory_of(pid):
    """-> {"Pss", "Anonymous"} of a process in bytes; zeros where it has gone"""
    memory = {"Pss": 0, "Anonymous": 0}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in memory:
                memory[name] = 1024 * int(rest.split()[0])
    except OSError:
        pass
    return memory


# --- One of the processes -------------------------------------------------------------------------

def load_and_wait(folder, way):
    """Load, shard, and stay until all have."""
    shared = SharedArgs(mllm=str(folder), sam=str(ROOT / "tests/tiny/sam"), num_queries=8)
    _, _, device, mesh = start_processes(shared)
    torch.distributed.barrier()
    load = train_rl.load_models if way == "mapped" else load_whole
    models = load(shared, train_rl.RLArgs(init="none"), mesh, device)
    torch.distributed.barrier()
    time.sleep(0.5)                                  # the parent's last reading
    del models
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def load_whole(shared, args, mesh, device):
    lens, processor = build_lens(shared, "", torch.float32)
    frozen = set_trainable(lens.train(), "rl")
    sampler = train_rl.copy_mllm(lens.mllm, shared.precision, device)
    whole = train_rl.copy_mllm(lens.mllm, shared.precision)
    reference = train_rl.Reference(whole, lens.forbidden)
    return shard(lens, mesh, shared.precision, frozen), shard(reference, mesh, shared.precision), \
        sampler, processor


def write_model(folder, layers):
    """A Qwen2.5-VL with the stand-in's tokenizer and `layers` layers of 1,024, in bf16.
    -> its parameters"""
    AutoProcessor.from_pretrained(STAND_IN).save_pretrained(folder)
    stand_in = json.loads((STAND_IN / "config.json").read_text())
    text = dict(vocab_size=100_000, hidden_size=1024, intermediate_size=2816,
                num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=2,
                rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                     mrope_section=[8, 12, 12]),
                bos_token_id=None, eos_token_id=2, pad_token_id=0)
    vision = dict(depth=2, hidden_size=320, intermediate_size=640, num_heads=4, patch_size=8,
                  window_size=32, out_hidden_size=1024, fullatt_block_indexes=[1])
    tokens = {name: stand_in[name] for name in stand_in if name.endswith("token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True,
                              **tokens)
    mllm = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    mllm.save_pretrained(folder)
    return sum(p.numel() for p in mllm.parameters())


if __name__ == "__main__":
    main()
