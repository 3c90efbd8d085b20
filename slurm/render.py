"""The batch script of a job, a pure function of its spec.

Lines that begin with `#SBATCH` are read by sbatch, which handles quotes and backslashes but expands nothing; all
others are read by bash. Each value is quoted for its reader.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from slurm.node import OTHER_NODES_S
from slurm.spec import FOREIGN, Element, JobSpec

PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,=-]+")
# The range in which a free port is searched, below those that Linux uses for outgoing connections.
FIRST_PORT, PORTS = 20000, 12000
IDLE_REQUEUES = 2  # consecutive requeues without a new step
PROBE_TIMEOUT_S = 60  # for every node of a failed step to respond


def render(spec: JobSpec) -> str:
    """The batch script of a job."""
    parts = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={sbatch_quoted(value)}"
          for name, value in options(spec)),
        f"# {_headline(spec)}. Written by `crosslift submit`.",
        _UNSET,
        *_setup(spec),
        *_values(spec),
        *_work(spec),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def sbatch_quoted(value: str) -> str:
    """A value as sbatch reads it from a `#SBATCH` line: in double quotes, with a backslash before `\\` and `"`."""
    if PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def options(spec: JobSpec) -> Iterator[tuple[str, str | None]]:
    """Options of sbatch as (name, value); the value of a switch is None."""
    chosen = spec.settings
    yield "job-name", spec.name
    yield "nodes", str(chosen.nodes if spec.kind == "train" else 1)  # other commands than training run on one node
    yield "ntasks-per-node", "1"  # a launcher, which starts the node's ranks
    if gpus := gpus_of(spec):
        yield "gpus-per-node", gpus
    for name, value in (
        ("cpus-per-task", chosen.cpus_per_task), ("mem", chosen.mem), ("time", chosen.time),
        ("partition", chosen.partition), ("account", chosen.account), ("qos", chosen.qos),
    ):  # fmt: skip
        if value is not None:
            yield name, str(value)
    if spec.array:
        limit = f"%{spec.array_limit}" if spec.array_limit else ""
        yield "array", f"0-{len(spec.elements) - 1}{limit}"
    if spec.after:
        # In an array, a command waits for the training of its own element only.
        kind = "aftercorr" if spec.kind == "command" and spec.array else "afterok"
        yield "dependency", ",".join(f"{kind}:{job}" for job in spec.after)
        yield "kill-on-invalid-dep", "yes"  # instead of waiting forever for a job that failed
    yield "chdir", str(spec.chdir)
    output = spec.output()
    yield "output", f"{str(output.parent).replace('%', '%%')}/{output.name}"  # no pattern in the folder's name
    yield "open-mode", "append"  # a requeued job continues the same file
    if spec.kind == "train":
        yield "requeue", None
        yield "signal", f"USR1@{chosen.grace}"  # to the steps; with B: it would go to this script only
    for name, option in chosen.sbatch.items():
        if option is True:
            yield name, None
        elif option is not False:
            yield name, str(option)


def gpus_of(spec: JobSpec) -> str | None:
    """GPUs of each node as Slurm's [TYPE:]NUMBER, one for other commands than training; None for no GPU."""
    settings = spec.settings
    if not settings.gpus:
        return None
    kind, _, number = (settings.gpus_per_node or "").rpartition(":")
    return ":".join(filter(None, (kind, number if spec.kind == "train" else "1")))


def _headline(spec: JobSpec) -> str:
    if spec.kind == "command":
        return f"crosslift {spec.elements[0].arguments[0]}"  # its other words might end the comment
    elements = f"{len(spec.elements)} runs, each on " if spec.array else ""
    nodes = f"{spec.settings.nodes} node{'s' if spec.settings.nodes > 1 else ''}"
    return f"Training: {elements}{nodes} with {spec.settings.ranks} rank{'s' if spec.settings.ranks > 1 else ''} each"


def _setup(spec: JobSpec) -> Iterator[str]:
    if spec.settings.setup:
        yield ""
        yield "# Setup lines of the site and the user; one that fails ends the job."
        yield "set -e -o pipefail"
        yield """trap 'echo "crosslift: setup: this line failed on $(hostname): $BASH_COMMAND" >&2; exit 2' ERR"""
        yield from spec.settings.setup
        yield "trap - ERR"
        yield "set +e"
    yield "set -u -o pipefail"


