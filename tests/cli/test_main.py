"""The `treedecode` command: its version, unknown commands, and closed pipes."""

import signal
import subprocess
import sys

import pytest

import treedecode
from treedecode.cli import main as cli
from treedecode.tasks.countdown import Countdown


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"treedecode {treedecode.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_an_unknown_command_prints_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: treedecode" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "solve --strategy help"])
def test_a_reader_that_closes_the_pipe_is_no_error(command):
    program = "import sys; from treedecode.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_an_error(monkeypatch):
    def verify(task, problem, text):
        raise BrokenPipeError("the judge has ended")

    monkeypatch.setattr(Countdown, "verify", verify)
    with pytest.raises(BrokenPipeError, match="the judge has ended"):
        cli.main(["solve", "--strategy", "best_of_n:num_samples=2", "--num-problems", "1", "--verifier", "task"])
