"""All checks that need a GPU, in one process: equality, attention, speed and the top kernels.

Nano, Small and Large dimensions with random weights, made on the device: no checkpoint is needed.
Each section is guarded, so that one failure does not cost the others.

    python -m tests.bench.gpu_check.check [--toy] [--only encoder,decoder] [--sizes Nano Large]

`--toy` runs a tiny model on any machine in seconds and shows that the script works.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from kalm_encoder.model import checkpoint
from tests.bench.gpu_check.device import CUDA, SIZES, TOY, Setting, say
from tests.bench.gpu_check.equality import check_attention, check_equality
from tests.bench.gpu_check.kernels import print_top_kernels
from tests.bench.gpu_check.speed import measure_decoder, measure_encoder

SECTIONS: dict[str, Callable[[Setting], list[str]]] = {
    "equality": check_equality,
    "attention": check_attention,
    "encoder": measure_encoder,
    "decoder": measure_decoder,
    "profile": print_top_kernels,
}


def bars() -> list[str]:
    """Return the bars of the encoder, as `make bench` prints them; none without a GPU."""
    if not CUDA:
        print("no CUDA device: not measured")
        return []
    return measure_encoder(Setting(SIZES, _tokenizer(), toy=False))


def _tokenizer() -> Any:
    return checkpoint.resolve(checkpoint.DEMO_NAME).tokenizer()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by commas")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    chosen = parser.parse_args(arguments)
    sizes = TOY if chosen.toy else {name: SIZES[name] for name in chosen.sizes}
    setting = Setting(sizes, _tokenizer(), chosen.toy)
    where = torch.cuda.get_device_name() if CUDA else "CPU"
    say(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")
    failed = []
    for name in chosen.only.split(","):
        try:
            for line in SECTIONS[name](setting):
                say(line)
        except Exception:
            traceback.print_exc(limit=6)
            failed.append(name)
    say("failed:", ", ".join(failed) or "nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
