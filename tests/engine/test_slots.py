"""The number of slots of a decode chunk."""

from __future__ import annotations

from tinsmith.engine.sampling.slots import Slots

COMPILE, CHUNK = 10.0, 1.0


def run(slots: Slots, needed: int, soon: int = 0, kind: str = "a") -> tuple[int, bool]:
    """Return the slots of one chunk, and whether they were compiled for it."""
    before = {name: set(known) for name, known in slots._compile_seconds.items()}
    chosen = slots.choose(kind, needed, soon)
    is_new = chosen not in before.get(kind, ())
    slots.ran(kind, needed, chosen, COMPILE if is_new else CHUNK)
    return chosen, is_new


def test_the_first_program_has_room_for_those_who_wait() -> None:
    slots = Slots()
    assert run(slots, 1, soon=3) == (4, True)
    assert run(slots, 3) == (4, False)


def test_a_compiled_program_serves_fewer_sequences_for_as_long_as_compiling_takes() -> None:
    slots = Slots()
    assert run(slots, 16) == (16, True)
    assert [run(slots, 4) for _ in range(12)] == [(16, False)] * 10 + [(4, True), (4, False)]
    assert run(slots, 1) == (4, False), "the smallest that holds it"
    assert run(slots, 9) == (16, False)


def test_more_sequences_than_any_program_holds_compile_one() -> None:
    slots = Slots()
    assert run(slots, 1) == (1, True)
    assert run(slots, 2) == (4, True)
    assert run(slots, 1) == (1, False)


def test_kinds_have_programs_of_their_own() -> None:
    slots = Slots()
    assert run(slots, 4) == (4, True)
    assert run(slots, 1, kind="b") == (1, True)
