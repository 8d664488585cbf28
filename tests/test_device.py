"""Device and number type of a run, and the line that names them."""

import pytest
import torch

from infini_retrofit.pipeline import device


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_a_processor_computes_in_bfloat16_only_where_it_has_such_products(
    capabilities, dtype, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(device, "_keep_freed_memory", lambda: None)
    assert device.start_run() == (torch.device("cpu"), dtype)
    said = capsys.readouterr().err
    assert said.startswith(f"computing on cpu in {str(dtype).removeprefix('torch.')}\n")
    assert ("the README names its minutes" in said) == (dtype is torch.float32)


def test_a_gpu_is_used_without_being_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for has_bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16: has)
        assert device.start_run() == (torch.device("cuda", 1), dtype)


def test_without_glibc_the_allocator_is_left_alone(monkeypatch):
    asked = []

    def library_of(found: object) -> None:
        monkeypatch.setattr(device.ctypes, "CDLL", lambda name: asked.append(name) or found())
        device._keep_freed_memory()
        device.return_freed_memory()

    library_of(object)  # a library without these functions
    library_of(lambda: (_ for _ in ()).throw(OSError("no library")))
    assert asked == ["libc.so.6"] * 4
