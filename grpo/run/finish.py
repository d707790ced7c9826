"""The end of a training run: its checkpoints, its export, and the next commands to type."""
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from grpo.config import ConfigError, TrainConfig, run_folder, shown
from grpo.configuration.launch import PREEMPTED, typed_words
from grpo.distributed.experts import whole_tensors
from grpo.distributed.place import find_place
from grpo.distributed.ranks import leads
from grpo.out_of_memory import is_out_of_memory
from grpo.record.terminal import print_error
from grpo.rollout.session import Interrupted
from grpo.run.checkpoint import SaveError, save_run
from grpo.run.export_files import write_adapter, write_model
from grpo.run.failures import DeadRun, Failure
from grpo.run.model_card import Origin
from grpo.run.policy import parameter_tensors
from grpo.run.rollouts import write
from grpo.run.start import OPTIM, Run, divides_weights
from models.formats.atomic import remove


def save(run: Run) -> None:
    """Saves a checkpoint of the finished steps, after the metrics. Raises FloatingPointError if a tensor is not finite, and
    SaveError if the run's folder was moved. Only rank 0 writes; where ranks divide the model, all call it."""
    if leads(run.ranks):
        run.lock.check_in_place()
    elif run.shards is None:
        return
    if run.saved_step == run.step:
        return
    optimizer_state = run.optimizer.state_dict() if run.shards is None else run.shards.whole_state(keeps=leads(run.ranks))
    tensors = parameter_tensors(run.policy, run.config.model)
    tensors |= run.reference.state_dict() if run.reference is not None else {}
    tensors = tensors if run.policy.share is None else whole_tensors(run.policy, tensors, keeps=leads(run.ranks))
    if not leads(run.ranks):
        run.saved_step = run.step
        return
    run.metrics.set_status("saving")
    if divides_weights(run) and run.policy.device.type == "cpu":  # FSDP2 cannot drop memory that numpy has seen
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors |= {OPTIM + name: tensor for name, tensor in optimizer_state.items()}
    for name, tensor in tensors.items():
        # as a norm, which needs no memory: there may be none left
        if tensor.is_floating_point() and tensor.numel() and not torch.linalg.vector_norm(tensor, torch.inf).isfinite():
            raise FloatingPointError(f"step {run.step}: {name} is not finite after the update, so no checkpoint is saved and "
                                     "the last one stands; start another run with a lower optim.lr or optim.weight_decay")
    state = {"wandb_id": run.metrics.wandb.run_id, "num_tokens": run.num_tokens, "made_of": run.made_of,
             "steps_without_update": run.steps_without_update,
             **({} if run.history is None else {"prompt_pass_rates": run.history.rates}),
             **({} if run.entropy is None else {"entropy": run.entropy.state})}
    if run.config.rollout.max_staleness:
        state["rollouts"], drawn = write([*run.rollouts, *run.begun])
        tensors |= drawn
    run.metrics.sync()
    best = run.config.checkpoint.best and run.metrics.best(run.config.checkpoint.best)
    save_run(run.run_dir, step=run.step, tensors=tensors, keep=run.config.checkpoint.keep, state=state,
             spared=best["step"] if best else None)
    run.saved_step = run.step


def save_best(run: Run) -> None:
    """Saves a checkpoint if the evaluation of this step is the best so far by `checkpoint.best`. Raises ConfigError if
    evaluations have no such metric."""
    name = run.config.checkpoint.best
    if name is None:
        return
    is_best = leads(run.ranks) and _is_best(run, name)
    if run.shards is not None:
        is_best = run.ranks.exchange("the best evaluation", is_best)[0]
    if is_best:
        save(run)


def _is_best(run: Run, name: str) -> bool:
    names = run.metrics.eval_names(run.step)
    if name not in names:
        raise ConfigError(f"checkpoint.best = {name!r}: evaluations have no such metric; they have {', '.join(names)}")
    best = run.metrics.best(name)
    return best is not None and best["step"] == run.step


