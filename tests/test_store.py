"""Hidden states in memory and on disk: the same numbers, the limit kept, nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch

import circuitpress.store as storing
from circuitpress.store import Store, return_freed_memory

SIZE = 6 * 4  # bytes of one small tensor


def small(value: float) -> torch.Tensor:
    return torch.full((2, 3), float(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (2, 0, 3), ()])
def test_files_hold_the_same_bits(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    store = Store(tmp_path / "s", limit=0)
    tensor = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    store.put((0, 1), tensor)
    back = store.get((0, 1))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)


def test_views_and_transposes(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", limit=0)
    base = torch.arange(24.0).view(4, 6)
    store.put((0,), base.T)
    store.put((1,), base[1:3, ::2])
    assert torch.equal(store.get((0,)), base.T)
    assert torch.equal(store.get((1,)), base[1:3, ::2])


def test_the_limit_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", limit=2 * SIZE)
    for i in range(5):
        store.put((i,), small(i))
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert [float(store.get((i,))[0, 0]) for i in range(5)] == [0, 1, 2, 3, 4]
    store.drop((0,))
    store.put((5,), small(5))  # its place in memory is free again
    assert len(list((tmp_path / "s").iterdir())) == 3
    store.drop((3,))
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert (3,) not in store and (4,) in store and (5,) in store


def test_a_key_is_replaced(tmp_path: Path) -> None:
    for limit in (0, 10 * SIZE):
        store = Store(tmp_path / f"s{limit}", limit=limit)
        for value in (1.0, 2.0):
            store.put(("name", 3), small(value))
        assert torch.equal(store.get(("name", 3)), small(2.0))
        store.drop(("name", 3))
        assert ("name", 3) not in store
        store.drop(("name", 3))
        with pytest.raises(KeyError):
            store.get(("name", 3))


def test_replacing_does_not_count_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", limit=2 * SIZE)
    for _ in range(10):
        store.put((0,), small(0))
    store.put((1,), small(1))
    assert not (tmp_path / "s").exists()


def test_keys_are_no_file_names(tmp_path: Path) -> None:
    """Keys of variants hold group names and formats: `model.layers.0.mlp[0:16, :]`, `3:int4g64`, `a/b`."""
    store = Store(tmp_path / "s", limit=0)
    keys = [("a/b", 0), ("a", 0), ("a-0", 1), ("a", "0", 1), ("x" * 300, 0), ("..", 1), ("ä:[0:16, :]", 2)]
    for i, key in enumerate(keys):
        store.put(key, small(i))
    assert [float(store.get(key)[0, 0]) for key in keys] == list(range(len(keys)))
    assert sorted(path.parent for path in tmp_path.rglob("*.bin")) == [tmp_path / "s"] * len(keys)


def test_without_a_folder_all_stays_in_memory() -> None:
    store = Store(None, limit=0)
    tensor = small(1).requires_grad_(True) * 2
    store.put((0,), tensor)
    assert not store.get((0,)).requires_grad
    store.clear()
    assert (0,) not in store


def test_clearing_removes_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", limit=SIZE)
    for i in range(3):
        store.put((i,), small(i))
    store.clear()
    assert list(tmp_path.iterdir()) == []
    store.put((9,), small(9))
    store.put((8,), small(8))
    assert torch.equal(store.get((8,)), small(8))
    store.clear()


def test_memory_goes_back_once_there_is_much_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit only, and once; an older C library, which cannot say what it keeps, is asked at every turn."""
    trimmed: list[int] = []

    class Library:
        def __init__(self, kept: int | None) -> None:
            self.malloc_trim = trimmed.append
            if kept is not None:
                self.mallinfo2 = lambda: storing._Heap(fordblks=kept, uordblks=1000, hblkhd=100)

    much = storing.FREED + 1
    for kept, resident, expected in (
        (much - 1, 4 * much, 0),
        (much, 4 * much, 1),
        (much, much + 1099, 0),
        (None, 0, 1),
    ):
        trimmed.clear()
        monkeypatch.setattr(storing.ctypes, "CDLL", lambda _, kept=kept: Library(kept))
        monkeypatch.setattr(storing, "_resident", lambda resident=resident: resident)
        return_freed_memory()
        assert len(trimmed) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_what_is_resident() -> None:
    before = storing._resident()
    block = torch.ones(1 << 24)
    assert storing._resident() - before > 0.9 * block.numel() * block.element_size()
