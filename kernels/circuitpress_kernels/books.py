"""How a kernel looks codes up in a book of 4, 8 or 16 numbers that it keeps in registers, as PTX.

    prmt d, a, b, s        byte i of d is byte (nibble i of s) of the eight bytes of a and b

1. A thread of a tensor-core instruction holds weights of two rows only. So the book of a row stays in its registers:
   the low bytes of the numbers in one register for every four of them, the high bytes in others.
2. Codes are nibbles of a selector once neighbouring bits are masked: one `prmt` takes the low bytes of four numbers
   out, a second one the high bytes, two more join them to pairs. Of two words, kk and kk + 1, bytes are sorted first,
   so that the four nibbles are two slices at kk and at kk + 1: each pair is what a tensor core wants in one register.
3. With 16 numbers there is a look-up in each half of the book; bit 3 of the codes chooses between their bytes.

Instructions a weight on Hopper for 4, 8 and 16 numbers: 1.9, 2.4 and 3.5; with look-ups in memory 6.8 to 9.2.
"""

from . import planes

_SORT = 0x3120
"""Of the bytes 0, 1 of kk and 2, 3 of kk + 1: 0, 2, 1, 3."""
_JOIN = (0x6240, 0x7351)
"""Of low bytes 0 to 3 and high bytes 4 to 7: numbers 0 and 2, numbers 1 and 3."""


def registers(bits: int) -> int:
    """Registers of the low bytes, and of the high bytes, of a book."""
    return 2**bits // 4


def book_slices(bits: int) -> int:
    """Slices that one piece of assembly takes out: those of a word, or of all that share one of the upper plane."""
    return planes.fields(bits)


def book_assembly(bits: int) -> str:
    """PTX: $0 to $n-1 become the pairs of numbers of n = `book_slices(bits)` slices.

    Then come the words of the superblock, and twice in a row (for two weights) each register of the low bytes and each
    of the high bytes.
    """
    count = book_slices(bits)
    words = [f"${count + word}" for word in range(planes.words(bits))]
    book = [f"${count + len(words) + 2 * place}" for place in range(2 * registers(bits))]
    lines = {2: _selectors_of_2, 3: _selectors_of_3, 4: _selectors_of_4}[bits](words)
    # Selector i stands for slices (a, b) at kk and at kk + 1.
    for number, (first, second) in enumerate(_pairs(bits)):
        lines += _bytes("lo", number, book[: registers(bits)]) + _bytes("hi", number, book[registers(bits) :])
        lines += [f"prmt.b32 ${goal}, lo, hi, {how:#06x}" for goal, how in zip((first, second), _JOIN, strict=True)]
    names = ["lo", "hi", "t", "v", *_selector_names(len(_pairs(bits)))]
    return "{ .reg .b32 " + ", ".join(names) + "; " + " ".join(f"{line};" for line in lines) + " }"


def book_constraints(bits: int) -> str:
    """Registers of `book_assembly`."""
    inputs = planes.words(bits) + 4 * registers(bits)
    return ",".join(["=r"] * book_slices(bits) + ["r"] * inputs)


def _pairs(bits: int) -> list[tuple[int, int]]:
    """The slices of each selector."""
    if bits == 4:
        return [(0, 1), (2, 3)]
    groups = [(0, 2), (1, 3), (4, 6), (5, 7)]
    return groups if bits == 2 else [(a + half, b + half) for half in (0, 8) for a, b in groups]


def _selector_names(count: int) -> list[str]:
    return [*(f"s{number}" for number in range(count)), "u", "w", "h", *(f"c{number}" for number in range(count))]


def _selectors_of_2(words: list[str]) -> list[str]:
    return [
        f"prmt.b32 u, {words[0]}, {words[0]}, {_SORT:#06x}",
        "and.b32 s0, u, 0x33333333", "shr.u32 t, u, 2", "and.b32 s1, t, 0x33333333",
        "shr.u32 s2, s0, 16", "shr.u32 s3, s1, 16",
    ]  # fmt: skip


def _selectors_of_3(words: list[str]) -> list[str]:
    """Two words of the lower plane side by side, as their upper bits are."""
    lines = [
        f"prmt.b32 u, {words[0]}, {words[1]}, 0x6420", f"prmt.b32 w, {words[0]}, {words[1]}, 0x7531",
        f"prmt.b32 h, {words[2]}, {words[2]}, {_SORT:#06x}",
    ]  # fmt: skip
    for number, (source, low, high) in enumerate((("u", 0, -2), ("u", 2, 0), ("w", 0, -1), ("w", 2, 1))):
        upper, lower = "h", source
        if high:
            lines.append(f"{'shl.b32' if high < 0 else 'shr.u32'} t, h, {abs(high)}")
            upper = "t"
        if low:
            lines.append(f"shr.u32 v, {source}, {low}")
            lower = "v"
        lines += [f"and.b32 t, {upper}, 0x44444444", f"lop3.b32 s{number}, {lower}, 0x33333333, t, 0xea"]
        lines.append(f"shr.u32 s{number + 4}, s{number}, 16")
    return lines


def _selectors_of_4(words: list[str]) -> list[str]:
    return [
        f"prmt.b32 u, {words[0]}, {words[0]}, {_SORT:#06x}",
        "and.b32 s0, u, 0x77777777", "shr.u32 s1, s0, 16",
        "shr.u32 t, u, 1", "mov.b32 v, 0x32103210", "lop3.b32 c0, t, 0x44444444, v, 0xea", "shr.u32 c1, c0, 16",
    ]  # fmt: skip


def _bytes(goal: str, number: int, book: list[str]) -> list[str]:
    """The bytes of four codes from the registers of a book."""
    if len(book) < 4:
        return [f"prmt.b32 {goal}, {book[0]}, {book[-1]}, s{number}"]
    return [
        f"prmt.b32 {goal}, {book[0]}, {book[1]}, s{number}", f"prmt.b32 t, {book[2]}, {book[3]}, s{number}",
        f"prmt.b32 {goal}, {goal}, t, c{number}",
    ]  # fmt: skip
