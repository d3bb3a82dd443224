"""A GPU that is only pretended: tensors that say they are on cuda:0, while the CPU computes them.

    with pretend_gpu() as device:
        x = torch.ones(3, device=device)    # x.device is cuda:0
        x + torch.ones(3)                   # RuntimeError, as on a GPU

On a CPU, code that forgets to move a tensor to the GPU works all the same. Here it raises, so a
machine without a GPU can find such a line. The numbers are those of the CPU, to the last bit.

What it cannot see: FSDP and NCCL, which need real devices; kernels that differ between devices, and
their rounding, speed and memory; compiled code; a copy that would make the CPU wait. A tensor of no
dimensions may mix with any device here, as a number would. On a GPU that holds for most operations.
"""
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default)



class GpuTensor(torch.Tensor):
    """`inner`, a tensor on the CPU, under the name of one on the GPU. PyTorch's own C++ code still
    takes it for a CPU tensor. So what asks for its device there has a substitute here."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = (property(lambda self, value=value: value)
                               for value in (GPU, True, False))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs)

    def to(self, *args, **kwargs):
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, (str, torch.device)) and torch.device(device).type == "cpu":
            dtype = kwargs.get("dtype", args[1] if len(args) > 1 else None)
            return aten._to_copy(self, device="cpu", dtype=dtype)
        return super().to(*args, **kwargs)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self):
        return f"GpuTensor({self.inner})"


def compute(func, args, kwargs):
    """One operation: on the CPU, after a look at where its tensors are said to be. Its result is
    where the argument `device` says, otherwise where the tensors are."""
    kwargs = dict(kwargs or {})
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    wrappers = {id(x.inner): x for x in tensors if isinstance(x, GpuTensor)}
    if wrappers:
        refuse_mixture(func, args, tensors)
    on_gpu = bool(wrappers)
    if kwargs.get("device") is not None:
        # In a backward pass it is C++ that makes new tensors, like others, which seem to be on the
        # CPU there. They belong to the GPU.
        in_backward = torch._C._current_autograd_node() is not None
        on_gpu = in_backward or torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = "cpu"
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, GpuTensor) else x, (args, kwargs))

    def wrap(x):
        if not on_gpu or not isinstance(x, torch.Tensor):
            return x
        # an operation in place returns its argument
        return wrappers[id(x)] if id(x) in wrappers else GpuTensor(x)
    return tree_map(wrap, func(*args, **kwargs))


def refuse_mixture(func, args, tensors):
    """RuntimeError where a GPU would find tensors on different devices. Three things are allowed:
    a number from the CPU, a copy between devices, and indices from the CPU into a tensor on the
    GPU."""
    on_cpu = [x for x in tensors if not isinstance(x, GpuTensor)]
    if func is aten.copy_.default:
        return
    # to write into a number of the CPU, or to stack it, is not allowed either
    numbers = func is not aten.stack.default and not (
        func._schema.is_mutable and any(x is args[0] for x in on_cpu))
    if func in INDEXING and isinstance(args[0], GpuTensor):
        on_cpu = [x for x in on_cpu if not any(x is index for index in args[1])]
    shapes = [tuple(x.shape) for x in on_cpu if x.dim() or not numbers]
    if shapes:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} has some on "
                           f"cuda:0 and of shape {', '.join(map(str, shapes))} on cpu")


class EveryOperation(TorchDispatchMode):
    """Calls `compute` for operations without a GpuTensor too, since those may make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs)


@contextmanager
def pretend_gpu():
    """Within it, one may make tensors on the device that it gives, and move tensors and modules to
    it. torch.cuda.is_available() remains False."""
    lazy_init, lift = torch.cuda._lazy_init, torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(...) makes each on the CPU first
    # module.to(device) replaces parameters; it cannot put a GpuTensor into one of the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with EveryOperation():
            yield GPU
    finally:
        torch.cuda._lazy_init = lazy_init
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
