"""`launch.sh` with all around it replaced: a Python that records what it is asked, no network, no training."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_PYTHON = getattr(sys, "_base_executable", sys.executable)

# Plays the Python that launch.sh finds, the one in .venv, and every tool in .venv/bin; says what it did in $CALLS.
STAND_IN = f"""#!/usr/bin/env bash
name=$(basename "$0")
case "$name $*" in
  python*" -c "*) exec {REAL_PYTHON} "$@" ;;
esac
if [[ $name == python* && $1 == -m && $2 == venv ]]; then
  folder=${{!#}}
  mkdir -p "$folder/bin"
  for tool in python deepspeed ruff mypy mkdocs pytest; do cp "$0" "$folder/bin/$tool"; done
fi
name=${{name/python3.11/python}}
echo "$name $*" >>"$CALLS"
case "$name $*" in
  "python -m pip"*) [[ -z ${{PIP_FAILS:-}} ]] || {{ echo "no route to the index"; exit 1; }} ;;
  "python -P -m finetune ranks"*) echo 2 ;;
  "python -P -m finetune hosts"*) echo 5 2 3 node1 ;;
  "python -P -m finetune plan"*) [[ -z ${{PLAN_FAILS:-}} ]] || {{ echo "Does NOT fit: 9 GiB."; exit 1; }} ;;
  "python "*/finetune/train.py*) [[ ${{TRAINING:-}} == fails ]] && exit 7 || touch "$RUN/finished" ;;
  "python -P -m finetune finished"*)
    [[ ! -e $RUN/finished ]] || {{ echo "$RUN"; exit 0; }}
    [[ -e $RUN/stopped.json ]] && {{ echo "$RUN"; exit 3; }} || exit 1 ;;
  "python -P -m finetune export"*) mkdir -p "$RUN/merged-by-launch"
    touch "$RUN/merged-by-launch/nextune-export.json" ;;
  deepspeed*)
    echo "env OMP=$OMP_NUM_THREADS DS=${{DS_ACCELERATOR:-}}" >>"$CALLS"
    case ${{TRAINING:-}} in
      fails) exit 7 ;;
      ends-early) ;;
      saves) launcher deepspeed.launcher.launch ;;
      hangs) sleep 300 & echo "$!" >"$RUN/rank"; sleep 300 ;;
      leaves-a-rank) sleep 300 & echo "$!" >"$RUN/rank" ;;
      *) touch "$RUN/finished" ;;
    esac ;;
esac
"""

# As DeepSpeed's: a signal is handed on to the rank as a second one.
LAUNCHER = """#!/usr/bin/env bash
trap 'kill -TERM "$rank"; exit 1' TERM
rank --local_rank=0 &
rank=$!
wait
"""
RANK = """#!/usr/bin/env bash
trap 'echo TERM >>"$RUN/signals"' TERM
echo "$$" >"$RUN/rank"
until [[ -e $RUN/signals ]]; do sleep 0.1; done
for tenth in {1..15}; do sleep 0.1; done
if [[ ${SAVING:-} == fails ]]; then exit 1; fi
if [[ ${SAVING:-} == hangs ]]; then for second in {1..300}; do sleep 1; done; fi
touch "$RUN/stopped.json"
"""


def heed_signals() -> None:
    """As in a terminal; tests that run in the background inherit that these are ignored, and bash cannot undo it."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


