"""Failures at any request, changed sources and wrong stores: the object is right, or there is none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.buckets import MIB, Bucket, upload
from support.killing import killed_at
from vmconv_s3 import backend
from vmconv_s3.parts import Part
from vmconv_s3.store import Store, StoreError

Hook = Callable[[str, bool], None]
"""Called with the operation of a request, before it is made and after it."""


def hooked(hook: Hook) -> Callable[..., Any]:
    """Returns what replaces `Store.ask`."""
    ask = Store.ask

    def replaced(self: Store, operation: str, **parameters: Any) -> Any:
        hook(operation, False)
        answer = ask(self, operation, **parameters)
        hook(operation, True)
        return answer

    return replaced


def answering(monkeypatch: pytest.MonkeyPatch, operation: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Makes the store's answers to an operation those that `change` returns."""
    ask = Store.ask

    def replaced(self: Store, asked: str, **parameters: Any) -> Any:
        answer = ask(self, asked, **parameters)
        return change(dict(answer)) if asked == operation else answer

    monkeypatch.setattr(Store, "ask", replaced)


def test_a_failure_at_any_request_leaves_no_object(
    shared: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before each request, and after it, when only its answer is lost."""
    before, left = shared.keys(), shared.unfinished()
    step, failed, lost = 0, True, 0
    target = shared.url("failing.qcow2")
    while failed:
        steps, failed = iter(range(1 << 30)), False

        def hook(operation: str, done: bool, step: int = step, steps: Any = steps) -> None:
            nonlocal failed
            if next(steps) == step:
                failed = True
                raise StoreError(f"{operation}: {done}")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "ask", hooked(hook))
            status = upload("-q", shared.url("disk.raw"), target)
        said = capsys.readouterr().err
        if status == 0:
            # Whether the object appeared was looked up, or nothing failed.
            lost += failed
            assert vmconv.compare(str(disk), target)
            assert (
                shared.swift.request("DELETE", f"/{shared.name}/failing.qcow2?multipart-manifest=delete").status == 200
            )
        else:
            assert status == 1
            assert shared.keys() == before, (step, said)
        unfinished = [name for name in shared.unfinished() if name not in left]
        # An upload whose id never arrived cannot be removed, and one that could not be removed is named.
        if "create_multipart_upload: True" in said or "an unfinished upload is left" in said:
            left += unfinished
        else:
            assert unfinished == [], (step, said)
        step += 1
    # Eight requests; a missing object is an answer that raises already.
    assert step > 12
    # The answer to the completion.
    assert lost == 1


def test_a_failure_that_stays_leaves_no_object(
    shared: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network is gone from some request on. Then nobody can know whether the object has appeared."""
    before, step, gone = shared.keys(), 0, True
    while gone:
        steps, gone = iter(range(1 << 30)), False

        def hook(operation: str, done: bool, step: int = step, steps: Any = steps) -> None:
            nonlocal gone
            if next(steps) >= step:
                gone = True
                raise StoreError("the network is gone")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "ask", hooked(hook))
            status = upload("-q", shared.url("disk.raw"), shared.url("gone.qcow2"))
        said = capsys.readouterr().err
        assert status == (1 if gone else 0)
        if shared.keys() != before:
            assert not gone or "may have appeared, and was not verified" in said
            shared.swift.request("DELETE", f"/{shared.name}/gone.qcow2?multipart-manifest=delete")
        step += 1


def count(reached: Callable[[], None]) -> None:
    """Calls a function before each request, and after it."""
    Store.ask = hooked(lambda *_: reached())  # type: ignore[method-assign]


def test_a_client_that_is_killed_leaves_nothing_half_made(shared: Bucket, disk: Path) -> None:
    before, step, seen = shared.keys(), 0, 0
    while killed_at(step, lambda: upload("-q", shared.url("disk.raw"), shared.url("killed.qcow2")), count):
        if shared.keys() != before:
            seen += 1
            assert vmconv.compare(str(disk), shared.url("killed.qcow2"))
            shared.swift.request("DELETE", f"/{shared.name}/killed.qcow2")
        step += 1
    # After the completion, before the object is looked at, and after that.
    assert seen == 3
    # What is left are unfinished uploads, which do not hinder the next.
    assert any(name.startswith("killed.qcow2/") for name in shared.unfinished())
    assert vmconv.compare(str(disk), shared.url("killed.qcow2"))


@pytest.mark.parametrize("operation", ["upload_part", "upload_part_copy", "list_parts"])
def test_a_signal_ends_an_upload_without_traces(
    shared: Bucket, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, left = shared.keys(), shared.left()

    def hook(asked: str, done: bool) -> None:
        if asked == operation and not done:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Store, "ask", hooked(hook))
    assert upload("-q", shared.url("disk.raw"), shared.url("stopped.qcow2")) == 130
    assert (shared.keys(), shared.left()) == (keys, left)


