"""How much CPU memory N processes of one machine take until stage 2's models are sharded.

    python tests/host_memory.py                     # 4 processes -> docs/host_memory.json, a minute
    python tests/host_memory.py --processes 2

A Qwen2.5-VL of random weights is written in bf16, as the published ones are, and loaded by N
processes in two ways, one after the other:

    now      train_rl.load_models: every process maps the files, and casts and cuts them unit by
             unit; only the sampling copy (on a GPU, where there is one) is a process's own
    before   each process loads the whole in fp32, with a reference in bf16 beside it, then cuts

Measured: each process's peak of memory of its own (anonymous pages, which no other process shares),
and the peak of all together (proportional shares, so that a mapped page counts once), read from
/proc while they run. Linux only.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import torch
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import train_rl
from align import SharedArgs, set_trainable, shard, start_processes
from data import write_whole
from model import build_lens


def write_model(folder, layers):
    """A Qwen2.5-VL with the stand-in's tokenizer and `layers` layers of 1,024, in bf16."""
    tokenizer = AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm")
    tokenizer.save_pretrained(folder)
    given = json.loads((ROOT / "tests/tiny/mllm/config.json").read_text())
    text = dict(vocab_size=100_000, hidden_size=1024, intermediate_size=2816,
                num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=2,
                rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                     mrope_section=[8, 12, 12]),
                bos_token_id=None, eos_token_id=2, pad_token_id=0)
    vision = dict(depth=2, hidden_size=320, intermediate_size=640, num_heads=4, patch_size=8,
                  window_size=32, out_hidden_size=1024, fullatt_block_indexes=[1])
    tokens = {name: given[name] for name in given if name.endswith("token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True,
                              **tokens)
    mllm = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    mllm.save_pretrained(folder)
    return sum(p.numel() for p in mllm.parameters())


def settings(folder):
    shared = SharedArgs(mllm=str(folder), sam=str(ROOT / "tests/tiny/sam"), num_queries=8,
                        connector_heads=4, device="cpu")
    return shared, train_rl.RLArgs(init="none")


def load_before(shared, args, mesh, device):
    """What every process did before: all of it in fp32, a whole bf16 reference, a sampling copy."""
    lens, processor = build_lens(shared, "", torch.float32)
    frozen = set_trainable(lens.train(), "rl")
    sampler = train_rl.copy_mllm(lens.mllm, shared.precision, device)
    whole = train_rl.copy_mllm(lens.mllm, shared.precision)
    reference = train_rl.Reference(whole, lens.forbidden)
    shard(lens, mesh, shared.precision, frozen)
    shard(reference, mesh, shared.precision)
    return lens, reference, sampler, processor


def child(folder, way):
    """One of the processes: load, shard, and stay until all have."""
    shared, args = settings(folder)
    _, _, device, mesh = start_processes(shared)
    torch.distributed.barrier()
    load = train_rl.load_models if way == "now" else load_before
    models = load(shared, args, mesh, device)
    torch.distributed.barrier()
    time.sleep(0.5)                                  # the parent's last look
    del models
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def memory_of(pid):
    """-> {"Pss", "Anonymous"} of a process, in bytes; zeros where it has gone."""
    found = {"Pss": 0, "Anonymous": 0}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = 1024 * int(rest.split()[0])
    except (OSError, ValueError):
        pass
    return found


def measure(folder, way, processes):
    """-> peak of each process's own memory (the largest of them), and of all together, in bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", __file__, "--child", str(folder), way]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    each = together = 0
    while run.poll() is None:
        listed = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
        of_all = [memory_of(pid) for pid in listed.stdout.split()]
        each = max([each, *(found["Anonymous"] for found in of_all)])
        together = max(together, sum(found["Pss"] for found in of_all))
        time.sleep(0.05)
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}")
    return each, together


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--out", default=str(ROOT / "docs/host_memory.json"))
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(folder, args.layers)
        found = {"command": "python tests/host_memory.py", "processes": args.processes,
                 "parameters": parameters, "torch": torch.__version__}
        for way in ("before", "now"):
            each, together = measure(folder, way, args.processes)
            found[way] = {"each_GB": round(each / 1e9, 2), "all_GB": round(together / 1e9, 2)}
            print(way, found[way], flush=True)
    write_whole(args.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
