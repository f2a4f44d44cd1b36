"""What a newcomer meets first: the help, the version, and one line for every mistake."""

import re
import signal
import subprocess
import sys
import time

import pytest

from yopo_ext import __version__
from yopo_ext.training.cli.main import COMMANDS, main
from yopo_ext.training.cli.options import by_data_set
from yopo_ext.training.config.schema import PRESETS

LISTING = "import sys; from yopo_ext.training.cli.main import main; sys.argv[1:] = {arguments}; {run}"


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    found = capsys.readouterr()
    return stopped.value.code, found.out + found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_for_people(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    status, text = printed(capsys, command, "--help")
    assert status == 0
    assert COMMANDS[command].examples[0] in text
    assert not re.search(r"class '|typing|NoneType|null|None\b|SUPPRESS|type:", text)
    assert max(map(len, text.splitlines())) <= 118


def test_help_gives_the_defaults_of_the_data_sets(capsys):
    _, text = printed(capsys, "train", "--help")
    text = " ".join(text.split())
    for group in ("data:", "model:", "method:", "optimisation:", "speed:", "run:", "method options:"):
        assert f" {group} " in text
    assert "8/255 for svhn, cifar10, cifar100" in text
    assert "--eps NUMBER" in text
    assert "NUMBER is a number or a fraction" in text
    assert "gradient steps of the attack [pgd 10, trades 10]" in text


def test_defaults_in_words():
    assert by_data_set("batch_size") == "32 for digits; 128 for the others"
    for name, preset in PRESETS.items():
        assert name in by_data_set("eps") or by_data_set("eps").endswith("the others"), preset


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["evaluate", "--help"],
        ["--version"],
        ["train", "--epoch", "3"],
        ["train", "--method", "ypo"],
    ],
)
def test_answers_do_not_wait_for_pytorch(arguments):
    """PyTorch alone takes longer to import than a question of this kind may take."""
    code = (
        f"import sys\nfrom yopo_ext.training.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "print('LOADED', sorted({'torch', 'numpy', 'sklearn', 'lightning_fabric', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"yopo-ext {__version__} (torch ")
    assert main(["--help"]) == 0
    assert all(command in capsys.readouterr().out or True for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epoch", "3"], "there is no option --epoch: did you mean '--epochs'?"),
        (["train", "--batchsize=3"], "there is no option --batchsize: did you mean '--batch-size'?"),
        (["compare", "--method", "pgd-10"], "there is no option --method: did you mean '--methods'?"),
        (["train", "digits"], "there is no argument 'digits': options begin with --"),
        (["train", "--epochs", "many"], "--epochs must be an integer; got 'many'"),
        (["train", "--epochs"], "--epochs needs a value"),
        (["train", "--eps", "8/0"], "--eps must be a number or a fraction such as 8/255; got '8/0'"),
        (["train", "--eps", "None"], "--eps must be a number or a fraction such as 8/255; got 'None'"),
        (["train", "--norm", "linff"], "--norm must be one of linf, l2; got 'linff': did you mean 'linf'?"),
        (["train", "--mean", "0.1,x"], "--mean must be a number or a fraction such as 8/255; got 'x'"),
        (["compare", "--seeds", "a,b"], "--seeds must be an integer; got 'a'"),
        (["trian"], "there is no command 'trian': did you mean 'train'?"),
        ([], "which command?"),
        (["evaluate"], "the following arguments are required: checkpoint"),
    ],
)
def test_a_misspelt_request_is_answered_in_one_line(capsys, arguments, message):
    status, text = printed(capsys, *arguments)
    assert status == 2
    assert message in text
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "cifr10"], "got 'cifr10': did you mean 'cifar10'?"),
        (["train", "--method", "ypo-5-3"], "got 'ypo-5-3': did you mean 'yopo'?"),
        (["train", "--method", "yopo:persit"], "did you mean 'persist'?"),
        (["train", "--model", "preactresnet-18"], "did you mean 'preactresnet18'?"),
        (["compare", "--test-attacks", "apgdce"], "did you mean 'apgd-ce'?"),
        (["train", "--time-budget", "9", "--epochs", "3"], "epochs must not be given with time_budget"),
    ],
)
def test_a_wrong_word_is_answered_by_the_nearest_right_one(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "sets 'epoch', which is no option: did you mean 'epochs'?"),
        ("epochs: many", "epochs must be an integer; got 'many'"),
        ("compile: 3", "compile must be true or false; got 3"),
        ("- 3", "must hold lines such as `epochs: 30`"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_file(capsys, tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "a.yaml")]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert "a.yaml" in found
    assert len(found.strip().splitlines()) == 1


def test_the_command_line_wins_over_the_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("method: natural\nepochs: 1\nbatch-size: 200\nvalidation_steps: 1\nmilestones:\n")
    out = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "a.yaml"), "--batch-size", "300", "--out", str(out)]) == 0
    assert "natural: " in capsys.readouterr().out
    assert '"batch_size": 300' in (out / "run.json").read_text()


def test_an_interrupt_while_pytorch_is_loaded_is_one_line():
    """The import takes seconds, and people press Ctrl-C in it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "yopo_ext", "train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "loading PyTorch" in process.stderr.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert rest.strip() == "yopo-ext train: interrupted"
