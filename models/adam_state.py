"""The state that AdamW keeps for each parameter: in fp32 or 8 bits, on the parameter's device or in pinned host memory.

State in host memory passes through the GPU when an update needs it, piece by piece: while one piece is updated, the next one is
copied in and the one before it out. The bits are those of a state on the GPU.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.adamw import BLOCK, AdamNumbers, Moments8, adamw, rng_keys
from models.arena import space_of
from models.host_store import pinned_bytes

PIECE = 1 << 23  # most elements updated at once, in 8 bits 4 times as many: bounds scratch and copies
_NUM_BUFFERS = 3  # batches of pieces on the GPU at once: one copied in, one updated, one copied out
_LEAST_SLAB = 1 << 20  # bytes


MOMENTS = ("fp32", "int8")
# how updates of bf16 weights add up (kernels/adamw.py): by an fp32 copy, by stochastic rounding, or with a bf16 tensor of what
# rounding took. fp32 weights need none of them
WEIGHTS = ("master", "stochastic", "compensated")


def piece_size(moments: str) -> int:
    return PIECE * (4 if moments == "int8" else 1)


class OptimizerBytes(NamedTuple):
    gradients: int  # during an update
    moments: int
    masters: int  # or what compensated weights need
    scratch: int  # of step()
    buffers: int  # of step(), if the state is on the host


def gradient_dtype(dtype: torch.dtype, weights: str) -> torch.dtype:
    """The dtype that gradients of a parameter add up in."""
    return torch.float32 if weights == "master" else dtype


def state_tensors(num_elements: int, dtype: torch.dtype, moments: str, weights: str) -> dict[str, tuple[int, torch.dtype]]:
    """Name -> elements and dtype of what is kept for a parameter."""
    blocks = -(-num_elements // BLOCK)
    if moments == "fp32":
        kept = {"exp_avg": (num_elements, torch.float32), "exp_avg_sq": (num_elements, torch.float32)}
    else:
        kept = {"exp_avg": (num_elements, torch.uint8), "exp_avg_absmax": (blocks, torch.float32),
                "exp_avg_root": (num_elements, torch.uint8), "exp_avg_root_absmax": (blocks, torch.float32)}
    if dtype != torch.float32 and weights == "master":
        kept["master"] = num_elements, torch.float32
    elif dtype != torch.float32 and weights == "compensated":
        kept["compensation"] = num_elements, dtype
    return kept


def can_divide(parameter: torch.Tensor, num_ranks: int) -> bool:
    """Whether ranks can divide a parameter along its first dimension: into equal parts, of whole blocks of the state."""
    return len(parameter) % num_ranks == 0 and parameter.numel() // num_ranks % BLOCK == 0


def optimizer_bytes(sizes: Iterable[int], dtype: torch.dtype, moments: str, weights: str) -> OptimizerBytes:
    """Bytes for parameters of these numbers of elements, all of one dtype."""
    sizes, largest = list(sizes), min(max(sizes, default=0), piece_size(moments))
    kept = [(name, count * kind.itemsize) for size in sizes
            for name, (count, kind) in state_tensors(size, dtype, moments, weights).items()]
    batch = min(sum(sizes), piece_size(moments))
    of_batch = sum(count * kind.itemsize for count, kind in state_tensors(batch, dtype, moments, weights).values())
    scratch = 4 * largest if moments == "fp32" and (dtype == torch.float32 or weights == "master") else (
        0 if moments == "int8" else 48 * largest)
    return OptimizerBytes(
        sum(sizes) * gradient_dtype(dtype, weights).itemsize,
        sum(size for name, size in kept if name.startswith("exp_avg")),
        sum(size for name, size in kept if not name.startswith("exp_avg")), scratch, _NUM_BUFFERS * of_batch)


def pinned_tensors(wanted: list[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    """Zeros in pinned host memory, in few allocations: each is rounded up to a power of two, so sizes are powers of two that the
    tensors fill."""
    sizes = [space_of(count * dtype.itemsize) for count, dtype in wanted]
    found, left, slab, used = [], sum(sizes), torch.empty(0, dtype=torch.uint8), 0
    for size, (count, dtype) in zip(sizes, wanted):
        if used + size > len(slab):
            num_bytes = max(1 << (left.bit_length() - 1), pinned_bytes(size), _LEAST_SLAB)
            try:
                slab, used = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True), 0
            except RuntimeError as error:
                raise RuntimeError(f"the optimizer's state does not fit pinned host memory: the system refuses another "
                                   f"{num_bytes / 1e9:.1f} GB ({str(error).splitlines()[0]})") from error
        found.append(slab[used:used + count * dtype.itemsize].view(dtype))
        used, left = used + size, left - size
    return found


@dataclass
class Piece:
    """Consecutive elements of a parameter."""

    name: str
    number: int  # of the parameter
    first: int  # element
    end: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1)[self.first:self.end]


class AdamState:
    """The state of named parameters and its updates. `tensors`: what a checkpoint holds, by name (kind.parameter)."""

    def __init__(self, params: dict[str, torch.nn.Parameter], moments: str, weights: str, *, betas: tuple[float, float],
                 eps: float, weight_decay: float, seed: int, on_host: bool, in_order: bool, starts: dict[str, int]) -> None:
        """in_order: pieces are always updated one after the other, so that those of small parameters can be copied together.
        starts: name -> element that a part of a parameter begins with, of those that are parts: a multiple of BLOCK."""
        assert moments in MOMENTS and weights in WEIGHTS, (moments, weights)
        half = [name for name, param in params.items() if param.dtype == torch.float16]
        if half and weights != "master":
            raise ValueError(f"optim.weights = {weights!r}: for bfloat16 and float32, and {half[0]} is float16; set "
                             "optim.weights=master")
        self.params, self.moments, self.weights, self.seed, self.starts = params, moments, weights, seed, starts
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.device = next(iter(params.values())).device
        is_streamed = on_host and self.device.type == "cuda"
        wanted = {name: state_tensors(param.numel(), param.dtype, moments, weights) for name, param in params.items()}
        flat = [spec for kept in wanted.values() for spec in kept.values()]
        made = iter(pinned_tensors(flat) if is_streamed else [
            torch.zeros(count, dtype=dtype, device=self.device) for count, dtype in flat])
        self._kept = {name: {kind: next(made) for kind in kept} for name, kept in wanted.items()}
        for name, kept in self._kept.items():
            if "master" in kept:
                kept["master"].copy_(params[name].detach().view(-1))
        most = piece_size(moments)
        self.pieces = [Piece(name, number, first, min(first + most, param.numel()))
                       for number, (name, param) in enumerate(params.items()) for first in range(0, param.numel(), most)]
        self.pieces_of = {name: [i for i, piece in enumerate(self.pieces) if piece.name == name] for name in params}
        self._held = [self._parts(piece) for piece in self.pieces]
        self._stream = (_Stream(self.pieces, self._held, self.device, in_order=in_order, most=most) if is_streamed
                        else None)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """In the shapes of the parameters, absmax apart."""
        return {f"{kind}.{name}": tensor.view(self.params[name].shape) if tensor.numel() == self.params[name].numel() else tensor
                for name, kept in self._kept.items() for kind, tensor in kept.items()}

    def begin(self) -> None:
        """Takes the GPU memory that updates of pieces need. An error comes before anything is changed."""
        if self._stream is not None:
            self._stream.begin()

    def end(self) -> None:
        """Gives it back."""
        if self._stream is not None:
            self._stream.end()

    def wait(self) -> None:
        """Waits until the state in host memory may be read or written."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def update(self, index: int, grad: torch.Tensor, *, lr: float, scale: float, num_updates: int) -> None:
        """Makes update number `num_updates`, from 1, of piece number `index`, in place. grad: of its parameter, to be multiplied
        by `scale`; is overwritten. An error comes before anything is changed."""
        piece = self.pieces[index]
        numbers = AdamNumbers(lr, *self.betas, self.eps, self.weight_decay, scale, num_updates)
        param = self.params[piece.name]
        state = self._held[index] if self._stream is None else self._stream.get(index)
        # data: autograd must not see the update of a parameter that shares memory with others whose backward is yet to come
        weight = piece.of(param.data)
        master = state.get("master")
        kept = [tensor for kind, tensor in state.items() if kind.startswith("exp_avg")]
        is_random = self.moments == "int8" or self.weights == "stochastic"
        adamw(weight if master is None else master, piece.of(grad), Moments8(*kept) if self.moments == "int8" else tuple(kept),
              state.get("compensation"), numbers, first=piece.first + self.starts.get(piece.name, 0),
              key=rng_keys(self.seed, num_updates, len(self.params))[piece.number] if is_random else (0, 0))
        if master is not None:
            weight.copy_(master)
        if self._stream is not None:
            self._stream.put(index)

    def round_masters(self) -> None:
        """Sets parameters with a master from it."""
        for name, kept in self._kept.items():
            if "master" in kept:
                self.params[name].detach().view(-1).copy_(kept["master"])

    def _parts(self, piece: Piece) -> dict[str, torch.Tensor]:
        """Where a piece's state lies."""
        return {kind: tensor[piece.first // BLOCK:-(-piece.end // BLOCK)] if kind.endswith("absmax")
                else tensor[piece.first:piece.end] for kind, tensor in self._kept[piece.name].items()}


class _Stream:
    """The way of the state from host memory through buffers on the GPU and back, a batch of pieces at a time. Small parameters
    that follow each other are one batch, and mostly one copy."""

    def __init__(self, pieces: list[Piece], held: list[dict[str, torch.Tensor]], device: torch.device, *, in_order: bool,
                 most: int) -> None:
        """held: of each piece, in host memory. most: elements of a batch of several pieces."""
        self.device, self.in_order = device, in_order
        self._batches: list[list[int]] = []  # of pieces
        self._places: list[dict[str, tuple[int, int, torch.dtype]]] = []  # of a piece's tensors in the buffer: from, to, dtype
        self._segments: list[list[torch.Tensor]] = []  # of a batch in host memory: bytes that the buffer has one after the other
        size = used = self._largest = 0
        for index, (piece, tensors) in enumerate(zip(pieces, held)):
            size += piece.end - piece.first
            if index == 0 or not in_order or size > most:
                self._batches.append([])
                self._segments.append([])
                size, used = piece.end - piece.first, 0
            self._batches[-1].append(index)
            self._places.append({})
            for kind, tensor in tensors.items():
                num_bytes = tensor.numel() * tensor.element_size()
                self._places[index][kind] = used, used + num_bytes, tensor.dtype
                used += space_of(num_bytes)
                _append(self._segments[-1], tensor.view(torch.uint8))
            self._largest = max(self._largest, used)
        self._batch_of = {index: number for number, batch in enumerate(self._batches) for index in batch}
        self._incoming, self._outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: list[torch.Tensor] = []  # each takes the state of a batch
        self._arrived: dict[int, torch.cuda.Event] = {}  # by batch
        self._left: dict[int, torch.cuda.Event] = {}  # by buffer: its last copy out

    def begin(self) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(self._largest, dtype=torch.uint8, device=self.device) for _ in range(_NUM_BUFFERS)]
            self._incoming.wait_stream(torch.cuda.current_stream(self.device))  # earlier work may still use this memory

    def end(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._outgoing)
        self._buffers, self._arrived, self._left = [], {}, {}

    def get(self, index: int) -> dict[str, torch.Tensor]:
        """A piece's state, on the GPU."""
        number = self._batch_of[index]
        if number not in self._arrived:
            self._fetch(number)
        if self.in_order and number + 1 < len(self._batches) and number + 1 not in self._arrived:
            self._fetch(number + 1)
        torch.cuda.current_stream(self.device).wait_event(self._arrived[number])
        buffer = self._buffers[number % _NUM_BUFFERS]
        return {kind: buffer[start:end].view(dtype) for kind, (start, end, dtype) in self._places[index].items()}

    def put(self, index: int) -> None:
        """Starts copying a batch back, if this is its last piece."""
        number = self._batch_of[index]
        if index == self._batches[number][-1]:
            self._outgoing.wait_stream(torch.cuda.current_stream(self.device))
            self._left[number % _NUM_BUFFERS] = self._copy(number, self._outgoing, is_out=True)

    def _fetch(self, number: int) -> None:
        """Starts copying a batch to its buffer."""
        if (left := self._left.get(number % _NUM_BUFFERS)) is not None:
            self._incoming.wait_event(left)
        self._arrived[number] = self._copy(number, self._incoming, is_out=False)

    def _copy(self, number: int, stream: torch.cuda.Stream, *, is_out: bool) -> torch.cuda.Event:
        buffer, used = self._buffers[number % _NUM_BUFFERS], 0
        with torch.cuda.stream(stream):
            for segment in self._segments[number]:
                part = buffer[used:used + len(segment)]
                target, source = (segment, part) if is_out else (part, segment)
                target.copy_(source, non_blocking=True)
                used += space_of(len(segment))
            return stream.record_event()


def _append(segments: list[torch.Tensor], part: torch.Tensor) -> None:
    """Adds bytes to a list of segments: to the last one if they follow it in memory, at the next aligned place."""
    if segments and segments[-1].data_ptr() + space_of(len(segments[-1])) == part.data_ptr() and (
            segments[-1].untyped_storage().data_ptr() == part.untyped_storage().data_ptr()):
        start = segments[-1].storage_offset()
        segments[-1] = torch.empty(0, dtype=torch.uint8).set_(
            part.untyped_storage(), start, (part.storage_offset() + len(part) - start,))
    else:
        segments.append(part)
