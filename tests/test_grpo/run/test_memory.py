"""A run's memory by its plan: what this machine has, what phases allow torch, peaks; on a GPU, the bits of a free run."""

import json
from types import SimpleNamespace

import pytest
import torch
from paths import FIXTURES

import grpo.run.memory
from grpo.configuration.launch import load_config
from grpo.run.memory import GpuMemory, free_host_bytes, needs_of, prompt_len_of, spec_of_gpu, summary, unplanned
from grpo.run.policy import build_model, build_tokenizer
from grpo.train import run_training
from models.config import released
from models.host_store import pinned_bytes
from models.memory_plan import GPU_SPECS, embedding_parameters, plan

CUDA = torch.device("cuda", 0)
GB = 1_000_000_000


class FakeCuda:
    """What torch.cuda says of a GPU of 24 GB."""

    def __init__(self) -> None:
        self.reserved = self.peak = self.beside = 0
        self.fractions: list[float] = []
        self.num_emptied = 0

    def empty(self) -> None:
        self.num_emptied += 1
        self.reserved = min(self.reserved, 10 * GB)

    def install(self, monkeypatch) -> None:
        fakes = {
            "mem_get_info": lambda device: (24 * GB - self.reserved - self.beside, 24 * GB),
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.peak,
            "max_memory_allocated": lambda device: self.peak - 2 * GB,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.reserved),
            "get_device_properties": lambda device: SimpleNamespace(total_memory=24 * GB),
            "set_per_process_memory_fraction": lambda share, device: self.fractions.append(share),
            "get_per_process_memory_fraction": lambda device: self.fractions[-1],
            "empty_cache": self.empty,
            "get_device_name": lambda device: self.name,
            "get_device_capability": lambda device: (9, 0),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(grpo.run.memory, "has_arenas", lambda device: True)


