"""What the tests share: where Python finds things, small random models of the real classes, batches
without files, and a script's main called in this process or in two.

Everything runs on the CPU in one thread, so that sums are the same every time. LENS_TEST_CUDA=1
leaves the GPUs visible.
"""
import contextlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in
                ("", "tests", "tests/tools", "tests/evidence", "tests/tiny")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
                  PYTHONPATH=str(ROOT))
if not os.environ.get("LENS_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sam2.modeling.position_encoding import PositionEmbeddingRandom
from transformers import AutoConfig, AutoModelForImageTextToText

import align
import model
import world as shapes_world

torch.set_num_threads(1)

# ids of the random MLLMs: an image token, the end token, the size of the vocabulary
IMAGE, END, VOCABULARY = 255, 2, 256
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SAM_CONFIG = OmegaConf.load(ROOT / "tests/tiny/sam/config.yaml").model
SAM_SIDE = SAM_CONFIG.image_size  # S of the stand-in


def pytest_configure(config):
    """What transformers is going to remove must not be used here any more."""
    config.addinivalue_line("filterwarnings", "error::FutureWarning")
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning:torch")


# --- Small models of the real classes, with random weights ----------------------------------------

def random_mllm(family="qwen2_5_vl", tied=False, seed=0, vocabulary=VOCABULARY, image=IMAGE,
                video=254, start=252, end=253):
    """A real MLLM of any family with three layers. Its head is not tied to its embeddings, so that
    nothing is shared by accident."""
    torch.manual_seed(seed)
    text = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
                bos_token_id=None, eos_token_id=END, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    text |= {"head_dim": 16} if family == "qwen3_vl" else {}
    vision = dict(depth=2, num_heads=2, patch_size=8, initializer_range=0.2)
    vision |= {"qwen2_vl": dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
               "qwen2_5_vl": dict(hidden_size=32, out_hidden_size=64, intermediate_size=64,
                                  window_size=32, fullatt_block_indexes=[1]),
               "qwen3_vl": dict(hidden_size=32, out_hidden_size=64, intermediate_size=64,
                                num_position_embeddings=64,
                                deepstack_visual_indexes=[0, 1])}[family]
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision,
                                  image_token_id=image, video_token_id=video,
                                  vision_start_token_id=start, vision_end_token_id=end,
                                  tie_word_embeddings=tied)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").float()


def random_sam(seed=0):
    """A real SAM 2 with a small Hiera, as tests/tiny/sam/config.yaml describes it."""
    torch.manual_seed(seed)
    return instantiate(SAM_CONFIG, _recursive_=True)


def random_lens(mllm=None, **settings):
    """A Lens with M = 5 of a random MLLM and a random SAM. Tokens from 250 on are forbidden. The
    connector's blocks, which add nothing at the start, do something."""
    settings = {"num_queries": 5, "precision": "fp32", **settings}
    mllm, sam = mllm or random_mllm(), random_sam()
    lens = model.Lens(mllm, sam, align.SharedArgs(**settings), torch.arange(VOCABULARY) >= 250, END)
    return fill_blocks(lens)


def fill_blocks(module):
    """The connector's zeros at the start would hide mistakes in its blocks: draw them instead."""
    for name, p in module.named_parameters():
        if name.endswith(("proj.weight", "fc2.weight")) and "blocks." in name and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return module


@pytest.fixture
def lens():
    return random_lens()


@pytest.fixture
def float64(monkeypatch):
    """-> a function that casts a module to float64, in which sums in another order agree to 1e-10.

    Hugging Face's norms would still compute in float32, so here float64 stays float64. Position
    encodings are the same in any order, and stay float32."""
    convert = torch.Tensor.to

    def stay(x, *args, **options):
        to_float32 = args[:1] == (torch.float32,)
        return x if to_float32 and x.dtype == torch.float64 else convert(x, *args, **options)

    def cast(module):
        for part in module.double().modules():
            if isinstance(part, PositionEmbeddingRandom):
                part.positional_encoding_gaussian_matrix = convert(
                    part.positional_encoding_gaussian_matrix, torch.float32)
            if hasattr(part, "inv_freq"):  # of rotary embeddings: the same in any order, too
                part.inv_freq = convert(part.inv_freq, torch.float32)
        return module
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: stay(x, torch.float32))
    return cast