@pytest.mark.parametrize("when", ["upload_part_copy", "list_parts"])
def test_an_object_that_changes_is_not_copied(
    bucket: Bucket, disk: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the plan and the copy, and after it: the store may look at the ETag, and copy another version then."""
    bucket.put("disk.raw", disk.read_bytes())
    changed = False

    def hook(operation: str, done: bool) -> None:
        nonlocal changed
        if operation == when and not done and not changed:
            changed = True
            bucket.put("disk.raw", disk.read_bytes()[::-1])

    monkeypatch.setattr(Store, "ask", hooked(hook))
    assert upload(bucket.url("disk.raw"), bucket.url("disk.qcow2")) == 1
    assert "changed while it was being" in capsys.readouterr().err
    assert (bucket.keys(), bucket.left()) == (["disk.raw"], [])


def test_a_file_that_changes_is_not_uploaded(
    bucket: Bucket, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changing = tmp_path / "changing.raw"
    vmconv.convert(str(disk), str(changing))

    def hook(operation: str, done: bool) -> None:
        if operation == "list_parts" and not done:
            with changing.open("r+b") as file:
                file.write(b"changed")

    monkeypatch.setattr(Store, "ask", hooked(hook))
    assert upload(changing, bucket.url("disk.qcow2")) == 1
    assert "changing.raw: changed while it was being uploaded" in capsys.readouterr().err
    assert (bucket.keys(), bucket.left()) == ([], [])


def test_an_object_that_appears_meanwhile_stays(
    bucket: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it is looked for the last time, and after that, when the store has to refuse (If-None-Match)."""
    for operation in ("list_parts", "complete_multipart_upload"):

        def hook(asked: str, done: bool, operation: str = operation) -> None:
            if asked == operation and not done:
                bucket.put("disk.qcow2", b"other")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "ask", hooked(hook))
            assert upload(disk, bucket.url("disk.qcow2")) == 1
        assert "appeared while it was being made" in capsys.readouterr().err
        assert (bucket.get("disk.qcow2"), bucket.left()) == (b"other", [])
        bucket.swift.request("DELETE", f"/{bucket.name}/disk.qcow2")


def other_bytes(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"ETag": f'"{"0" * 32}"'}


def one_part_less(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"Parts": answer["Parts"][1:]}


def shorter_part(answer: dict[str, Any]) -> dict[str, Any]:
    first, *others = answer["Parts"]
    return answer | {"Parts": [first | {"Size": first["Size"] - 1}, *others]}


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        ("upload_part", other_bytes, "the store received other bytes"),
        ("upload_part", lambda _: {}, "the store states no ETag"),
        ("create_multipart_upload", lambda _: {}, "begins an upload without an id"),
        ("list_parts", one_part_less, "part 1: the store has 0 bytes with the ETag none"),
        ("list_parts", shorter_part, "part 1: the store has"),
        ("list_parts", lambda answer: answer | {"IsTruncated": True, "Parts": []}, "has no end"),
        ("list_parts", lambda answer: answer | {"IsTruncated": True}, "has no end"),
        ("complete_multipart_upload", other_bytes, "was expected"),
    ],
)
def test_a_store_that_says_something_else_is_refused(
    bucket: Bucket,
    disk: Path,
    operation: str,
    change: Callable[[dict[str, Any]], Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answering(monkeypatch, operation, change)
    assert upload(disk, bucket.url("disk.qcow2")) == 1
    assert message in capsys.readouterr().err
    assert bucket.keys() == []


def test_bytes_that_change_on_the_way_are_refused_by_the_store(
    bucket: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = Store.ask

    def spoiled(self: Store, operation: str, **parameters: Any) -> Any:
        if operation == "upload_part":
            parameters["Body"] = parameters["Body"][:-1] + bytes([parameters["Body"][-1] ^ 1])
        return ask(self, operation, **parameters)

    monkeypatch.setattr(Store, "ask", spoiled)
    assert upload(disk, bucket.url("disk.qcow2")) == 1
    assert "the store answers 400 BadDigest to UploadPart" in capsys.readouterr().err
    assert (bucket.keys(), bucket.left()) == ([], [])


def wrong_metadata(self: backend.Upload, numbered: tuple[int, Part]) -> Any:
    """Sends zeros instead of what is planned, as if what makes parts had a fault."""
    number, part = numbered
    assert not part.is_copied
    return self.store.send(self._id, number, bytes(part.length))


COPY = Store.copy


def other_range(self: Store, upload: str, number: int, at: Any, etag: str, offset: int, length: int) -> Any:
    return COPY(self, upload, number, at, etag, offset - 512, length)


def test_an_object_with_wrong_metadata_is_removed_again(
    bucket: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend.Upload, "_make", wrong_metadata)
    assert upload(disk, bucket.url("disk.qcow2")) == 1
    assert "has other bytes than planned from 0x0 on" in capsys.readouterr().err
    assert bucket.keys() == []
    # What had another object's place cannot be taken back, and the message says so.
    bucket.put("disk.qcow2", b"other")
    assert upload("--force", disk, bucket.url("disk.qcow2")) == 1
    assert "was replaced, and the new object is not verified" in capsys.readouterr().err


def test_an_object_with_other_payload_is_removed_again(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store copies another range than planned, of the same length."""
    bucket.put("disk.raw", os.urandom(16 * MIB))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "copy", other_range)
        assert upload(bucket.url("disk.raw"), bucket.url("disk.qcow2")) == 1
    assert "has other bytes than planned" in capsys.readouterr().err
    assert bucket.keys() == ["disk.raw"]


def test_what_replaces_an_object_at_once_is_left_alone(
    bucket: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hook(operation: str, done: bool) -> None:
        if operation == "complete_multipart_upload" and done:
            bucket.put("disk.qcow2", b"other")

    monkeypatch.setattr(Store, "ask", hooked(hook))
    assert upload(disk, bucket.url("disk.qcow2")) == 1
    assert "was replaced or removed as soon as it had appeared" in capsys.readouterr().err
    assert bucket.get("disk.qcow2") == b"other"
