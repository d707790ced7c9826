"""From a config to a policy: device, tokenizer, model, adapter; and from a run's folder back to the policy it holds.

Shared by the three entry points. Trained parameters of a run live in its checkpoints; the base comes from `model.path`, or from
`model.architecture` and the seed.
"""
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo.config import ConfigError, Device, Dtype, InferenceConfig, ModelConfig, Train, TrainConfig, read_saved_config
from grpo.configuration.targets import resolve_target
from grpo.environment import tiny_tokenizer
from grpo.rollout.session import Sampler
from grpo.run.checkpoint import RunState, load_run
from grpo.run.memory import GpuMemory, gpu_memory, needs_of_inference, unplanned
from models.chat.tokenizer import Tokenizer
from models.config import GptOssConfig
from models.expert_share import ExpertShare
from models.formats.files import checkpoint_folder
from models.formats.hugging_face import load_model, read_checkpoint_config
from models.formats.peft import check_adapter, load_adapter
from models.gpt_oss import GptOss
from models.lora import LoraConfig, attach_lora, set_full_training
from models.memory_plan import MemoryPlan

PARAM = "param."  # prefix of trained parameters in a run's checkpoint


def prepare_device(config: TrainConfig | InferenceConfig) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the config asks for; sets the number of CPU threads as well. Raises ConfigError for a GPU that is
    not there, and for a dtype that the device does not compute in."""
    if config.threads:
        torch.set_num_threads(config.threads)
    # read at the first use of a GPU: memory is reserved as it is needed, not in segments that fit badly
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if config.device == Device.cuda and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no CUDA device here; set device=cpu (or auto), or install a CUDA "
                          "build of torch")
    is_gpu = config.device != Device.cpu and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")  # some calls want a number
    return device, select_dtype(config.dtype, device)


def select_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The torch dtype; `auto` is bfloat16 on a GPU (float16 where it has no bfloat16) and float32 on the CPU. Raises ConfigError
    for a dtype that the device does not compute in."""
    is_gpu = device.type == "cuda"
    has_bf16 = not is_gpu or torch.cuda.get_device_capability(device) >= (8, 0)  # torch's own check counts emulation
    if dtype == Dtype.auto:
        return torch.float32 if not is_gpu else torch.bfloat16 if has_bf16 else torch.float16
    if dtype == Dtype.float16 and not is_gpu:
        raise ConfigError("dtype = 'float16': for GPUs; on the CPU set dtype=float32 (or auto)")
    if dtype == Dtype.bfloat16 and not has_bf16:
        raise ConfigError(f"dtype = 'bfloat16': {torch.cuda.get_device_name(device)} has none (its compute capability is below "
                          "8.0); set dtype=float16 (or auto)")
    return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float16: torch.float16}[dtype]


def check_trainable(model: ModelConfig, dtype: torch.dtype) -> None:
    """Raises ConfigError where a float16 model would train more than an adapter."""
    if dtype == torch.float16 and model.train == Train.full:
        raise ConfigError("model.train = 'full': weights that train need more range than float16 has; set model.train=lora, or "
                          "dtype=float32 (bfloat16 on a GPU that has it)")


def build_tokenizer(model: ModelConfig, env: dict | None) -> Tokenizer:
    """model.tokenizer, else the checkpoint's, else the tiny one that the environment's class brings."""
    source = model.tokenizer or model.path
    if source is not None:
        path = Path(source).expanduser()
        return Tokenizer.load(path if path.exists() else checkpoint_folder(source))
    target = resolve_target((env or {}).get("_target_"), "env")
    if not hasattr(target, "build_tokenizer"):
        raise ConfigError(f"model.tokenizer = None: a model without a checkpoint needs one, and {target.__name__} brings none; "
                          "set model.tokenizer=FOLDER with a tokenizer.json")
    return tiny_tokenizer(target)


def read_architecture(model: ModelConfig, tokenizer: Tokenizer) -> GptOssConfig:
    """The sizes of the model that `build_model` builds, without its weights. Raises ConfigError where the tokenizer has ids that
    the model has not."""
    if model.path is not None:
        architecture = read_checkpoint_config(model.path)
    else:
        defaults = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.return_, "pad_token_id": tokenizer.endoftext}
        architecture = GptOssConfig.from_architecture({**defaults, **model.architecture})
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(f"model.tokenizer: its largest id is {tokenizer.vocab_size - 1}, the model has a vocabulary of "
                          f"{architecture.vocab_size}; they do not belong together")
    return architecture


def build_model(model: ModelConfig, tokenizer: Tokenizer, *, seed: int, device: torch.device, dtype: torch.dtype,
                plan: MemoryPlan | None = None, share: ExpertShare | None = None) -> GptOss:
    """The untrained policy: base weights, with fresh adapters or with full training enabled. plan: where what lies on a GPU.
    share: which experts this process has."""
    if dtype == torch.float16:  # the library would add partial sums in float16, and they can pass its 65504
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    architecture = read_architecture(model, tokenizer)
    host_gb, placement = 0.0, None
    if plan is not None:
        host_gb, placement = (plan.host["embedding"] + plan.host["activations"]) / 1e9, plan.placement
    settings = {"device": device, "dtype": dtype, "activation_checkpointing": model.activation_checkpointing,
                "memory_gb": model.memory_gb, "host_gb": host_gb, "placement": placement, "share": share}
    if model.path is not None:
        policy = load_model(model.path, experts=str(model.experts), **settings)
    else:
        policy = GptOss(architecture, experts="bf16", **settings)
        policy.init_weights(seed)
    if model.train == Train.full:
        set_full_training(policy)
    else:
        attach_lora(policy, lora_config(model), seed=seed)
    check_sinks(policy, model)
    return policy