def random_batch(grids=((1, 4, 6), (1, 6, 4)), texts=(7, 11), seed=1, dtype=torch.float32):
    """B prompts of different lengths with images of different shapes, as data.Collator lays them
    out, but without ground truth. texts: tokens behind each image."""
    g = torch.Generator().manual_seed(seed)
    ids, types = [], []
    for (_, h, w), n in zip(grids, texts):
        before = torch.randint(3, 250, (4,), generator=g)
        after = torch.randint(3, 250, (n,), generator=g)
        image = torch.full((h * w // 4,), IMAGE)
        ids.append(torch.cat([before, torch.tensor([252]), image, torch.tensor([253]), after]))
        types.append((ids[-1] == IMAGE).long())
    patches = sum(h * w for _, h, w in grids)
    return {"prompt_ids": ids, "token_types": types, "grid_thw": torch.tensor(grids),
            "pixel_values": torch.randn(patches, 3 * 2 * 8 * 8, generator=g).to(dtype),
            "sam_pixels": torch.randn(len(grids), 3, SAM_SIDE, SAM_SIDE, generator=g).to(dtype)}


def random_completions(B=2, G=3, longest=9, seed=2):
    """B x G x (T_i,) token ids."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (B, G), generator=g)
    return [[torch.randint(3, 250, (int(length),), generator=g) for length in row]
            for row in lengths]


@pytest.fixture
def mesh():
    """Of this process alone, with a process group that ends with the test."""
    yield align.start_processes(align.SharedArgs())[3]
    dist.destroy_process_group()


# --- The scripts ----------------------------------------------------------------------------------

def call(script, *flags, preset="tiny"):
    """Run the main of a script in this process, from the repository, as the shell would. -> what it
    printed. Where it refuses, SystemExit holds everything that it said."""
    module, said = importlib.import_module(script.removesuffix(".py")), io.StringIO()
    flags = ["--preset", preset, *flags] if preset else flags
    caught = signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD
    before = [signal.getsignal(number) for number in caught]
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said),
          contextlib.redirect_stderr(said)):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            align.run(module.main)
        except SystemExit as stopped:
            raise SystemExit(f"{said.getvalue()}{stopped}") from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for number, handler in zip(caught, before):
                signal.signal(number, handler)
    return said.getvalue()


def refused(script, *flags, preset="tiny"):
    """What a script says, called in this process, when it refuses its flags or its input."""
    with pytest.raises(SystemExit) as stopped:
        call(script, *flags, preset=preset)
    return str(stopped.value)


def in_two(function, *arguments):
    """Run a function of a module in two processes at once, with the environment that torchrun gives
    them. They are forked from a server that has imported everything once, so they start quickly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.set_forkserver_preload(["train_rl", "evaluate", "pytest"])
    torch.multiprocessing.start_processes(run_as_rank, (port, function, arguments), nprocs=2,
                                          start_method="forkserver")


def run_as_rank(rank, port, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(*arguments)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = dict(os.environ)


def run(*command, check=True, cwd=ROOT, env=ENVIRONMENT):
    """Run a command in a process of its own. -> subprocess.CompletedProcess"""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def rows(folder):
    """The objects of FOLDER/metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """The same without what a clock says."""
    times = ("seconds", "speed")
    return [{name: value for name, value in row.items() if not name.startswith(times)}
            for row in rows(folder)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def largest_move(before, after, file):
    """Of any weight, between two folders' safetensors of that name."""
    before, after = load_file(before / file), load_file(after / file)
    return max((after[name] - before[name]).abs().max().item() for name in before)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small shapes world."""
    root = tmp_path_factory.mktemp("data")
    splits = {"train": 48, "val": 12, "testA": 4, "testB": 4}
    shapes_world.write_shapes_world(root, splits=splits)
    return root


@pytest.fixture(scope="session")
def aligned(world, tmp_path_factory):
    """The folder of a run of stage 1, two steps long."""
    folder = tmp_path_factory.mktemp("runs") / "align"
    call("align.py", "--data", world, "--output", folder, "--steps", 2, "--batch", 8,
         "--micro-batch", 4)
    return folder