class Checkout:
    """A copy of launch.sh in a folder of its own, with the stand-in as its python3.11."""

    def __init__(self, folder: Path):
        self.root, self.run_folder, self.calls_file = folder / "my checkout", folder / "run", folder / "calls"
        for place in (self.root / "recipes", self.run_folder, folder / "tools", folder / "elsewhere"):
            place.mkdir(parents=True)
        self.elsewhere = folder / "elsewhere"
        shutil.copy(ROOT / "launch.sh", self.root)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        (self.root / "recipes/tiny.yaml").touch()
        (self.root / "recipes/other.yaml").touch()
        self.tools = folder / "tools"
        self.add_tool("python3.11", STAND_IN)
        self.add_tool("launcher", LAUNCHER)
        self.add_tool("rank", RANK)
        self.add_tool("nvidia-smi", "#!/bin/sh\nexit 9\n")  # no GPU, whatever this machine has
        self.environment = {"PATH": f"{self.tools}:/usr/bin:/bin", "CALLS": str(self.calls_file)}
        self.environment |= {"RUN": str(self.run_folder), "HOME": str(folder)}

    def add_tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        self.calls_file.unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(self.root / "launch.sh"), *arguments],
            env=self.environment | environment,
            cwd=self.elsewhere,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=heed_signals,
        )

    def launch(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self) -> list[str]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [line.replace(str(self.root), "ROOT").replace(str(self.run_folder), "RUN") for line in text.splitlines()]

    def set_up_calls(self) -> list[str]:
        calls = [re.sub(r" --no-input.*off", "", call) for call in self.calls()]
        return [call for call in calls if call.startswith(("python -m venv", "python -m pip"))]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


VENV_AND_TORCH = ["python -m venv ROOT/.venv", "python -m pip install torch==2.13.0"]


def test_script_has_no_syntax_error_and_says_how_it_is_used(checkout: Checkout) -> None:
    done = checkout.launch("--help")
    assert done.returncode == 0
    for word in ("./launch.sh RECIPE.yaml", "./launch.sh test", "./launch.sh setup"):
        assert word in done.stdout
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train"], "'train' is neither a command (setup, test, docs) nor a recipe"),
        (["recipes/none.yaml"], "no recipe recipes/none.yaml"),
        (["--set", "steps"], "--set wants key=value"),
        (
            ["recipes/tiny.yaml", "--steps=3"],
            "after the recipe come --set key=value and --hostfile FILE, but got '--steps=3'",
        ),
        (["setup", "now"], "setup takes no arguments, but got: now"),
        (["recipes/tiny.yaml", "--hostfile"], "--hostfile wants a value"),
        (["recipes/tiny.yaml", "--hostfile", "/no/such/hosts"], "no hostfile /no/such/hosts"),
        (["--node-rank", "1"], "--node-rank, --master-addr and --master-port go with --hostfile"),
        (["--hostfile", "launch.sh", "--node-rank", "first"], "--node-rank is 'first'; it must be a whole number"),
        (["--hostfile", "launch.sh", "--node-rank", "08"], "--node-rank is '08'; it must be a whole number"),
        (
            ["--hostfile", "launch.sh", "--master-port", "a[$(touch HIT)]"],
            "--master-port is 'a[$(touch HIT)]'; it must",
        ),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_set_up(
    checkout: Checkout, arguments: list[str], sentence: str
) -> None:
    done = checkout.launch(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"launch.sh: {sentence}")
    assert done.stderr.count("\n") == 1
    assert checkout.calls() == []


def test_set_up_is_done_once(checkout: Checkout) -> None:
    assert checkout.launch("setup").returncode == 0
    assert checkout.set_up_calls() == [*VENV_AND_TORCH, "python -m pip install -e ROOT"]
    again = checkout.launch("setup")
    assert checkout.set_up_calls() == []
    assert again.stdout == "Set-up: .venv is up to date.\n"


def test_tests_add_the_development_tools_once_and_a_job_keeps_them(checkout: Checkout) -> None:
    checkout.launch("setup")
    assert checkout.launch("test", "--fast").returncode == 0
    assert checkout.set_up_calls() == ["python -m pip install -e ROOT[dev]"]
    for arguments in (["test", "--fast"], ["setup"]):
        checkout.launch(*arguments)
        assert checkout.set_up_calls() == []


def test_changed_dependencies_are_installed_into_the_same_venv(checkout: Checkout) -> None:
    checkout.launch("setup")
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.launch("setup")
    assert checkout.set_up_calls() == ["python -m pip install -e ROOT"]


