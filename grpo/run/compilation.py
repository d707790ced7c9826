"""The kernels of a run, compiled before its first step by processes side by side, while the weights are loaded
(models/rehearsal.py). What fails here, or was not foreseen, is compiled by the launch that needs it."""
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from grpo.config import Train, TrainConfig
from grpo.configuration.validate import is_evaluating
from grpo.rollout.sampling import SamplingParams
from grpo.run.memory import needs_of
from grpo.run.policy import lora_config
from models.config import GptOssConfig
from models.rehearsal import Rehearsal, can_rehearse, compile_beside, gpu_here


def rehearsal_of(config: TrainConfig, architecture: GptOssConfig, *, prompt_len: int, dtype: torch.dtype) -> Rehearsal:
    """What decides which kernels a training run needs, for prompts of up to prompt_len tokens."""
    rollout, optim, evaluation = config.rollout, config.optim, config.eval
    needs = needs_of(config, architecture, prompt_len=prompt_len, dtype=dtype)
    settings = [SamplingParams.of(rollout)]
    if is_evaluating(evaluation):
        settings += [SamplingParams.of(rollout, evaluation)] * (evaluation.num_samples > 0)
        settings += [SamplingParams(max_new_tokens=1, greedy=True)] * evaluation.greedy
    draws = {params.plain.is_greedy: params.plain for params in settings if params.plain is not None}
    return Rehearsal(
        config=replace(architecture, raw={}), dtype=dtype, experts=needs.experts,
        lora=None if config.model.train == Train.full else lora_config(config.model),
        activation_checkpointing=config.model.activation_checkpointing,
        max_rows=min(rollout.max_batch, max(rollout.prompts_per_step * rollout.group_size, needs.eval_rows)),
        max_len=min(architecture.max_position_embeddings, 1 << (needs.prompt_len + rollout.max_new_tokens - 1).bit_length()),
        draws=[draws[is_greedy] for is_greedy in sorted(draws)], filters=any(params.plain is None for params in settings),
        shares_prompts=optim.share_prompts, scores=config.needs_reference or optim.minibatches * optim.epochs > 1,
        moments=str(optim.moments), weights=str(optim.weights),
        full_kl=needs.full_kl, entropy_loss=config.entropy.coefficient > 0, num_sharers=config.distributed.expert_parallel)


SILENCE = 180  # seconds; a kernel takes a few, the rehearsal before the first up to a minute on a slow CPU


class Compilation:
    """A process that compiles what a run will launch, if anything is missing in Triton's cache. wait() waits for its end."""

    def __init__(self, process: subprocess.Popen | None) -> None:
        self.process, self._started = process, time.perf_counter()
        self.num_compiled, self.failures = 0, []

    def wait(self, progress: Callable[[int, int], None], should_stop: Callable[[], bool]) -> float:
        """Returns the seconds since the start. progress(compiled, all) is called after each kernel. The process is ended if
        should_stop() says so, if it says nothing for SILENCE seconds, and by Ctrl-C."""
        if self.process is not None:
            process, heard, self.failures, line = self.process, time.perf_counter(), None, b"[]"
            try:
                while line:
                    if select.select([process.stdout], [], [], 0.5)[0]:
                        heard, line = time.perf_counter(), process.stdout.readline()
                        if line:
                            self._read(json.loads(line), progress)
                    elif should_stop() or time.perf_counter() - heard > SILENCE:
                        break
            finally:  # Ctrl-C too
                if line:
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            code = process.wait()
            if self.failures is None:
                self.failures = [f"the process that compiles ended with code {code}"]
            self.process = None
        return time.perf_counter() - self._started

    def _read(self, line: list, progress: Callable[[int, int], None]) -> None:
        match line:
            case [int(done), int(count)]:
                self.num_compiled = done
                progress(done, count)
            case _:
                self.failures = line


def begin_compiling(config: TrainConfig, architecture: GptOssConfig, *, prompt_len: int, device: torch.device,
                    dtype: torch.dtype) -> Compilation:
    """Starts to compile the kernels of a training run on this device, in the background."""
    if device.type != "cuda" or not can_rehearse(gpu_here(device)):
        return Compilation(None)
    return Compilation(compile_beside(rehearsal_of(config, architecture, prompt_len=prompt_len, dtype=dtype),
                                      gpu_here(device)))


def describe_failures(failures: list[str]) -> str:
    return (f"{len(failures)} kernels could not be compiled before the first step ({failures[0]}); each is compiled when it is "
            "needed")
