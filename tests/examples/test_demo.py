"""The demonstration: its parts, and a run on a tiny model."""

import pytest
from support.tiny_model import save_tiny_model

from examples import demo

pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("5 + 5 = 10. #### 10", "10"), (" ####1,280\n", "1280"), ("#### -3", "-3"), ("it is 10", None)],
)
def test_final_answer(text, answer):
    assert demo.final_answer(text) == answer


def test_vote():
    assert demo.vote(["#### 4", "#### 5", "none", "#### 5"]) == ("5", "5 x2, 4 x1")
    assert demo.vote(["none"]) == (None, "")


def test_it_runs(tmp_path, monkeypatch, capfd, one_thread):
    monkeypatch.setattr(demo, "gguf_path", lambda: save_tiny_model(tmp_path))
    monkeypatch.setattr(demo, "EXAMPLES", "")
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr("sys.argv", ["demo", "--branches", "3", "--beams", "2"])
    demo.main()
    printed, bars = capfd.readouterr()
    assert "3 branches\n  " in printed
    assert "Beam search, 2 beams\n  " in printed
    table = printed[printed.index("| | treedecode") :].splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| 3 samples", "| 2 beams"]
    assert "prefill: 100%" in bars
    assert "decode: 100%" in bars
