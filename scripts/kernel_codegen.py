"""Compiles every Triton kernel for three generations of GPUs, without one; shows what came out.

The ptxas that ships with Triton makes the machine code; its registers, spills and widest loads and
stores are read from there. That proves nothing about speed. No kernel has a ``tl.dot``: matrix
products are cuBLAS's, so there are no tensor-core instructions to be serialised.

``python scripts/kernel_codegen.py [--arch 90] [--json codes.json]``
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thor_fast.kernels.hierarchical_grpo_triton import (
    BLOCK,
    NUM_WARPS,
    logit_gradients_kernel,
    row_sums_kernel,
)

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = {
    "column_ptr": "i64",
    "rows_ptr": "i64",
    "index_ptr": "i64",
    "lost_ptr": "u8",
    "ignored_ptr": "u8",
}
_INTEGERS = ("row_stride", "weights_stride", "gradients_stride", "vocab")
_CONSTANTS = {"no_shift_yet": -1e30, "block": BLOCK}
_OF_A_HEAD = ("bias_ptr", "own_ptr", "rounding_ptr")
_OF_ENTROPY = ("moment_ptr", "entropy_ptr", "by_entropy_ptr")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as the launcher would make it."""

    kernel: str
    logits: str  # their dtype
    given: bool  # by the caller, and read by row; or a chunk's
    out: str | None  # dtype of the weights or gradients; None: they are not wanted
    options: bool  # bias (of a head), softcap and entropy
    aligned: bool  # 16 divides the vocabulary and the strides


@dataclass(frozen=True)
class Code:
    """What ptxas made of it; widths in bits."""

    arch: int
    variant: Variant
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    widest_store: int


def variants() -> Iterator[Variant]:
    """Those that bound what a call may launch: with everything and with nothing, even and odd."""
    flags = ((False, True), (True, True), (True, False))
    for options, aligned in flags:
        for out in ("bf16", "fp32", None):
            yield Variant("row_sums", "fp32", False, out, options, aligned)
        for out in ("bf16", "fp32"):
            yield Variant("logit_gradients", "fp32", False, out, options, aligned)
        yield Variant("row_sums", "bf16", True, None, options, aligned)
        yield Variant("logit_gradients", "bf16", True, "bf16", options, aligned)
    for kind in ("fp16", "fp32"):
        yield Variant("row_sums", kind, True, None, options=True, aligned=True)
        yield Variant("logit_gradients", kind, True, kind, options=True, aligned=True)


def compile_variant(variant: Variant, arch: int) -> Code:
    """Its machine code's numbers."""
    kernel = row_sums_kernel if variant.kernel == "row_sums" else logit_gradients_kernel
    names = kernel.arg_names
    constants = {name: value for name, value in _CONSTANTS.items() if name in names}
    constants["has_softcap"] = variant.options
    absent = list(_OF_A_HEAD if variant.given else ("rows_ptr", "index_ptr"))
    if not variant.options:
        absent += ["bias_ptr", *_OF_ENTROPY]
    if variant.out in (None, "fp32"):
        absent.append("rounding_ptr")
    if variant.out is None:
        absent.append("weights_ptr")
    constants |= dict.fromkeys(name for name in absent if name in names)
    kinds = dict.fromkeys(_INTEGERS, "i32")
    signature = {}
    for name in names:
        kind = kinds.get(name, "fp32")
        if name.endswith("_ptr"):
            kind = "*" + _POINTERS.get(name, "fp32")
        if name in ("weights_ptr", "gradients_ptr"):
            kind = f"*{variant.out}"
        if name == "logits_ptr":
            kind = f"*{variant.logits}"
        signature[name] = "constexpr" if name in constants else kind
    sixteen = [name for name, kind in signature.items() if kind.startswith("*")]
    sixteen += [name for name in names if name in _INTEGERS and variant.aligned]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in sixteen},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": NUM_WARPS},
    )
    return _read(compiled.asm["cubin"], variant, arch)


def _read(cubin: bytes, variant: Variant, arch: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [_CUOBJDUMP, flag, file.name],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = {
        name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)
    }
    # A spill need not show as a stack: any access to local memory counts as one.
    local = 4 * len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Code(
        arch=arch,
        variant=variant,
        registers=numbers["REG"],
        spilled_bytes=max(numbers["STACK"] + numbers["LOCAL"], local),
        shared_bytes=numbers["SHARED"],
        widest_load=_widest("LDG", code),
        widest_store=_widest("STG", code),
    )


def _widest(instruction: str, code: str) -> int:
    found = re.findall(rf"\b{instruction}\.E([.\w]*)", code)
    if not found:
        raise ValueError(f"the machine code has no {instruction}, expected one at least")
    return max(int(m[1]) if (m := re.search(r"\.(64|128|256)\b", rest)) else 32 for rest in found)


def table(codes: list[Code]) -> str:
    """One line for each."""
    head = f"{'kernel':<16}{'logits':<12}{'out':<6}{'options':<9}{'16 | V':<8}{'sm':>4}"
    lines = [f"{head}{'regs':>6}{'spilled':>9}{'shared':>8}{'load':>6}{'store':>7}"]
    for code in codes:
        v = code.variant
        logits, options = v.logits + " given" * v.given, "all" if v.options else "none"
        lines.append(
            f"{v.kernel:<16}{logits:<12}{v.out or '-':<6}{options:<9}"
            f"{'yes' if v.aligned else 'no':<8}{code.arch:>4}{code.registers:>6}"
            f"{code.spilled_bytes:>9}{code.shared_bytes:>8}{code.widest_load:>6}"
            f"{code.widest_store:>7}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="default: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(arguments)
    architectures = ARCHITECTURES if options.arch is None else (options.arch,)
    codes = [compile_variant(v, arch) for arch in architectures for v in variants()]
    print(table(codes))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(code) for code in codes]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
