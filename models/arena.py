"""GPU memory that can be given back and taken again at the same addresses.

The sampler's cache and training take turns. Were the cache freed for training and allocated again, it would lie elsewhere, and
CUDA graphs, which hold addresses, would have to be captured again. Here a range of addresses is reserved once, and memory is
mapped into it only while it is in use (CUDA driver API, virtual memory management). It is the driver's own memory: PyTorch's
allocator neither counts it nor can use it, and must have given back what it holds unused where the GPU has no room for both.
"""
from __future__ import annotations

import ctypes
import math
import sys

import torch

_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3  # kinds of allocation, of location, of access
_OUT_OF_MEMORY = 2
_ALIGNMENT = 256  # bytes between the starts of tensors


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location),
                ("win32_metadata", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8)]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def _call(name: str, *arguments) -> int:
    """A function of the driver; its result code is 0 or that of lacking memory."""
    code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if code not in (0, _OUT_OF_MEMORY):
        raise RuntimeError(f"{name} failed with CUDA error {code}")
    return code


def has_arenas(device: torch.device) -> bool:
    """Whether the device's memory can be managed so."""
    if device.type != "cuda":
        return False
    torch.cuda.init()  # the driver's functions need it
    value = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(value), _SUPPORTED, device.index or 0)
    return bool(value.value)


class _Bytes:
    """A range of memory, as torch.as_tensor takes it; keeps the arena alive."""

    def __init__(self, arena: Arena, address: int, num_bytes: int) -> None:
        self.arena = arena
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
                                         "strides": None}


class Arena:
    """num_bytes of addresses on a GPU; memory is there between take() and give_back(). content, advice: for the error where it is
    short: what the memory is for, and what would need less."""

    def __init__(self, num_bytes: int, device: torch.device, *, content: str, advice: str) -> None:
        self._content, self._advice = content, advice
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.empty(1, device=self.device)  # PyTorch makes the context that the driver's functions work in
        location = _Location(_DEVICE, self.device.index)
        self._properties, self._access = _Properties(type=_PINNED, location=location), _Access(location, _READ_WRITE)
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
        self.num_bytes = -(-num_bytes // granularity.value) * granularity.value
        address = ctypes.c_uint64()
        if _call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(self.num_bytes), ctypes.c_size_t(0),
                 ctypes.c_uint64(0), ctypes.c_uint64(0)):
            raise RuntimeError(f"no addresses for {self.num_bytes:,} bytes")
        self._address, self._used, self._handle = address.value, 0, None

    def take(self) -> None:
        """Puts memory, of zeros, behind the addresses. Raises torch.OutOfMemoryError, and changes nothing, where there is not
        enough."""
        if self._handle is not None:
            return
        size, handle = ctypes.c_size_t(self.num_bytes), ctypes.c_uint64()
        with torch.cuda.device(self.device):
            if _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), ctypes.c_uint64(0)):
                torch.cuda.empty_cache()  # what PyTorch holds unused
                if _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), ctypes.c_uint64(0)):
                    free, _ = torch.cuda.mem_get_info(self.device)
                    raise torch.OutOfMemoryError(f"{self._content}: {self.num_bytes / 1e9:.2f} GB are wanted, the GPU "
                                                 f"has {free / 1e9:.2f} GB free; {self._advice}")
            _call("cuMemMap", ctypes.c_uint64(self._address), size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
            _call("cuMemSetAccess", ctypes.c_uint64(self._address), size, ctypes.byref(self._access), ctypes.c_size_t(1))
            self._handle = handle
            self._bytes(self._address, self.num_bytes).zero_()

    def give_back(self) -> None:
        """Frees the memory, once the GPU is done with it; tensors in it must not be touched until it is taken again."""
        if self._handle is None:
            return
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            _call("cuMemUnmap", ctypes.c_uint64(self._address), ctypes.c_size_t(self.num_bytes))
            _call("cuMemRelease", self._handle)
        self._handle = None

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor of the arena, which must be taken; at an address of its own as long as the arena lives."""
        num_bytes = math.prod(shape) * dtype.itemsize
        start, self._used = self._used, self._used + space_of(num_bytes)
        assert self._handle is not None and self._used <= self.num_bytes, (self._handle, self._used, self.num_bytes)
        return self._bytes(self._address + start, num_bytes).view(dtype).view(shape)

    def _bytes(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_Bytes(self, address, num_bytes), device=self.device)

    def __del__(self) -> None:
        if "_address" in vars(self) and not sys.is_finalizing():  # with the process, the driver frees everything
            self.give_back()
            _call("cuMemAddressFree", ctypes.c_uint64(self._address), ctypes.c_size_t(self.num_bytes))


def space_of(num_bytes: int) -> int:
    """The bytes that a tensor of `num_bytes` bytes takes among others in one allocation, whose starts are aligned."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
