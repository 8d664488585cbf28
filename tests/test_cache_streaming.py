"""Streaming costs the same work and memory a token, however long the text; the table says so.

How fast a stream is stands in `python -m benchmarks.streaming`, and in no test.
"""

import gc
import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import generate, streaming
from benchmarks.streaming import Stream, resident_bytes
from infini_retrofit.pipeline import device as runtime
from tests.tiny import tiny_base_folder
from tests.tiny_export import make_retrofit
from tests.tiny_generation import SEGMENT, generating_model

CALL = streaming.SEGMENTS_PER_CALL * SEGMENT
# torch counts attention on a GPU only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    )
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class LeakyStream(Stream):
    """A broken stream: something of each call stays in memory."""

    def __call__(self) -> float:
        """Keep a few bytes."""
        self.kept = [*getattr(self, "kept", []), torch.ones(3)]
        return super().__call__()


def operations(stream: Stream) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        stream()
    return counter.get_total_flops()


def live_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("kind", "other", "work_grows", "memory_grows"),
    [
        (Stream, "segment", False, False),
        (Stream, "full", True, True),
        (LeakyStream, "segment", False, True),
    ],
)
def test_work_and_memory_stay_the_same_over_hundreds_of_segments(
    kind, other, work_grows, memory_grows
):
    stream = kind(generating_model(other_layers=other, layers=[0, 2], local_context=2))
    work, memory, cache = operations(stream), live_bytes(), stream.cache.num_bytes
    for _ in range(100):
        stream()
    assert stream.cache.num_seen > 400 * SEGMENT
    assert (operations(stream) > work, live_bytes() > memory) == (work_grows, memory_grows)
    assert (stream.cache.num_bytes > cache) == (other == "full")


@linux
@pytest.mark.skipif(not runtime._of_glibc("malloc_trim"), reason="needs glibc")
def test_resident_memory_is_that_of_now_and_freed_memory_is_given_back():
    cpu = torch.device("cpu")
    before = resident_bytes(cpu)
    blocks = [b"x" * (2**16 + i) for i in range(800)]
    assert resident_bytes(cpu) - before > 2**24
    blocks = blocks[-1:]  # on top of the others, which malloc keeps below it
    kept = resident_bytes(cpu)
    runtime.return_freed_memory()
    assert kept - resident_bytes(cpu) > 2**24


def run_command(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["streaming", *map(str, options)])
    monkeypatch.setattr(streaming, "start_run", lambda: (torch.device("cpu"), torch.float32))
    streaming.main()


@linux
def test_the_command_prints_ten_parts_and_their_ratios(tmp_path, monkeypatch, capsys):
    base = tiny_base_folder(tmp_path / "base", num_hidden_layers=1)
    options = ("--segment-length", 3, "--tokens", 240, "--other-layers", "full")
    run_command(monkeypatch, "--base", base, *options)
    said = capsys.readouterr().out
    rows = re.findall(r"^\| +(\d+) \|", said, re.MULTILINE)
    assert rows == [str(12 + 24 * part) for part in range(1, 11)]
    assert re.search(r"last tenth over first: [\d.]+; after .* given back: [\d.]+\.\n", said)


def test_a_stream_too_short_for_the_retrofit_s_own_segments_is_refused(tmp_path, monkeypatch):
    make_retrofit(tmp_path, "llama", segment_length=SEGMENT)
    monkeypatch.chdir(tmp_path)
    options = ("--base", "models/base", "--segment-length", 3, "--tokens", 399)
    with pytest.raises(ValueError, match=r"^tokens must be at least 400, .* got 399$"):
        run_command(monkeypatch, "models/finetuned", *options)


def test_generation_is_measured_beside_the_base_at_every_length(tmp_path, monkeypatch, capsys):
    make_retrofit(tmp_path, "llama", segment_length=SEGMENT)
    monkeypatch.chdir(tmp_path)
    words = ["generate", "models/finetuned", "--lengths", "7", "20"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(generate, "start_run", lambda: (torch.device("cpu"), torch.float32))
    generate.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["7", "20"]
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)
