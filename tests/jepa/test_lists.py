"""Lists as people write them: read as meant, or refused with file and line."""

from __future__ import annotations

import json

import pytest

from jepa.config import ConfigError
from jepa.data.diving48 import diving48
from jepa.data.imagenet100 import imagenet100
from jepa.data.pathlist import pathlist
from jepa.data.ssv2 import ssv2
from jepa.data.ucf101 import ucf101

MARKS = {"none": "utf-8", "bom": "utf-8-sig", "utf16": "utf-16"}


@pytest.fixture(params=MARKS)
def written(request, tmp_path):
    """Writes a text in every encoding that a text editor may choose, with every line end."""

    def write(name, text):
        path = tmp_path / name
        ends = {"none": "\n", "bom": "\r\n", "utf16": "\r\n"}[request.param]
        path.write_bytes(text.replace("\n", ends).encode(MARKS[request.param]))
        return path

    return write


def of_list(path):
    data = pathlist(path)
    return list(zip(data.files, data.labels, strict=True))


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("a.mp4 1", ("a.mp4", 1)),
        ("a.mp4\t1", ("a.mp4", 1)),
        ("a.mp4,1", ("a.mp4", 1)),
        ("a.mp4, 1", ("a.mp4", 1)),
        ("a.mp4;1", ("a.mp4", 1)),
        ("a b,c.mp4 12", ("a b,c.mp4", 12)),
        ('"a, b.mp4",1', ("a, b.mp4", 1)),
        ('"a b.mp4"', ("a b.mp4", -1)),
        ("a\u2028b.mp4 1", ("a\u2028b.mp4", 1)),
        ("a\u0085b.mp4 1", ("a\u0085b.mp4", 1)),
        ("a.mp4", ("a.mp4", -1)),
        ("a, b.mp4", ("a, b.mp4", -1)),
        ("a.mp4 b.mp4", ("a.mp4 b.mp4", -1)),
        ("a.mp4 -1", ("a.mp4", -1)),
        ("größe 1.mp4 0", ("größe 1.mp4", 0)),
    ],
)
def test_pathlist_reads_as_meant(written, line, entry):
    assert of_list(written("list.txt", f"first.mp4 0\n\n{line}\n"))[1] == entry
    assert of_list(written("list.txt", f"{line}\n"))[0] == entry


def test_pathlist_skips_a_header(written):
    assert of_list(written("list.csv", "path,label\na.mp4,2\n")) == [("a.mp4", 2)]


@pytest.mark.parametrize(
    "line",
    ["a.mp4 -2", "a.mp4 1.0", "a.mp4 cat", "a.mp4,1e3", "a.mp4 ²", '"a.mp4",x', "a.mp4 9999999"],
)
def test_pathlist_refuses_with_file_and_line(written, line):
    with pytest.raises(ConfigError, match=r"list\.txt must give labels .* in line 3\.$"):
        of_list(written("list.txt", f"first.mp4 0\n\n{line}\n"))


def test_names_that_are_no_utf8_stand_for_themselves(tmp_path):
    import os

    name = os.fsdecode(b"Caf\xe9.mp4")
    (tmp_path / "list.txt").write_bytes(b"Caf\xe9.mp4 1\n")
    assert of_list(tmp_path / "list.txt") == [(name, 1)]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\0\1\2", b"\xff\xfea\0\0\0"])
def test_what_is_no_list_is_refused(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    for read in (
        lambda: pathlist(path),
        lambda: diving48(tmp_path, path),
        lambda: ssv2(tmp_path, path, path),
    ):
        with pytest.raises(ConfigError):
            read()
    with pytest.raises(ConfigError, match="must be a file to read"):
        pathlist(tmp_path)


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"Holding something": "2", "Tearing, slowly": "3"}))
    return path


@pytest.mark.parametrize(
    ("text", "files", "labels"),
    [
        ("1,2\n2,1\n", ["1", "2"], [2, 1]),
        ("clip_a,2\nclip_b,1\n", ["clip_a", "clip_b"], [2, 1]),
        ("id,label\nclip_a,2\n", ["clip_a"], [2]),
        ("video_id;template\n7;Holding [something]\n", ["7"], [2]),
        ("7\tholding something\n", ["7"], [2]),
        ("7,Tearing, slowly\n", ["7"], [3]),
        ('7,"Tearing, slowly"\n', ["7"], [3]),
        ("7\n8\n", ["7", "8"], [-1, -1]),
    ],
)
def test_ssv2_csv_reads_as_meant(written, tmp_path, classes, text, files, labels):
    data = ssv2(tmp_path, written("list.csv", text), classes)
    assert data.files == [f"{name}.webm" for name in files]
    assert data.labels == labels


