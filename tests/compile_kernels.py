"""Compiles every kernel for a GPU, with or without one: the types of arguments that occur, and sizes of one, which are
constants then. Run by test_gpu_kernels.py in a process of its own, in which Triton does not interpret."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from siamese_detr.kernels import gpu_assign, gpu_photometric, gpu_sampling

HOPPER = GPUTarget("cuda", 90, 32)


def build(kernel: Any, warps: int = 4, **arguments: Any) -> None:
    """Compile a kernel for types (strings) and constants of its arguments."""
    names = kernel.arg_names
    types = {name: arguments[name] if isinstance(arguments[name], str) else "constexpr" for name in names}
    constants = {(names.index(name),): value for name, value in arguments.items() if not isinstance(value, str)}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    assert triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm["cubin"]


def main() -> None:
    for size in ("i32", 1):
        build(
            gpu_assign._assign, warps=1, cost="*fp32", valid="*i1", chosen="*i64", targets=size, queries=size,
            highest="fp32", ROWS=16, COLUMNS=128,
        )  # fmt: skip
        for value, sums, width in (("*bf16", "*fp32", 32), ("*fp64", "*fp64", 8)):
            inputs = {"value": value, "weights": sums, "sizes": "*i64", "starts": "*i64"}
            inputs |= {"locations": value}
            inputs |= dict.fromkeys(("tokens", "queries", "heads", "channels", "levels", "points"), size)
            precise = tl.float32 if sums == "*fp32" else tl.float64
            inputs |= {"QUERIES": gpu_sampling.QUERIES, "WIDTH": width, "PRECISE": precise}
            build(gpu_sampling._sum, warps=gpu_sampling.WARPS, out=value, **inputs)
            build(
                gpu_sampling._spread, warps=gpu_sampling.WARPS, gradient=value, to_value=sums, to_locations=value,
                to_weights=sums, **inputs,
            )  # fmt: skip
        extent = {"sizes": "*i64", "height": size, "width": size, "PIXELS": gpu_photometric.PIXELS}
        normal = {f"{colour}_{part}": "fp32" for colour in ("red", "green", "blue") for part in ("scale", "shift")}
        for pixels in ("*u8", "*fp32"):
            source = extent | {"pixels": pixels, "unit": "fp32", "operations": "*fp32"}
            source |= dict.fromkeys(("of_image", "of_channel", "of_row", "of_column"), size)
            build(gpu_photometric._brightness, parts="*fp32", **source)
            build(gpu_photometric._augment, means="*fp32", out="*fp32", **normal, **source)
        for rows in (False, True):
            blurred = {"images": "*fp32", "between": "*fp32", "which": "*fp32", "count": size}
            build(gpu_photometric._blur_lines, ROWS=rows, **blurred, **extent)


if __name__ == "__main__":
    main()
