"""How far recorded log-probs are from those of a run's checkpoints."""

import torch

from grpo.config import read_saved_config
from grpo.run.checkpoint import load_run
from grpo.run.policy import load_parameters


def gaps(policy, run_dir, version, batch):
    """[T]: of each token's recorded log-prob to that of the run's policy after `version` steps, whose weights `policy` gets."""
    load_parameters(policy, load_run(run_dir, step=version).tensors, "test")
    with torch.no_grad():
        log_probs = policy.log_probs(batch.tokens, batch.cu_seqlens, mask=batch.loss_mask,
                                     temperature=read_saved_config(run_dir / "config.yaml").rollout.temperature)[0]
    return (log_probs - batch.sampler_log_probs).abs()
