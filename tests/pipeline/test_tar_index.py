import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.clips import check_relative_path
from mervcache.errors import MediaError, UserError
from pipeline.media import TarMember, resolve_media
from pipeline.tar_index import MAX_EXTENDED_BYTES, tar_index

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: list[tuple[str, bytes]], format_name: str = "pax") -> Path:
    with tarfile.open(path, "w", format=FORMATS[format_name]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def raw_header(name: bytes, size: int | bytes, kind: bytes = b"0") -> bytes:
    """A header made by hand, with a right checksum, for archives that no library would write."""
    digits = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = digits
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def content_of(media: TarMember) -> bytes:
    with open(media.tar_path, "rb") as file:
        return os.pread(file.fileno(), media.size, media.offset)


def reason(root: Path, path: str) -> str:
    with pytest.raises(MediaError) as caught:
        resolve_media(root, path)
    return str(caught.value)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_member_is_found_at_its_bytes(tmp_path, format_name):
    long_name = "folder/" + "n" * (80 if format_name == "ustar" else 180) + ".mp4"
    members = [("000.mp4", b"first" * 200), ("./001.mp4", b"second"), (long_name, b"third" * 103)]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members, format_name)
    for name, content in members:
        media = resolve_media(tmp_path, f"shards/0.tar/{name.removeprefix('./')}")
        assert content_of(media) == content


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5),
    format_name=st.sampled_from(["gnu", "pax"]),
)
def test_the_index_agrees_with_tarfile_for_any_names(tmp_path_factory, members, format_name):
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, format_name)
    with tarfile.open(path) as tar:
        found = [(without_dot(m.name), m.offset_data, m.size) for m in tar.getmembers()]
    expected = {name: (offset, size) for name, offset, size in found if is_safe(name)}
    assert tar_index(str(path)).members == expected


