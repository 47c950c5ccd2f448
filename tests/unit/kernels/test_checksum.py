import pytest
import torch

from kernels import ops

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def naive_checksum(data: bytes) -> int:
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum(word * (splitmix64(i) | 1) for i, word in enumerate(words)) & MASK


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 64, 1000, 4096])
def test_matches_plain_integers(num_bytes):
    torch.manual_seed(num_bytes)
    payload = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    assert ops.checksum(payload) == naive_checksum(bytes(payload.tolist()))


@pytest.mark.parametrize("offset", [1, 8, 13])
def test_does_not_depend_on_where_the_payload_lies(offset):
    slab = torch.randint(0, 256, (256,), dtype=torch.uint8)
    payload = slab[offset : offset + 64]
    assert ops.checksum(payload) == ops.checksum(payload.clone())


def test_finds_a_flipped_bit_and_swapped_words():
    payload = torch.randint(0, 256, (512,), dtype=torch.uint8)
    sums = {ops.checksum(payload)}
    for byte in (0, 100, 511):
        flipped = payload.clone()
        flipped[byte] ^= 16
        sums.add(ops.checksum(flipped))
    sums.add(ops.checksum(payload.view(8, 64).flip(0).contiguous().view(-1)))
    assert len(sums) == 5
