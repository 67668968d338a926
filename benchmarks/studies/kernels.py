"""Report the loss kernels' instruction counts and registers for several GPUs, without a GPU.

    python -m benchmarks.studies.kernels
    python -m benchmarks.studies.kernels --capabilities 90

The kernels are compiled for 150 classes in bf16 at stride 4. The target GPUs are A100, H100, B200
and RTX 50. The column "loop" counts the instructions in the innermost loop that contains an
exponential. Each loop iteration processes all classes of 4 pixels. The column "work" is "loop"
times the number of iterations for 16 images of 512 pixels, counted per warp. The code around the
loop is not included in "work".
"""

from __future__ import annotations

import collections
import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Table, make_parser, write_json
from segmentation import losses_triton as kernels

CAPABILITIES = (80, 90, 100, 120)
CLASSES, LOW, SIZE, IMAGES = 150, 128, 512, 16
SHOWN = ("SHFL", "FADD", "FFMA", "FMUL", "FMNMX", "MUFU", "LDG", "FSEL", "FSETP")


class Found(NamedTuple):
    """The properties of a compiled kernel.

    Attributes:
        registers: Number of registers per thread.
        stack: Stack size in bytes.
        shared: Size of the shared memory in bytes.
        loop: Number of occurrences of each instruction in the innermost loop.
        rounds: Number of iterations of the innermost loop for all images.
    """

    registers: int
    stack: int
    shared: int
    loop: collections.Counter[str]
    rounds: int


def compile_for(capability: int, backward: bool, targets: int) -> bytes:
    """Compile the forward or backward kernel of the loss, and return its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel: Any = kernels._backward_kernel if backward else kernels._forward_kernel
    logits = torch.empty(1, CLASSES, LOW, LOW, device="meta", dtype=torch.bfloat16)
    pointers = {"logits": "*bf16", "grad": "*bf16", "first": "*i64", "second": "*i64"}
    names = ("class_weights", "lse", "nll", "sums", "by_nll", "by_intersection", "by_predicted")
    floats = dict.fromkeys(("weight", "second_weight", "scale_y", "scale_x"), "fp32")
    known: dict[str, Any] = {
        "logits": logits,
        "num_targets": targets,
        "class_weights": None,
        "width": SIZE,
    }
    parameters = inspect.signature(kernels._constants).parameters
    constants = kernels._constants(**{name: known[name] for name in parameters})
    constants |= dict(zip(("ROWS", "CELLS"), tile(backward)))
    options = {"num_warps": constants.pop("num_warps")}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | floats
    types |= dict.fromkeys(names, "*fp32") | dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    # At launch, Triton tells the compiler which arguments are divisible by 16. Declare the same
    # arguments here, so that the compiler generates the same code.
    aligned = [n for n, kind in enumerate(types.values()) if kind.startswith("*")]
    aligned += [list(types).index(name) for name in ("h", "w", "height", "width")]
    attributes = {(n,): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options=options).asm["cubin"]


def tile(backward: bool) -> tuple[int, int]:
    """Return the number of rows and the number of cells that one Triton program processes."""
    if backward:
        return kernels.BACKWARD_ROWS, kernels.BACKWARD_CELLS
    return kernels.FORWARD_ROWS, kernels.FORWARD_CELLS


def rounds(backward: bool) -> int:
    """Return the number of iterations of the innermost loop for all images."""
    rows, cells = tile(backward)
    if not backward:
        return IMAGES * SIZE * (LOW + 1)
    scale, programs = SIZE // LOW, (-(-LOW // rows), -(-LOW // cells))
    # Add one row and one column of cells, because the pixels of each Triton program extend into
    # the first row and column of the neighbouring programs.
    return IMAGES * programs[0] * programs[1] * scale * (rows + 1) * (cells + 1)


def tool(name: str, *arguments: str) -> str:
    """Run a command-line tool that is bundled with Triton, and return its output."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__path__[0], "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read(cubin: bytes, backward: bool) -> Found:
    """Extract the resource usage and the innermost loop from a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("cuobjdump", "-sass", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    lines = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", code
    )
    addresses = [int(address, 16) for address, _, _ in lines]
    loops = []
    for place, (_, name, operands) in enumerate(lines):
        to = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if to and int(to[1], 16) < addresses[place]:
            body = [other for _, other, _ in lines[addresses.index(int(to[1], 16)) : place + 1]]
            if any(other.startswith("MUFU.EX2") for other in body):
                loops.append(body)
    loop = collections.Counter(name.split(".")[0] for name in min(loops, key=len))
    return Found(numbers["REG"], numbers["STACK"], numbers["SHARED"], loop, rounds(backward))


def main(argv: list[str] | None = None) -> None:
    """Compile the kernels and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    args = parser.parse_args(argv)
    columns = "kernel", "GPU", "registers", "stack", "shared", "loop"
    table = Table(*columns, *SHOWN, "work, 10^9")
    for backward in (False, True):
        for targets in (1, 2):
            name = f"{'backward' if backward else 'forward'}, {('index', 'mixed')[targets - 1]}"
            for capability in args.capabilities:
                found = read(compile_for(capability, backward, targets), backward)
                total = found.loop.total()
                cells = [name, f"sm_{capability}", found.registers, found.stack, found.shared]
                cells += [total, *(found.loop[each] for each in SHOWN)]
                table.add(*cells, f"{total * found.rounds / 1e9:.2f}")
    write_json(args, table.result())


if __name__ == "__main__":
    main()
