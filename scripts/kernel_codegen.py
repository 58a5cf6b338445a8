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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thor_fast.kernels.hierarchical_grpo_one_kernel import BLOCK as ONE_BLOCK
from thor_fast.kernels.hierarchical_grpo_one_kernel import NUM_WARPS as ONE_WARPS
from thor_fast.kernels.hierarchical_grpo_one_kernel import STAGES, loss_gradients_kernel
from thor_fast.kernels.hierarchical_grpo_triton import (
    BLOCK,
    NUM_WARPS,
    logit_gradients_kernel,
    row_sums_kernel,
)
from thor_fast.kernels.paged_kv_splice_triton import NUM_WARPS as SPLICE_WARPS
from thor_fast.kernels.paged_kv_splice_triton import splice_kernel, tile_rows

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = {
    "column_ptr": "i64",
    "rows_ptr": "i64",
    "index_ptr": "i64",
    "lost_ptr": "u8",
    "ignored_ptr": "u8",
    "outside_ptr": "u8",
}
_INTEGERS = ("row_stride", "weights_stride", "gradients_stride", "vocab")
_CONSTANTS = {"no_shift_yet": -1e30, "block": BLOCK}
_KERNELS = {
    "row_sums": row_sums_kernel,
    "logit_gradients": logit_gradients_kernel,
    "loss_gradients": loss_gradients_kernel,
}
_OF_A_HEAD = ("bias_ptr", "own_ptr", "rounding_ptr")
_OF_OPTIONS = ("moment_ptr", "entropy_ptr", "by_entropy_ptr", "ref_logp_ptr")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as the launcher would make it."""

    kernel: str
    logits: str  # their dtype
    given: bool  # by the caller, and read by row; or a chunk's
    out: str | None  # dtype of the weights or gradients; None: they are not wanted
    options: bool  # bias (of a head), softcap, entropy, and the token stage's KL
    aligned: bool  # 16 divides the vocabulary and the strides


@dataclass(frozen=True)
class SpliceVariant:
    """One specialisation of the splice."""

    kernel: str
    numbers: str  # dtype of the cache
    layout: str  # packed: a head's value lies behind its key; pools: elsewhere
    width: int  # of a head
    turned: int  # how much of a key; 0: a plain copy
    interleaved: bool
    alone: bool  # a plan that overlaps itself
    aligned: bool  # 16 bytes divide every stride and address


@dataclass(frozen=True)
class Code:
    """What ptxas made of it; widths in bits."""

    arch: int
    variant: Variant | SpliceVariant
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    narrowest_store: int


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
        yield Variant("loss_gradients", "bf16", True, "bf16", options, aligned)
    yield Variant("loss_gradients", "fp32", True, "fp32", options=True, aligned=True)
    yield Variant("loss_gradients", "bf16", True, None, options=True, aligned=True)
    for kind in ("fp16", "fp32"):
        yield Variant("row_sums", kind, True, None, options=True, aligned=True)
        yield Variant("logit_gradients", kind, True, kind, options=True, aligned=True)


def compile_variant(variant: Variant, arch: int) -> Code:
    """Its machine code's numbers."""
    kernel, warps = _KERNELS[variant.kernel], NUM_WARPS
    names = kernel.arg_names
    constants = {name: value for name, value in _CONSTANTS.items() if name in names}
    if variant.kernel == "loss_gradients":
        warps, constants["block"], constants["stages"] = ONE_WARPS, ONE_BLOCK, STAGES
        constants |= {"kind": "ppo", "kl_kind": "k3" if variant.options else None}
    constants["has_softcap"] = variant.options
    absent = list(
        (*_OF_A_HEAD, "factor_ptr") if variant.given else ("rows_ptr", "index_ptr", "factor_ptr")
    )
    if not variant.options:
        absent += ["bias_ptr", *_OF_OPTIONS]
    if variant.out in (None, "fp32"):
        absent.append("rounding_ptr")
    if variant.out is None:
        absent += ["weights_ptr", "gradients_ptr"]
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
        options={"num_warps": warps},
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared, variant, arch)