class Recorder:
    """A policy and a sampler that note what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.expert_store = SimpleNamespace(layer_bytes=423_014_400, for_sampling=lambda: self.calls.append("for_sampling"),
                                            for_update=lambda: self.calls.append("for_update"))
        self.memory = SimpleNamespace(memory_gb=None)

    def offload(self) -> None:
        self.calls.append("offload")


def needs_20b(*words):
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", "rollout.prompts_per_step=1", "model.lora.rank=8",
                                   "eval.at_start=false", "eval.at_end=false", "eval.every=0", *words])  # fmt: skip
    architecture = released("openai/gpt-oss-20b")
    return needs_of(config, architecture, prompt_len=prompt_len_of(config, max_len=131_072), dtype=torch.bfloat16)


def test_a_config_becomes_needs():
    needs = needs_20b("rollout.group_size=4", "rollout.top_k=5", "rollout.cache_gb=2", "optim.max_tokens=3000")
    assert (needs.num_prompts, needs.group_size, needs.num_rows, needs.max_rows) == (1, 4, 4, 64)
    assert (needs.prompt_len, needs.new_len, needs.max_tokens, needs.micro_tokens) == (1024, 1024, 3000, 3000)
    assert (needs.experts, needs.filters, needs.cache_bytes, needs.lora_rank) == ("mxfp4", True, 2 * GB, 8)
    assert needs_20b("eval.every=5", "eval.max_prompts=40", "eval.num_samples=2").num_rows == 80


def test_phases_allow_torch_what_is_beside_the_rest(monkeypatch):
    cuda, policy = FakeCuda(), Recorder()
    cuda.install(monkeypatch)
    found = plan(needs_20b(), GPU_SPECS["H200"], limit=15 * GB, host_bytes=100 * GB)
    returning = found.update.num_streamed
    assert found.sampling.num_streamed == 0 < returning
    memory = GpuMemory(found, CUDA, others=0, limits_torch=True)
    assert cuda.fractions == [1.0, (15 * GB - 550_000_000) / (24 * GB)]
    # sampling: arenas hold the cache and the experts that the update has no room for; of modules only some are loaded yet
    cuda.beside = 600_000_000
    memory.for_sampling(policy)
    in_arenas = found.sampling.lines["cache"] + returning * 423_014_400
    assert cuda.fractions[-1] * 24 * GB == pytest.approx(15 * GB - 870_000_000 - in_arenas)
    assert policy.calls == ["for_sampling"] and cuda.num_emptied == 1
    memory.for_sampling(policy)
    assert policy.calls == ["for_sampling"]
    # the update: all but context and modules is torch's, and activations may fill it
    cuda.reserved, cuda.peak, cuda.beside = 10 * GB, 11 * GB, 3 * GB
    memory.for_update(policy, policy)
    assert policy.calls[1:] == ["offload", "for_update"]
    assert memory.peaks == {"sampling": 14 * GB}
    assert cuda.fractions[-1] * 24 * GB == pytest.approx(11.95 * GB) and policy.memory.memory_gb == pytest.approx(11.95)
    cuda.beside, cuda.peak = 900_000_000, 13_800_000_000
    assert memory.metrics() == {"memory/peak_gb": 14.7, "memory/planned_gb": pytest.approx(15.0, rel=0.02)}
    assert memory.report() == [f"memory   sampling: planned {found.sampling.peak / GB:.2f} GB, measured 14.00 GB; "
                               f"update: planned {found.update.peak / GB:.2f} GB, measured 14.70 GB"]  # fmt: skip
    # what the update had reserved is given back, and does not count as sampling's
    cuda.reserved = 13 * GB
    memory.for_sampling(policy)
    cuda.beside = 3_500_000_000
    memory.measure()
    assert memory.peaks["sampling"] == 14 * GB and cuda.reserved == 10 * GB


def test_torch_may_have_what_a_smaller_cache_leaves(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    found = plan(needs_20b(), GPU_SPECS["H200"], limit=15 * GB, host_bytes=100 * GB)
    planned, memory = found.sampling.lines["cache"], GpuMemory(found, CUDA, others=0, limits_torch=True)
    memory.for_sampling(Recorder())
    before = cuda.fractions[-1]
    memory.cache_became(planned + 1)  # changes nothing
    assert cuda.fractions[-1] == before
    memory.cache_became(planned - 100_000_000)
    memory.cache_became(planned - 150_000_000)
    assert cuda.fractions[-1] - before == pytest.approx(0.15 / 24)
    memory.for_update(Recorder(), None)
    memory.for_sampling(Recorder())
    assert cuda.fractions[-1] - before == pytest.approx(0.15 / 24)


def test_other_processes_are_not_counted(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    memory = GpuMemory(plan(needs_20b(), GPU_SPECS["H200"], limit=140 * GB, host_bytes=0), CUDA, others=2 * GB,
                       limits_torch=False)
    memory.for_sampling(Recorder())
    cuda.beside, cuda.peak = 3 * GB, 5 * GB
    memory.measure()
    # without a limit torch keeps what it reserved before: what sampling uses is 2 GB less
    assert memory.peaks == {"sampling": 4 * GB} and memory.metrics()["memory/peak_gb"] == 6.0
    assert cuda.num_emptied == 0 and cuda.fractions == [1.0]


def test_on_a_cpu_nothing_is_planned_and_the_cache_is_still_given_back():
    policy, memory = Recorder(), unplanned(torch.device("cpu"))
    memory.for_sampling(policy)
    memory.for_update(policy, policy)
    assert policy.calls == ["offload"] and memory.report() == [] and list(memory.metrics()) == ["memory/peak_gb"]
    assert memory.sampler_settings(1.5) == {"cache_gb": 1.5}


@pytest.mark.parametrize("name, key", [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("Tesla T4", "T4"), ("NVIDIA L4", "L4"),
    ("NVIDIA GeForce RTX 4090", "4090"), ("NVIDIA A100-SXM4-80GB", "A100-40"), ("NVIDIA L40S", None)])  # fmt: skip
def test_a_gpu_is_known_by_its_name(monkeypatch, name, key):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    cuda.name = name
    found = spec_of_gpu(CUDA)
    assert found.num_bytes == 24 * GB and found.has_tensor_cores
    assert found.bandwidth == (GPU_SPECS[key].bandwidth if key else 1e12)


@pytest.mark.parametrize("files, expected", [
    ({"/proc/meminfo": "MemTotal: 1 kB\nMemAvailable:   20000000 kB"}, 0.9 * 20_480_000_000 - 2 * GB),
    # a container may use 10 GB and uses 6, of which 1 is pages of files
    ({"/proc/meminfo": "MemAvailable: 20000000 kB", "/sys/fs/cgroup/memory.max": "10000000000",
      "/sys/fs/cgroup/memory.current": "6000000000", "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 1000000000"},
     0.9 * 5 * GB - 2 * GB),
    ({"/proc/meminfo": "MemAvailable: 20000000 kB", "/sys/fs/cgroup/memory.max": "max",
      "/sys/fs/cgroup/memory.current": "6"}, 0.9 * 20_480_000_000 - 2 * GB),
    ({"/proc/meminfo": "MemAvailable: 1000000 kB"}, 0)])  # fmt: skip
def test_host_memory_that_is_free(monkeypatch, files, expected):
    monkeypatch.setattr(grpo.run.memory, "_lines", lambda path: files.get(path, "").splitlines())
    assert free_host_bytes() == pytest.approx(expected)


def test_the_first_lines_say_where_things_are():
    found = plan(needs_20b(), GPU_SPECS["H200"], limit=15 * GB, host_bytes=100 * GB)
    text = summary(found, 24)
    assert text.startswith(f"memory   sampling {found.sampling.peak / GB:.2f}, update {found.update.peak / GB:.2f} of 15.00 GB")
    assert "host: embedding 2.15, optimizer 0.74, experts " in text
    assert f"experts of 0 in sampling and {found.update.num_streamed} in update of 24 layers are streamed" in text
    assert "\n" not in summary(plan(needs_20b(), GPU_SPECS["H200"], limit=140 * GB, host_bytes=0), 24)


def test_a_model_is_loaded_where_the_plan_says():
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", f"model.path={FIXTURES / 'tiny_mxfp4'}",
                                   f"model.tokenizer={FIXTURES / 'tokenizer_compact'}"])  # fmt: skip
    found = plan(needs_20b(), GPU_SPECS["H200"], limit=140 * GB, host_bytes=0)
    found.sampling.num_streamed, found.update.num_streamed = 1, 3
    found.host |= {"embedding": 1 << 20, "activations": 5000}
    policy = build_model(config.model, build_tokenizer(config.model, None), seed=0, device=torch.device("cpu"),
                         dtype=torch.float32, plan=found)  # fmt: skip
    placement = policy.expert_store.placement
    assert (placement.num_streamed_sampling, placement.num_streamed_update) == (1, 3)
    assert policy.memory.host_bytes == (1 << 20) + 5000


@pytest.mark.gpu
def test_a_run_with_everything_in_host_memory_has_the_numbers_of_a_free_one(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text(
        "def even(completions, completion_ids, **columns):\n"
        "    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]\n")  # fmt: skip
    words = ["+experiment=gpt_oss_20b_lora", "steps=3", f"model.path={FIXTURES / 'tiny_mxfp4'}", "model.lora.rank=2",
             f"model.tokenizer={FIXTURES / 'tokenizer_compact'}", "env.match=none", "env.answer_key=null",
             f"env.path={FIXTURES / 'arithmetic.jsonl'}", f"env.rewards={tmp_path}/reward.py:even", "rollout.prompts_per_step=2",
             "rollout.group_size=4", "rollout.max_new_tokens=24", "eval.at_start=false", "eval.at_end=false", "eval.every=0",
             "wandb.mode=disabled", f"output_dir={tmp_path}"]  # fmt: skip

    def planned_tight(needs, gpu, *, limit, host_bytes):
        found = plan(needs, gpu, limit=limit, host_bytes=host_bytes)
        found.embedding_on_host = found.state_on_host = True
        found.host["embedding"] = pinned_bytes(embedding_parameters(needs.config) * needs.dtype.itemsize)
        found.sampling.num_streamed, found.update.num_streamed, found.prefill_tokens = 2, 4, 16
        return found

    rows = {}
    for name in ("free", "tight"):
        if name == "tight":
            monkeypatch.setattr(grpo.run.memory, "plan", planned_tight)
        assert run_training(load_config("train", [*words, f"name={name}"])) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [[row["reward"], row["loss"], row["grad_norm"]] for row in map(json.loads, lines) if "loss" in row]
    assert len(rows["free"]) == 3 and rows["free"] == rows["tight"]
