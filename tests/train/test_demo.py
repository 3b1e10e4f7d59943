"""The demo: its text, its folder, its two runs, and what stops it."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_run import write_fake_run

from adarankgrad.cli.main import main
from adarankgrad.train import comparison, stdlib_corpus
from adarankgrad.train import demo as demo_module
from adarankgrad.train.child import ChildPool, ChildProcess, Job, training_environment
from adarankgrad.train.demo import DEMO_RUNS, MARKER_NAME, Demo
from adarankgrad.train.errors import Interrupted, TrainingError, UserError
from adarankgrad.train.stdlib_corpus import StdlibCorpus, read_stdlib

SMALL_CORPUS = StdlibCorpus([("a.py", "x = 1\n" * 50)], [("b.py", "y = 2\n" * 50)])


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A made-up library of forty files."""
    root = tmp_path / "library"
    for index in range(40):
        path = root / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"VALUE = {index}\n" * 100, encoding="utf-8")
    monkeypatch.setattr(stdlib_corpus, "MIN_TRAIN_BYTES", 1000)
    monkeypatch.setattr(stdlib_corpus, "VALIDATION_BYTES", 4000)
    return root


def test_the_text_is_the_same_every_time_and_holds_out_whole_files(library, tmp_path):
    first, second = read_stdlib(library), read_stdlib(library)
    assert first == second
    assert first.num_files == 40
    assert not {name for name, _ in first.train} & {name for name, _ in first.validation}
    assert 3 <= len(first.validation) <= 4
    train, validation = first.write(tmp_path / "data")
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert [row["path"] for row in rows] == sorted(name for name, _ in first.train)
    assert rows[0]["text"].startswith("VALUE = ")
    assert len(validation.read_text().splitlines()) == len(first.validation)


def test_tests_installed_packages_and_unreadable_files_are_left_out(library):
    for folder in ("test", "site-packages", "__pycache__", "idlelib", "lib2to3", "package1/tests"):
        (library / folder).mkdir()
        (library / folder / "unwanted.py").write_text("UNWANTED = 1\n" * 100)
    (library / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    (library / "empty.py").write_text("\n")
    (library / "table.txt").write_text("not code")
    names = {name for rows in vars(read_stdlib(library)).values() for name, _ in rows}
    assert len(names) == 40


def test_the_size_is_capped_by_a_sample_of_the_library_not_its_first_letters(library, monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "MAX_TRAIN_BYTES", 15_000)
    names = [name for name, _ in read_stdlib(library).train]
    assert len(names) < 15
    assert {name.split("/")[0] for name in names} == {"package0", "package1", "package2"}


def test_a_python_without_its_source_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="not in .*adarankgrad train --data"):
        read_stdlib(tmp_path / "nothing")


def test_the_library_of_this_python_is_large_enough():
    corpus = read_stdlib()
    assert corpus.num_bytes > 3_000_000
    assert len(corpus.validation) >= 5


@pytest.fixture
def children(monkeypatch):
    """Replace training by fabricated run folders; collects the commands."""
    commands = []

    def train(child):
        command = child._command
        commands.append(command)
        folder = Path(command[command.index("--output") + 1])
        if not folder.exists():
            write_fake_run(folder, command[command.index("--optimizer") + 1], num_logs=3)
        return 0

    monkeypatch.setattr(demo_module.ChildProcess, "run", train)

    def compare(run_dirs, output, title):
        page = output / "comparison.html"
        page.write_text(title)
        return page

    monkeypatch.setattr(comparison, "write_comparison", compare)
    monkeypatch.setattr(demo_module, "read_stdlib", lambda: SMALL_CORPUS)
    return commands


def test_both_runs_differ_in_optimizer_learning_rate_and_folder_only(children, tmp_path):
    Demo(tmp_path / "demo", steps=60, seed=3).run()
    first, second = (dict(zip(c[4::2], c[5::2], strict=True)) for c in children)
    assert {key for key in first if first[key] != second[key]} == {
        "--optimizer",
        "--lr",
        "--output",
    }
    assert first["--seed"] == "3" and first["--steps"] == "60"
    assert [c[:4] for c in children] == [[sys.executable, "-m", "adarankgrad", "train"]] * 2