@pytest.mark.parametrize("line", ["7,-3", "7,174", "7,Juggling", ",3", "7 3", "7,²", '7,"x'])
def test_ssv2_csv_refuses_with_line(written, tmp_path, classes, line):
    with pytest.raises(ConfigError, match=r"list\.csv.*line 2"):
        ssv2(tmp_path, written("list.csv", f"1,2\n{line}\n"), classes)


@pytest.mark.parametrize("value", [[], {"a": "x"}, {"a": -1}, {"a": 174}, {"a": None}, 3, None])
def test_ssv2_refuses_classes(tmp_path, value):
    (tmp_path / "labels.json").write_text(json.dumps(value))
    (tmp_path / "list.csv").write_text("1,2\n")
    with pytest.raises(ConfigError, match=r"ssv2: labels\.json must map templates"):
        ssv2(tmp_path, tmp_path / "list.csv", tmp_path / "labels.json")


@pytest.mark.parametrize(
    "records",
    [
        [5],
        [{"vid_name": "a"}],
        [{"vid_name": "a", "label": "x"}],
        {},
        7,
        "text",
        [{"vid_name": "a", "label": -1}],
        [{"vid_name": "a", "label": 1.5}],
        [{"vid_name": 1, "label": 1}],
    ],
)
def test_diving48_refuses_records(tmp_path, records):
    (tmp_path / "list.json").write_text(json.dumps(records))
    with pytest.raises(ConfigError, match=r"list\.json must be a list of records"):
        diving48(tmp_path, tmp_path / "list.json")


def test_ssv2_refuses_records(tmp_path, classes):
    (tmp_path / "list.json").write_text("[5]")
    with pytest.raises(ConfigError, match=r"list\.json must be a list of records"):
        ssv2(tmp_path, tmp_path / "list.json", classes)
    (tmp_path / "list.json").write_text("{")
    with pytest.raises(ConfigError, match=r"list\.json must be JSON"):
        ssv2(tmp_path, tmp_path / "list.json", classes)


def test_ucf101_reads_as_meant(written, tmp_path):
    written("classInd.txt", "1 A\n2\tB\n")
    written("trainlist01.txt", "A/x y.avi 1\nB/z.avi\t2\nB/w.avi\n")
    data = ucf101(tmp_path, tmp_path)
    assert data.files == ["A/x y.avi", "B/z.avi", "B/w.avi"]
    assert data.labels == [0, 1, 1]


@pytest.mark.parametrize(
    "text",
    ["0 A\n1 B\n", "A 1\n", "1\n", "1 A\n1 B\n", "1 A\n2 A\n", "102 A\n", "1.0 A\n", "1 A B\n"],
)
def test_ucf101_refuses_class_numbers(tmp_path, text):
    (tmp_path / "classInd.txt").write_text(text)
    (tmp_path / "trainlist01.txt").write_text("A/x.avi\n")
    with pytest.raises(ConfigError, match=r"ucf101: .*classInd\.txt must .* in line \d\.$"):
        ucf101(tmp_path, tmp_path)


def test_imagenet100_reads_as_meant(written, tmp_path, caplog):
    for name in ("n1", "n2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.JPEG").touch()
    data = imagenet100(tmp_path, written("classes.txt", "n2\trobin\nn1,wren\n"))
    assert data.files == ["n2/a.JPEG", "n1/a.JPEG"]
    (tmp_path / "n1" / "a.JPEG").unlink()
    assert imagenet100(tmp_path, tmp_path / "classes.txt").files == ["n2/a.JPEG"]
    assert "n1 holds no images" in caplog.text
    (tmp_path / "n2" / "a.JPEG").unlink()
    with pytest.raises(ConfigError, match="files must not be empty"):
        imagenet100(tmp_path, tmp_path / "classes.txt")
