"""Standard streams that nobody reads, or on a full disk."""
import os

import pytest

from grpo.record.terminal import tell


@pytest.fixture
def broken():
    """`broken()`: a stream whose reader has gone."""
    streams = []

    def broken():
        reader, writer = os.pipe()
        os.close(reader)
        streams.append(open(writer, "w", encoding="utf-8"))  # noqa: SIM115  (closed below)
        return streams[-1]

    yield broken
    for stream in streams:
        stream.close()


def test_what_nobody_need_read_may_fail_again_and_again(broken):
    stream = broken()
    for _ in range(2):
        tell("progress", stream)
    stream.flush()  # as Python at its exit: nothing is left that fails


def test_what_somebody_must_read_still_raises_after_the_other_stream_has_failed(broken, monkeypatch):
    """As where a full disk has both: results that are only printed must not be lost with exit code 0."""
    results, errors = broken(), broken()
    monkeypatch.setattr("sys.stdout", results)
    monkeypatch.setattr("sys.stderr", errors)
    print("an environment's own words, not written yet")
    tell("progress", errors)
    with pytest.raises(OSError):
        print("results", flush=True)
    tell("", results)  # nothing is left for the end of the test