def splice_variants() -> Iterator[SpliceVariant]:
    """Plain and turned, over itself and not, in both layouts; heads of 128 and of 64."""
    for turned in (0, 128):
        for layout, alone in (("packed", False), ("pools", False), ("pools", True)):
            yield SpliceVariant("splice", "bf16", layout, 128, turned, False, alone, aligned=True)
    yield SpliceVariant("splice", "bf16", "packed", 128, 128, True, False, aligned=True)
    yield SpliceVariant("splice", "fp32", "pools", 128, 128, False, False, aligned=True)
    yield SpliceVariant("splice", "fp16", "packed", 64, 32, False, False, aligned=True)
    yield SpliceVariant("splice", "bf16", "packed", 64, 64, False, False, aligned=False)


def compile_splice(variant: SpliceVariant, arch: int) -> Code:
    """As the launcher would, for eight heads."""
    size = 4 if variant.numbers == "fp32" else 2
    packed = variant.layout == "packed"
    row = variant.width * (2 if packed else 1)
    constants = {
        "numbers": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[variant.numbers],
        "unit": 16 // size if variant.aligned else 1,
        "heads": 1 if variant.alone else 8,
        "kinds": 1 if packed else 2,
        "key_width": row,
        "value_width": variant.width,
        "turned": variant.turned,
        "interleaved": variant.interleaved,
        "alone": variant.alone,
        "tile": tile_rows(row, size, variant.turned, 16 if variant.aligned else size),
    }
    pointers = {"rotations_ptr": "*fp32", "target_ptr": "*i64", "source_ptr": "*i64"}
    names = splice_kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    # Sizes of blocks and counts of layers need not be multiples of anything.
    sixteen = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(splice_kernel, signature, constants, sixteen),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": SPLICE_WARPS},
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared, variant, arch)


def _read(cubin: bytes, shared: int, variant: Variant | SpliceVariant, arch: int) -> Code:
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
        shared_bytes=numbers["SHARED"] + shared,
        widest_load=max(_widths("LDG(?:STS)?", code)),
        widest_store=max(_widths("STG", code)),
        narrowest_store=min(_widths("STG", code)),
    )


def _widths(instruction: str, code: str) -> list[int]:
    found = re.findall(rf"\b{instruction}\.E([.\w]*)", code)
    if not found:
        raise ValueError(f"the machine code has no {instruction}, expected one at least")
    widths = (re.search(r"\.(?:[US])?(8|16|64|128|256)\b", rest) for rest in found)
    return [int(m[1]) if m else 32 for m in widths]


def table(codes: list[Code]) -> str:
    """One line for each kernel of the loss."""
    head = f"{'kernel':<16}{'logits':<12}{'out':<6}{'options':<9}{'16 | V':<8}{'sm':>4}"
    lines = [f"{head}{'regs':>6}{'spilled':>9}{'shared':>8}{'load':>6}{'store':>7}"]
    for code in codes:
        v = code.variant
        if isinstance(v, SpliceVariant):
            continue
        logits, options = v.logits + " given" * v.given, "all" if v.options else "none"
        lines.append(
            f"{v.kernel:<16}{logits:<12}{v.out or '-':<6}{options:<9}"
            f"{'yes' if v.aligned else 'no':<8}{code.arch:>4}{code.registers:>6}"
            f"{code.spilled_bytes:>9}{code.shared_bytes:>8}{code.widest_load:>6}"
            f"{code.widest_store:>7}"
        )
    return "\n".join(lines)


def splice_table(codes: list[Code]) -> str:
    """One line for each of the splice."""
    head = (
        f"{'splice':<8}{'layout':<8}{'D':>4}{'turned':>8}{'pairs':>12}{'overlaps':>10}{'16 B':>6}"
    )
    lines = [head + f"{'sm':>5}{'regs':>6}{'spilled':>9}{'shared':>8}{'load':>6}{'stores':>9}"]
    for code in codes:
        v = code.variant
        if isinstance(v, SpliceVariant):
            pairs = ("neighbours" if v.interleaved else "halves") if v.turned else "-"
            lines.append(
                f"{v.numbers:<8}{v.layout:<8}{v.width:>4}{v.turned:>8}{pairs:>12}"
                f"{'yes' if v.alone else 'no':>10}{'yes' if v.aligned else 'no':>6}{code.arch:>5}"
                f"{code.registers:>6}{code.spilled_bytes:>9}{code.shared_bytes:>8}"
                f"{code.widest_load:>6}{f'{code.narrowest_store}-{code.widest_store}':>9}"
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
    codes += [compile_splice(v, arch) for arch in architectures for v in splice_variants()]
    print(table(codes) + "\n\n" + splice_table(codes))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(code) for code in codes]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
