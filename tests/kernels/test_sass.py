"""Reading machine code: classes, widths, the hot loop; and how many programs fit on a multiprocessor."""

import pytest

from opensora_fast.kernels.compilation.sass import (
    CLASSES,
    count_kinds,
    count_programs,
    count_widths,
    describe_sass,
    find_loops,
    parse_sass,
)

# A kernel made up of lines as cuobjdump prints them: a loop over two inner loops, of which the first is the hot one,
# a loop that waits, and code behind the end that branches back.
TEXT = """
        Function : made_up
        /*0000*/                   S2R R0, SR_TID.X ;                         /* 0x0000000000007919 */
                                                                              /* 0x000ea20000002100 */
        /*0010*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;           /* 0x0000000000007919 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R6.64], !P2 ;  /* 0x00 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;  /* 0x00 */
        /*0040*/              @!P0 BRA 0x30 ;                                 /* 0x00 */
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR24], RZ, !UPT ;  /* 0x00 */
        /*0060*/                   MUFU.EX2 R24, R24 ;                        /* 0x00 */
        /*0070*/                   F2FP.BF16.F32.PACK_AB R24, R25, R24 ;      /* 0x00 */
        /*0080*/                   FFMA R1, R2, R3, R4 ;                      /* 0x00 */
        /*0090*/                   UIADD3.64 UR30, UR26, 0x2, URZ ;           /* 0x00 */
        /*00a0*/                   LDS.128 R8, [R2] ;                         /* 0x00 */
        /*00b0*/                   LDG.E.64 R8, desc[UR4][R2.64] ;            /* 0x00 */
        /*00c0*/                   NOP ;                                      /* 0x00 */
        /*00d0*/               @P1 BRA 0x50 ;                                 /* 0x00 */
        /*00e0*/                   HGMMA.64x16x16.F32.BF16 R24, R96, gdesc[UR24], RZ, !UPT ;  /* 0x00 */
        /*00f0*/               @P2 BRA 0xe0 ;                                 /* 0x00 */
        /*0100*/              @UP0 BRA 0x20 ;                                 /* 0x00 */
        /*0110*/                   STG.E desc[UR4][R2.64], R8 ;               /* 0x00 */
        /*0120*/                   EXIT ;                                     /* 0x00 */
        /*0130*/                   BRA 0x110 ;                                /* 0x00 */
        /*0140*/                   BRA 0x140;                                 /* 0x00 */
"""


def test_instructions_have_predicates_classes_and_widths() -> None:
    instructions = {line.address: line for line in parse_sass(TEXT)}
    assert len(instructions) == 21
    assert (instructions[0x40].predicate, instructions[0x40].target) == ("!P0", 0x30)
    assert (instructions[0x120].predicate, instructions[0x120].target) == ("", None)
    assert [instructions[address].width for address in (0x10, 0x20, 0xB0, 0x110)] == [2, 16, 8, 4]
    kinds = [instructions[address].kind for address in (0x20, 0x30, 0x50, 0x60, 0x70, 0x80, 0x90, 0xA0, 0x120)]
    expected = ["global", "control", "matrix", "mufu", "conversion", "float", "integer", "shared", "control"]
    assert kinds == expected
    assert instructions[0x50].products == 64 * 64 * 16 // 4


@pytest.mark.parametrize(
    ("name", "kind", "products"),
    [
        ("HMMA.16816.F32.BF16", "matrix", 16 * 8 * 16),
        ("UTCHMMA", "matrix", 1),
        ("LDL.LU", "local", 0),
        ("LDGDEPBAR", "control", 0),
        ("LDC.64", "integer", 0),
        ("LDSM.16.M88.4", "shared", 0),
        ("SEL", "integer", 0),
        ("SHFL.BFLY", "shared", 0),
        ("SHF.L.U32", "integer", 0),
        ("FSETP.GT.AND", "float", 0),
        ("I2FP.F32.S32", "conversion", 0),
        ("XYZZY", "other", 0),
    ],
)
def test_the_longest_beginning_of_a_name_decides(name, kind, products) -> None:
    (instruction,) = parse_sass(f"        /*0000*/    {name} R1, R2 ;   /* 0x00 */")
    assert (instruction.kind, instruction.products) == (kind, products)


