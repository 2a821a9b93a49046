"""Listing images."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from siamese_detr.errors import UserError
from siamese_detr.images import list_images


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folder_is_searched_recursively_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/x.JPEG", "a.jpg", "a/z.png", "a-b/y.Tif", "a/b/c/d.webp", "a/B.jpg", "z.gif", "é/ü.jpg"]
    make(tmp_path, *names, ".hidden.jpg", ".cache/x.jpg", "notes.txt", "jpg", "a/._x.jpg", "x.jpg.part")
    (tmp_path / "folder.jpg").mkdir()
    listed = list_images(tmp_path)
    assert listed.root == tmp_path
    assert listed.paths == sorted(names)
    assert len(listed) == len(names)
    assert listed.absolute(0) == str(tmp_path / sorted(names)[0])
    assert listed == list_images(str(tmp_path) + "/")


def test_what_a_command_writes_among_its_images_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "run/pictures/a.jpg", "runs/b.jpg")
    assert list_images(tmp_path, without=tmp_path / "run").paths == ["a.jpg", "runs/b.jpg"]
    assert len(list_images(tmp_path, without=tmp_path / "new")) == len(list_images(tmp_path, without=tmp_path)) == 3


def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, "data/a/1.jpg", "other/2.jpg")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/up").symlink_to("..")
    (tmp_path / "data/other").symlink_to(tmp_path / "other")
    (tmp_path / "data/again").symlink_to(tmp_path / "other")
    (tmp_path / "data/3.jpg").symlink_to(tmp_path / "other/2.jpg")
    (tmp_path / "data/broken.jpg").symlink_to("nowhere")
    # The broken link is listed so that reading reports it.
    assert list_images(tmp_path / "data").paths == ["3.jpg", "a/1.jpg", "again/2.jpg", "broken.jpg"]


def test_names_that_are_not_unicode_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.jpg", "wb"):
        pass
    listed = list_images(tmp_path)
    assert listed.paths == ["a.jpg"]
    assert len(listed.problems) == 1
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"no image in .* \(name is not Unicode: .*xff.xfe\.jpg.*rename"):
        list_images(tmp_path)


@contextlib.contextmanager
def without_privileges(folder: Path) -> Iterator[None]:
    """Within, the process may do in ``folder`` and below what a user may who owns it."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.promise("bad-images")
def test_folders_without_permission_are_reported() -> None:
    """And links to what may not be looked at, or to themselves; the images beside them are listed."""
    with tempfile.TemporaryDirectory() as name:  # outside of pytest's folder, which is its user's alone
        folder = Path(name)
        make(folder, "photos/a.jpg", "photos/closed/b.jpg", "photos/names/c.jpg", "secret/inside/d.jpg")
        (folder / "photos/link").symlink_to(folder / "secret/inside")
        (folder / "photos/link.jpg").symlink_to(folder / "secret/inside/d.jpg")
        (folder / "photos/loop").symlink_to("loop")
        modes = {"photos/closed": 0o000, "photos/names": 0o444, "secret": 0o000}
        with without_privileges(folder):
            try:
                for closed, mode in modes.items():
                    (folder / closed).chmod(mode)
                listed = list_images(folder / "photos")
                assert list_images(f"file://{folder}/photos") == listed
                with pytest.raises(UserError, match=r"cannot list the folder .*closed: Permission denied"):
                    list_images(folder / "photos/closed")
            finally:
                for closed in modes:
                    (folder / closed).chmod(0o700)
        # What is not searched has a line here; what is listed and cannot be read, reading reports.
        assert listed.paths == ["a.jpg", "link.jpg", "names/c.jpg"]
        reported = {problem.removeprefix(f"cannot list {folder}/photos/") for problem in listed.problems}
        assert reported == {
            "closed/: Permission denied",
            "link: Permission denied",
            "loop: Too many levels of symbolic links",
        }


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    make(tmp_path, "here/readme.md")
    with pytest.raises(UserError, match=rf"nearest folder that does is {tmp_path}/here\b"):
        list_images(tmp_path / "here/not/there")
    with pytest.raises(UserError, match=r"no image in .*jpeg.*webp"):
        list_images(tmp_path / "here")
    with pytest.raises(UserError, match="give one of these"):
        list_images(tmp_path / "here/readme.md")


def test_list_file(photos: Path) -> None:
    path = photos.parent / "list.txt"
    path.write_text(f"\ufeff# comment\nphotos/1.jpg\r\n\n  photos/0.jpg  \n{photos}/2.jpg\nphotos/../photos/1.jpg\n")
    listed = list_images(path)
    assert listed.root == photos.parent
    assert listed.paths == ["photos/0.jpg", "photos/1.jpg", "photos/2.jpg"]
    sub = photos / "deep" / "list.txt"
    make(photos, "deep/list.txt")
    sub.write_text("../0.jpg\n")
    assert [list_images(sub).absolute(0)] == [str(photos / "0.jpg")]


@pytest.mark.parametrize("content", [b"", b"# nothing\n\n", b"missing.jpg\n", b"\xff\xfe\x00\x01", b"a\0b.jpg\n"])
def test_bad_list_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt"):
        list_images(tmp_path / "list.txt")


def test_coco_json(coco: Path, photos: Path, tmp_path: Path) -> None:
    listed = list_images(coco)
    assert [listed.absolute(i) for i in range(6)] == [str(photos / f"{n}.jpg") for n in range(6)]

    content = {"images": [{"id": n, "file_name": f"{n}.jpg"} for n in (2, 0, 2)] + [{"id": 9}, 5]}
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "instances_photos.json"
    path.write_text(json.dumps(content))
    for listed in (list_images(path), list_images(path, images=photos)):  # ../photos, after the JSON's name
        assert (listed.root, listed.paths) == (photos, ["0.jpg", "2.jpg"])
        assert len(listed.problems) == 1
    photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"none of its images .*0\.jpg.* was found in .*'images'"):
        list_images(path)
    with pytest.raises(UserError, match="does not exist"):
        list_images(path, images=photos)


def test_no_path_leads_out_of_the_root(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels" / "far" / "coco.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"images": [{"file_name": "../../photos/0.jpg"}, {"file_name": str(photos / "1.jpg")}]}))
    listed = list_images(path)
    assert (listed.root, listed.paths) == (tmp_path, ["photos/0.jpg", "photos/1.jpg"])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"images": {}}', '{"images": []}', "[" * 100_000, "\x80"])
def test_bad_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="latin1")
    with pytest.raises(UserError, match=r"a\.json"):
        list_images(tmp_path / "a.json")