def check_sinks(policy: GptOss, model: ModelConfig) -> None:
    """Raises ConfigError for a head without a sink (minus infinity) where sinks are trained: no checkpoint is saved that holds a
    value that is not finite."""
    for number, block in enumerate(policy.model.layers):
        sinks = block.self_attn.sinks
        if sinks.requires_grad and not sinks.isfinite().all():
            heads = ", ".join(map(str, (~sinks.isfinite()).nonzero().flatten().tolist()))
            raise ConfigError(f"model.path = {model.path!r}: sinks of layer {number} are not finite (heads {heads}), and this "
                              "run trains sinks: set model.lora.train_sinks=false, or write -10000 there, which is none either")


def lora_config(model: ModelConfig) -> LoraConfig:
    lora = model.lora
    return LoraConfig(lora.rank, lora.alpha, list(lora.targets), lora.train_sinks, lora.train_norms)


def has_initial_adapter(model: ModelConfig) -> bool:
    """Whether training begins with an adapter that somebody else wrote."""
    return model.lora is not None and model.lora.adapter is not None


def check_initial_adapter(model: ModelConfig) -> None:
    """Compares that adapter, if the config names one, with model.lora; before the base is loaded."""
    if has_initial_adapter(model):
        check_adapter(Path(model.lora.adapter).expanduser(), lora_config(model))


def load_initial_adapter(policy: GptOss, model: ModelConfig) -> None:
    """Reads that adapter into the policy. For a resumed run the checkpoint has its trained values."""
    if has_initial_adapter(model):
        load_adapter(policy, Path(model.lora.adapter).expanduser())


def parameters_of_run(policy: GptOss, model: ModelConfig) -> dict[str, torch.nn.Parameter]:
    """The parameters that a run changes: the trained ones and, if training begins with an adapter, the norms and sinks that it
    may have."""
    return {name: parameter for name, parameter in policy.named_parameters()
            if parameter.requires_grad or (has_initial_adapter(model) and name.endswith(("norm.weight", "sinks")))}


def parameter_tensors(policy: GptOss, model: ModelConfig) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the policy, so that the run needs the adapter that it began with no more."""
    return {PARAM + name: parameter.detach() for name, parameter in parameters_of_run(policy, model).items()}


@torch.no_grad()
def load_parameters(policy: GptOss, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copies parameters from a checkpoint's tensors; raises ConfigError where they are not those of this model."""
    parameters = {PARAM + name: parameter for name, parameter in policy.named_parameters()}
    stored = {name: policy.own(name, tensor) for name, tensor in tensors.items() if name.startswith(PARAM)}
    wrong = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in stored]
    wrong += [name for name, tensor in stored.items() if name not in parameters or parameters[name].shape != tensor.shape]
    if wrong:
        raise ConfigError(f"{source}: {len(wrong)} trained parameters do not fit the configured model, first {min(wrong)}; "
                          "use the config of the run that saved them")
    for name, tensor in stored.items():
        parameters[name].copy_(tensor)


@dataclass
class Loaded:
    """A policy that samples."""

    policy: GptOss
    tokenizer: Tokenizer
    trained: TrainConfig | None  # the config of the run that it comes from
    step: int | None  # of that run
    sampler: Sampler


def load_policy(config: InferenceConfig, env: dict | None, *, max_batch: int) -> Loaded:
    """The policy of the run, or the model, that the config names, with a sampler of `max_batch` rows. `env` may bring a tokenizer
    for a model. The config gets the form of turns that the run was trained with."""
    device, dtype = prepare_device(config)
    trained, state = None, None
    memory = _plan_inference(config, max_batch, device, dtype) if device.type == "cuda" else unplanned(device)
    if config.run is not None:
        policy, tokenizer, trained, state = load_run_policy(config.run, step=config.step, device=device, dtype=dtype,
                                                            plan=memory.plan)
        config.turns.form = trained.turns.form  # as the run was trained
    else:
        tokenizer = build_tokenizer(config.model, env)
        check_initial_adapter(config.model)
        policy = build_model(config.model, tokenizer, seed=config.seed, device=device, dtype=dtype, plan=memory.plan)
        load_initial_adapter(policy, config.model)
    memory.for_sampling(policy)
    sampler = Sampler(policy, tokenizer.stop_ids, max_batch=max_batch, seed=config.seed, **memory.sampler_settings())
    sampler.on_cache = memory.cache_became
    return Loaded(policy, tokenizer, trained, state and state.step, sampler)


def _plan_inference(config: InferenceConfig, max_batch: int, device: torch.device, dtype: torch.dtype) -> GpuMemory:
    model = config.model if config.run is None else read_saved_config(Path(config.run).expanduser() / "config.yaml").model
    if model.path is None:  # a model from scratch is small
        return unplanned(device)
    needs = needs_of_inference(config, model, read_checkpoint_config(model.path), max_rows=max_batch, dtype=dtype)
    return gpu_memory(needs, model, device)


def load_run_policy(run_dir: str | Path, *, step: int | None, device: torch.device, dtype: torch.dtype,
                    plan: MemoryPlan | None = None) -> tuple[GptOss, Tokenizer, TrainConfig, RunState]:
    """The policy of a run at a checkpoint (the newest by default), for evaluation, chat and export."""
    run_dir = Path(run_dir).expanduser()
    config = read_saved_config(run_dir / "config.yaml")
    state = load_run(run_dir, step=step)
    if state is None:
        raise ConfigError(f"run = {str(run_dir)!r}: it has no checkpoint yet; wait for one or train with checkpoint.every=N")
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    policy = build_model(config.model, tokenizer, seed=config.seed, device=device, dtype=dtype, plan=plan)
    load_parameters(policy, state.tensors, f"{run_dir}, step {state.step}")
    return policy, tokenizer, config, state
