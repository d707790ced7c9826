"""gpt-oss weights between files and the model: Hugging Face and OpenAI `original/` layouts, in and out; bitsandbytes' NF4, in.

Loading streams one tensor at a time from file to device. Exports keep the schema of the published checkpoints
(`rope_theta` and `rope_scaling` with its `truncate`, [E, in, out] dense experts, `_blocks`/`_scales` packed ones),
which transformers and vLLM both read; nothing goes through transformers' own save_pretrained.

A training run's weights: `save_model(model, folder, merge_lora=False, dtype=model.dtype)` and `load_model` give the
same bits back. Adapters are in models/formats/peft.py.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kernels.device import product_path
from kernels.packed.weights import ExpertWeights
from models.chat.tokenizer import TOKENIZER_FILES
from models.config import GptOssConfig, read_config
from models.expert_share import ExpertShare
from models.expert_store import Placement
from models.experts import FORMATS, PROJECTIONS, RoutedExperts, stored_format
from models.formats.bitsandbytes import is_bitsandbytes, unpacked_names
from models.formats.files import (
    CheckpointError,
    DerivedTensor,
    Stored,
    TensorToWrite,
    atomic_folder,
    list_tensors,
    misshapen_tensors,
    read_json,
    shortened,
    weights_folder,
    write_shards,
)
from models.formats.original import from_hugging_face, is_original, to_hugging_face
from models.formats.peft import has_expert_adapter, merged_weight, save_adapter
from models.gpt_oss import GptOss
from models.host_store import pinned_bytes

_FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def load_model(source: str | Path, *, device: torch.device | str, dtype: torch.dtype, experts: str = "auto",
               activation_checkpointing: bool = False, memory_gb: float | None = None, host_gb: float = 0.0,
               placement: Placement | None = None, share: ExpertShare | None = None) -> GptOss:
    """Reads a checkpoint into a frozen model.

    source: a folder in Hugging Face layout (one file, or shards by model.safetensors.index.json), a folder in OpenAI's
        original layout or with an `original/` subfolder and no weights of its own, or a hub id.
    dtype: of every tensor but packed ones.
    experts: "auto" keeps the form of the checkpoint; "bf16" dequantises packed experts into dense [E, in, out] of
        `dtype` (4 times the memory in bfloat16); "mxfp4" and "nf4" insist on those, and pack dense ones with a warning that
        states the rounding.
    activation_checkpointing, memory_gb, host_gb, placement, share: as GptOss takes them; experts of other processes are
        not read. On a GPU, host_gb takes the input embedding first, if it is large enough (pinned allocations are rounded up
        to a power of two).
    Where Triton makes the products, packed experts are brought into fragment order at the end, in place (models/experts.py).
    Beyond the model, host and device memory hold one tensor at a time; experts that stream are read into host memory, and
    the GPU holds two layers of them at most. Raises CheckpointError (a ValueError) naming the file and what to do; every
    missing, unused, misshapen and mistyped tensor is listed in one message.
    """
    if experts not in ("auto", *FORMATS):
        raise ValueError(f"experts={experts!r}; allowed: auto, {', '.join(FORMATS)}")
    folder = weights_folder(source)
    config, stored, stored_form = _read_headers(folder)
    form = stored_form if experts == "auto" else FORMATS[experts]
    if form.is_packed and stored_form.is_packed and form is not stored_form:
        how = f", or pack them first with scripts/export.py --experts {form.name}" if form.is_written else ""
        raise CheckpointError(
            f"{folder}: experts={form.name}, but the checkpoint holds {stored_form.description}; use experts=auto{how}"
        )

    if form is not stored_form and form.is_packed:
        try:
            form.check(form.quantization, config.hidden_size, config.intermediate_size)
        except ValueError as error:
            raise CheckpointError(f"{folder}: experts={form.name}: {error}; use experts=bf16") from None

    expected = GptOss(config, dtype=dtype, device="meta", experts=stored_form.name).state_dict()
    _check_tensors(folder, stored, expected, stored_form)
    model = GptOss(config, dtype=dtype, device=device, experts=form.name, activation_checkpointing=activation_checkpointing,
                   memory_gb=memory_gb, host_gb=host_gb, placement=placement, share=share)
    _pin_embedding(model)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    rounding = _Rounding(form)
    if share is not None:
        stored = {name: _own_part(tensor, share) if ".mlp.experts." in name else tensor for name, tensor in stored.items()}
    with torch.no_grad():
        for name, target in sorted(targets.items(), key=lambda item: _first_source(item[0], stored, stored_form, form)):
            if name in stored:
                target.copy_(stored[name].read())
            elif not form.is_packed:
                _dequantize_into(target, name, stored, stored_form, model.device)
            elif name.endswith(form.suffixes[0]):  # a projection's tensors are packed at once
                dense = name.removesuffix(form.suffixes[0])
                _pack_into([targets[dense + suffix] for suffix in form.suffixes], stored[dense], rounding, model.device)
    rounding.warn(folder)
    if product_path(model.lm_head.weight) == "triton":
        for block in model.model.layers:
            block.mlp.experts.arrange()
    return model


def _own_part(stored: Stored, share: ExpertShare) -> Stored:
    """The experts of this process, of a tensor [E, ...] in a file, which is mapped: others are not read."""
    part = share.of(stored.shape[0])
    return DerivedTensor(stored.path, stored.dtype, (part.stop - part.start, *stored.shape[1:]), lambda: stored.read()[part])


def read_checkpoint_config(source: str | Path) -> GptOssConfig:
    """The architecture of a checkpoint that `load_model` would load; raises CheckpointError like it."""
    return _read_headers(weights_folder(source))[0]


def _pin_embedding(model: GptOss) -> None:
    """Moves a GPU model's input embedding into pinned host memory, if host_gb has room for it."""
    embedding = model.model.embed_tokens
    size = embedding.weight.numel() * embedding.weight.element_size()
    if embedding.weight.is_cuda and model.memory.claim_host(pinned_bytes(size)):
        pinned = torch.empty(embedding.weight.shape, dtype=model.dtype, pin_memory=True)
        embedding.weight = torch.nn.Parameter(pinned, requires_grad=False)