def test_failed_set_up_shows_the_end_of_pips_output_and_is_made_anew(checkout: Checkout) -> None:
    failed = checkout.launch("setup", PIP_FAILS="yes")
    assert failed.returncode == 1
    assert "no route to the index" in failed.stderr
    assert "launch.sh: pip could not install torch==2.13.0" in failed.stderr
    leftover = checkout.root / ".venv/lib/half-installed"
    leftover.mkdir(parents=True)
    assert checkout.launch("setup").returncode == 0
    assert checkout.set_up_calls() == [*VENV_AND_TORCH, "python -m pip install -e ROOT"]
    assert not leftover.exists()


def test_moved_checkout_is_set_up_anew(checkout: Checkout) -> None:
    checkout.launch("setup")
    checkout.root = checkout.root.rename(checkout.root.parent / "moved")
    checkout.launch("setup")
    assert checkout.set_up_calls()[:2] == VENV_AND_TORCH


@pytest.mark.parametrize("what", ["bin", "notes"])
def test_a_venv_of_someone_else_is_left_alone(checkout: Checkout, what: str) -> None:
    (checkout.root / ".venv" / what).mkdir(parents=True)
    done = checkout.launch("setup")
    assert done.returncode == 1
    assert "was not made by launch.sh" in done.stderr
    assert [path.name for path in (checkout.root / ".venv").iterdir()] == [what]
    assert checkout.calls() == []


def test_without_a_usable_python_it_says_which_it_looked_at(checkout: Checkout) -> None:
    for name in ("python3.11", "python3.12", "python3.13", "python3.14", "python3", "python"):
        checkout.add_tool(
            name, "#!/bin/sh\nexit 127\n"
        )  # what a version manager leaves for a version that is not there
    done = checkout.launch("setup")
    assert done.returncode == 1
    assert "found no Python 3.11 or newer" in done.stderr
    assert f"{checkout.tools}/python3.12" in done.stderr
    named = checkout.launch("setup", PYTHON="python3.12")
    assert "PYTHON=python3.12 is not a Python 3.11 or newer" in named.stderr


