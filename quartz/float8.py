"""Training with products in 8 bits (FP8, Micikevicius et al., 2022), installed into a model from outside by `install`.

Read it when `--fp8=True` is too slow, or loses too much. The linear layers of the blocks multiply numbers of 8 bits
with sums in 32: inputs and weights in e4m3 (3 bits of mantissa), gradients, which vary more, in e5m2 (2 bits). Each
tensor is scaled so that its largest magnitude becomes the largest that the format holds. Weights, their names and the
optimizer stay as they are, in float32; the head, the embeddings and all that is evaluated stay in bfloat16.

It wants a GPU of compute capability 8.9 or more, and torch.compile, without which the casts cost more than the products
save. On small models they do so all the same: measure with tests/gpu.py.
"""

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from quartz.errors import UserError

STEP, LEAST = 16, 128  # sizes of a product: multiples of the hardware's step, and none so small that casts outweigh it
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-64  # that counts as a largest magnitude: a tensor of zeros is left as it is, and nothing overflows


def scaled(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in 8 bits, and the float32 number (1,) that it is to be multiplied by: not finite where x is not."""
    largest = x.detach().abs().amax().float().clamp(min=SMALLEST).view(1)
    scale = torch.finfo(dtype).max / largest
    return (x.float() * scale).to(dtype), largest / torch.finfo(dtype).max


def multiply(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, fast: bool
) -> torch.Tensor:
    """a (M, K) times b (N, K) transposed, both in 8 bits, contiguous -> (M, N) in bfloat16.

    fast: sums are rounded more, which does in the forward pass.
    """
    if hasattr(torch, "_scaled_mm"):  # the public name is newer, and on CPUs of no use in torch 2.11
        return torch._scaled_mm(
            a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    whole = F.ScalingType.TensorWise
    return F.scaled_mm(a, b.t(), scale_a, whole, scale_b, whole, output_dtype=torch.bfloat16, use_fast_accum=fast)


class Float8Product(torch.autograd.Function):
    """F.linear(x, weight) by way of 8 bits: x (M, K), weight (N, K) -> (M, N) in bfloat16."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor):
        small_x, scale_x = scaled(x, FORWARD)
        small_weight, scale_weight = scaled(weight, FORWARD)
        # The weight itself is kept, which FSDP may take away in between; its 8 bits would keep all of it in memory
        ctx.save_for_backward(small_x, scale_x, weight)
        ctx.dtype = x.dtype
        return multiply(small_x, small_weight, scale_x, scale_weight, fast=True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        small_x, scale_x, weight = ctx.saved_tensors
        small_grad, scale_grad = scaled(grad, BACKWARD)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            small_weight, scale_weight = scaled(weight.t(), FORWARD)
            grad_x = multiply(small_grad, small_weight.contiguous(), scale_grad, scale_weight, fast=False).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            turned = small_grad.t().contiguous(), small_x.t().contiguous()
            grad_weight = multiply(*turned, scale_grad, scale_x, fast=False).to(weight.dtype)
        return grad_x, grad_weight


class Float8Linear(nn.Linear):
    """A linear layer that trains in 8 bits, and evaluates as it always did."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if not (self.training and torch.is_grad_enabled()) or rows % STEP:
            return super().forward(x)
        y = Float8Product.apply(x.reshape(rows, self.in_features), self.weight).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    return all(size % STEP == 0 and size >= LEAST for size in module.weight.shape)


def install(model: GPT, wanted: bool) -> None:
    """Has the linear layers of a GPT's blocks, in place, train in 8 bits where their sizes allow it, if it is `wanted`.

    The head is left out: its gradient decides most about what is learned, and the loss multiplies it in chunks of its
    own. Raises UserError where no layer is left.
    """
    if not wanted:
        return
    layers = [module for module in model.transformer.h.modules() if fits(module)]
    if not layers:
        raise UserError(
            f"fp8=True has nothing to do: it takes linear layers of {LEAST} and more, in multiples of {STEP}, without "
            "adapters beside them; leave it out"
        )
    for layer in layers:
        layer.__class__ = Float8Linear
