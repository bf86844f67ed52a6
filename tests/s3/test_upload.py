"""Uploads to a real server: every format from one raw object and back; what is sent is counted by its proxy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vmconv
from support.buckets import MIB, Bucket, upload
from support.disks import QemuImg
from support.variants import Variant, is_compressed, options, qemu_name, self_contained, title
from vmconv.io.registry import installed
from vmconv_s3.backend import COPIED

PAYLOAD = 40 * MIB


def is_one_file(variant: Variant) -> bool:
    one = installed().formats[variant[0]]
    return len(one.file_names(one.options()(**options(variant)), "disk", 40 * MIB)) == 1


VARIANTS = [each for each in self_contained() if not is_compressed(each) and is_one_file(each)]


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_every_format_is_made_from_one_raw_object_and_back(
    shared: Bucket, disk: Path, qemu_img: QemuImg, variant: Variant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = f"{title(variant)}{installed().formats[variant[0]].suffixes[0]}"
    given = ["-o", variant[1]] if variant[1] else []
    shared.received()
    assert upload("--output=json", "-O", variant[0], *given, shared.url("disk.raw"), shared.url(key)) == 0
    received = shared.received()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    plan, sent = lines[0], lines[-1]
    # Nothing is shared, whatever the store does.
    assert (plan["shared"], plan["copied"]) == (0, PAYLOAD)
    by_reason = {copy["reason"]: copy["bytes"] for copy in plan["copies"]}
    by_store = by_reason.pop(COPIED, 0)
    assert by_store == sent["copied_by_store"]
    assert sum(by_reason.values()) == sent["payload"] == PAYLOAD - by_store
    # A dynamic VHD has a bitmap before each 2 MiB of payload, so all of it is beside metadata.
    assert by_store == 0 if variant == ("vhd", "subformat=dynamic") else by_store >= PAYLOAD - 12 * MIB
    assert received == sent["bytes"]
    assert 0 <= received - sent["payload"] - sent["metadata"] - sent["zeros"] < 16 << 10
    local = tmp_path / key
    local.write_bytes(shared.get(key))
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", qemu_name(variant), disk, local).stdout
    back = f"{key}.raw"
    assert upload("-f", variant[0], shared.url(key), shared.url(back)) == 0
    assert shared.get(back) == disk.read_bytes()


def test_a_local_disk_is_sent(bucket: Bucket, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upload(disk, bucket.url("disk.qcow2")) == 0
    said = capsys.readouterr()
    assert "because it is not in the store: it is sent" in said.err
    assert "; the store copied 0 B" in said.out
    assert vmconv.compare(str(disk), bucket.url("disk.qcow2"))
    assert bucket.keys() == ["disk.qcow2"]


def test_holes_are_sent_as_zeros(bucket: Bucket, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upload(disk, bucket.url("disk.raw")) == 0
    assert "of them zeros, because objects have no holes" in capsys.readouterr().err
    assert bucket.get("disk.raw") == disk.read_bytes()


def test_compressed_clusters_are_sent_decoded(shared: Bucket, disk: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "compressed.qcow2"
    vmconv.convert(str(disk), str(compressed), compress=True)
    shared.put("compressed.qcow2", compressed.read_bytes())
    assert upload(shared.url("compressed.qcow2"), shared.url("plain.vmdk")) == 0
    assert vmconv.compare(str(disk), shared.url("plain.vmdk"))


def test_payload_of_a_small_object_is_sent(bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.put("small.raw", b"payload!" * (5 * MIB // 8))
    assert upload(bucket.url("small.raw"), bucket.url("small.qcow2")) == 0
    assert "ranges only of objects of more than 5242880 bytes" in capsys.readouterr().err
    assert vmconv.compare(bucket.url("small.raw"), bucket.url("small.qcow2"))


def test_a_fragmented_disk_is_sent_and_the_plan_says_so(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fragmented, raw = tmp_path / "fragmented.qcow2", tmp_path / "fragmented.raw"
    with raw.open("wb") as file:
        for number in range(24):
            file.seek(number * MIB)
            file.write(bytes([number + 1]) * (512 << 10))
        file.truncate(24 * MIB)
    vmconv.convert(str(raw), str(fragmented))
    bucket.put("fragmented.qcow2", fragmented.read_bytes())
    assert upload("--dry-run", "--output=json", bucket.url("fragmented.qcow2"), bucket.url("f.raw")) == 0
    plan = json.loads(capsys.readouterr().out)
    (copy,) = plan["copies"]
    assert copy["reason"].endswith("it is sent with its neighbours")
    assert copy["bytes"] == 12 * MIB
    assert upload(bucket.url("fragmented.qcow2"), bucket.url("f.raw")) == 0
    assert bucket.get("f.raw") == raw.read_bytes()


def test_what_the_store_copies_is_no_client_traffic(shared: Bucket, disk: Path) -> None:
    shared.received()
    assert upload("-q", shared.url("disk.raw"), shared.url("traffic.qcow2")) == 0
    logged = shared.client_traffic()
    assert sum(logged) < 16 * MIB
    assert vmconv.compare(str(disk), shared.url("traffic.qcow2"))


def test_it_is_never_zero_copy(shared: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    keys, left = shared.keys(), shared.left()
    for more in ([], ["--dry-run"]):
        assert upload("--zero-copy=require", *more, shared.url("disk.raw"), shared.url("zero.qcow2")) == 3
    shared.received()
    assert upload("--dry-run", shared.url("disk.raw"), shared.url("zero.qcow2")) == 0
    said = capsys.readouterr().out
    assert "no client traffic, the store copies" in said
    assert "shared        0 B" in said
    assert shared.received() == 0
    assert (shared.keys(), shared.left()) == (keys, left)


def test_an_object_is_replaced_only_by_force(bucket: Bucket, disk: Path) -> None:
    bucket.put("disk.vmdk", b"other")
    assert upload(disk, bucket.url("disk.vmdk")) == 4
    assert upload("--dry-run", disk, bucket.url("disk.vmdk")) == 4
    assert (bucket.get("disk.vmdk"), bucket.left()) == (b"other", [])
    assert upload("--force", disk, bucket.url("disk.vmdk")) == 0
    assert vmconv.compare(str(disk), bucket.url("disk.vmdk"))


def test_a_source_is_not_its_own_target(shared: Bucket, disk: Path) -> None:
    assert upload("--force", "-O", "qcow2", shared.url("disk.raw"), shared.url("disk.raw")) == 1
    assert shared.get("disk.raw") == disk.read_bytes()


def test_keys_may_have_any_character(bucket: Bucket, disk: Path) -> None:
    bucket.put("a folder/dïsk+#.raw", disk.read_bytes())
    source = bucket.url("a%20folder/d%C3%AFsk+%23.raw")
    assert upload(source, bucket.url("b%20folder/d%C3%AFsk%23.vhdx")) == 0
    assert bucket.keys() == ["a folder/dïsk+#.raw", "b folder/dïsk#.vhdx"]
    assert vmconv.compare(source, bucket.url("b%20folder/d%C3%AFsk%23.vhdx"))


@pytest.mark.parametrize(
    "target",
    [
        "disk.qcow2",
        "swift://cloud/c/disk.qcow2",
        "s3://bucket",
        "s3://bucket/disk.qcow2?versionId=1",
        "s3://bucket/%ff.qcow2",
        "s3://bucket/a/../disk.qcow2",
    ],
)
def test_what_is_no_target_is_refused(disk: Path, target: str) -> None:
    assert upload(disk, target) == 2


def test_a_key_without_a_suffix_needs_a_format(bucket: Bucket, disk: Path) -> None:
    assert upload(disk, bucket.url("disk")) == 2
    assert upload("-O", "vmdk", disk, bucket.url("disk")) == 0
    assert vmconv.compare(str(disk), bucket.url("disk"), right_format="vmdk")


def test_a_bucket_that_is_not_there(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upload(disk, "s3://no-such-bucket/disk.qcow2") == 1
    assert "the store answers 404 NoSuchBucket to CreateMultipartUpload" in capsys.readouterr().err


def test_with_wrong_credentials_nothing_is_made(
    bucket: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert upload(disk, bucket.url("disk.qcow2")) == 1
    assert "the store answers 403" in capsys.readouterr().err
    assert (bucket.keys(), bucket.left()) == ([], [])
