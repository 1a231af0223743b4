"""Features of compiled Triton kernels: machine code, Triton's IR, and types as a launch has them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")

from codegen.kernel import KernelDescription
from codegen.triton_kernels.gemv import GEMV
from ir_dataset.cost_models.triton_code import (
    CODE,
    argument_types,
    for_launch,
    sass_counts,
    ttgir_counts,
)

SASS = """
        Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
                                                                  /* 0x000ff00000000800 */
        /*0010*/                   S2R R113, SR_CTAID.Y ;         /* 0x0000000000717919 */
        /*0020*/               @P0 BRA 0x90 ;                     /* 0x0000002000300947 */
        /*0030*/                   LDG.E.128 R4, [R2.64] ;        /* 0x000000000000 */
        /*0040*/                   FFMA R5, R4, R6, R5 ;          /* 0x000000000000 */
        /*0050*/                   FFMA R5, R4, R6, R5 ;          /* 0x000000000000 */
        /*0060*/                   STL [R1], R5 ;                 /* 0x000000000000 */
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ; /* 0x0000 */
        /*0080*/              @!P0 BRA 0x30 ;                     /* 0xffffffe000b48947 */
        /*0090*/                   EXIT ;                         /* 0x000000000000 */
        /*00a0*/                   BRA 0xa0;                      /* 0xfffffffc00fc7947 */
        /*00b0*/                   NOP;                           /* 0x000000000000 */
        /*00c0*/                   VOTEU.ANY UR4, UPT, PT ;       /* 0x000000000000 */
"""
TTGIR = """
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32}) {
    %0 = tt.load %a, %m : tensor<16x!tt.ptr<bf16>, #blocked>
    %1:2 = scf.for %i = %c0 to %n step %c1 iter_args(%s = %0, %t = %0) -> (i32, i32) {
      %2 = ttg.convert_layout %s : tensor<16xf32> -> tensor<16xf32>
      %3 = arith.addf %2, %2 : tensor<16xf32>
      %4 = math.exp2 %3 : tensor<16xf32>
      %5 = "tt.reduce"(%4) <{axis = 0 : i32}> ({
    tt.store %a, %1#0 : tensor<16x!tt.ptr<bf16>, #blocked>
    tt.return
"""


def test_instructions_by_class_in_all_and_in_the_loop() -> None:
    counts = sass_counts(SASS)
    whole = {n.removeprefix("sass_"): v for n, v in counts.items() if n.startswith("sass_") and v}
    assert whole == {
        "move": 2,
        "branch": 4,
        "global_load": 1,
        "fma": 2,
        "spill": 1,
        "matrix": 1,
        "other": 1,
        "total": 12,
    }
    loop = {n.removeprefix("loop_"): v for n, v in counts.items() if n.startswith("loop_") and v}
    assert loop == {"global_load": 1, "fma": 2, "spill": 1, "matrix": 1, "branch": 1, "total": 6}
    assert set(counts) < set(CODE)
    assert sass_counts("nothing")["loop_total"] == 0


def test_operators_of_tritons_dialect() -> None:
    counts = {n.removeprefix("ttgir_"): v for n, v in ttgir_counts(TTGIR).items() if v}
    assert counts == {
        **dict.fromkeys(("tt_load", "tt_store", "tt_reduce", "scf_for", "arith", "math"), 1),
        "ttg_convert_layout": 1,
        "other": 2,
    }


def test_a_launch_specialises_as_triton_does() -> None:
    text = GEMV.source(KernelDescription(operator="gemv", dtype=torch.bfloat16, form="row"))
    tensor = torch.empty(64, dtype=torch.bfloat16)
    wide = torch.empty(1, device="meta")
    arguments = (tensor, tensor[1:], wide, tensor, 1, 4096, 10, 2**40, 0, 3)
    types = argument_types(text, arguments)
    assert list(types.values()) == [
        *("*bf16:16", "*bf16", "*fp32:16", "*bf16:16"),
        *("i32:1", "i32:16", "i32", "i64:16", "i32:16", "i32"),
    ]
    found = for_launch(text, arguments)
    assert '        "rows": "i32:1",' in found and '        "out_features": "i32",' in found
    assert found.count("LAUNCH") == text.count("LAUNCH") and found != text
    assert for_launch(found, arguments) == found
