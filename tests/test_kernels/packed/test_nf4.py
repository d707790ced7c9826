"""NF4 packing against values worked out by hand, and against bitsandbytes where the peer's Python has it."""

import json
import os
import subprocess

import pytest
import torch

from kernels.packed.nf4 import dequantize_nf4_reference, quantize_nf4

PEER_PYTHON = os.environ.get("GRPO_PEER_PYTHON")
# Packs rows of the matrix that it reads, and prints bytes and absmax.
BITSANDBYTES = """
import json, sys
try:
    from bitsandbytes.functional import quantize_4bit
except ImportError:
    sys.exit(77)
import torch
weight = torch.tensor(json.load(sys.stdin))
packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
print(json.dumps([packed.flatten().tolist(), state.absmax.tolist()]))
"""


def block(*values: float) -> torch.Tensor:
    """A matrix [1, 64] that begins with the values."""
    return torch.tensor([[*values, *[0.0] * (64 - len(values))]])


def test_each_element_goes_to_the_nearest_value_of_the_code():
    # absmax 2: values of the code are 1.392 (below -), 0.159, 0.322, ..., 1.125, 1.446, 2; midpoint of the last two 1.723
    codes, absmax = quantize_nf4(block(-2.0, 2.0, 0.0, 1.72, 1.73, 0.079, 0.080, -1.39))
    assert absmax.tolist() == [2.0]
    # the high nibble first: codes 0, 15; 7, 14; 15, 7; 8, 1; then zeros, code 7
    assert codes[0, :5].tolist() == [0x0F, 0x7E, 0xF7, 0x81, 0x77]
    values = dequantize_nf4_reference(codes, absmax, torch.float32)[0, :8].tolist()
    assert values == pytest.approx([-2, 2, 0, 1.4459137, 2, 0, 0.1591606, -1.3923856], abs=1e-6)


def test_blocks_run_over_the_rows_of_a_matrix_and_not_into_the_next_matrix():
    weight = torch.zeros(2, 8, 24)  # 192 elements, 3 blocks; a block ends inside a row
    weight[0, 2, 15], weight[0, 2, 16], weight[1, 0, 0] = 3.0, -5.0, 7.0  # elements 63 and 64 of the first matrix
    codes, absmax = quantize_nf4(weight)
    assert absmax.tolist() == [[3.0, 5.0, 0.0], [7.0, 0.0, 0.0]]
    assert codes.shape == (2, 8, 12) and codes[0, 2, 7].item() == 0x7F and codes[0, 2, 8].item() == 0x07


def test_what_was_packed_is_packed_again_to_the_same_bytes():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 6, 128, generator=generator)
    codes, absmax = quantize_nf4(weight)
    values = dequantize_nf4_reference(codes, absmax, torch.float32)
    again, absmax_again = quantize_nf4(values)
    assert torch.equal(again, codes) and torch.equal(absmax_again, absmax)
    # half the widest gap of the code, 1 - 0.6961928 on the left
    assert ((values - weight).abs().view(3, -1, 64) <= 0.15191 * absmax[..., None]).all()
    assert (values - weight).norm() / weight.norm() == pytest.approx(0.09, abs=0.01)  # normal weights are what NF4 is made for


def test_a_block_of_zeros_stays_zero():
    codes, absmax = quantize_nf4(block())
    assert absmax.tolist() == [0.0] and dequantize_nf4_reference(codes, absmax, torch.float32).count_nonzero() == 0


@pytest.mark.parametrize("weight, message", [
    (torch.zeros(2, 48), "2 x 48 is no whole number"), (torch.zeros(64, 3), "64 x 3 is no whole number"),
    (torch.full((1, 64), float("nan")), "NaN")])  # fmt: skip
def test_weights_that_cannot_be_packed_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        quantize_nf4(weight)


@pytest.mark.skipif(PEER_PYTHON is None, reason="GRPO_PEER_PYTHON names no Python with bitsandbytes")
def test_bitsandbytes_packs_the_same_bytes():
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))
    peer = subprocess.run([PEER_PYTHON, "-c", BITSANDBYTES], input=json.dumps(weight.tolist()), capture_output=True, text=True)
    if peer.returncode == 77:
        pytest.skip("the peer's Python has no bitsandbytes")
    packed, peer_absmax = json.loads(peer.stdout)
    codes, absmax = quantize_nf4(weight)
    assert absmax.tolist() == peer_absmax and codes.flatten().tolist() == packed
