"""evaluate.py, but each completion is sampled at temperature 1 instead of decoded greedily.

    python tests/evidence/sampled_evaluation.py --preset tiny --checkpoint runs/tiny/rl

All flags are evaluate.py's. It runs on one process. The same seed and the same rows give the same
completions.
"""
import sys
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import evaluate
import train_rl
from align import SharedArgs, parse_settings, run
from train_rl import draw_uniforms, generate


def sampling_generate(seed):
    """`generate` as inference calls it, with uniforms that are a function of seed and row."""
    rows = count()

    def sample(mllm, batch, positions, G, max_new, *inputs, **options):
        uniforms = draw_uniforms(seed, 0, islice(rows, len(positions)), G, max_new)
        return generate(mllm, batch, positions, G, max_new, *inputs,
                        uniforms=uniforms.to(batch["pixel_values"].device), **options)
    return sample


def main():
    shared, _ = parse_settings([SharedArgs, evaluate.EvaluateArgs], evaluate.PRESETS, __doc__)
    train_rl.generate = sampling_generate(shared.seed)
    evaluate.main()


if __name__ == "__main__":
    run(main)
