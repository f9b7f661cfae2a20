"""What users bring: folders, lists and annotations as others write them, and what is missing."""

import json
import os
import re
import subprocess
import unicodedata

import pytest

from lib import lists
from lib.annotations import read_names
from lib.lists import missing_videos, read_split


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(split):
    return [path.name for path in split.paths]


@pytest.fixture
def read(tmp_path):
    """Write a list beside six videos, and read it: (names, labels, classes)."""
    touch(tmp_path, *(f"v{i}.mp4" for i in range(4)), "a b, c.mp4", "sub/d.avi", "clip.dat")

    def read(text, name="list.txt", **more):
        (tmp_path / name).write_text(text)
        split = read_split(tmp_path, tmp_path / name, **more)
        return (
            [path.relative_to(tmp_path).as_posix() for path in split.paths],
            split.labels,
            split.classes,
        )

    return read


# folders


def test_every_ending_of_what_is_read_is_a_video_and_the_rest_is_named(tmp_path, capsys):
    endings = (
        "avi mp4 M4V mov 3gp 3g2 mkv webm mpg mpeg vob m2v ts MTS m2ts tod mod asf wmv flv f4v"
    )
    videos = [
        f"a/{i}.{ending}" for i, ending in enumerate(f"{endings} ogv ogg divx xvid gif qt".split())
    ]
    touch(tmp_path, *videos, "a/notes.txt", "b.srt", "a/c.mp3", "a/noending")
    touch(tmp_path, "a/._0.avi", "a/.DS_Store", "__MACOSX/a/0.avi", "a/desktop.ini", "a/THUMBS.DB")
    (tmp_path / "a" / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "a" / "folder.mp4").mkdir()
    touch(tmp_path, *(f"a/thumb{i}.jpg" for i in range(6)))  # beside videos: no frames of one
    split = read_split(tmp_path)
    assert sorted(names(split)) == sorted(name[2:] for name in videos) and split.classes == ["a"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "11 (no videos by their endings" in printed
    assert "a/c.mp3, a/gone.mp4, a/noending ..." in printed


def test_only_the_first_process_prints(tmp_path, capsys, monkeypatch):
    touch(tmp_path, "a.mp4", "b.txt")
    monkeypatch.setattr(lists.engine, "rank", lambda: 1)
    assert len(read_split(tmp_path).notes) == 1 and capsys.readouterr().out == ""


def test_linked_folders_are_followed_and_loops_end(tmp_path, capsys):
    data = tmp_path / "data"
    touch(tmp_path, "store/walk/a.mp4", "store/run/b.mp4", "data/sit/c.mp4", "other/x.mp4")
    for name, target in (
        *(("walk", "../store/walk"), ("run", "../store/run"), ("again", "../store/run")),
        *(("all", "sit"), ("sit/up", ".."), ("out", "../.."), ("self", "self")),
    ):
        (data / name).symlink_to(target)
    split = read_split(data)
    assert split.classes == ["again", "sit", "walk"] and sorted(names(split)) == [
        "a.mp4",
        "b.mp4",
        "c.mp4",
    ]
    assert (
        "5 (no videos by their endings, read already, or links to nothing): all, out, run ..."
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "image, pattern",
    [
        ("img_00001.jpg", '"${d}img_%05d.jpg"'),
        ("7.png", '-start_number 7 -i "${d}%d.png"'),
        ("v 1_frame-000123.JPG", '-start_number 123 -i "${d}v 1_frame-%06d.JPG"'),
        (
            "$(touch x)`1`_0007.jpg",
            '-i "${d}img_%05d.jpg"',
        ),  # no program of others gets into a command
    ],
)
def test_folders_of_frames_get_the_command_that_makes_videos(tmp_path, read, image, pattern):
    number = re.search("[0-9]+(?=[.])", image)[0]
    frames = [image.replace(number, f"{int(number) + i:0{len(number)}}") for i in range(6)]
    touch(tmp_path / "data", *(f"walk/v{i}/{frame}" for i in range(2) for frame in frames))
    with pytest.raises(ValueError, match="no videos: folders of frames are not read") as caught:
        read_split(tmp_path / "data")
    command = str(caught.value).split("make videos of them: ")[1].split("; passed")[0]
    assert (
        command.startswith(f"for d in {tmp_path}/data/*/*/; do ffmpeg -framerate 25")
        and pattern in command
    )
    # A shell runs it as meant: here with a program that makes what ffmpeg would make.
    (tmp_path / "ffmpeg").write_text('#!/bin/sh\nfor out; do :; done; touch "$out"\n')
    (tmp_path / "ffmpeg").chmod(0o755)
    subprocess.run(
        ["sh", "-c", command], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True
    )
    split = read_split(tmp_path / "data")
    assert names(split) == ["v0.mp4", "v1.mp4"] and split.classes == ["walk"]
    for text in (
        "data/walk/v0 20 0\n",
        "data/walk/v0 0\n",
        "data/walk/v0\n",
        "data/walk/v0 1 20 3\n",
    ):
        with pytest.raises(
            ValueError, match=r"folders of frames are not read.*/\*/\*/\*/; do ffmpeg"
        ):
            read(text)


# lines


@pytest.mark.parametrize(
    "text, paths, labels, classes",
    [
        ("video_path,label\nv0.mp4,0\nv1.mp4,1\n", "v0.mp4 v1.mp4", [0, 1], "0 1"),
        ("v0.mp4,1\nv1.mp4, 0\n", "v0.mp4 v1.mp4", [1, 0], "0 1"),
        ("path\tclass\nv0.mp4\trun\nv1.mp4\tat, rest\n", "v0.mp4 v1.mp4", [1, 0], "at, rest|run"),
        (",label,file name\n0,1,v0.mp4\n1,0,clip.dat\n", "v0.mp4 clip.dat", [1, 0], "0 1"),
        ("clip_name,clip_path,label\nx,v0.mp4,Run\n", "v0.mp4", [0], "Run"),
        ("path,label\r\nsub\\d.avi,0\r\n", "sub/d.avi", [0], "0"),
        ("sub\\d.avi left\\right\rv0.mp4 Run\r", "sub/d.avi v0.mp4", [1, 0], r"Run left\right"),
        ("path\nv0.mp4\nsub/d.avi\n", "v0.mp4 sub/d.avi", [-1, -1], ""),
        ("path label\nv0.mp4 1\na b, c.mp4 0\n", "v0.mp4|a b, c.mp4", [1, 0], "0 1"),
        ('"a b, c.mp4",0\n"v0.mp4",1\n', "a b, c.mp4|v0.mp4", [0, 1], "0 1"),
        ("a b, c.mp4,0\nv0.mp4;1\n", "a b, c.mp4|v0.mp4", [0, 1], "0 1"),
        ("v0.mp4 0 -1\nv1.mp4 0 -1\n", "v0.mp4 v1.mp4", [-1, -1], ""),
        ("v0.mp4 0 -1 1\nv1.mp4 0 -1 0\n", "v0.mp4 v1.mp4", [1, 0], "0 1"),
        ("v0.mp4 0 -1 run\n", "v0.mp4", [0], "run"),
        (
            "v0.mp4 run\nv1.mp4 at rest\nv2.mp4 -1\n",
            "v0.mp4 v1.mp4 v2.mp4",
            [1, 0, -1],
            "at rest|run",
        ),
        ("v0.mp4 put a, b and c\n", "v0.mp4", [0], "put a, b and c"),
        ('v0.mp4,"put a,b"\n', "v0.mp4", [0], "put a,b"),
        (".\\v0.mp4 0\nsub\\d.avi 1\n", "v0.mp4 sub/d.avi", [0, 1], "0 1"),
        ("v0.mp4 0.0\nv1.mp4 1.0\nclip.dat 1.\n", "v0.mp4 v1.mp4 clip.dat", [0, 1, 1], "0 1"),
        ("v0.mp4 0\n._v0.mp4 0\nsub/._d.avi 1\n", "v0.mp4", [0], "0"),
    ],
)
def test_lines_are_read_as_they_are_meant(read, text, paths, labels, classes):
    parts = [
        words.split("|" if "|" in words or "put" in words else None) for words in (paths, classes)
    ]
    assert read(text) == (parts[0], labels, parts[1])


@pytest.mark.parametrize(
    "text, words",
    [
        ("v0.mp4 0,2\n", "line 1, 'v0.mp4 0,2', looks like several labels"),
        ("v0.mp4 1 4 5 7\n", "looks like several labels"),
        ("v0.mp4 3 5\n", "looks like several labels"),
        ("v0.mp4 3 run\n", "looks like several labels"),
        ("v0.mp4 run|walk\n", "looks like several labels"),
        ('path,label\nv0.mp4,"0,2"\n', "line 2, .* looks like several labels"),
        ('path,label\nv0.mp4,"[0, 2]"\n', "looks like several labels"),
        ("path,label\nv0.mp4,run;walk\n", "looks like several labels"),
        ("v0.mp4 0 120 3\n", "looks like a segment with start and end"),
        ("video,begin,stop,label\nv0.mp4,1,2,run\n", "looks like a segment with start and end"),
        ("video,t0,t1,label\nv0.mp4,1,2,run\n", "looks like a segment with start and end"),
        ("v0.mp4,1.5,7.25,run\n", "looks like a segment with start and end"),
        ("video,start,end,label\nv0.mp4,1,2,run\n", "looks like a segment with start and end"),
        ("path,label\nv0.mp4,a,b\n", "has 3 columns, the header has 2"),
        ("v0.mp4 1.5\n", "line 1: label 1.5 must be"),
        ("v0.mp4 100000\n", "line 1: label 100000 must be from 0"),
        ("label,path\n99999999999,v0.mp4\n", "line 2: label 99999999999 must be"),
        ("v0.mp4 run\nv1.mp4 1\n", "line 1 has the class 'run', line 2 a number"),
        (
            "path,label,split\nv0.mp4,0,train\nv1.mp4,0,val\n",
            r"several parts \(train, val\): make a list",
        ),
        ("path,label,is_train\nv0.mp4,0,0\nv1.mp4,0,1\n", r"several parts \(0, 1\): make a list"),
        ("sub\\e.avi 1\n", "missing, the first is .*sub/e.avi"),
        ("v0.mp4/x.avi 1\n", "missing, the first is .*v0.mp4/x.avi"),
    ],
)
def test_other_lines_are_refused_by_what_they_look_like(read, text, words):
    with pytest.raises(ValueError, match=words):
        read(text)


@pytest.mark.parametrize(
    "line", ["{0}.mp4 1,2", "{0}", "{0}.mp4", "x.mp4 {0} 1.", "a\x1b{0} 2 1", "x,{0}"]
)
def test_no_message_holds_more_than_200_characters_of_a_line(read, tmp_path, line):
    for text in (line.format("y" * 900) + "\n", "path,label\n" + line.format("y" * 900)):
        with pytest.raises(ValueError) as caught:
            read(text)
        message = str(caught.value).replace(str(tmp_path), "")
        assert message.count("y") <= 210 and "\n" not in message and "\x1b" not in message


def test_labels_that_begin_at_1_are_noticed(read, capsys):
    assert read("v0.mp4 1\nv1.mp4 2\nv2.mp4 -1\n") == (
        ["v0.mp4", "v1.mp4", "v2.mp4"],
        [1, 2, -1],
        ["0", "1", "2"],
    )
    assert "note: no video has label 0: labels seem to begin at 1" in capsys.readouterr().out
    for text in ("v0.mp4 0\nv1.mp4 1\n", "v0.mp4\n", "v0.mp4 2\n", "v0.mp4 run\n"):
        read(text)
    assert capsys.readouterr().out == ""


# names of classes


def test_classes_get_their_names_from_a_file(read, tmp_path, capsys):
    file = tmp_path / "names"
    text = "v0.mp4 1\nv1.mp4 0\nv2.mp4 -1\n"
    for content in ("walk\nrun fast\n", "0 walk\n1 run fast\n", '2,"run fast"\n1,walk\n'):
        file.write_text(content)
        assert [*read_names(file).values()] == ["walk", "run fast"]
        assert read(text, classes_file=file)[1:] == ([1, 0, -1], ["walk", "run fast"])
        # A list of names gets the numbers of the file.
        assert read("v0.mp4 walk\nv1.mp4 run fast\n", classes_file=file)[1] == [0, 1]
        assert read("v0.mp4 run fast\n", classes_file=file)[1] == [1]
    (tmp_path / "list.json").write_text('["walk", "run"]')
    assert read_names(tmp_path / "list.json") == {0: "walk", 1: "run"}
    file.write_text("1 walk\n2 run fast\n")  # label 1 is run fast if 0 is walk
    with pytest.raises(ValueError, match="counts from 1, and no video has label 0"):
        read("v0.mp4 1\nv1.mp4 1\n", classes_file=file)
    (tmp_path / "list.json").write_text("3")
    with pytest.raises(ValueError, match="does not name the classes"):
        read_names(tmp_path / "list.json")
    (tmp_path / "list.json").write_text('["walk", "run", "walk"]')
    with pytest.raises(ValueError, match="does not name the classes"):
        read_names(tmp_path / "list.json")
    (tmp_path / "labels.json").write_text('{"run": "1", "walk": "0"}')
    assert read(text, classes_file=tmp_path / "labels.json")[2] == ["walk", "run"]
    assert capsys.readouterr().out == ""
    file.write_text("a\nb\nc\n")
    assert (
        read(text, classes_file=file)[2] == ["a", "b", "c"]
        and "names 3 classes" in capsys.readouterr().out
    )
    for content, words in (
        ("walk\n", "names 1 classes"),
        ("a\na\n", "each once"),
        ("0 a\n2 b\n", "numbers from 0"),
        ("2 a\n3 b\n", "numbers from 0"),
        ("", "each"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            read(text, classes_file=file)
    file.write_text("a\nb\n")
    with pytest.raises(ValueError, match="no class is called walk"):
        read("v0.mp4 walk\n", classes_file=file)


def test_classes_of_two_parts_meet_by_name(read, tmp_path):
    """A test list without videos of a class must not shift the others."""
    read("v0.mp4 run\n", "test.txt")
    read("v1.mp4 at rest\nv2.mp4 run\n", "train.txt")
    train, test = (read_split(tmp_path, tmp_path / f"{part}.txt") for part in ("train", "test"))
    assert train.kind == test.kind == "named list" and test.labels == [0]
    test = lists.relabel(test, train.classes, "the training list")
    assert test.labels == [1] and test.classes == ["at rest", "run"]
    with pytest.raises(ValueError, match="the test list: no class is called at rest"):
        lists.relabel(train, ["run", "sit"], "the test list")
    read("v0.mp4 0\n", "numbers.txt")
    (tmp_path / "names").write_text("run\n")
    assert read_split(tmp_path, tmp_path / "numbers.txt").kind == "list"
    assert (
        read_split(tmp_path, tmp_path / "numbers.txt", classes_file=tmp_path / "names").kind
        == "named list"
    )


# Something-Something V2 and Kinetics

TEMPLATES = [
    "Turning [something] upside down",
    "Holding [something]",
    "Putting [something], [something] on [something]",
]


def ssv2(folder, file, ids, labelled=True):
    entries = [{"id": str(i), "template": None} for i in ids]
    for entry in entries if labelled else ():
        template = TEMPLATES[int(entry["id"]) % 3]
        entry |= dict(
            label=template.replace("[something]", "potato").lower(),
            template=template,
            placeholders=["potato"],
        )
    (folder / file).write_text(json.dumps(entries))
    return folder / file


def test_something_something_is_read_as_published(tmp_path, capsys):
    data = tmp_path / "20bn-something-something-v2"
    touch(data, "3.webm", "4.webm", "5.mp4", "30.webm", "old/3.webm")
    train = ssv2(tmp_path, "something-something-v2-train.json", [4, 3, 5])
    split = read_split(data, train)
    assert f"{data}/3.webm is taken, not {data}/old/3.webm" in capsys.readouterr().out
    plain = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
    assert split.paths == [data / name for name in ("4.webm", "3.webm", "5.mp4")]  # any ending
    assert split.classes == sorted(plain) and [split.classes[label] for label in split.labels] == [
        plain[i] for i in (1, 0, 2)
    ]
    numbers = {name: str(number) for number, name in enumerate(plain)}
    for name in ("labels.json", "something-something-v2-labels.json"):
        (tmp_path / name).write_text(json.dumps(numbers))
        split = read_split(data, train)
        assert split.labels == [1, 0, 2] and split.classes == plain
    test = read_split(
        data, ssv2(tmp_path, "something-something-v2-test.json", [30], labelled=False)
    )
    assert test.labels == [-1] and names(test) == ["30.webm"] and test.classes == plain
    with pytest.raises(
        ValueError, match="1 of 2 listed videos are missing, the first is .*/9.webm"
    ):
        read_split(data, ssv2(tmp_path, "more.json", [3, 9]))
    (tmp_path / name).write_text('{"Holding something": "0"}')
    with pytest.raises(ValueError, match="template '.*' is not in .*labels.json"):
        read_split(data, train)
    for text, words in (
        ('{"database": {}}', "only JSON that is read"),
        ("[1]", "only JSON"),
        ("[", "no whole JSON"),
    ):
        train.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_split(data, train)


def test_kinetics_is_read_as_published(tmp_path):
    file = tmp_path / "train.csv"
    lines = [
        "label,youtube_id,time_start,time_end,split",
        "playing guitar,-_4xY,20,30.0,train",
        '"eat, drink",--3b,6,16,train',
    ]
    file.write_text("\n".join([*lines, "playing guitar,zz_9,0,10,train"]) + "\n")
    for i, place in enumerate(
        ("{}", "{}/playing guitar", "{}/playing_guitar", "train/{}/playing guitar")
    ):
        data = tmp_path / str(i)
        folder = place.format("") if i < 3 else "train/x"
        touch(
            data,
            f"./{folder}/-_4xY_000020_000030.mp4",
            f"./{folder}/--3b.mp4",
            f"./{folder}/zz_9_000000_000010.mkv",
        )
        split = read_split(data, file)
        assert names(split) == ["-_4xY_000020_000030.mp4", "--3b.mp4", "zz_9_000000_000010.mkv"]
        assert split.labels == [1, 0, 1] and split.classes == ["eat, drink", "playing guitar"]
    file.write_text("\n".join([*lines, "playing guitar,gone,0,10,train"]) + "\n")
    with pytest.raises(
        ValueError, match="1 of 3 listed videos are missing, the first is .*gone_000000_000010.mp4"
    ):
        read_split(data, file)
    assert read_split(data, file, missing="skip").labels == [1, 0]
    file.write_text("youtube_id,time_start,time_end,split\n--3b,6,16,test\n")  # the test list
    assert read_split(data, file).labels == [-1]


# what is missing


def test_missing_videos_can_be_left_out(read, tmp_path, capsys):
    text = "no.mp4 2\nv0.mp4 0\nv1.mp4 1\nnone.mp4 0\n"
    with pytest.raises(
        ValueError, match="2 of 4 .*no.mp4: .*check.* lists them all, --missing skip"
    ):
        read(text)
    assert read(text, missing="skip") == (["v0.mp4", "v1.mp4"], [0, 1], ["0", "1", "2"])
    assert "note: 2 of 4 listed videos are missing, the first is " in capsys.readouterr().out
    paths = lists.listed(tmp_path, tmp_path / "list.txt", 1, True).paths
    assert [path.name for path in missing_videos(paths)[0]] == ["no.mp4", "none.mp4"]
    with pytest.raises(ValueError, match="2 of 2 listed videos are missing"):
        read("no.mp4 2\nnone.mp4 0\n", missing="skip")


def test_a_column_of_ids_is_taken_where_there_is_no_path(read):
    both = (["sub/d.avi", "v0.mp4"], [1, 0], ["0", "1"])
    assert read("video_id,label\nsub/d.avi,1\nv0.mp4,0\n") == both
    assert read("video_id,label,video_name\n7,1,sub/d.avi\n8,0,v0.mp4\n") == both


def test_names_that_differ_in_case_accents_or_ending_only_are_named(read, tmp_path):
    accent = unicodedata.normalize("NFD", "é")
    touch(tmp_path, "HandStandPushups/v_01.AVI", f"caf{accent}.avi", "Ünï.mp4")
    touch(tmp_path, "new.mp4.part")
    for text, words in (
        ("HandstandPushups/v_01.avi 0", "HandStandPushups, only upper and lower case differ"),
        (
            "HandStandPushups/v_01.avi 0",
            "HandStandPushups/v_01.AVI, only upper and lower case differ",
        ),
        ("café.avi 0", "only the forms of accents differ"),
        (unicodedata.normalize("NFD", "üNÏ.mp4 0"), "Ünï.mp4, only upper and lower case differ"),
        ("sub/D 0", "sub/d.avi, only the endings differ: rename it, or mend the list"),
        ("handstandpushups/v_02.avi 0", "HandStandPushups, only upper and lower case differ"),
        ("sub/d/e.avi 0", "--missing skip"),
        ("new.mp4 0", "--missing skip"),
    ):
        with pytest.raises(ValueError, match=f"1 of 1 listed videos are missing.*{words}"):
            read(text)


def test_official_lists_pass_over_what_systems_leave(tmp_path):
    folder = tmp_path / "splits"
    touch(
        tmp_path,
        "clap/a.avi",
        "clap/b.avi",
        "splits/._clap_test_split2.txt",
        "splits/._classInd.txt",
        "splits/desktop.ini",
    )
    with pytest.raises(ValueError, match="neither classInd.txt"):
        read_split(tmp_path, folder)
    (folder / "clap_test_split1.txt").write_text("a.avi 1\nb.avi 2\n")
    assert names(read_split(tmp_path, folder, train=False)) == ["b.avi"]