def test_the_hot_loop_is_the_innermost_with_most_matrix_work() -> None:
    loops = find_loops(parse_sass(TEXT))
    assert [(body[0].address, body[-1].address) for body in loops] == [(0x50, 0xD0), (0xE0, 0xF0), (0x20, 0x100)]
    found = describe_sass(TEXT)
    assert found["in_loop"] and found["loop_products"] == 64 * 64 * 16 // 4 and found["matrix"] == 2
    counts = {"matrix": 1, "float": 1, "mufu": 1, "conversion": 1, "shared": 1, "global": 1, "integer": 1, "control": 1}
    assert found["loop"] == dict.fromkeys((*CLASSES, "other"), 0) | counts  # the NOP is not counted
    assert (found["loop_loads"], found["loop_stores"]) == ({"8": 1}, {})
    assert (found["loads"], found["stores"]) == ({"16": 1, "8": 1, "2": 1}, {"4": 1})
    # From 0x00 to 0x40, and from the branch at 0xd0 over 0xe0, 0xf0, 0x100 and 0x110 to the end.
    assert found["outside"] == 5 + 5


def test_without_matrix_instructions_the_bytes_decide_and_without_a_loop_all_counts() -> None:
    streaming = [line for line in TEXT.splitlines() if "HGMMA" not in line]
    found = describe_sass("\n".join(streaming))
    assert found["in_loop"] and found["loop"]["mufu"] == 1 and found["loop_loads"] == {"8": 1}
    straight = [line for line in streaming if "BRA" not in line]
    found = describe_sass("\n".join(straight))
    assert not found["in_loop"] and found["outside"] == 0
    assert found["loop"] == count_kinds(parse_sass("\n".join(straight)))
    assert count_widths(parse_sass("\n".join(straight)), store=True) == {"4": 1}


def test_a_loop_may_be_left_from_its_middle_by_a_call() -> None:
    found = describe_sass(
        """
        /*0000*/                   MOV R1, R2 ;                     /* 0x00 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;     /* 0x00 */
        /*0020*/               @P1 CALL.REL.NOINC 0x50 ;            /* 0x00 */
        /*0028*/                   BRA.U !UP1, 0x30 ;               /* 0x00 */
        /*0030*/                   BRA 0x10 ;                       /* 0x00 */
        /*0040*/                   MOV R1, R2 ;                     /* 0x00 */
        /*0050*/              @!P0 EXIT ;                           /* 0x00 */
        /*0060*/                   EXIT ;                           /* 0x00 */
        """
    )
    assert found["in_loop"] and sum(found["loop"].values()) == 4
    assert found["outside"] == 2


def test_text_without_instructions_is_refused() -> None:
    with pytest.raises(ValueError, match="no instructions"):
        parse_sass("cuobjdump info: no device code")


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "programs"),
    [
        ("sm_90", 32, 0, 2, 32),  # the limit of programs
        ("sm_90", 128, 1024, 4, 4),
        ("sm_90", 129, 1024, 4, 3),  # allocated in eights
        ("sm_90", 168, 61696, 4, 3),
        ("sm_90", 168, 80000, 4, 2),  # shared memory
        ("sm_80", 168, 80000, 4, 2),
        ("sm_80", 64, 55 * 1024, 4, 2),  # 164 KiB hold two of 56
        ("sm_90", 132, 40960, 8, 1),
        ("sm_90", 255, 0, 16, 0),
    ],
)
def test_programs_on_a_multiprocessor(arch, registers, shared, num_warps, programs) -> None:
    expected = {"programs": programs, "warps": programs * num_warps}
    assert count_programs(arch, registers, shared, num_warps) == expected
