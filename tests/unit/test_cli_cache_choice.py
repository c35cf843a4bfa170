"""What `--cache` and `--socket` may name; what is wrong is told before a model is loaded."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import ucm
from ucm.cli import main
from ucm.cli.cache_choice import reached_cache, say_loading, socket_or_folder
from ucm.errors import ConfigError, TierUnavailableError
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.testing.models import write_tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one is a failure."""

    def load(*_arguments: object) -> None:
        raise AssertionError("a model was loaded before the cache was reached")

    monkeypatch.setattr("ucm.engine.loading.load_model", load)


def run_generate(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """Exit code and standard error."""
    arguments = ["ucm", "generate", "--model", str(model), "--prompt", "x", "--cache", str(cache)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


def test_what_the_option_may_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="neither"), reached_cache(tmp_path / "file", 1.0):
        pass
    with (
        pytest.raises(TierUnavailableError, match="ucm serve"),
        reached_cache(tmp_path / "ucm.sock", 1.0),
    ):
        pass
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "empty", tmp_path / "to-be-made"):
        with reached_cache(folder, 1.0) as factory:
            assert factory is not None
            with factory() as cache:  # type: ignore[attr-defined]
                assert cache.flush(timeout_s=1.0)
            factory().close()  # the store outlives a session
    with reached_cache(None, 1.0) as factory:
        assert factory is None


def test_a_socket_where_nobody_listens(
    tiny: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with short_folder() as folder:
        absent, dead = folder / "absent.sock", folder / "dead.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(dead))
        for path in (absent, dead):
            code, err = run_generate(tiny, path, monkeypatch, capsys)
            assert code == 3
            assert "ucm serve" in err


def test_a_folder_that_is_in_use_says_by_whom(
    tiny: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with short_folder() as folder, running_daemon(small_config(folder)) as daemon:
        path = daemon.config.nvme.path
        assert path is not None
        code, err = run_generate(tiny, path, monkeypatch, capsys)
        where = daemon.config.service.socket_path
    assert code == 2
    assert f"process {os.getpid()}, a daemon that serves at {where}: stop the daemon" in err
    assert "clients of its store name that socket instead of the folder" in err
    assert len(err.splitlines()) == 1
    with ucm.open(path):
        code, err = run_generate(tiny, path, monkeypatch, capsys)
    assert code == 2
    assert f"in use by process {os.getpid()}: stop it" in err, "the daemon's socket is forgotten"


def test_a_mistyped_path_is_told_before_the_model_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def load(*_arguments: object) -> None:
        told.append(capsys.readouterr().err)
        raise ConfigError("enough")

    monkeypatch.setattr("ucm.engine.loading.load_model", load)
    code, _ = run_generate(tiny, tmp_path / "mistyped", monkeypatch, capsys)
    assert code == 2
    assert told == [f"--cache {tmp_path / 'mistyped'}: nothing is there yet, a new store is made\n"]


def test_a_socket_will_do_for_a_folder(tmp_path: Path) -> None:
    with short_folder() as folder:
        path = folder / "a.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        assert socket_or_folder(None, path) == socket_or_folder(path, None) == (path, None)
        with pytest.raises(ConfigError, match=r"itself: \S+/a\.sock$"):
            socket_or_folder(None, folder / "a.sock.lock")
        assert socket_or_folder(None, folder / "absent.sock") == (folder / "absent.sock", None)
    assert socket_or_folder(None, tmp_path) == (None, tmp_path)
    with pytest.raises(ConfigError, match="either --socket or --cache"):
        socket_or_folder(tmp_path, tmp_path)


def test_a_new_folder_may_be_called_anything(tmp_path: Path) -> None:
    for name in ("x" * 150, "my.lock", "site.admin", "front.door"):
        assert socket_or_folder(None, tmp_path / name) == (None, tmp_path / name)
    with pytest.raises(ConfigError, match="File name too long"):
        socket_or_folder(None, tmp_path / ("x" * 300))


def test_a_folder_with_hidden_files_only_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").touch()
    with reached_cache(tmp_path, 1.0) as factory:
        assert factory is not None
        factory().close()


@pytest.mark.parametrize("command", ["generate", "add", "ls"])
def test_no_store_is_made_among_documents(
    command: str,
    tiny: Path,
    tmp_path: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.md", "b.md", "c.md"):
        (texts / name).write_text("a text")
    arguments = ["collection", command, "docs", "--cache", str(texts)]
    if command == "add":
        arguments += [str(texts), "--model", str(tiny)]
    if command == "generate":
        code, err = run_generate(tiny, texts, monkeypatch, capsys)
    else:
        monkeypatch.setattr("sys.argv", ["ucm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code, err = ended.value.code, capsys.readouterr().err
    assert code == 2
    assert err == (
        f"ucm: --cache {texts}: not a data folder, it holds a.md and 2 more; name an empty folder "
        "or a new one\n"
    )
    assert sorted(path.name for path in texts.iterdir()) == ["a.md", "b.md", "c.md"]


def test_loading_is_told_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say_loading(Path("models/tiny"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    say_loading(Path("models/tiny"))
    assert capsys.readouterr().err == "loading tiny ...\n"


def test_a_folder_may_be_called_as_a_socket_is(tmp_path: Path) -> None:
    folder = tmp_path / "x.sock"
    folder.mkdir()
    assert socket_or_folder(None, folder) == (None, folder)
    with reached_cache(folder, 1.0) as factory:
        assert factory is not None
        factory().close()
    (tmp_path / "file.sock").write_text("x")
    with pytest.raises(ConfigError, match="neither"):
        socket_or_folder(None, tmp_path / "file.sock")


@pytest.mark.parametrize("command", ["ls", "rm", "add"])
def test_no_command_makes_a_folder_where_a_daemon_should_be(
    command: str,
    tiny: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tiny / "text.txt").write_text("a text")
    with short_folder() as run:
        path = run / "ucm.sock"
        arguments = ["ucm", "collection", command, "docs", "--cache", str(path)]
        arguments += {"ls": [], "rm": ["--all"]}.get(command, [str(tiny / "text.txt")])
        arguments += ["--model", str(tiny)] if command == "add" else []
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 3
        assert list(run.iterdir()) == []
    assert str(path) in capsys.readouterr().err
