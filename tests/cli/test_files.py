"""`polyak average` and `inspect` on the command line."""

from __future__ import annotations

import json

import torch


def saved(folder, steps=(9, 10, 100)):
    for step in steps:
        torch.save({"model": {"w": torch.full((2, 2), float(step))}, "global_step": step}, folder / f"step-{step}.pt")


def test_the_one_command(says, tmp_path):
    saved(tmp_path)
    status, out, err = says("average step-9.pt step-10.pt step-100.pt --last 2 -o mean.pt")
    assert (status, err) == (0, "")
    assert out.splitlines()[1:3] == ["step-10.pt   10    0.5000", "step-100.pt  100   0.5000"]
    assert "written: mean.pt" in out
    assert torch.equal(torch.load(tmp_path / "mean.pt")["w"], torch.full((2, 2), 55.0))


def test_every_way_to_weigh(says, tmp_path):
    saved(tmp_path, (100, 200, 400))
    names = "step-100.pt step-200.pt step-400.pt"
    (tmp_path / "m.json").write_text(json.dumps({"step-100": 3, "step-200": 1, "step-400": 2}))
    for options, wanted in {
        "--weights .5,.25,.25": 200.0,
        "--weights 2,1,1 --normalize": 200.0,
        "--strategy ema_halflife --set halflife=100": 337.5,
        "--wsm linear": 700 / 3,
        "--best 2 --metrics m.json": 300.0,
        "--until 200": 150.0,
    }.items():
        status, _, err = says(f"average {names} -o mean.pt {options}")
        assert (status, err) == (0, "")
        assert torch.load(tmp_path / "mean.pt")["w"][0, 0] == torch.tensor(wanted)


def test_mistakes_are_one_line_and_exit_code_2(says, tmp_path):
    saved(tmp_path)
    for options, words in {
        "step-9.pt step-10.pt -o step-9.pt": "is the input",
        "step-9.pt -o o.pt": "at least 2",
        "step-9.pt step-10.pt -o o.pt --weights 1,2": "add up to 3",
        "step-9.pt step-10.pt -o o.pt --weights a,b": "expected numbers",
        "step-9.pt step-10.pt -o o.pt --set halflife=3": "give its name",
        "step-9.pt step-10.pt -o o.pt --wsm linear --weights .5,.5": "exclude each other",
        "step-9.pt none.pt -o o.pt": "there is no file",
    }.items():
        status, out, err = says(f"average {options}")
        assert (status, out) == (2, "")
        assert words in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "o.pt").exists()


def test_inspect_says_what_a_file_is(says, tmp_path):
    saved(tmp_path)
    w = torch.ones(2)
    torch.save({"a": w, "b": w}, tmp_path / "tied.pt")
    says("average step-9.pt step-100.pt -o mean.pt --weights .25,.75")
    status, out, err = says("inspect step-9.pt tied.pt mean.pt --tensors")
    assert (status, err) == (0, "")
    assert "format    torch, under the key 'model'" in out
    assert "tensors   1 of 4 values, 16 B" in out
    assert "step      9" in out
    assert "tied      a = b" in out
    assert "made      polyak average of polyak" in out
    assert "0.7500 × step-100.pt, step 100, sha256 " in out
    assert "w       float32  [2, 2]" in out


def test_diff_lists_the_farthest_first_and_draws(says, tmp_path):
    torch.save({"a.weight": torch.ones(4), "b.weight": torch.ones(4), "c": torch.ones(1)}, tmp_path / "1.pt")
    torch.save({"a.weight": torch.ones(4), "b.weight": -torch.ones(4)}, tmp_path / "2.pt")
    status, out, err = says("diff 1.pt 2.pt --plot far.png")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split() == ["b.weight", "2", "4", "-1.000000", "2"]
    assert "only in the first: c" in lines
    assert (tmp_path / "far.png").stat().st_size > 1000


def test_merges_by_name_with_settings(says, tmp_path):
    for name, value in {"base": 1.0, "a": 2.0, "b": 4.0}.items():
        torch.save({"w": torch.full((4,), value)}, tmp_path / f"{name}.pt")
    status, out, err = says("merge task_arithmetic a.pt b.pt -o o.pt --base base.pt --set lam=0.5 --weights 1,2")
    assert (status, err) == (0, "")
    assert torch.load(tmp_path / "o.pt")["w"].tolist() == [4.5] * 4
    assert "made      polyak merge of polyak" in says("inspect o.pt")[1]
    status, out, err = says("merge tis a.pt b.pt -o o2.pt")
    assert (status, out) == (2, "")
    assert "Did you mean 'ties'" in err
    status, out, err = says("merges")
    assert (status, err) == (0, "")
    for name in ("linear", "ties", "dare", "geometric_median"):
        assert f"\n{name} " in out


def test_a_soup_by_a_function_of_a_module(says, tmp_path):
    for value in (100.0, 190.0, 900.0):
        torch.save({"weight": torch.full((1, 3), value)}, tmp_path / f"{value:.0f}.pt")
    command = "soup 100.pt 190.pt 900.pt --evaluate task:far --mode min --work work -o soup.pt --plot soup.png"
    status, out, err = says(command)
    assert (status, err) == (0, "")
    assert "soup of 2: 5, +35 better than the best file alone" in out
    assert "evaluated 5 times" in out
    assert torch.load(tmp_path / "soup.pt")["weight"].tolist() == [[145.0] * 3]
    assert (tmp_path / "soup.png").exists()
    assert "evaluated 0 times" in says(command)[1]
    status, _, err = says("soup 100.pt 190.pt --evaluate task:breaks --work work -o other.pt")
    assert status == 2
    assert "task:breaks raised KeyError" in err
