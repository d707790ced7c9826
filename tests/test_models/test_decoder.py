"""Which graph serves a batch. The graphs themselves are tested on a GPU, with whole rollouts (tests/test_grpo/test_gpu.py)."""

from pathlib import Path

import torch

from models.checkpoint import load_model
from models.decoder import BUCKETS, bucket_of, can_decode_by_graph


def test_a_batch_takes_the_smallest_bucket_that_holds_it():
    assert [bucket_of(count) for count in (1, 2, 3, 8, 9, 33, 128, 129, 512)] == [1, 2, 4, 8, 16, 48, 128, 192, 512]
    assert [bucket_of(count) for count in (513, 640, 641)] == [640, 640, 768]
    assert all(bucket_of(bucket) == bucket for bucket in BUCKETS)


def test_the_cpu_has_no_graphs():
    folder = Path(__file__).parent.parent / "fixtures/tiny_mxfp4"
    assert not can_decode_by_graph(load_model(folder, device="cpu", dtype=torch.float32))
