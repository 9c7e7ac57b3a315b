"""Reading machine code as nvdisasm prints it: what the loop of a kernel costs, instruction by instruction.

Issue slots are what a kernel that streams is bound by once its loads are wide and early: an H100 has about 98 of them
for an element of the 8-bit AdamW step at copy speed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# The pipe of an instruction, by its first word; what is not here goes to the ALU (IADD3, LOP3, PRMT, ISETP, FMNMX ...).
_WORDS = {
    "FMA": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 FSWZADD IMAD IDP",
    "XU": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "LSU": "LDG STG LDS STS LDC LDSM ATOMG ATOM ATOMS RED REDG SHFL LD ST LDL STL MEMBAR ERRBAR CCTL",
    "CTL": "BRA EXIT BAR BSSY BSYNC RET CALL NOP WARPSYNC DEPBAR BREAK YIELD JMP BRX NANOSLEEP",
}
PIPES = {word: pipe for pipe, words in _WORDS.items() for word in words.split()}


@dataclass(frozen=True)
class Loop:
    """A loop: its opcodes, in order."""

    opcodes: tuple[str, ...]

    def count(self, *words: str) -> int:
        """How many instructions begin with one of these words."""
        return sum(op.split(".")[0] in words for op in self.opcodes)

    @property
    def pipes(self) -> dict[str, int]:
        """Instructions by pipe."""
        return dict(Counter(PIPES.get(op.split(".")[0], "ALU") for op in self.opcodes))

    @property
    def branches(self) -> int:
        """Branches besides the one that closes the loop."""
        return self.count("BRA", "BRX", "JMP") - 1


def loop(sass: str) -> Loop | None:
    """The longest loop in a kernel's machine code, from a label to the last branch back to it; None if it has none."""
    opcodes, starts, found = list[str](), dict[str, int](), list[Loop]()
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line.strip()):
            starts[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            opcodes.append(instruction[1].split()[0])
            target = re.search(r"BRA.*\((\.L_x_\w+)\)", instruction[1])
            if target and target[1] in starts:
                found.append(Loop(tuple(opcodes[starts[target[1]] :])))
    return max(found, key=lambda x: len(x.opcodes), default=None)
