"""Runs checkpoints and adapters in transformers and PEFT; a process of its own, started by test_peer.py.

    python peer_logits.py JOBS.json OUT.safetensors

JOBS: [{"name", "checkpoint", "adapter" or null, "input_ids", "text" or null}]. OUT holds the logits of each job; its
metadata, as JSON under "jobs", what transformers and PEFT said while loading; with "text" its ids by the tokenizer of the
adapter's or checkpoint's folder, a chat of one message, and the generation settings there.
"""

import json
import sys
import warnings

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file

# transformers would import a distribution named `kernels` of the right version; that name may be this project's
transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False
transformers.utils.is_kernels_available = lambda *_, **__: False


def run(job: dict) -> tuple[torch.Tensor, dict]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        job["checkpoint"], dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    said = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if job["adapter"] is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, job["adapter"])
        said["adapter_warnings"] = [str(warning.message) for warning in caught if "adapter" in str(warning.message)]
    if job["text"] is not None:
        folder = job["adapter"] or job["checkpoint"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        said["text_ids"] = list(tokenizer(job["text"])["input_ids"])
        said["generation"] = transformers.GenerationConfig.from_pretrained(folder).to_dict()
        if tokenizer.chat_template:
            said["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    with torch.no_grad():
        return model(torch.tensor(job["input_ids"])).logits, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as jobs:
        results = {job["name"]: run(job) for job in json.load(jobs)}
    save_file(
        {name: logits.contiguous() for name, (logits, _) in results.items()},
        sys.argv[2],
        metadata={"jobs": json.dumps({name: said for name, (_, said) in results.items()})},
    )