def _first_source(name: str, stored: dict[str, Stored], stored_form: type[ExpertWeights],
                  form: type[ExpertWeights]) -> tuple[str, str]:
    """Sorts tensors by file, so that each file is read once from beginning to end."""
    if name in stored:
        return str(stored[name].path), name
    projection = next(name.removesuffix(suffix) for suffix in form.suffixes if name.endswith(suffix))
    return str(stored[projection + stored_form.suffixes[0]].path), name


@dataclass
class _Rounding:
    """Packs weights and adds up the error that this makes."""

    form: type[ExpertWeights]
    error: float = 0.0  # sums of squares over the weights that were packed: of what rounding changed,
    change: float = 0.0  # of what the adapter changed,
    weights: float = 0.0  # and of the weights themselves

    def pack(self, wanted: torch.Tensor, base: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """One expert's tensors; wanted [out, in] fp32, with the adapter merged into `base` if there is one."""
        packed = self.form.pack(wanted)
        if self.form.is_packed:
            self.error += (self.form.unpack(*packed, dtype=torch.float32) - wanted).square().sum().item()
            self.change += (wanted - base).square().sum().item() if base is not None else 0.0
            self.weights += wanted.square().sum().item()
        return packed

    def warn(self, folder: str | Path) -> None:
        if self.weights > 0:
            error, change = (f"{math.sqrt(part / self.weights):.2%}" for part in (self.error, self.change))
            warnings.warn(
                f"{folder}: packing experts into {self.form.name.upper()} rounded them by {error} (rms, of their own size)"
                + (f"; the merged adapter changed them by {change}" if self.change else ""),
                stacklevel=3,
            )


def _read_headers(folder: Path) -> tuple[GptOssConfig, dict[str, Stored], type[ExpertWeights]]:
    """Config, stored tensors under the model's names, and the format that experts are stored in."""
    try:
        config = read_config(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    try:
        stored_form = stored_format(config.quantization, config)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    stored = list_tensors(folder, allow_unindexed=not config.raw)  # only Hugging Face configs are kept raw
    if is_original(stored):  # its config.json does not say how the experts are stored
        stored = to_hugging_face(stored, config)
        stored_form = _format_in(stored) or stored_form
    if is_bitsandbytes(stored, config):
        stored = unpacked_names(stored, config)
        if (found := _format_in(stored)) is not None and not found.is_packed:
            stored_form = found  # dense projections alone are packed
    return config, stored, stored_form


def _format_in(stored: dict[str, Stored]) -> type[ExpertWeights] | None:
    """The format of the experts in the files, None if they have none."""
    return next((form for form in FORMATS.values() for name in stored
                 if name.endswith(tuple(f".mlp.experts.{leaf}{form.suffixes[0]}" for leaf in PROJECTIONS))), None)


def _check_tensors(
    folder: Path, stored: dict[str, Stored], expected: dict[str, torch.Tensor], stored_form: type[ExpertWeights]
) -> None:
    """Raises CheckpointError listing every difference between the stored tensors and the expected ones."""
    missing = [name for name in expected if name not in stored]
    unused = [f"{name} ({found.path.name})" for name, found in stored.items() if name not in expected]
    misshapen = misshapen_tensors(stored, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    mistyped = []
    for name, tensor in expected.items():
        is_bytes = tensor.dtype == torch.uint8
        if name in stored and stored[name].dtype not in (("U8",) if is_bytes else _FLOAT_DTYPES):
            mistyped.append(f"{name} is {stored[name].dtype}, expected {'U8' if is_bytes else 'BF16 (or F16, F32)'}")
    problems = {"missing": missing, "not used by the model": unused, "wrong shape": misshapen, "wrong dtype": mistyped}
    if not any(problems.values()):
        return
    lines = [f"{folder}: the tensors do not fit the model that its config.json describes"]
    lines += [f"  {kind} ({len(names)}): {shortened(names)}" for kind, names in problems.items() if names]
    if (found := _format_in(stored)) not in (None, stored_form):
        lines.append(f"  config.json says the experts are {stored_form.description}, the files hold {found.description}: "
                     "correct quantization_config in config.json")
    else:
        lines.append("  fetch the checkpoint again, or correct config.json")
    raise CheckpointError("\n".join(lines))


def _dequantize_into(target: torch.Tensor, name: str, stored: dict[str, Stored], stored_form: type[ExpertWeights],
                     device: torch.device) -> None:
    parts = [stored[name + suffix].read().to(device) for suffix in stored_form.suffixes]
    for expert, weight in enumerate(target):  # [in, out]; one expert at a time bounds the working memory
        weight.copy_(stored_form.unpack(*(part[expert] for part in parts), dtype=target.dtype).T)


def _pack_into(targets: list[torch.Tensor], stored: Stored, rounding: _Rounding, device: torch.device) -> None:
    """Packs a projection's dense weights, stored as [E, in, out], into its tensors; one expert at a time."""
    for expert, weight in enumerate(stored.read()):
        packed = rounding.pack(weight.to(device).T.float())
        for target, part in zip(targets, packed, strict=True):
            target[expert].copy_(part)


def _held_tensors(model: GptOss) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, module by module: as state_dict(), which would drop what FSDP2 has gathered."""
    for prefix, module in model.named_modules():
        for tensors in (module.named_parameters, module.named_buffers):
            yield from ((name, tensor.detach()) for name, tensor in tensors(prefix, recurse=False))


@dataclass
class _Export:
    """The tensors of an export."""

    model: GptOss
    form: type[ExpertWeights]
    dtype: torch.dtype  # of what is not packed
    merges: bool  # the adapter, except that of experts
    merges_experts: bool
    rounding: _Rounding

    def plan(self) -> list[TensorToWrite]:
        """The tensors in Hugging Face names, each made when it is asked for."""
        experts: dict[str, list[TensorToWrite]] = {}  # a projection's tensors come where its first one is held
        for layer, block in enumerate(self.model.model.layers):
            for leaf in PROJECTIONS:
                first, *others = (f"model.layers.{layer}.mlp.experts.{held}" for held in block.mlp.experts.held(leaf))
                experts |= {first: self._expert_tensors(layer, leaf)} | {name: [] for name in others}
        plan = []
        for name, tensor in _held_tensors(self.model):
            if name in experts:
                plan += experts[name]
            elif "lora_" not in name:
                plan.append(TensorToWrite(name, tensor.numel() * self.dtype.itemsize, partial(self._dense, name, tensor)))
        return plan

    def _dense(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (merged_weight(self.model, name, tensor) if self.merges else tensor).to("cpu", self.dtype)

    def _expert_tensors(self, layer: int, leaf: str) -> list[TensorToWrite]:
        """A projection's tensors: merged, and packed or rounded to the dtype, expert by expert as they are made."""
        name, experts = f"model.layers.{layer}.mlp.experts.{leaf}", self.model.model.layers[layer].mlp.experts
        num_experts = self.model.config.num_local_experts
        shapes = [(shape, own or self.dtype) for shape, own in self.form.stored(num_experts, *experts.sizes[leaf])]
        is_untouched = self.form is experts.weight_format and not (self.merges_experts and has_expert_adapter(self.model, name))
        waiting: list[torch.Tensor] = []  # all are made at once and handed out one after the other

        def make() -> torch.Tensor:
            if not waiting:
                waiting.extend(torch.empty(shape, dtype=own) for shape, own in shapes)
                for expert in range(num_experts):
                    parts = experts.as_stored(leaf, expert) if is_untouched else self._pack(name, experts, expert)
                    for whole, part in zip(waiting, parts, strict=True):
                        whole[expert].copy_(part)
            return waiting.pop(0)

        return [TensorToWrite(name + suffix, math.prod(shape) * own.itemsize, make)
                for suffix, (shape, own) in zip(self.form.suffixes, shapes)]

    def _pack(self, name: str, experts: RoutedExperts, expert: int) -> tuple[torch.Tensor, ...]:
        base = experts.dense(name.rpartition(".")[2], expert)  # [out, in] fp32
        wanted = merged_weight(self.model, name, base, expert=expert) if self.merges_experts else base
        return self.rounding.pack(wanted, base)


def written_format(model: GptOss, experts: str) -> type[ExpertWeights]:
    """The format of the experts in an export. Raises ValueError for an unknown name, CheckpointError for a format that is not
    written."""
    written = [form.name for form in FORMATS.values() if form.is_written]
    if experts not in ("as_loaded", *written):
        raise ValueError(f"experts={experts!r}; allowed: as_loaded, {', '.join(written)}")
    form = model.expert_format if experts == "as_loaded" else FORMATS[experts]
    if model.share is not None:
        raise CheckpointError("this process holds some of the model's experts: let scripts/export.py, which loads all, export it")
    if not form.is_written:
        raise CheckpointError(f"experts packed as {form.name.upper()} are read, not written; export with --experts "
                              f"{' or '.join(written)}, in the Hugging Face layout")
    return form


def keeps_expert_adapter(model: GptOss, experts: str) -> bool:
    """Whether a merged export leaves the experts' adapter beside them: packed experts that stay as they are."""
    return experts == "as_loaded" and model.expert_format.is_packed and has_expert_adapter(model)


def save_model(model: GptOss, folder: str | Path, *, merge_lora: bool, experts: str = "as_loaded", max_shard_bytes: float = 5e9,
               dtype: torch.dtype = torch.bfloat16, beside: dict[str, Path | str] | None = None, name: str | None = None) -> None:
    """Writes the model in Hugging Face layout, atomically, into a folder that does not exist or is empty.

    merge_lora: adds the adapter to the weights it belongs to (in fp32, rounded once to `dtype`; small changes are
        lost in that rounding where they are under 2^-9 of a weight in bfloat16). False writes the base alone; trained
        norms and sinks are part of it either way.
    experts: "as_loaded" keeps their form, except for NF4, which is not written. MXFP4 is then written byte for byte; if an
        adapter should be merged, it goes to FOLDER/expert_adapter in PEFT form instead (attention and router are merged), with a
        warning. "bf16" writes dense experts of `dtype`. "mxfp4" packs: what is not on the grid is rounded, 11 % rms
        for dense weights, more than most adapters change, hence a warning with the figures.
    dtype: of all tensors that are not packed; the published checkpoints and vLLM use bfloat16. The dtype of the model
        itself (float32) gives an exact copy.
    beside: more files of the folder by name (tokenizer_files, a model card), copies of others or text.
    name: hub id of the export, for the adapter of experts that goes with it; None: its path.
    Host memory beyond the model: one shard, max_shard_bytes. Raises CheckpointError, with nothing changed on disk.
    """
    form, beside = written_format(model, experts), beside or {}
    files = {"config.json": _hub_config(model.config, form, dtype), **beside}
    if "generation_config.json" not in beside:
        files["generation_config.json"] = _generation_config(model.config, beside.get("tokenizer.json"))
    keeps_adapter = merge_lora and keeps_expert_adapter(model, experts)
    export = _Export(model, form, dtype, merges=merge_lora, merges_experts=merge_lora and not keeps_adapter,
                     rounding=_Rounding(form))
    plan = export.plan()
    with atomic_folder(Path(folder), num_bytes=sum(tensor.num_bytes for tensor in plan), files=files) as temporary:
        write_shards(temporary, plan, max_shard_bytes=max_shard_bytes)
        if keeps_adapter:
            base = name or str(Path(folder).absolute())
            save_adapter(model, temporary / "expert_adapter", only_experts=True, base_model=base)
    if keeps_adapter:
        warnings.warn(f"{folder}: the experts stay as they were ({form.name.upper()}) and their adapter is in expert_adapter/; "
                      "--experts bf16 merges it", stacklevel=2)
    export.rounding.warn(folder)


def save_original(model: GptOss, folder: str | Path, *, merge_lora: bool, experts: str = "as_loaded",
                  max_shard_bytes: float = 5e9, beside: dict[str, Path | str] | None = None) -> None:
    """Writes the model in OpenAI's original layout, bfloat16, atomically; experts and beside as of save_model.

    OpenAI's own loader reads packed experts only; dense ones are read back by this project. Raises CheckpointError,
    also where an adapter on packed experts would have to be merged into them as they are.
    """
    form = written_format(model, experts)
    if merge_lora and keeps_expert_adapter(model, experts):
        raise CheckpointError(
            f"{folder}: the adapter of packed experts cannot be merged into them as they are, and the original layout has no "
            "place beside: give --experts bf16 (dense ones, 4 times the size) or --experts mxfp4 (packed again, which rounds), "
            "or leave --layout out"
        )
    try:
        files = {"config.json": model.config.to_original(), **(beside or {})}
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    export = _Export(model, form, torch.bfloat16, merges=merge_lora, merges_experts=merge_lora, rounding=_Rounding(form))
    plan = from_hugging_face(export.plan(), model.config)
    with atomic_folder(Path(folder), num_bytes=sum(tensor.num_bytes for tensor in plan), files=files) as temporary:
        write_shards(temporary, plan, max_shard_bytes=max_shard_bytes, is_original=True)
    export.rounding.warn(folder)


def tokenizer_files(folder: str | Path | None) -> list[Path]:
    """The tokenizer files in a folder. Raises CheckpointError if there are none."""
    if folder is None:
        return []
    folder = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder}: no tokenizer.json to copy into the export; name the folder of the tokenizer")
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def _hub_config(config: GptOssConfig, form: type[ExpertWeights], dtype: torch.dtype) -> dict:
    is_as_read = form.is_packed and config.quantization.get("quant_method") == form.quant_method
    quantization = config.quantization if is_as_read else form.quantization or {}
    described = config.to_hf(quantization=quantization) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    # the original layout names no token ids, and transformers refuses ids beyond a small vocabulary
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        described["pad_token_id"] = None
    if max(config.stop_ids) >= config.vocab_size:
        del described["eos_token_id"]
    return described


def _generation_config(config: GptOssConfig, tokenizer: Path | None) -> dict:
    """Stop ids for generation: config.json names only one, with which a model would not stop after a call."""
    added = read_json(tokenizer).get("added_tokens", []) if tokenizer is not None else []
    ids = {token["content"]: token["id"] for token in added}
    named = [ids[token] for token in ("<|return|>", "<|endoftext|>", "<|call|>") if token in ids]
    stop_ids = named or ([200002, 199999, 200012] if config.stop_ids == [200002] else config.stop_ids)
    written = {"do_sample": True, "eos_token_id": stop_ids, "pad_token_id": config.pad_token_id}
    return written if max(stop_ids) < config.vocab_size else {"do_sample": True}