def export_policy(run: Run) -> tuple[Path, str] | None:
    """Exports the policy at the end of a run: a PEFT adapter, or a Hugging Face checkpoint of a fully trained model. Returns the
    folder and a text about its content; None on other ranks than 0. All call it."""
    whole = {}
    if run.policy.share is not None:
        parameters = run.policy.trainable_parameters()
        found = whole_tensors(run.policy, parameters, keeps=leads(run.ranks))
        whole = {parameters[name]: tensor for name, tensor in found.items()}
    if not leads(run.ranks):
        return None
    if run.optimizer.num_updates == 0:
        run.metrics.warn("no step made an update: what is exported has learnt nothing from rewards")
    is_lora = run.config.model.lora is not None
    folder = run.run_dir / ("adapter" if is_lora else "model")
    remove(folder)  # of fewer steps, where a finished run went on
    origin = Origin(run.config.model.path, run.run_dir / "tokenizer", run.config, run.run_dir, run.step)
    if is_lora:
        return folder, write_adapter(run.policy, folder, origin, read=lambda parameter: whole.get(parameter, parameter))
    return folder, write_model(run.policy, folder, origin, merge_lora=False, dtype=run.policy.dtype)


def _can_save(run: Run, error: BaseException) -> bool:
    """Whether there are finished steps, and this process has them whole, or with other ranks."""
    if isinstance(error, (SaveError, OSError)) or not run.is_between_steps or run.optimizer.is_updating:
        return False
    if run.step == 0 and (run.config.warmup is None or not isinstance(error, Interrupted)):
        return False  # nothing was learnt yet
    return run.shards is None or isinstance(error, (Interrupted, DeadRun))  # else the others may be in the middle of a step


def keep_finished_steps(run: Run | None, error: BaseException) -> str:
    """Saves the finished steps after an error. Returns a text about it for the error's message."""
    if run is None or run.optimizer is None:
        return ""
    can_save = _can_save(run, error)
    if run.shards is not None and run.saved_step != run.step:
        can_save = run.ranks.all_save(can_save)
    if not can_save:
        return ""
    try:
        if run.shards is not None:
            run.shards.gather()
        save(run)
    except FloatingPointError:
        return ""
    except (SaveError, OSError) as failure:
        return f"; and {failure}"
    except (RuntimeError, MemoryError) as failure:
        if not is_out_of_memory(failure):
            raise
        return f"; memory is not enough to save step {run.step} either: the newest checkpoint stands"
    return f"; saved after step {run.step}"


def report_failure(failure: Failure, config: TrainConfig) -> int:
    """Prints why a run ended and, if a signal stopped it, the command that resumes it. Returns the exit code."""
    if failure.code != PREEMPTED:
        print_error("error", failure.message)
        return failure.code
    is_saved = any((run_folder(config) / "checkpoints").glob("step_*"))
    print_error("stopped", failure.message + (
        f"; resume with: {resume_command(config)}" if is_saved
        else "; nothing was learnt yet, so there is nothing to resume: start again with the same command"))
    return failure.code


def resume_command(config: TrainConfig) -> str:
    """The command line that continues this run; of a sweep's job, this job alone."""
    return train_command(f"name={config.name}", "resume=true")


def train_command(*words: str) -> str:
    """This run's command line, with these words instead of its own for their keys, and for `name` and `resume`."""
    replaced = {"name", "resume", *(word.partition("=")[0] for word in words)}
    kept = [word for word in typed_words() if word.lstrip("+").partition("=")[0] not in replaced]
    return " ".join([launcher(os.environ), shlex.join(["-m", "grpo.train", *kept, *words])])


def launcher(variables: Mapping[str, str]) -> str:
    """What starts Python as this process was started."""
    if (place := find_place(variables)) is None:
        return "python"
    if not place.is_torchrun:
        return "srun python"
    return f"torchrun --nproc-per-node {place.num_local}" if place.num_local == place.num_ranks else "torchrun ..."


def next_commands(run: Run, exported: tuple[Path, str]) -> list[str]:
    """What to type after a finished run."""
    run_dir, weights = shlex.quote(f"run={shown(run.run_dir)}"), shlex.quote(str(shown(exported[0])))
    return [f"python -m grpo.generate {run_dir}", f"python -m grpo.evaluate {run_dir} num_samples=8",
            train_command(f"seed={run.config.seed + 1}"), f"ls {weights}    # {exported[1]}"]
