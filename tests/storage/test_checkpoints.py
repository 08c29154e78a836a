import errno
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from potstill.errors import InputError
from potstill.storage.checkpoints import ProbeMismatch, load, save, verify_probe, write_atomically


def raw(header: object, body: bytes = b"") -> bytes:
    """A safetensors file as bytes, with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start: int, end: int, shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


METADATA = {"potstill": json.dumps({"format": 1})}


def no_leftovers(folder: Path) -> bool:
    return not list(folder.glob(".*.tmp"))


def test_tensors_and_document_come_back_as_they_went(tmp_path):
    tensors = {
        "weight": torch.tensor([[1.5, float("nan")], [float("inf"), -0.0]]),
        "step": torch.tensor(7),
        "rng": torch.get_rng_state(),
        "half": torch.ones(2, 3, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
    }
    save(tmp_path / "a.safetensors", tensors, {"score": -3.5, "env": {"name": "pong"}})
    loaded, document = load(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(nan=9.0), tensor.nan_to_num(nan=9.0)), name
        assert loaded[name].shape == tensor.shape
    assert (document["score"], document["env"]) == (-3.5, {"name": "pong"})


def test_the_document_names_the_format_and_what_computed_it_whatever_the_caller_says(tmp_path):
    given = {"format": 99}
    save(tmp_path / "a.safetensors", {}, given)
    _, document = load(tmp_path / "a.safetensors")
    assert given == {"format": 99}
    assert document["format"] == 1
    assert set(document["versions"]) == {"potstill", "torch", "ale_py", "gymnasium", "numpy", "python"}
    assert document["versions"]["torch"] == torch.__version__


def test_channels_last_and_shared_tensors_come_back_contiguous_and_apart(tmp_path):
    image = torch.arange(48.0).reshape(2, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    base = torch.arange(6.0)
    save(tmp_path / "a.safetensors", {"image": image, "all": base, "tail": base[2:], "t": base.reshape(2, 3).T}, {})
    loaded, _ = load(tmp_path / "a.safetensors")
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert torch.equal(loaded["image"], image)
    assert torch.equal(loaded["t"], base.reshape(2, 3).T)
    loaded["all"].zero_()
    assert torch.equal(loaded["tail"], base[2:])


def test_parameters_that_require_gradients_are_saved_as_plain_tensors(tmp_path):
    save(tmp_path / "a.safetensors", {"w": torch.ones(2, requires_grad=True)}, {})
    assert not load(tmp_path / "a.safetensors")[0]["w"].requires_grad


def test_loaded_tensors_do_not_follow_later_changes_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.ones(1000)}, {})
    loaded, _ = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded["w"], torch.ones(1000))


@pytest.mark.parametrize("document", [{"score": float("nan")}, {"path": Path("x")}, {"big": "x" * 10_000_001}])
def test_a_document_that_could_not_be_read_back_is_refused_before_the_old_file_is_touched(tmp_path, document):
    save(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {})
    with pytest.raises((ValueError, TypeError)):
        save(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, document)
    assert load(tmp_path / "a.safetensors")[0]["w"].item() == 1.0


def fail(number: int):
    def raiser(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return raiser


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch, call):
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.ones(1)}, {})
    before = path.read_bytes()
    monkeypatch.setattr(os, call, fail(errno.ENOSPC))
    with pytest.raises(InputError, match=r"a\.safetensors: no space left on device; nothing was changed$"):
        save(path, {"w": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert no_leftovers(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_write_that_the_system_refuses_is_one_clear_line(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: real("/dev/full", os.O_WRONLY))
    with pytest.raises(InputError, match="no space left on device; nothing was changed"):
        write_atomically(tmp_path / "a", b"x" * 100_000)
    assert not (tmp_path / "a").exists()


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", b"old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert no_leftovers(tmp_path)


def test_the_data_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        order.append("rename")
        assert (source.parent, source.name[0], source.suffix) == (target.parent, ".", ".tmp")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "a", b"new")
    if os.path.exists("/proc/self/fd"):
        assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_flushed_passes_only_where_the_file_system_has_no_such_thing(
    tmp_path, monkeypatch, number, passes
):
    fsync, calls = os.fsync, []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    if passes:
        write_atomically(tmp_path / "a", b"new")
    else:
        with pytest.raises(InputError, match="may not survive a power cut"):
            write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_the_file_is_as_readable_to_others_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_missing_or_a_path_that_is_a_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file or directory; nothing was changed"):
        write_atomically(tmp_path / "missing" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a directory; nothing was changed"):
        write_atomically(tmp_path / "folder", b"")
    assert no_leftovers(tmp_path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.safetensors: no such file or directory"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is a directory"):
        load(tmp_path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.ones(3)}, {"score": 1.0})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated"):
            load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        (b"\x80\x02}q\x00." * 10, "not a safetensors file"),
        (struct.pack("<Q", 2**63) + b"{" * 100, "not a safetensors file"),
        (struct.pack("<Q", 10_000_001) + b"{" + bytes(10_000_001), "not a safetensors file"),
        (raw(b"[]"), "not a safetensors file"),
        (raw(b"{not json"), "not a safetensors file"),
        (raw(b'{"\xff": 1}'), "not a safetensors file"),
        (raw(b'{"a":' + b"[" * 100_000), "not a safetensors file"),
        (raw({"w": 3}), "not a safetensors file"),
        (raw({"w": {"data_offsets": [0, "4"]}}), "not a safetensors file"),
        (raw({"w": {"data_offsets": []}}), "not a safetensors file"),
        (raw({"__metadata__": METADATA}, b"tail"), "has bytes after its end"),
        (raw({"w": entry(0, 4)}, bytes(4)), "not potstill's: it has no 'potstill' metadata"),
        (raw({"__metadata__": {"format": "pt"}}), "not potstill's"),
        (raw({"__metadata__": None}), "not potstill's"),
        (raw({"__metadata__": {"potstill": "{"}}), "not potstill's"),
        (raw({"__metadata__": {"potstill": "[1]"}}), "not potstill's"),
        (raw({"__metadata__": {"potstill": "{}"}}), "not potstill's"),
        (raw({"__metadata__": {"potstill": '{"format": "1"}'}}), "not potstill's"),
        (raw({"__metadata__": {"potstill": '{"format": true}'}}), "not potstill's"),
        (raw({"__metadata__": {"potstill": '{"format": 2}'}}), "format 2, this potstill reads up to 1: upgrade"),
        (raw({"__metadata__": {"potstill": '{"format": 0}'}}), "format 0, which never was"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, data, message):
    path = tmp_path / "strange.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "strange.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(0, 4), "b": entry(8, 12)},  # a gap
        {"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))},  # an overlap
        {"a": entry(0, 12, (2,))},  # a shape of other size
        {"a": entry(4, 12, (2,))},  # bytes before the first
        {"a": entry(0, 12, (3,)) | {"dtype": "F33"}},
    ],
)
def test_entries_that_do_not_add_up_are_left_to_safetensors_which_refuses_them(tmp_path, entries):
    data = raw({"__metadata__": METADATA, **entries}, bytes(12))
    with pytest.raises(SafetensorError):
        safetensors.torch.load(data)
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.safetensors is damaged"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    save(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {})
    with pytest.raises(InputError, match=f"on device '{device}'.*try --device cpu") as caught:
        load(tmp_path / "a.safetensors", device)
    assert "\n" not in str(caught.value)


def test_a_probe_within_tolerance_passes():
    expected = torch.tensor([[0.0, 100.0]])
    verify_probe(expected, expected + torch.tensor([[0.0009, 0.1]]), "mps", Path("p"))


def test_a_probe_out_of_tolerance_names_the_device_and_the_largest_difference():
    expected = torch.tensor([[0.0, 100.0], [1.0, 2.0]])
    with pytest.raises(ProbeMismatch) as caught:
        verify_probe(expected, expected + torch.tensor([[0.0, 0.05], [0.31, 0.0]]), "mps", Path("p.safetensors"))
    assert str(caught.value) == (
        "p.safetensors computes other logits on device 'mps' than when it was saved (largest difference 0.31): "
        "do not trust scores from this device; try --device cpu"
    )
    assert isinstance(caught.value, InputError)


def test_the_tolerance_is_relative_to_the_stored_logits():
    with pytest.raises(ProbeMismatch):
        verify_probe(torch.tensor([[1.0]]), torch.tensor([[1.0021]]), "mps", Path("p"))
    with pytest.raises(ProbeMismatch):
        verify_probe(torch.tensor([[0.0]]), torch.tensor([[1000.0]]), "mps", Path("p"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_never_pass_even_where_both_sides_have_them(bad):
    good, broken = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, bad]])
    for expected, actual in ((good, broken), (broken, good), (broken, broken)):
        with pytest.raises(ProbeMismatch, match="not finite"):
            verify_probe(expected, actual, "cuda", Path("p"))


def test_on_the_cpu_nobody_is_sent_to_the_cpu():
    with pytest.raises(ProbeMismatch, match="device 'cpu'") as caught:
        verify_probe(torch.zeros(1, 3), torch.ones(1, 3), "cpu", Path("p"))
    assert "--device cpu" not in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 3), (2, 6)])
def test_a_probe_of_another_shape_or_an_empty_one_proves_nothing_and_is_refused(shape):
    with pytest.raises(ProbeMismatch, match="shape"):
        verify_probe(torch.zeros(shape), torch.zeros(0, 3), "cpu", Path("p"))