def _values(spec: JobSpec) -> Iterator[str]:
    yield ""
    yield "# What to run, and where."
    yield f"python={shlex.quote(spec.python)}"
    yield f"code={shlex.quote(str(spec.code))}"
    if spec.kind == "train":
        yield f"outcome={shlex.quote(str(spec.folder))}/outcome-$SLURM_JOB_ID"
        yield f"idle={shlex.quote(str(spec.folder))}/idle-$SLURM_JOB_ID"
    if spec.array:
        yield 'case "$SLURM_ARRAY_TASK_ID" in'
        for number, element in enumerate(spec.elements):
            yield f"{number}) " + "; ".join(_element(element)) + " ;;"
        yield "esac"
    else:
        yield from _element(spec.elements[0])
    for name, value in spec.settings.environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _element(element: Element) -> list[str]:
    readable = [word for path in element.readable for word in ("--readable", str(path))]
    return [
        f"run={shlex.quote(str(element.run_dir))}",
        f"readable=({shlex.join(readable)})",
        f"arguments=({shlex.join(element.arguments)})",
    ]


_UNSET = "\n".join([
    "# Variables of another job, launcher or MPI in the submitting shell; the lines below may set some again.",
    "unset " + " ".join(f'"${{!{prefix}@}}"' for prefix in FOREIGN),
])  # fmt: skip

_RENDEZVOUS = f"""
# The number of nodes may have been changed while the job was pending.
nodes=$SLURM_JOB_NUM_NODES
# The rendezvous of the nodes: a free port of the first one, on which this script runs.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))
while (: > "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done"""

_DEADLINE = """
# The number of an array's element. SLURM_JOB_ID of the last element is the number of the whole array.
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# The end of the time limit in seconds since 1970: ranks stop in time even if Slurm's signal is lost.
end=${SLURM_JOB_END_TIME:-$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$job" --format=%e 2> /dev/null)}
case "$end" in '' | *[!0-9]*) ;; *) export CROSSLIFT_DEADLINE=$end ;; esac"""


def _work(spec: JobSpec) -> list[str]:
    """The job step, which runs `node.py` on each node, and the handling of its end."""
    if spec.kind == "command":
        return ["", _step(spec)]
    return [
        _RENDEZVOUS, _DEADLINE, _STEP_BEGINS, f"{_step(spec)} &", _WAIT,
        _END.format(max_requeues=spec.settings.max_requeues, probe=_every_node(spec), probe_seconds=PROBE_TIMEOUT_S,
                    idle_requeues=IDLE_REQUEUES),
    ]  # fmt: skip


def _step(spec: JobSpec) -> str:
    settings = spec.settings
    words = ["srun", _every_node(spec), "--kill-on-bad-exit=1", "--export=ALL"]
    if settings.cpus_per_task:
        words.append(f"--cpus-per-task={settings.cpus_per_task}")  # since Slurm 22.05 a step does not inherit it
    if gpus := gpus_of(spec):
        words.append(f"--gpus-per-node={gpus}")
    if spec.kind == "train":
        node = [
            '--outcome="$outcome" --host="$host" --port="$port"',
            f'--nodes="$nodes" --nproc={settings.ranks}',
        ]
    else:
        node = ["--command"]
    lines = [
        " ".join([*words, *_container(spec)]),
        _PROGRAM,
        f'--code="$code" --run="$run" --chdir={shlex.quote(str(spec.chdir))}',
        *node,
        '"${readable[@]}" -- "${arguments[@]}"',
    ]
    return " \\\n  ".join(lines)


def _every_node(spec: JobSpec) -> str:
    nodes = '"$nodes"' if spec.kind == "train" else "1"
    return f"--nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"


_STEP_BEGINS = r"""
# This shell traps the signals that end a job, to handle the end of its step. Slurm itself signals the step's
# processes. ALRM comes from `crosslift cancel`, to this shell only: plain scancel gives ranks KillWait to save, and a
# TERM that reaches srun kills them at once. (A shell cannot trap HUP if slurmd was started with nohup.)
rm -f "$outcome"
# The last step in the run's record.
last_step() {
  sed -n 's/^.*"kind": "metrics", "step": \([0-9]*\),.*$/\1/p' "$run/record.jsonl" 2> /dev/null | sort -n | tail -n 1
}
before=$(last_step)
step= ended= cancelled= interrupted=
stop() { interrupted=1; if [ -n "$step" ]; then kill -USR1 "$step" 2> /dev/null; fi; }
trap 'ended=1 interrupted=1' TERM
trap 'stop' USR1 USR2
trap 'ended=1 cancelled=1; stop' ALRM"""

