"""Bad command lines: the error names the option, its value, and what is allowed."""

import sys

import gpt_fsdp2
import mnist_ddp
import pytest
import torch
from ranks import Ranks

HUGE = str(10**20)
COUNT = f"is not a whole number from 1 to {2**63 - 1}"
BOTH = {
    "--batch-size": ([HUGE, "0", "1.5", ""], COUNT),
    "--save-every": ([HUGE, "-1"], COUNT),
    "--keep": ([HUGE, "0"], COUNT),
    "--seed": ([HUGE, "-1", "1e20", "nan"], f"is not a whole number from 0 to {2**63 - 1}"),
    "--timeout": ([HUGE, "0", "inf", "31536001"], "is not a whole number from 1 to 31536000"),
    "--lr": (["nan", "inf", "-1", "1e39", "fast"], "is not a number in [0, 1e30]"),
}
GPT = BOTH | {
    **dict.fromkeys(["--layers", "--width", "--heads", "--context", "--steps"], ([HUGE, "0"], COUNT)),
    **dict.fromkeys(["--log-every", "--eval-every"], ([HUGE, "0"], COUNT)),
    "--dropout": (["nan", "1", "-0.1", "inf"], "is not a number in [0, 1)"),
    "--minutes": (["nan", "inf", "-1", "0"], "is not a finite number greater than 0"),
}
MNIST = BOTH | dict.fromkeys(["--epochs", "--limit"], ([HUGE, "0"], COUNT))
CASES = [
    (script, option, value, allowed)
    for script, options in ((gpt_fsdp2, GPT), (mnist_ddp, MNIST))
    for option, (values, allowed) in options.items()
    for value in values
]


@pytest.fixture
def parse(monkeypatch):
    def parse(script, *options):
        monkeypatch.setattr(sys, "argv", ["", *options])
        return script.parse()

    return parse


@pytest.mark.parametrize(("script", "option", "value", "allowed"), CASES)
def test_value_that_is_not_allowed(parse, script, option, value, allowed):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(script, f"{option}={value}")
    assert str(caught.value) == f"argument {option}: {value!r} {allowed}"


@pytest.mark.parametrize("script", [gpt_fsdp2, mnist_ddp])
def test_no_number_of_an_option_is_too_large_for_torch(parse, script):
    with pytest.raises(ValueError, match=r"^argument --option: slice_p=1000+ is not between"):
        parse(script, "--option", f"slice_p={HUGE}")


@pytest.mark.parametrize("script", [gpt_fsdp2, mnist_ddp])
def test_the_ends_of_what_is_allowed(parse, script):
    args = parse(script, "--seed", str(2**63 - 1), "--lr", "0", "--timeout", "31536000", "--keep", "1")
    torch.manual_seed(args.seed)
    assert args.timeout.days == 365


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", str(2**60)], f"--layers 4 --width {2**60} --heads 4 --context 128: choose a smaller"),
        (
            ["--batch-size", str(2**60)],
            f"--batch-size {2**60} is more than there are windows of --context 128",
        ),
    ],
)
def test_sizes_that_no_memory_holds(parse, tmp_path, capsys, options, message):
    (tmp_path / "a").write_text("a" * 1000)
    (tmp_path / "b").write_text("b" * 1000)
    args = parse(gpt_fsdp2, "--data", str(tmp_path), "--out", str(tmp_path / "out"), *options)
    with pytest.raises(SystemExit):
        gpt_fsdp2.run(args, Ranks(0, 1, 0, 1))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "expected"), [([], False), (["--option", "split_groups_mean=True"], True)], ids=str
)
def test_muon_has_a_step_size_of_its_own_unless_it_is_said(parse, given, expected):
    assert parse(mnist_ddp, "--muon", *given).option == {"split_groups_mean": expected}
