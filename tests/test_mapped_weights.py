"""Policy, sampler and reference start from one file, mapped into memory, and share nothing."""
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import align
import model
import train_rl
from align import SharedArgs

STAND_IN = ROOT / "tests/tiny/mllm"


def mapped_at(tensor, file):
    """Does the tensor's memory lie in the mapping of the file?"""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name.strip() == str(file)
    return False


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "fp32"), (torch.bfloat16, "bf16"),
                                              (torch.float32, "fp32")])
def test_three_models_from_one_file(dtype, precision, tmp_path, monkeypatch):
    """The weights are mapped, not read. Then the policy (in fp32), the sampler and the reference
    (in the compute precision) each hold their own; and `refresh` brings the policy's into the
    sampler."""
    file, from_file = tmp_path / "mllm/model.safetensors", []
    stand_in = AutoModelForImageTextToText.from_pretrained(STAND_IN, dtype=dtype)
    stand_in.save_pretrained(file.parent)
    AutoProcessor.from_pretrained(STAND_IN).save_pretrained(file.parent)
    load_mllm = model.load_mllm

    def load(*args):
        mllm, processor = load_mllm(*args)
        from_file.extend((p.dtype, mapped_at(p, file)) for p in mllm.parameters())
        return mllm, processor
    for module in model, train_rl:                       # the reference is loaded apart
        monkeypatch.setattr(module, "load_mllm", load)
    monkeypatch.chdir(ROOT)
    shared = SharedArgs(**{**align.TINY, "mllm": str(file.parent), "precision": precision})
    args = train_rl.RLArgs(batch=2, micro_batch=2, init="none")
    _, _, device, mesh = align.start_processes(shared)
    try:
        lens, reference, sampler, _ = train_rl.load_models(shared, args, mesh, device)
        check(from_file, stand_in, lens, sampler, reference, file)
    finally:
        dist.destroy_process_group()


def check(from_file, stand_in, lens, sampler, reference, file):
    stored = dict(stand_in.named_parameters())
    dtype = stand_in.dtype
    assert len(from_file) > 50 and {dtype for dtype, _ in from_file} == {dtype}
    assert sum(mapped for _, mapped in from_file) > 0.9 * len(from_file)
    compute = torch.bfloat16 if sampler.dtype == torch.bfloat16 else torch.float32
    three = {}
    for name, mllm in ("policy", lens.mllm), ("sampler", sampler), ("reference", reference.mllm):
        three[name] = {key: p.to_local() if isinstance(p, DTensor) else p
                       for key, p in mllm.named_parameters()}
    for name, parameters in three.items():
        precision = torch.float32 if name == "policy" else compute
        assert parameters.keys() == stored.keys()
        for key, parameter in parameters.items():
            assert parameter.dtype == precision, (name, key)
            assert torch.equal(parameter, stored[key].to(precision)), (name, key)
            assert not mapped_at(parameter, file), (name, key)
    with torch.no_grad():                                # each holds its own
        for value, parameters in enumerate(three.values(), 2):
            for parameter in parameters.values():
                parameter.fill_(value)
    for value, parameters in enumerate(three.values(), 2):
        assert all((parameter == value).all() for parameter in parameters.values())
    again = AutoModelForImageTextToText.from_pretrained(file.parent, dtype="auto")
    assert all(torch.equal(p, stored[key]) for key, p in again.named_parameters())
    train_rl.refresh(sampler, lens)
    assert all((parameter == 2).all() for parameter in sampler.parameters())
