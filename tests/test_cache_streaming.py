"""What the measurement of streaming counts, on a tiny model: not how fast that is."""

import re
import sys
import time

import pytest
import torch

from benchmarks import streaming
from benchmarks.streaming import Stream, late_over_early, measure_stream, resident_bytes
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import save_retrofit
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline import device as runtime
from tests.reference import infini_params
from tests.tiny import tiny_base_folder
from tests.tiny_generation import SEGMENT, generating_model

CALL = streaming.SEGMENTS_PER_CALL * SEGMENT


def test_parts_are_equal_and_none_of_the_stream_is_left_out():
    parts = list(measure_stream(Stream(generating_model(layers=[1])), 7 * CALL + 1, num_parts=3))
    assert [part.num_tokens for part in parts] == [4 * CALL, 7 * CALL, 10 * CALL]
    assert all(0 < part.seconds < 1 for part in parts)
    assert all(part.resident_bytes > 2**20 for part in parts)


def test_a_bounded_cache_stays_as_it_is_and_one_that_sees_everything_grows():
    sizes = {}
    for other in ("segment", "full"):
        model = generating_model(other_layers=other, layers=[1])
        parts = list(measure_stream(Stream(model), 7 * CALL, num_parts=2))
        sizes[other] = [part.cache_bytes for part in parts]
    assert sizes["segment"][0] == sizes["segment"][1]
    assert sizes["full"][1] - sizes["full"][0] == 2 * 3 * CALL * 2 * 2 * 6 * 4


def test_a_stream_that_slows_down_is_noticed(monkeypatch):
    stream, read = Stream(generating_model(layers=[1])), streaming.read

    def slower(model, ids, cache, num_segments: int):
        time.sleep(5e-3 * cache.num_seen / CALL)
        return read(model, ids, cache, num_segments)

    list(measure_stream(stream, 41 * CALL, num_parts=1))
    assert 0.5 < late_over_early(stream, 5) < 2
    monkeypatch.setattr(streaming, "read", slower)
    assert late_over_early(stream, 5) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_that_of_now():
    before = resident_bytes(torch.device("cpu"))
    held = torch.ones(2**25)
    during = resident_bytes(torch.device("cpu"))
    assert during - before > 0.9 * held.numel() * 4
    del held
    assert resident_bytes(torch.device("cpu")) < during


def keep_freed(stream: Stream, monkeypatch) -> None:
    """Let each call leave freed memory behind that malloc may keep, more at each."""
    step, kept = type(stream).__call__, []

    def leave_holes(stream: Stream) -> float:
        blocks = [b"x" * (2**16 + i) for i in range(800)]
        kept.append(blocks[-1])  # on top of the others
        return step(stream)

    monkeypatch.setattr(Stream, "__call__", leave_holes)


@pytest.mark.skipif(not runtime._of_glibc("malloc_trim"), reason="needs glibc")
@pytest.mark.parametrize("gives_back", [True, False])
def test_memory_that_was_freed_and_kept_is_told_apart(monkeypatch, gives_back):
    stream = Stream(generating_model(layers=[1]))
    keep_freed(stream, monkeypatch)
    if not gives_back:
        monkeypatch.setattr(streaming, "return_freed_memory", lambda: None)
    (part,) = measure_stream(stream, 3 * CALL, num_parts=1)
    assert (part.resident_bytes - part.needed_bytes > 2**24) == gives_back


@pytest.mark.parametrize("other", ["segment", "full"])
def test_the_command_prints_ten_parts_and_their_ratios(tmp_path, monkeypatch, capsys, other):
    folder = tiny_base_folder(tmp_path / "base", num_hidden_layers=1)
    options = ["--segment-length", "3", "--tokens", "240", "--other-layers", other]
    monkeypatch.setattr(sys, "argv", ["streaming", "--base", str(folder), *options])
    monkeypatch.setattr(streaming, "start_run", lambda: (torch.device("cpu"), torch.float32))
    streaming.main()
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 10
    assert rows[-1].startswith("| 252 ")
    assert re.search(r"last tenth over first: [\d.]+; after .* given back: [\d.]+\.\n", said)


@pytest.mark.parametrize("num_tokens", [1, 399])
def test_a_stream_too_short_for_the_retrofit_s_own_segments_is_refused(
    tmp_path, monkeypatch, num_tokens
):
    base = tiny_base_folder(tmp_path / "base", num_hidden_layers=1)
    model, params = load_base(base, torch.float32), infini_params(segment_length=SEGMENT)
    insert_infini(model, params)
    save_retrofit(model, params, base, tmp_path / "retrofit")
    options = ["--base", str(base), "--segment-length", "3", "--tokens", str(num_tokens)]
    monkeypatch.setattr(sys, "argv", ["streaming", str(tmp_path / "retrofit"), *options])
    monkeypatch.setattr(streaming, "start_run", lambda: (torch.device("cpu"), torch.float32))
    with pytest.raises(ValueError, match=rf"^tokens must be at least 400, .* got {num_tokens}$"):
        streaming.main()


class LeakyStream(Stream):
    """A broken stream: of each call something stays."""

    def __call__(self) -> float:
        """Keep two MiB."""
        self.kept = [*getattr(self, "kept", []), torch.ones(2**19)]
        return super().__call__()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "other", "cache_grows", "memory_grows"),
    [
        (Stream, "segment", False, False),
        (Stream, "full", True, False),
        (LeakyStream, "segment", False, True),
    ],
)
def test_memory_stays_flat_over_hundreds_of_segments(kind, other, cache_grows, memory_grows):
    stream = kind(generating_model(other_layers=other, layers=[0, 2], local_context=2))
    parts = list(measure_stream(stream, 300 * SEGMENT, num_parts=5))
    assert stream.cache.num_seen >= 300 * SEGMENT
    assert (len({part.cache_bytes for part in parts}) > 1) == cache_grows
    assert (parts[-1].needed_bytes > 1.02 * parts[0].needed_bytes) == memory_grows
