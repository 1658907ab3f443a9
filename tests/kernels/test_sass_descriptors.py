"""Matrix instructions that read descriptors which nothing has written, in machine code made up for the purpose."""

import pytest

from opensora_fast.kernels.compilation.sass import parse_sass
from opensora_fast.kernels.compilation.sass_descriptors import find_unwritten_descriptors

BOTH = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24"
SECOND = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR12].tnspB, R24"  # the first factor is in registers
MADE = ["ULDC.64 UR12, c[0x0][0x210]", "ULDC.64 UR14, c[0x0][0x218]"]


def find(*lines: str) -> list[str]:
    """Addresses, where the lines are a kernel's instructions from 0x00 on, 0x10 apart."""
    text = "\n".join(f"        /*{16 * number:04x}*/    {line} ;   /* 0x00 */" for number, line in enumerate(lines))
    return [hex(line.address) for line in find_unwritten_descriptors(parse_sass(text))]


def test_what_is_written_before_is_no_fault() -> None:
    assert find(*MADE, BOTH, "EXIT") == []
    assert find(MADE[1], SECOND, "EXIT") == []
    assert find("UMOV UR14, UR4", "R2UR UR15, R3", SECOND, "EXIT") == ["0x20"]
    assert find("S2UR UR4, SR_CTAID.X", "UMOV UR14, UR4", "R2UR.OR P1, UR15, R3", SECOND, "EXIT") == []


@pytest.mark.parametrize("left_out", [0, 1])
def test_both_registers_of_both_descriptors_count(left_out) -> None:
    assert find(MADE[left_out], BOTH, "EXIT") == ["0x10"]
    assert find(MADE[0], "UMOV UR14, 0x1", BOTH, "EXIT") == ["0x20"]


def test_a_write_on_one_path_alone_is_found() -> None:
    """As ptxas leaves it: the other path comes from before the loop."""
    assert find(MADE[0], "@P0 BRA 0x30", MADE[1], BOTH, "EXIT") == ["0x30"]
    assert find(MADE[0], "@P0 BRA 0x40", MADE[1], "BRA 0x50", MADE[1], BOTH, "EXIT") == []
    assert find("BRA.U !UP3, 0x20", MADE[1], SECOND, "EXIT") == ["0x20"]
    assert find("BRA 0x20", "EXIT", MADE[1], SECOND, "EXIT") == []


def test_a_write_behind_the_read_in_a_loop_is_found() -> None:
    assert find(SECOND, MADE[1], "@P0 BRA 0x00", "EXIT") == ["0x0"]
    assert find(MADE[1], SECOND, MADE[1], "@P0 BRA 0x10", "EXIT") == []


def test_what_is_made_from_unwritten_registers_is_unwritten() -> None:
    chain = ["@P0 BRA 0x20", "ULDC.64 UR4, c[0x0][0x210]", "UIADD3.64 UR14, UR4, UR6, URZ", SECOND, "EXIT"]
    assert find("ULDC.64 UR6, c[0x0][0x218]", *(line.replace("0x20", "0x30") for line in chain)) == ["0x40"]
    assert find("ULDC.64 UR6, c[0x0][0x218]", *chain[1:]) == []
    assert find(*chain[1:]) == ["0x20"]
    assert find(MADE[1], "UIADD3 UR14, UR8, 0x2, URZ", SECOND, "EXIT") == ["0x20"]  # written, and spoilt again


def test_comparisons_write_predicates() -> None:
    assert find("UISETP.NE.AND UP0, UPT, UR14, URZ, UPT", "UMOV UR15, 0x0", SECOND, "EXIT") == ["0x20"]


def test_code_that_no_path_reaches_does_not_count() -> None:
    assert find("EXIT", BOTH, "EXIT") == []


def test_other_instructions_are_not_looked_at() -> None:
    assert find("HMMA.16816.F32.BF16 R4, R8, R12, R4", "STG.E desc[UR4][R2.64], R4", "EXIT") == []
