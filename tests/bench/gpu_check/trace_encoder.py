"""What the encoder's forward would do on a GPU, traced on fake CUDA tensors in bf16 without one.

It prints which attention is chosen, the operations that mix devices, the kernels by name, the large
float32 outputs and the dtypes of the products. It needs a CUDA build of torch, and no GPU.

    python -m tests.bench.gpu_check.trace_encoder [Nano|Small|Large]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2RotaryEmbedding,
    T5Gemma2TextEncoder,
)

from jobs.demo_training.architecture import configuration
from kalm_encoder.model import batching, checkpoint, encoder_forward, pooling
from kalm_encoder.model.batching import Packed
from tests.bench.forwards import RATIO
from tests.bench.gpu_check.device import SIZES

LENGTHS = [128] * 512
LARGE_VALUES = 1 << 20
VIEWS = set(
    "view _unsafe_view expand slice select transpose t unsqueeze squeeze permute alias reshape "
    "detach as_strided split narrow empty empty_like lift_fresh new_empty empty_strided".split()
)


@dataclass(frozen=True)
class Operation:
    """One call: its name, and (shape, dtype, device type) of the tensors it took and gave."""

    name: str
    inputs: list[tuple[tuple[int, ...], str, str]]
    outputs: list[tuple[tuple[int, ...], str, str]]

    @property
    def is_kernel(self) -> bool:
        return self.name.split("aten.")[-1].split(".")[0].rstrip("_") not in VIEWS


class Trace(TorchDispatchMode):
    """Notes every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append(Operation(str(func), _tensors((args, kwargs)), _tensors(result)))
        return result


def _tensors(tree: Any) -> list[tuple[tuple[int, ...], str, str]]:
    found: list[tuple[tuple[int, ...], str, str]] = []

    def note(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found.append((tuple(x.shape), str(x.dtype).removeprefix("torch."), x.device.type))

    tree_map(note, tree)
    return found


def _fake_encoder(size: str) -> Any:
    tokenizer = checkpoint.resolve(checkpoint.DEMO_NAME).tokenizer()
    config = configuration(SIZES[size], tokenizer)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = T5Gemma2TextEncoder(config.encoder.text_config, config.eoi_token_index)
    torch.set_default_dtype(torch.float32)
    with torch.device("cuda"):
        model.rotary_emb = T5Gemma2RotaryEmbedding(model.config)
    embedding = model.embed_tokens
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device="cuda")
    return model.requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", nargs="?", choices=SIZES, default="Nano")
    chosen = parser.parse_args()
    torch.cuda.get_device_capability = lambda *_: (9, 0)

    def send(values, device):
        return torch.zeros(len(values), dtype=torch.long, device=device)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = _fake_encoder(chosen.size)
    with fake, torch.inference_mode(), mock.patch.object(batching, "send", send):
        forward = encoder_forward.PackedForward(model, fuse=False)
        print("attend:", forward._attend.__name__)
        packed = Packed(LENGTHS, torch.device("cuda"))
        ids = torch.zeros(sum(LENGTHS), dtype=torch.long, device="cuda")
        with Trace() as trace:
            hidden = forward(ids, packed)
            count = len(trace.operations)
            pooled = pooling.pool_packed(hidden, packed, RATIO)
    print(f"hidden {tuple(hidden.shape)} {hidden.dtype} {hidden.device}")
    print(f"pooled {tuple(pooled.shape)} {pooled.dtype}")
    _print(trace.operations[:count], trace.operations[count:])


def _print(forward: list[Operation], pooling: list[Operation]) -> None:
    mixed = [o for o in forward + pooling if len({device for *_, device in o.inputs}) > 1]
    print(f"{len(mixed)} operations mix devices")
    for operation in mixed[:20]:
        print(f"    {operation.name} {operation.inputs}")
    kernels = [o.name for o in forward if o.is_kernel]
    print(f"forward: {len(forward)} operations, {len(kernels)} of them kernels; pooling: "
          f"{sum(o.is_kernel for o in pooling)} kernels")  # fmt: skip
    _print_counts(kernels)
    print("large float32 outputs:")
    _print_counts(
        f"{o.name} {shape}"
        for o in forward
        for shape, dtype, _ in o.outputs
        if dtype == "float32" and math.prod(shape) >= LARGE_VALUES
    )
    print("dtypes of products:")
    products = [o for o in forward if "mm" in o.name or "linear" in o.name]
    _print_counts(" ".join(sorted({dtype for _, dtype, _ in o.inputs})) for o in products)
    print("outputs on the CPU:")
    _print_counts(o.name for o in forward + pooling for *_, place in o.outputs if place == "cpu")


def _print_counts(names: Any) -> None:
    for name, count in Counter(names).most_common():
        print(f"    {count:5} {name}")


if __name__ == "__main__":
    main()
