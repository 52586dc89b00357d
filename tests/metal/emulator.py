"""`mx.fast.metal_kernel` without Metal: the source that MLX writes for the GPU, compiled by g++ and run on this machine.

    monkeypatch.setattr(mx.fast, "metal_kernel", Emulator(folder).metal_kernel)

Kernels that are built then take and give MLX arrays as ever. See metal_on_cpu.h for what is emulated.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
SCHEDULES = {"first to last": 0, "last to first": 1, "in turn": 2, "random": 3, "random again": 4}
_build_metal_kernel = mx.fast.metal_kernel
# What only a stray read, a wrong shift or a misaligned vector can do is a crash here.
_FLAGS = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=bounds,shift,alignment"]
_FLAGS += ["-fsanitize-undefined-trap-on-error"]


class EmulationError(RuntimeError):
    """The kernel did not compile, crashed, or its threads did not meet: RuntimeError, as MLX raises on a GPU."""


@dataclass
class Emulator:
    """Compiles into `folder`, where it finds again what it compiled before.

    Attributes:
        schedule: which of the threads that can go on does; see SCHEDULES.
        edit: changes a kernel's own text before MLX wraps it, to see the tests fail.
        sources: what MLX would compile, by kernel name, of the kernels run so far.
    """

    folder: Path
    schedule: int = 0
    edit: Callable[[str], str] = lambda source: source
    sources: dict[str, str] = field(default_factory=dict)

    def metal_kernel(
        self, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = ""
    ) -> Callable[..., list[mx.array]]:
        """Stands in for `mx.fast.metal_kernel`."""
        kernel = _build_metal_kernel(name, list(input_names), list(output_names), self.edit(source), header)

        def call(*, inputs: list[mx.array], **launch: Any) -> list[mx.array]:
            self.sources[name] = text = write_source(kernel, inputs, launch)
            return self._run(self._compile(text), inputs, launch)

        return call

    def _compile(self, text: str) -> Path:
        program = make_program(text)
        headers = "".join((HERE / name).read_text() for name in ("metal_on_cpu.h", "launch.h"))
        binary = self.folder / hashlib.sha256((program + headers).encode()).hexdigest()[:20]
        if not binary.exists():
            header = self.folder / "metal_on_cpu.h.gch"  # g++ reads this for the header of that name: half the time
            if not header.exists():
                _call_compiler("-x", "c++-header", str(HERE / "metal_on_cpu.h"), "-o", str(header))
            binary.with_suffix(".cpp").write_text(program)
            _call_compiler(f"-I{HERE}", str(binary.with_suffix(".cpp")), "-o", str(binary))
        return binary

    def _run(self, binary: Path, inputs: list[mx.array], launch: dict[str, Any]) -> list[mx.array]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            arguments = [str(n) for n in (self.schedule, *launch["grid"], *launch["threadgroup"])]
            for i, array in enumerate(inputs):
                data = np.asarray(mx.contiguous(array).view(mx.uint8)).tobytes()
                Path(folder, f"in{i}").write_bytes(data)
                arguments += ["in", f"{folder}/in{i}", str(len(data))]
            outputs = list(zip(launch["output_shapes"], launch["output_dtypes"], strict=True))
            for i, (shape, dtype) in enumerate(outputs):
                arguments += ["out", f"{folder}/out{i}", str(int(np.prod(shape)) * dtype.size)]
            done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                raise EmulationError(f"exit status {done.returncode}: {done.stderr[:1000]}")
            return [
                mx.array(np.fromfile(f"{folder}/out{i}", np.uint8)).view(dtype).reshape(shape)
                for i, (shape, dtype) in enumerate(outputs)
            ]


def _call_compiler(*arguments: str) -> None:
    done = subprocess.run(["g++", *_FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"g++: {done.stderr[:4000]}")


def write_source(kernel: Any, inputs: list[mx.array], launch: dict[str, Any]) -> str:
    """The Metal source that MLX compiles for these arguments: MLX prints it where a kernel is traced, not run."""
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        standard_output = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            traced = lambda *arrays: kernel(inputs=list(arrays), **launch, verbose=True)  # noqa: E731
            mx.export_function(str(Path(folder, "kernel.mlxfn")), traced, *inputs)
        finally:
            os.dup2(standard_output, 1)
            os.close(standard_output)
        file.seek(0)
        printed = file.read().decode()
    return printed.split("```\n")[1]


def make_program(text: str) -> str:
    """A C++ program around a kernel's body, untouched, between the emulator and a call of it.

    The template around the body becomes the constants of its one instantiation: g++ puts threadgroup memory where it
    can be filled with nonsense in a plain function only.
    """
    template, name, parameters = re.search(
        r"template <(.*?)>\n\[\[kernel\]\] void (\w+)\((.*?)\) \{", text, re.S
    ).groups()
    values = re.search(rf"decltype\({name}<(.*?)>\) ", text)[1].split(", ")
    body = text[text.index(") {", text.index("[[kernel]]")) + 2 : text.index("template [[host_name(")]
    constants, declared, arguments = [], [], []
    for constant, value in zip(template.split(", "), values, strict=True):
        kind, constant = constant.split()
        constants.append(
            f"using {constant} = {value};" if kind == "typename" else f"constexpr {kind} {constant} = {value};"
        )
    for i, parameter in enumerate(parameters.split(",\n")):
        declared.append(re.sub(r"\[\[.*?\]\]", "", parameter).strip())
        kind, parameter = declared[-1].rsplit(None, 1)
        arguments.append(f"buffer<{kind}>({i})" if kind.endswith("*") else f"find_{parameter}()")
    return "\n".join(
        (
            '#include "metal_on_cpu.h"\n#include "launch.h"',
            *constants,
            f'static void {name}({", ".join(declared)})\n#line 1 "{name}.metal"\n{body}',
            f"static void run_kernel() {{ {name}({', '.join(arguments)}); }}\n",
        )
    )
