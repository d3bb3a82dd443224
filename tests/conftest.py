"""Shared by the tests: the repository's root on the path, one thread (exact sums), small real
models with random weights, batches without any file, and the scripts from the command line."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/tiny")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT))
if not os.environ.get("LENS_TEST_CUDA"):         # a GPU would change the sums that tests compare
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

torch.set_num_threads(1)

import world as shapes_world
from model import Samples

IMAGE, END, VOCABULARY = 255, 2, 256
SAM_CONFIG = OmegaConf.load(ROOT / "tests/tiny/sam/config.yaml").model
SAM_SIDE = SAM_CONFIG.image_size                 # of the stand-in's square picture, in pixels


def random_mllm(seed=0, attention="sdpa"):
    """A real Qwen2.5-VL of two layers, random weights, untied head so that nothing is accidentally
    shared."""
    torch.manual_seed(seed)
    text = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                initializer_range=0.2, bos_token_id=None, eos_token_id=END, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8,
                  window_size=32, out_hidden_size=64, fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE,
                              video_token_id=254, vision_start_token_id=252,
                              vision_end_token_id=253, tie_word_embeddings=False)
    made = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    return made.float()


def random_sam(seed=0):
    """A real SAM 2 of a small Hiera, as tests/tiny/sam/config.yaml describes it, random weights."""
    torch.manual_seed(seed)
    return instantiate(SAM_CONFIG, _recursive_=True)


def random_batch(grids=((1, 4, 6), (1, 6, 4)), texts=(7, 11), seed=1):
    """B prompts of different lengths over pictures of different shapes, as Collator lays them
    out."""
    g = torch.Generator().manual_seed(seed)
    ids, types = [], []
    for (_, h, w), n in zip(grids, texts):
        before = torch.randint(3, 250, (4,), generator=g)
        after = torch.randint(3, 250, (n,), generator=g)
        picture = torch.full((h * w // 4,), IMAGE)
        ids.append(torch.cat([before, torch.tensor([252]), picture, torch.tensor([253]), after]))
        types.append((ids[-1] == IMAGE).long())
    patches = sum(h * w for _, h, w in grids)
    return {"ids": ids, "types": types, "grid_thw": torch.tensor(grids),
            "pixel_values": torch.randn(patches, 3 * 2 * 8 * 8, generator=g),
            "sam_pixels": torch.randn(len(grids), 3, SAM_SIDE, SAM_SIDE, generator=g)}


def stored_samples(completions, finished):
    """Samples as if they had been drawn, without the sampler's log-probs."""
    longest = max(len(completion) for group in completions for completion in group)
    number = sum(map(len, completions))
    return Samples(completions, finished, torch.zeros(number, longest))


def random_completions(B=2, G=3, longest=9, seed=2):
    g = torch.Generator().manual_seed(seed)
    groups = []
    for _ in range(B):
        group = []
        for _ in range(G):
            length = int(torch.randint(1, longest + 1, (1,), generator=g))
            group.append(torch.randint(3, 250, (length,), generator=g))
        groups.append(group)
    return groups


@pytest.fixture
def lens():
    from model import Lens
    args = SimpleNamespace(num_queries=5, precision="fp32", connector="vit", connector_heads=4,
                           prompt_tokens="all", prompt="paper", positions="mrope", multimask=False)
    forbidden = torch.arange(VOCABULARY) >= 250
    return Lens(random_mllm(), random_sam(), args, forbidden, END)


# The scripts from the command line

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command, check=True, cwd=ROOT, env=ENVIRONMENT):
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def script(name, *flags, processes=1, check=True):
    start = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    return run(*start, name, "--preset", "tiny", *flags, check=check)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small shapes world for the command-line tests."""
    root = tmp_path_factory.mktemp("data")
    splits = {"train": 48, "val": 12, "testA": 4, "testB": 4}
    shapes_world.write_shapes_world(root, splits=splits)
    return root


@pytest.fixture(scope="session")
def aligned(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "align"
    script("align.py", "--data", world, "--output", folder, "--steps", 2, "--batch", 8,
           "--micro-batch", 4)
    return folder
