"""Every Triton kernel compiles for sm90, on any machine: the interpreter accepts more than the compiler does.

Run: pytest tests/test_kernels_compile.py -m slow
"""

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import sys

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels.logprob_entropy

    TYPES = {"targets": "*i64"} | dict.fromkeys(("V", "stride_row", "out_stride_row", "n_blocks"), "i32")
    CONSTANTS = dict(SCALE=1.6, INV_T=1.1, LN2=0.69, FLOOR=-16384.0, IGNORE=-100, ACC=tl.float32, stride_vocab=1)
    CONSTANTS |= dict(out_stride_vocab=1, BLOCK=4096)
    loop = sys.modules["kernels.logprob_entropy"]

    def compile(kernel, **more):
        constants, names = CONSTANTS | more, kernel.arg_names
        types = {n: (TYPES | more.get("types", {})).get(n, "*fp32") for n in names}
        types |= {n: "constexpr" for n in names if n in constants}
        values = {(names.index(n),): constants[n] for n in names if n in constants}
        source = ASTSource(fn=kernel, signature=types, constexprs=values)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        print(kernel.__name__, len(compiled.asm["cubin"]))

    for logits in ("*bf16", "*fp32"):
        compile(loop._stats_kernel, types={"logits": logits})
        compile(loop._gradients_kernel, types={"logits": logits, "dlogits": "*bf16"})
    compile(loop._stats_kernel, types={"logits": "*fp64"}, ACC=tl.float64)
"""


@pytest.mark.slow
def test_kernels_compile_for_sm90():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
