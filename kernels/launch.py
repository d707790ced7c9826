"""Which path serves a tensor, and what the kernels know about a GPU.

CUDA tensors run the Triton kernels, CPU tensors the PyTorch references; in Triton's interpreter (TRITON_INTERPRET=1 in the
environment when the kernels are imported) CPU tensors run the kernels too. Block-size tables are kept beside each kernel and
keyed by `gpu_family`, so that one entry serves the GPUs that share tensor cores and shared memory.
"""
import os

import torch

# compute capability -> family; a newer GPU that is not listed gets the sizes that fit everywhere, those of "consumer"
_FAMILIES = {
    80: "ampere", 87: "ampere",  # A100
    86: "consumer", 89: "consumer", 120: "consumer", 121: "consumer",  # RTX 30, 40, 50, L4: mma.sync, small shared memory
    90: "hopper",  # H100, H200: wgmma
    100: "blackwell", 103: "blackwell", 110: "blackwell",  # B200: tcgen05
}
# bytes of shared memory one program may use
SHARED_MEMORY = {"turing": 65_536, "ampere": 166_912, "consumer": 101_376, "hopper": 232_448, "blackwell": 232_448}


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_triton(x: torch.Tensor) -> bool:
    """Whether x is served by Triton kernels rather than by the PyTorch references."""
    return x.is_cuda or is_interpreted()


def family_of(capability: int) -> str:
    """The family of a compute capability written as an integer, 90 for 9.0: a key of SHARED_MEMORY."""
    return _FAMILIES.get(capability, "consumer" if capability >= 80 else "turing")


def gpu_family(x: torch.Tensor) -> str:
    """The family of x's GPU; "interpreter" for CPU tensors, whose blocks should be tiny."""
    if not x.is_cuda:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(x.device)
    return family_of(10 * major + minor)


def num_multiprocessors(x: torch.Tensor) -> int:
    """Multiprocessors of x's GPU, the size of a persistent grid; 2 in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def check_served(operation: str, tensors: dict[str, torch.Tensor], *, dtypes: tuple[torch.dtype, ...],
                 tensor_cores: bool) -> None:
    """Raises ValueError, with the reason, where a Triton kernel cannot serve these tensors: several devices, a dtype it has no
    code for, or (kernels with matrix products, `tensor_cores`) a GPU whose tensor cores Triton does not drive."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the others on {device}; move them to one device")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{operation}: {name} is {tensor.dtype}; the Triton kernel takes {', '.join(map(str, dtypes))}")
    if tensor_cores and device.type == "cuda" and gpu_family(next(iter(tensors.values()))) == "turing":
        raise ValueError(f"{operation}: {torch.cuda.get_device_name(device)} has compute capability below 8.0, where Triton "
                         "has no tensor-core path; use a GPU of capability 8.0 or later")
