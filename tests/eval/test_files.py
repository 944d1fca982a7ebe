"""Files and folders that appear whole or not at all, and places that are refused before any work."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svg.eval.files import atomic_path, check_folder, check_outputs, remove_partials, result_folder

NAMES = ("a.mp4", "b.mp4", "report.json")


def fill(folder, text, names=NAMES):
    for name in names:
        (folder / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_a_file_at_a_temporary_name_is_never_written_through(tmp_path):
    """Names are random and made anew: a link at any name that could be guessed stays as it is."""
    (tmp_path / "foreign").write_text("mine")
    for name in (f".out.json.{os.getpid()}.part", ".out.json.part"):
        (tmp_path / name).symlink_to(tmp_path / "foreign")
    with atomic_path(tmp_path / "out.json") as partial:
        assert not partial.is_symlink() and partial.stat().st_nlink == 1
        partial.write_text("result")
    assert (tmp_path / "foreign").read_text() == "mine" and (tmp_path / "out.json").read_text() == "result"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "out") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_plain_files_are_replaced(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(OSError, match="plain file"), atomic_path(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_partials_of_the_dead_go_and_of_the_living_stay(tmp_path):
    others = [tmp_path / name for name in (".note.part", ".x.123.part", ".svg-0123456789abcdef.part.txt")]
    for path in others:
        path.write_text("foreign")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".svg-0123456789abcdef.part").write_text("below")
    (tmp_path / ".svg-fedcba9876543210.part").symlink_to(others[0])
    dead = tmp_path / ".svg-0123456789abcdef.part"
    dead.write_text("half")
    locks = [dead.with_suffix(".lock"), tmp_path / ".svg-aaaaaaaaaaaaaaaa.lock"]  # of a writer killed before its file
    for path in locks:
        path.touch()
    with atomic_path(tmp_path / "out") as living:
        remove_partials(tmp_path)
        assert living.exists() and not dead.exists() and not any(path.exists() for path in locks)
        assert living.with_suffix(".lock").exists()
    assert all(path.exists() for path in others) and (tmp_path / "folder" / ".svg-0123456789abcdef.part").exists()
    assert (tmp_path / ".svg-fedcba9876543210.part").is_symlink()


@pytest.mark.parametrize("spelling", ["q", "./q", "below/../q", "link", "hard", "linked/q"])
def test_no_output_is_an_input(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    Path("q").write_text("input")
    Path("below").mkdir()
    Path("link").symlink_to("q")
    os.link("q", "hard")
    Path("linked").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="out must not be one of the inputs"):
        check_outputs({"out": spelling}, ["q"])
    with pytest.raises(ValueError, match="out must not be one of the inputs"):
        check_outputs({"out": spelling}, [tmp_path])
    check_outputs({"out": "new"}, ["q", None, "not-there"])
    assert Path("q").read_text() == "input" and sorted(os.listdir()) == ["below", "hard", "link", "linked", "q"]


def test_two_outputs_are_two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("x", "./x", "X"):
        with pytest.raises(ValueError, match="--csv and --json must be two files"):
            check_outputs({"--json": "x", "--csv": other})
    check_outputs({"--json": "x", "--csv": None})


def test_places_are_checked(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for place, words in (
        ("no/such", "not there"),
        ("file/x", "is a file"),
        ("pipe", "no plain file"),
        (".", "the folder"),
    ):
        with pytest.raises(ValueError, match=words):
            check_outputs({"out": tmp_path / place})
    with pytest.raises(ValueError, match="must be writable"):
        check_outputs({"out": "/proc/x"})
    with pytest.raises(ValueError, match="must be a folder"):
        check_folder("--out", tmp_path / "file", ())
    with pytest.raises(ValueError, match="one of the inputs"):
        check_folder("--out", tmp_path, ("file",), [tmp_path / "file"])
    check_folder("--out", tmp_path / "a" / "b", ("file",), [tmp_path / "file"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_new_folder_appears_whole(tmp_path):
    with result_folder(tmp_path / "a" / "out", NAMES) as folder:
        fill(folder, "one")
        assert not (tmp_path / "a").exists()
    assert contents(tmp_path / "a" / "out") == dict.fromkeys(NAMES, "one")


def test_results_move_into_a_folder_that_is_there(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with result_folder(tmp_path, NAMES) as folder:
        fill(folder, "one")
    with pytest.raises(ValueError, match="--force"), result_folder(tmp_path, NAMES):
        raise AssertionError("it must not begin")
    with result_folder(tmp_path, NAMES, force=True) as folder:
        fill(folder, "two", ("b.mp4", "report.json"))
    assert contents(tmp_path) == {"b.mp4": "two", "mine.txt": "mine", "report.json": "two"}


def test_a_second_run_into_one_folder_is_refused(tmp_path):
    for out in (tmp_path, tmp_path / "new"):
        with result_folder(out, NAMES) as folder:
            with pytest.raises(ValueError, match="another run is writing"), result_folder(out, NAMES):
                raise AssertionError("it must not begin")
            fill(folder, "one")
        assert {name: (out / name).read_text() for name in NAMES} == dict.fromkeys(NAMES, "one")


def test_a_killed_run_stops_no_later_one(tmp_path):
    """The process id is the same each time, as in a container."""
    code = (
        "import os\nfrom svg.eval.files import result_folder\nme = os.getpid()\nos.getpid = lambda: 7\n"
        f"with result_folder('out', {NAMES}) as folder:\n"
        "    (folder / 'a.mp4').write_text('half')\n    os.kill(me, 9)\n"
    )
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
    with result_folder(tmp_path / "out", NAMES) as folder:
        fill(folder, "one")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == dict.fromkeys(NAMES, "one")


def test_a_foreign_folder_in_the_way_is_left_alone(tmp_path):
    with pytest.raises(RuntimeError), result_folder(tmp_path / "out", NAMES) as folder:
        raise RuntimeError
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="in the way"), result_folder(tmp_path / "out", NAMES):
        raise AssertionError("it must not begin")
    assert contents(folder) == {"thesis.txt": "mine"}
    (folder / "thesis.txt").unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="writable"), result_folder(tmp_path / "out", NAMES):
        raise AssertionError("it must not begin")


@pytest.mark.parametrize("moves", range(5))
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_among_the_moves_is_made_good(tmp_path, moves, after):
    """Killed before or after any rename: never a complete-looking mixture, and the next run finds all or nothing."""
    (tmp_path / "mine.txt").write_text("mine")
    with result_folder(tmp_path, NAMES) as folder:
        fill(folder, "one")
    code = (
        "import os\nfrom pathlib import Path\nfrom svg.eval.files import result_folder\noriginal, done = Path.replace, []\n"
        "def replace(self, target):\n    done.append(target)\n"
        f"    if len(done) == {moves + 1} and not {after}: os.kill(os.getpid(), 9)\n    original(self, target)\n"
        f"    if len(done) == {moves + 1}: os.kill(os.getpid(), 9)\n"
        f"Path.replace = replace\nwith result_folder('.', {NAMES}, force=True) as folder:\n"
        "    for name in ('b.mp4', 'report.json'): (folder / name).write_text('two')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert run.returncode in (0, -signal.SIGKILL), run.stderr
    if (tmp_path / "report.json").exists():
        text = (tmp_path / "report.json").read_text()
        names = NAMES if text == "one" else ("b.mp4", "report.json")
        assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(names, text)
    with pytest.raises(ValueError, match="--force"), result_folder(tmp_path, NAMES):
        raise AssertionError("it must not begin")
    text = (tmp_path / "report.json").read_text()
    names = NAMES if text == "one" else ("b.mp4", "report.json")
    assert contents(tmp_path) == {"mine.txt": "mine"} | dict.fromkeys(names, text)


def test_an_input_of_a_results_name_is_kept(tmp_path):
    (tmp_path / "a.mp4").write_text("input")
    inputs = [tmp_path / "a.mp4"]
    with pytest.raises(ValueError, match="one of the inputs"), result_folder(tmp_path, NAMES, True, inputs):
        raise AssertionError("it must not begin")
    assert contents(tmp_path) == {"a.mp4": "input"}