def without_dot(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name


def is_safe(name: str) -> bool:
    try:
        check_relative_path(name)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", ["/etc/passwd", "../../a.mp4", "a/../b.mp4", "C:/a.mp4", "a\\b.mp4"])
def test_a_member_whose_name_climbs_out_has_no_entry(tmp_path, name):
    write_tar(tmp_path / "a.tar", [(name, b"evil"), ("good.mp4", b"good")])
    assert list(tar_index(str(tmp_path / "a.tar")).members) == ["good.mp4"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_links_devices_and_pipes_are_refused(tmp_path, kind, words):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert reason(tmp_path, "a.tar/a.mp4") == f"tar member is {words}, not a regular file"


def test_sparse_members_are_refused_and_what_follows_them_is_found(tmp_path):
    sparse = bytearray(raw_header(b"sparse.mp4", 512, b"S"))
    sparse[148:156] = b" " * 8
    sparse[482] = 1  # one extension block follows
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    after = raw_header(b"after.mp4", 3) + b"abc".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(bytes(sparse) + bytes(512) + b"x" * 512 + after + bytes(1024))
    assert "a sparse file" in reason(tmp_path, "a.tar/sparse.mp4")
    assert content_of(resolve_media(tmp_path, "a.tar/after.mp4")) == b"abc"


def test_pax_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.mp4")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info)
    assert "a sparse file" in reason(tmp_path, "a.tar/a.mp4")


@pytest.mark.parametrize(
    "size",
    [1 << 32, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"nonsense 12 "],
    ids=["beyond the end", "astronomic", "negative base 256", "negative octal", "not a number"],
)
def test_an_absurd_size_ends_the_index_and_keeps_what_came_before(tmp_path, size):
    good = raw_header(b"good.mp4", 4) + b"good".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(good + raw_header(b"bad.mp4", size) + bytes(4096))
    assert content_of(resolve_media(tmp_path, "a.tar/good.mp4")) == b"good"
    assert reason(tmp_path, "a.tar/bad.mp4") == "tar archive is damaged before this member"


def test_an_extended_header_of_huge_size_is_not_read(tmp_path):
    good = raw_header(b"good.mp4", 4) + b"good".ljust(512, b"\0")
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(good + raw_header(b"pax", 64 * MAX_EXTENDED_BYTES, b"x"))
        file.truncate(128 * MAX_EXTENDED_BYTES)  # a sparse file on disk: the claimed bytes are there
    index = tar_index(str(tmp_path / "a.tar"))
    assert list(index.members) == ["good.mp4"]
    assert index.is_damaged


@pytest.mark.parametrize(
    "record", [b"9999999 path=a\n", b"3 a\n", b"12 nothing\n\n", b"xx path=a\n", b"18446744073709 path=a"]
)
def test_a_broken_pax_record_ends_the_index(tmp_path, record):
    good = raw_header(b"good.mp4", 4) + b"good".ljust(512, b"\0")
    bad = raw_header(b"pax", len(record), b"x") + record.ljust(512, b"\0") + raw_header(b"b.mp4", 1) + bytes(512)
    (tmp_path / "a.tar").write_bytes(good + bad)
    assert reason(tmp_path, "a.tar/b.mp4") == "tar archive is damaged before this member"


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(0, 5120), flips=st.lists(st.tuples(st.integers(0, 5119), st.integers(0, 255)), max_size=4))
def test_any_damage_gives_members_inside_the_file_or_a_media_error(tmp_path_factory, cut, flips):
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", [("a.mp4", b"a" * 600), ("b" * 120, b"b" * 10)], "gnu")
    data = bytearray(path.read_bytes()[:5120])
    for position, value in flips:
        data[position] = value
    path.write_bytes(data[:cut])
    try:
        index = tar_index(str(path))
    except MediaError:
        return
    assert all(0 <= offset <= offset + size <= cut for offset, size in index.members.values())


def test_a_truncated_archive_keeps_its_whole_members(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.mp4", b"a" * 512), ("b.mp4", b"b" * 5000)])
    path.write_bytes(path.read_bytes()[:3000])
    assert content_of(resolve_media(tmp_path, "a.tar/a.mp4")) == b"a" * 512
    assert reason(tmp_path, "a.tar/b.mp4") == "tar archive is damaged before this member"


def test_a_compressed_archive_and_a_text_are_not_plain_tars(tmp_path):
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    (tmp_path / "text.tar").write_text("not a tar" * 200)
    (tmp_path / "empty.tar").touch()
    assert reason(tmp_path, "gz.tar/a.mp4") == "tar archive is not a plain, readable tar"
    assert reason(tmp_path, "text.tar/a.mp4") == "tar archive is not a plain, readable tar"
    assert reason(tmp_path, "empty.tar/a.mp4") == "media file is empty"


def test_a_name_that_comes_twice_means_its_last_file(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.mp4", b"old"), ("a.mp4", b"new!")])
    assert content_of(resolve_media(tmp_path, "a.tar/a.mp4")) == b"new!"


def test_an_index_is_read_anew_when_the_archive_changes(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.mp4", b"one")])
    assert reason(tmp_path, "a.tar/b.mp4") == "tar member is missing"
    os.remove(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [("b.mp4", b"two" * 5000)])
    assert content_of(resolve_media(tmp_path, "a.tar/b.mp4")) == b"two" * 5000


def test_an_archive_that_is_a_link_out_of_the_root_is_refused(tmp_path):
    write_tar(tmp_path / "outside.tar", [("a.mp4", b"a")])
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.tar").symlink_to(tmp_path / "outside.tar")
    assert "out of the dataset root" in reason(tmp_path / "root", "a.tar/a.mp4")


def test_a_folder_may_be_called_like_an_archive(tmp_path):
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "a.mp4").write_bytes(b"x")
    assert resolve_media(tmp_path, "a.tar/a.mp4").path.name == "a.mp4"


def test_a_missing_archive_is_a_missing_file(tmp_path):
    (tmp_path / "other").touch()
    assert reason(tmp_path, "a.tar/a.mp4") == "media file is missing"