def test_a_cuda_torch_that_is_there_is_kept(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_tool("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.launch("setup")
    assert checkout.set_up_calls()[:2] == ["python -m venv ROOT/.venv", "python -m pip install torch"]
    shutil.rmtree(checkout.root / ".venv")
    (tmp_path / "torch.py").write_text("class version:\n    cuda = '13.0'\n")
    checkout.launch("setup", PYTHONPATH=str(tmp_path))
    assert checkout.set_up_calls() == [
        "python -m venv --system-site-packages ROOT/.venv",
        "python -m pip install -e ROOT",
    ]


def test_main_job_plans_trains_exports_and_sums_up(checkout: Checkout) -> None:
    done = checkout.launch("--set", "train.steps=3", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    job = "--recipe ROOT/recipes/tiny.yaml --set train.steps=3"
    calls = [re.sub(r"--master_port \d+", "--master_port N", call) for call in checkout.calls()]
    assert [call for call in calls if call not in VENV_AND_TORCH and "pip" not in call and "venv" not in call] == [
        f"python -P -m finetune ranks {job}",
        f"python -P -m finetune finished {job}",
        f"python -P -m finetune plan {job}",
        f"deepspeed --log_level critical --num_gpus 2 --master_port N ROOT/finetune/train.py {job}",
        f"env OMP={max(1, len(os.sched_getaffinity(0)) // 2)} DS=cpu",
        f"python -P -m finetune finished {job}",
        "python -P -m finetune export RUN --to RUN/merged-by-launch --format merged --written-by launch.sh",
        "python -P -m finetune summary RUN --model RUN/merged-by-launch",
    ]


def test_complete_job_is_not_trained_again(checkout: Checkout) -> None:
    checkout.launch()
    done = checkout.launch()
    assert done.returncode == 0
    assert [call.split()[4] for call in checkout.calls()] == ["ranks", "finished", "export", "summary"]
    assert "complete already" in done.stdout


def test_another_recipe_is_trained_but_not_exported(checkout: Checkout) -> None:
    assert checkout.launch("recipes/other.yaml").returncode == 0  # found in the checkout from any folder
    commands = [call.split()[4] for call in checkout.calls() if "-m finetune" in call]
    assert commands == ["ranks", "finished", "plan", "finished", "summary"]


@pytest.mark.parametrize(
    ("training", "code", "sentence"),
    [
        ("fails", 7, "the training stopped with exit code 7; the same command continues it"),
        ("ends-early", 1, "the training ended, but its run is not complete"),
        ("leaves-a-rank", 1, "the launcher ended and left ranks behind; stopping them"),
    ],
)
def test_exit_code_0_of_the_launcher_is_not_believed(
    checkout: Checkout, training: str, code: int, sentence: str
) -> None:
    done = checkout.launch(TRAINING=training)
    assert done.returncode == code
    assert f"launch.sh: {sentence}" in done.stderr
    if training == "leaves-a-rank":
        assert not is_running(int((checkout.run_folder / "rank").read_text()))


ASKED = [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]


@pytest.mark.parametrize(("asked", "code"), ASKED)
def test_a_signal_stops_every_rank(checkout: Checkout, asked: signal.Signals, code: int) -> None:
    process = checkout.start(TRAINING="hangs")
    rank = pid_of_rank(checkout)
    process.send_signal(asked)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "stopped; the same command continues the training" in err
    assert not is_running(rank)


def pid_of_rank(checkout: Checkout) -> int:
    rank_file, end = checkout.run_folder / "rank", time.monotonic() + 30
    while not (rank_file.exists() and rank_file.read_text()):
        assert time.monotonic() < end, "the stand-in for training never started"
        time.sleep(0.05)
    return int(rank_file.read_text())


@pytest.mark.parametrize(("asked", "code"), [(number, 130 if number == signal.SIGINT else 0) for number, _ in ASKED])
def test_ranks_asked_to_stop_are_asked_once_and_a_run_that_saved_is_resumable(
    checkout: Checkout, asked: signal.Signals, code: int
) -> None:
    process = checkout.start(TRAINING="saves")
    rank = pid_of_rank(checkout)
    process.send_signal(asked)
    process.send_signal(asked)  # `timeout` does so
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    name = "SIGTERM" if asked == signal.SIGHUP else asked.name
    assert f"got {name}; the ranks save and stop, within 10 minutes" in err
    assert ("resumable: the same command continues the training where it stopped" in out) == (code == 0)
    assert (checkout.run_folder / "signals").read_text() == "TERM\n"
    assert not is_running(rank)
    assert not any("summary" in call for call in checkout.calls())


def test_a_run_that_stopped_by_itself_in_order_is_resumable_and_an_earlier_stop_proves_nothing(
    checkout: Checkout,
) -> None:
    process = checkout.start(TRAINING="saves")
    os.kill(pid_of_rank(checkout), signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Stopped in order, resumable" in out
    assert (checkout.run_folder / "stopped.json").exists()
    done = checkout.launch(TRAINING="fails")
    assert done.returncode == 7
    assert "resumable" not in done.stdout


@pytest.mark.parametrize(("saving", "code"), [("fails", 143), ("hangs", 130)])
def test_ranks_that_do_not_save_are_no_orderly_stop_and_asked_later_again_is_at_once(
    checkout: Checkout, saving: str, code: int
) -> None:
    process = checkout.start(TRAINING="saves", SAVING=saving)
    rank = pid_of_rank(checkout)
    process.send_signal(signal.SIGTERM)
    if saving == "hangs":
        time.sleep(4)
        assert is_running(rank)
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    assert ("stopped at once" in err) == (saving == "hangs")
    assert not is_running(rank)


# Over several hosts.


@pytest.fixture
def hostfile(checkout: Checkout) -> str:
    (checkout.elsewhere / "hosts").write_text("node1 slots=2\nnode2 slots=3\n")
    checkout.launch("setup")
    return str(checkout.elsewhere / "hosts")


SLURM = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "5", "SLURM_LOCALID": "0"}
JOB = "--recipe ROOT/recipes/other.yaml --set train.steps=3"


def test_a_hostfile_starts_this_script_on_every_host(checkout: Checkout, hostfile: str) -> None:
    done = checkout.launch("recipes/other.yaml", "--hostfile", "hosts", "--set", "a=b c", "--master-port", "7")
    assert done.returncode == 0, done.stderr
    assert checkout.calls() == [
        f"python -P -m finetune across {hostfile} bash ROOT/launch.sh ROOT/recipes/other.yaml --set a=b c"
        f" --hostfile {hostfile} --with-stdin --master-port 7"
    ]


@pytest.mark.parametrize(("node", "leads"), [("0", True), ("1", False)])
def test_each_host_plans_and_trains_its_part_and_the_first_sums_up(
    checkout: Checkout, hostfile: str, node: str, leads: bool
) -> None:
    options = ["--set", "train.steps=3", "--hostfile", "hosts", "--node-rank", node]
    done = checkout.launch("recipes/other.yaml", *options, OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    assert checkout.calls() == [
        f"python -P -m finetune hosts {hostfile} --node-rank {node}",
        f"python -P -m finetune finished {JOB}",
        f"python -P -m finetune plan {JOB} --ranks 5 --nodes 2",
        f"deepspeed --log_level critical --hostfile {hostfile} --no_ssh --node_rank {node} --master_addr node1"
        f" --master_port 29500 ROOT/finetune/train.py {JOB}",
        f"env OMP={max(1, len(os.sched_getaffinity(0)) // 3)} DS=cpu",
        *([f"python -P -m finetune finished {JOB}", "python -P -m finetune summary RUN"] if leads else []),
    ]


@pytest.mark.parametrize(("task", "leads"), [("0", True), ("9", False)])
def test_every_slurm_task_is_a_rank_without_a_launcher(
    checkout: Checkout, hostfile: str, task: str, leads: bool
) -> None:
    done = checkout.launch("recipes/other.yaml", "--set", "train.steps=3", **SLURM, SLURM_PROCID=task)
    assert done.returncode == 0, done.stderr
    assert checkout.calls() == [
        f"python -P -m finetune finished {JOB}",
        f"python -P -m finetune plan {JOB} --ranks 16 --nodes 2",
        f"python ROOT/finetune/train.py {JOB}",
        *([f"python -P -m finetune finished {JOB}", "python -P -m finetune summary RUN"] if leads else []),
    ]
    assert bool(done.stdout) == leads
    failed = checkout.launch("recipes/other.yaml", **SLURM, SLURM_PROCID=task, TRAINING="fails", RUN="/nowhere")
    assert failed.returncode == 7


def test_a_step_of_one_task_is_a_machine_like_any_other(checkout: Checkout, hostfile: str) -> None:
    """`srun --pty bash`, and then ./launch.sh."""
    one = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert checkout.launch("recipes/other.yaml", **one).returncode == 0
    assert any(call.startswith("deepspeed --log_level critical --num_gpus 2") for call in checkout.calls())


NUMBERS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_CPUS_PER_TASK")
COMMAND = "a[$(touch HIT)]"


@pytest.mark.parametrize("name", NUMBERS)
def test_a_command_in_a_variable_of_slurm_is_refused_and_not_executed(
    checkout: Checkout, hostfile: str, name: str
) -> None:
    done = checkout.launch("recipes/other.yaml", **({**SLURM, "SLURM_PROCID": "3"} | {name: COMMAND}))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"launch.sh: {name} is '{COMMAND}'; it must be a whole number such as 0 or 16\n"
    assert checkout.calls() == []
    assert not (checkout.elsewhere / "HIT").exists()


@pytest.mark.parametrize("value", ["08", "-1", "1.5", "1" * 30, "0x10", "1\n2"])
def test_a_number_of_slurm_that_bash_would_read_otherwise_is_refused(
    checkout: Checkout, hostfile: str, value: str
) -> None:
    done = checkout.launch("recipes/other.yaml", **SLURM | {"SLURM_STEP_NUM_TASKS": value}, SLURM_PROCID="3")
    assert (done.returncode, done.stderr.count("\n"), checkout.calls()) == (1, 1, [])
    assert "launch.sh: SLURM_STEP_NUM_TASKS is " in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        dict.fromkeys(NUMBERS[1:], COMMAND),  # SLURM_PROCID is not set: no task of SLURM
        dict.fromkeys((NUMBERS[1], *NUMBERS[3:]), COMMAND) | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        dict.fromkeys(("SECONDS", "GPU", "GROUP", "ASKED_AT", "STOPPED", "SAVE_SECONDS", "code", "ranks"), COMMAND),
    ],
)
def test_a_variable_that_is_not_used_is_neither_refused_nor_executed(
    checkout: Checkout, hostfile: str, environment: dict[str, str]
) -> None:
    done = checkout.launch("recipes/other.yaml", **environment)
    assert done.returncode == 0, done.stderr
    assert any(call.startswith("deepspeed --log_level critical --num_gpus 2") for call in checkout.calls())
    assert not (checkout.elsewhere / "HIT").exists()


def test_a_host_that_it_does_not_fit_on_ends_at_once_and_says_so(checkout: Checkout, hostfile: str) -> None:
    options = ["recipes/other.yaml", "--hostfile", "hosts", "--node-rank", "1"]
    done = checkout.launch(*options, PLAN_FAILS="yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"launch.sh: on {os.uname().nodename}: Does NOT fit: 9 GiB.\n"
    assert not any(call.startswith("deepspeed") for call in checkout.calls())


@pytest.mark.parametrize("options", [["--hostfile", "hosts", "--node-rank", "1"], []])
def test_a_host_that_is_not_set_up_is_told_not_set_up_by_all_at_once(checkout: Checkout, options: list[str]) -> None:
    (checkout.elsewhere / "hosts").write_text("node1 slots=2\n")
    done = checkout.launch("recipes/other.yaml", *options, **SLURM, SLURM_PROCID="3")
    assert done.returncode == 1
    assert f"launch.sh: on {os.uname().nodename}: {checkout.root} is not set up; run ./launch.sh setup" in done.stderr
    assert checkout.calls() == []


def test_a_host_stops_its_ranks_when_whoever_started_it_has_gone(checkout: Checkout, hostfile: str) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        ["bash", str(checkout.root / "launch.sh"), "--hostfile", "hosts", "--node-rank", "1", "--with-stdin"],
        env=checkout.environment | {"TRAINING": "hangs"},
        cwd=checkout.elsewhere,
        text=True,
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(reading)
    rank = pid_of_rank(checkout)
    time.sleep(0.5)
    assert is_running(rank)
    # Nobody reads what it says any more either, as when an ssh is gone.
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    os.close(writing)
    assert process.wait(timeout=60) == 143
    assert not is_running(rank)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_checks_run_in_order_and_pytest_has_the_last_word(checkout: Checkout) -> None:
    checkout.launch("test", "-x", "tests/test_model.py")
    assert [call for call in checkout.calls() if not call.startswith("python")] == [
        "ruff format --check .",
        "ruff check .",
        "mypy ",
        "mkdocs build --quiet --site-dir ROOT/.venv/site",
        "pytest -q -m not slow -x tests/test_model.py",
    ]
    checkout.launch("test", "--all")
    assert checkout.calls()[-1] == "pytest -q -n 2 --dist worksteal"
    checkout.launch("test", "--fast")
    assert not [call for call in checkout.calls() if call.startswith("pytest")]


def test_the_command_for_ci_is_the_one_for_people() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert "exec ./launch.sh test </dev/null" in script
    refused = subprocess.run(["bash", str(ROOT / ".ci/run"), "quick"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