def test_a_demo_leaves_data_runs_and_a_comparison(children, tmp_path):
    lines = []
    result = Demo(tmp_path / "demo", steps=60).run(lines.append)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "adamw",
        "adarankgrad",
        "comparison.html",
        "data",
        "demo.json",
    ]
    assert list(result["runs"]) == ["AdamW", "AdaRankGrad"]
    assert result["runs"]["AdaRankGrad"]["projected_state_bytes"] == 860_000
    assert Path(result["comparison"]).is_file()
    assert "Run 2 of 2: AdaRankGrad, 60 steps." in lines


def test_a_second_demo_replaces_the_first_and_keeps_what_is_not_its_own(children, tmp_path):
    output = tmp_path / "demo"
    Demo(output, steps=60).run()
    (output / "notes.txt").write_text("mine")
    Demo(output, steps=30).run()
    assert [command[-1] for command in children[2:]] == ["--overwrite", "--overwrite"]
    assert (output / "notes.txt").read_text() == "mine"
    assert json.loads((output / MARKER_NAME).read_text())["steps"] == 30


def test_a_folder_that_no_demo_wrote_is_refused_untouched_unless_asked_for(children, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that no demo wrote.*--overwrite"):
        Demo(tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    Demo(tmp_path, overwrite=True).run()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "comparison.html").is_file()


def test_bad_requests_are_refused_before_anything_is_written(children, tmp_path):
    (tmp_path / "file").write_text("")
    for output, steps, seed, message in (
        ("demo", 0, 0, "steps = 0"),
        ("demo", 10, -1, "seed = -1"),
        ("file", 10, 0, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            Demo(tmp_path / output, steps=steps, seed=seed).run()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_library_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "read_stdlib", lambda: read_stdlib(tmp_path / "nothing"))
    with pytest.raises(UserError, match="standard library"):
        Demo(tmp_path / "demo").run()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_is_named_and_the_folder_can_be_used_again(children, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo_module.ChildProcess, "run", lambda child: 1)
        with pytest.raises(TrainingError, match="the AdamW run of the demo ended with exit code 1"):
            Demo(tmp_path / "demo").run()
    assert not (tmp_path / "demo" / "comparison.html").exists()
    Demo(tmp_path / "demo").run()
    assert json.loads((tmp_path / "demo" / MARKER_NAME).read_text())["is_finished"]


def test_an_interrupted_demo_says_how_to_start_again(children, tmp_path, monkeypatch):
    def stop(child):
        raise Interrupted("stopped", 130)

    monkeypatch.setattr(demo_module.ChildProcess, "run", stop)
    with pytest.raises(Interrupted, match="during the AdamW run.*adarankgrad demo") as caught:
        Demo(tmp_path / "demo").run()
    assert caught.value.exit_code == 130


def test_a_child_passes_its_exit_code_and_output_through(capfd):
    program = "import sys; print('live'); print('error', file=sys.stderr); sys.exit(7)"
    assert ChildProcess([sys.executable, "-c", program]).run() == 7
    assert capfd.readouterr() == ("live\n", "error\n")
    assert ChildProcess([sys.executable, "-c", "print('moved')"], sys.stderr).run() == 0
    assert capfd.readouterr() == ("", "moved\n")


COUNTS_SIGNALS = """
import signal, sys, time
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(int(number)))
open(sys.argv[1], "w").close()
while not received or {stubborn}:
    time.sleep(0.02)
time.sleep(0.2)
open(sys.argv[1], "w").write(repr(received))
"""


def skip_where_ignored(number):
    """Under nohup, or in the background of a script; a signal that is ignored stays so."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{signal.Signals(number).name} is ignored here")


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_a_signal_reaches_the_child_once_and_is_reported_after_it_ended(sent, passed_on, tmp_path):
    told = tmp_path / "told"
    child = ChildProcess([sys.executable, "-c", COUNTS_SIGNALS.format(stubborn=0), str(told)])
    before = signal.getsignal(sent)
    skip_where_ignored(sent)
    killer = threading.Thread(target=send_when_there, args=(told, sent))
    killer.start()
    with pytest.raises(Interrupted) as caught:
        child.run()
    killer.join()
    assert told.read_text() == repr([int(passed_on)])
    assert caught.value.exit_code == 128 + sent
    assert signal.getsignal(sent) is before


def test_the_third_signal_ends_a_child_that_does_not_listen(tmp_path):
    skip_where_ignored(signal.SIGINT)
    told = tmp_path / "told"
    job = Job([sys.executable, "-c", COUNTS_SIGNALS.format(stubborn=1), str(told)])
    killer = threading.Thread(target=send_when_there, args=(told, signal.SIGINT, 3))
    killer.start()
    exit_codes = []
    with pytest.raises(Interrupted):
        ChildPool().run([job], lambda job, exit_code: exit_codes.append(exit_code))
    killer.join()
    assert exit_codes == [-signal.SIGKILL]


def test_a_pool_runs_so_many_at_a_time_and_logs_what_each_said(tmp_path):
    waits_for_the_other = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.02)
sys.exit(mine.name)
"""
    names = {"a": "b", "b": "a"}
    jobs = [
        Job(
            [
                sys.executable,
                "-c",
                waits_for_the_other,
                str(tmp_path / mine),
                str(tmp_path / other),
            ],
            log=tmp_path / f"{mine}.log",
        )
        for mine, other in names.items()
    ]
    ended = {}
    ChildPool(2).run(jobs, lambda job, exit_code: ended.update({job.log.name: exit_code}))
    assert ended == {"a.log": 1, "b.log": 1}
    assert [(tmp_path / f"{name}.log").read_text() for name in names] == ["a\n", "b\n"]


def test_a_user_can_still_tune_the_training_processes(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    environment = training_environment()
    assert environment["MALLOC_TOP_PAD_"] == "1"
    assert environment["HF_HUB_OFFLINE"] == os.environ["HF_HUB_OFFLINE"]
    assert environment["PATH"] == os.environ["PATH"]
    if sys.platform == "linux":
        assert environment["MALLOC_MMAP_THRESHOLD_"] == "4294967296"


def test_a_real_demo_trains_both_and_starts_them_from_the_same_weights(
    inputs, tmp_path, monkeypatch
):
    def train_in_this_process(child):
        with pytest.raises(SystemExit) as end:
            main(child._command[3:])
        return end.value.code

    monkeypatch.setattr(demo_module.ChildProcess, "run", train_in_this_process)
    monkeypatch.setattr(stdlib_corpus, "MAX_TRAIN_BYTES", 250_000)
    monkeypatch.setattr(stdlib_corpus, "VALIDATION_BYTES", 3000)
    monkeypatch.setattr(stdlib_corpus, "MAX_VALIDATION_FILE_BYTES", 3000)
    settings = {"model": str(inputs / "tiny" / "config.json"), "batch_size": 2, "seq_len": 16}
    result = Demo(tmp_path / "demo", steps=6, settings=tuple(settings.items())).run()
    adamw, adaptive = result["runs"].values()
    assert adamw["tokens"] == adaptive["tokens"] == 6 * 2 * 16
    assert adamw["projected_state_bytes"] == adaptive["adamw_projected_state_bytes"]
    assert adaptive["mean_rank"] > 0
    folders = [tmp_path / "demo" / run.optimizer for run in DEMO_RUNS]
    first_losses = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for folder in folders
    ]
    assert first_losses[0] == first_losses[1]
    tokenizers = [(folder / "model" / "tokenizer.json").read_text() for folder in folders]
    assert tokenizers[0] == tokenizers[1]
    assert all((folder / "report.html").is_file() for folder in folders)
    assert sorted(path.name for path in (tmp_path / "demo" / "plots").iterdir()) == [
        "loss.png",
        "memory.png",
    ]


def send_when_there(path: Path, number: int, times: int = 1) -> None:
    """Send a signal to this process once a file appears, as a terminal or a user would."""
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.1)
