"""Whether checkpoints are equal: for tests, and for tests/gpu.py, which may have no pytest."""

import torch


def same(a, b) -> bool:
    """Whether two checkpoints' values are equal, tensors to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