# Each node looks for its interpreter first, since Slurm's message about a missing one does not name it. The first node
# that ends with an error makes srun kill the others: it waits until they have printed their problems.
_PROGRAM = f"""bash -c '
    command -v "$1" > /dev/null && exec "$@"
    trap "exit 2" TERM
    echo "crosslift: node $SLURMD_NODENAME ($(hostname)): $1: no such python" >&2
    sleep {OTHER_NODES_S}
    exit 2' bash "$python" -u "$code/slurm/node.py\""""

_WAIT = """step=$!
if [ -n "$interrupted" ]; then stop; fi
status=127
while :; do
  interrupted=
  wait "$step"
  answer=$?
  if [ "$answer" != 127 ]; then status=$answer; fi
  if [ -z "$interrupted" ]; then break; fi
done"""

_END = """
# 75: stopped on request after a checkpoint. The job then requeues itself, unless it was ended on purpose (TERM here):
# by a user's scancel, or by Slurm, which requeues it itself. A time limit is not on purpose.
# 3: training is finished and its export kept, but the export failed its check; another start would not correct that.
# A failed node ends the step long before Slurm marks it as down (SlurmdTimeout); the job continues on other nodes.
again=
if [ "$(cat "$outcome" 2> /dev/null)" = 75 ]; then
  status=75
  if [ -z "$ended" ]; then
    again='stopped on request'
  elif scontrol show job "$job" | grep -q '^ *JobState=.* Reason=TimeLimit'; then
    again='stopped at its time limit'
  else
    echo "crosslift: job $job was ended by a user or by Slurm; it does not requeue itself"
  fi
elif [ -z "$ended" ] && [ "$status" != 0 ] && [ "$status" != 2 ] && [ "$status" != 3 ]; then
  if ! timeout -k 5 {probe_seconds} srun {probe} true && [ -z "$ended" ]; then again='lost a node'; fi
fi
if [ -n "$again" ]; then
  restarts=${{SLURM_RESTART_COUNT:-0}}
  # Consecutive starts without a new step: the next one would be stopped as well.
  starts=0
  if [ "$(last_step)" = "$before" ]; then starts=$(($(cat "$idle" 2> /dev/null || echo 0) + 1)); fi
  echo "$starts" > "$idle"
  if [ "$restarts" -ge {max_requeues} ]; then
    echo "crosslift: job $job $again, all {max_requeues} requeues (max_requeues) are used; the same command resumes" >&2
  elif [ "$starts" -gt {idle_requeues} ]; then
    echo "crosslift: job $job $again; {idle_requeues} requeues made no new step (still at ${{before:-0}}), so \
it is not requeued: see above what stops it; the same command resumes" >&2
  elif scontrol requeue "$job"; then
    echo "crosslift: job $job $again and is requeued ($((restarts + 1)) of at most {max_requeues})"
  else
    echo "crosslift: job $job $again, but cannot be requeued here; the same command resumes" >&2
  fi
fi
if [ -n "$cancelled" ] && [ "$status" != 0 ]; then scancel "$job"; fi  # Slurm shows it as cancelled, not as failed
rm -f "$outcome"
if [ -z "$again" ]; then rm -f "$idle"; fi
exit "$status\""""


def _container(spec: JobSpec) -> list[str]:
    """Words before `node.py`'s command: options of srun, or the container's program."""
    container = spec.settings.container
    if container is None:
        return []
    folders = dict.fromkeys(str(path) for path in (spec.chdir, spec.folder, *(each.run_dir for each in spec.elements)))
    mounts = [*(f"{folder}:{folder}" for folder in folders), *container.mounts]
    if container.command == ("srun",):
        chosen = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
    else:
        bound = [word for mount in mounts for word in ("--bind", mount)]
        chosen = [*container.command, *bound, container.image]
    return [shlex.quote(word) for word in chosen]
