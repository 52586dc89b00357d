"""The same text as CUDA: nvcc compiles it as MLX would wrap it, and a GPU that is at hand gives the product."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from arcee_mlx.model.relu2 import kernels, self_check

from sparse_cases import CASES, NAMES, check, make_layer

_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.uint32: "uint32_t"}


class Recorder:
    """Stands in for `mx.fast.cuda_kernel`: keeps the source that MLX 0.32's CUDA backend makes of a call."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def cuda_kernel(self, name: str, input_names: Any, output_names: Any, source: str, header: str) -> Any:
        def call(*, inputs: Any, template: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            parameters = [f"const {_TYPES[a.dtype]}* {n}" for n, a in zip(input_names, inputs, strict=True)]
            parameters += [f"{_TYPES[dtype]}* {n}" for n, dtype in zip(output_names, output_dtypes, strict=True)]
            constants = "".join(
                f"  using {key} = {_TYPES[value]};\n" if isinstance(value, mx.Dtype)
                else f"  constexpr {type(value).__name__} {key} = {str(value).lower()};\n"
                for key, value in template
            )  # fmt: skip
            self.sources.append(
                "#include <cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cooperative_groups.h>\n"
                f"{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
                f"__global__ void {name}({', '.join(parameters)}) {{\n{constants}\n{source}\n}}\n\n}}\n"
            )
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(mx.fast, "cuda_kernel", recorder.cuda_kernel)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    kernels._build.cache_clear()
    yield recorder
    kernels._build.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(",".join(NAMES), [CASES[1], CASES[3], CASES[7]])
def test_nvcc_compiles_the_text_and_keeps_sums_in_registers(
    recorder, tmp_path, tokens, neurons, hidden, bits, group_size, dtype
):
    mx.eval(make_layer(tokens, neurons, hidden, bits=bits, group_size=group_size, dtype=dtype).run())
    assert len(recorder.sources) == 2
    for i, source in enumerate(recorder.sources):
        path = Path(tmp_path, f"kernel{i}.cu")
        path.write_text(source)
        command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o", str(path) + "bin", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        assert "0 bytes stack frame, 0 bytes spill stores" in done.stderr


@pytest.mark.parametrize("kind", [pytest.param(k, marks=getattr(pytest.mark, k)) for k in ("metal", "cuda")])
@pytest.mark.parametrize(",".join(NAMES), CASES)
def test_this_gpu_gives_the_product(kind, tokens, neurons, hidden, bits, group_size, dtype):
    mx.set_default_device(mx.gpu)
    try:
        y = check(make_layer(tokens, neurons, hidden, bits=bits, group_size=group_size, dtype=dtype))
        again = check(make_layer(tokens, neurons, hidden, bits=bits, group_size=group_size, dtype=dtype))
        assert mx.array_equal(y, again)
        assert self_check.find_fault(dtype, bits, group_size, tokens) is None
    finally:
        mx.set_default_device(mx.cpu)
