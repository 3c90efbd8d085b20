"""A job's batch script: readable text, a pure function of its spec.

In: JobSpec. Out: the text that `sbatch` gets. Next: `submit.py`.

Two grammars meet here. Lines that begin with `#SBATCH` are read by sbatch, which knows quotes and backslashes but
expands nothing; all others are bash's. Each value is quoted for whoever reads it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from slurm.node import OTHERS_SPEAK_SECONDS
from slurm.spec import FOREIGN, Element, JobSpec

PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,=-]+")
# Free ports are looked for from here on: below those that Linux gives to outgoing connections.
FIRST_PORT, PORTS = 20000, 12000
IDLE_REQUEUES = 2  # in a row that may bring no new step
PROBE_SECONDS = 60  # in which every node of a failed step must answer


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
    """Options of sbatch: (name, value), without a value for a switch."""
    chosen = spec.settings
    yield "job-name", spec.name
    yield "nodes", str(chosen.nodes if spec.kind == "train" else 1)  # a command other than training runs on one
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
        kind = "aftercorr" if spec.elementwise else "afterok"
        yield "dependency", ",".join(f"{kind}:{job}" for job in spec.after)
        yield "kill-on-invalid-dep", "yes"  # instead of waiting for ever for a job that failed
    yield "chdir", str(spec.chdir)
    yield "output", slurm_file(spec)
    yield "open-mode", "append"  # a requeued job goes on in the same file
    if spec.kind == "train":
        yield "requeue", None
        yield "signal", f"USR1@{chosen.grace}"  # to the steps; without B:, which would be this script alone
    for name, option in chosen.sbatch.items():
        if option is True:
            yield name, None
        elif option is not False:
            yield name, str(option)


def slurm_file(spec: JobSpec) -> str:
    """The output file's pattern, with `%` doubled where it is a letter of the folder's name."""
    path = spec.output()
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"


def gpus_of(spec: JobSpec) -> str | None:
    """GPUs of each node as Slurm's [TYPE:]NUMBER; a command other than training uses one. None: no GPU."""
    settings = spec.settings
    if not settings.gpus:
        return None
    kind, _, number = (settings.gpus_per_node or "").rpartition(":")
    return ":".join(filter(None, (kind, number if spec.kind == "train" else "1")))


def _headline(spec: JobSpec) -> str:
    if spec.kind == "command":
        return f"crosslift {spec.elements[0].arguments[0]}"  # its other words could end the comment
    elements = f"{len(spec.elements)} runs, each on " if spec.array else ""
    nodes = f"{spec.settings.nodes} node{'s' if spec.settings.nodes > 1 else ''}"
    return f"Training: {elements}{nodes} with {spec.settings.ranks} rank{'s' if spec.settings.ranks > 1 else ''} each"


def _setup(spec: JobSpec) -> Iterator[str]:
    if spec.settings.setup:
        yield ""
        yield "# The site's and the user's setup lines; one that fails ends the job."
        yield "set -e -o pipefail"
        yield """trap 'echo "crosslift: setup: this line failed on $(hostname): $BASH_COMMAND" >&2; exit 2' ERR"""
        yield from spec.settings.setup
        yield "trap - ERR"
        yield "set +e"
    yield "set -u -o pipefail"


def _values(spec: JobSpec) -> Iterator[str]:
    yield ""
    yield "# What runs, and where."
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
    "# What the submitting shell may have from another job, launcher or MPI; the lines below may set it anew.",
    "unset " + " ".join(f'"${{!{prefix}@}}"' for prefix in FOREIGN),
])  # fmt: skip

_MEETING = f"""
# As many nodes as the job really has: while it was pending, somebody may have given it another number.
nodes=$SLURM_JOB_NUM_NODES
# Where the nodes meet: on the first one, where this script runs, at a port that nobody listens on.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))
while (: > "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done"""

_DEADLINE = """
# An element of an array has a number of its own; that of the last one alone would mean the whole array.
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# When the time limit ends the job, in seconds since 1970; ranks stop in time even if Slurm's signal is lost.
end=${SLURM_JOB_END_TIME:-$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$job" --format=%e 2> /dev/null)}
case "$end" in '' | *[!0-9]*) ;; *) export CROSSLIFT_DEADLINE=$end ;; esac"""


def _work(spec: JobSpec) -> list[str]:
    """The step, which is the node's program on each node, and what comes of its end."""
    if spec.kind == "command":
        return ["", _step(spec)]
    return [
        _MEETING, _DEADLINE, _STEP_BEGINS, f"{_step(spec)} &", _WAIT,
        _END.format(max_requeues=spec.settings.max_requeues, probe=_every_node(spec), probe_seconds=PROBE_SECONDS,
                    idle_requeues=IDLE_REQUEUES),
    ]  # fmt: skip


def _step(spec: JobSpec) -> str:
    settings = spec.settings
    words = ["srun", _every_node(spec), "--kill-on-bad-exit=1", "--export=ALL"]
    if settings.cpus_per_task:
        words.append(f"--cpus-per-task={settings.cpus_per_task}")  # since Slurm 22.05 a step does not take it over
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
# This shell outlives the signals that end a job, to see how its step ended. Slurm signals the step's processes itself.
# ALRM is `crosslift cancel`, for this shell alone: plain scancel gives ranks KillWait to save, and a TERM that reaches
# srun has them killed at once. (A shell cannot trap HUP where slurmd was started with nohup.)
rm -f "$outcome"
# The last step in the run's record: how far it has ever come.
last_step() {
  sed -n 's/^.*"kind": "metrics", "step": \([0-9]*\),.*$/\1/p' "$run/record.jsonl" 2> /dev/null | sort -n | tail -n 1
}
before=$(last_step)
step= ended= cancelled= interrupted=
stop() { interrupted=1; if [ -n "$step" ]; then kill -USR1 "$step" 2> /dev/null; fi; }
trap 'ended=1 interrupted=1' TERM
trap 'stop' USR1 USR2
trap 'ended=1 cancelled=1; stop' ALRM"""

# Each node looks for its own interpreter first: Slurm's own message about a missing one does not help. The first node
# that ends with an error has the others killed: it waits until they have said what they lack, and all end alike.
_PROGRAM = f"""bash -c '
    command -v "$1" > /dev/null && exec "$@"
    trap "exit 2" TERM
    echo "crosslift: node $SLURMD_NODENAME ($(hostname)): $1: no such python" >&2
    sleep {OTHERS_SPEAK_SECONDS}
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
# 75: stopped on request, all that was done is saved. Then the job goes on by itself, unless whoever ended it (TERM
# here) meant that: a user's scancel, or Slurm, which requeues by itself. A time limit is nobody's wish.
# 3: training is finished and its export kept, but the export did not pass its check; to go on would not mend it.
# A dead node ends the step long before Slurm calls it dead (SlurmdTimeout); then, too, the job goes on elsewhere.
again=
if [ "$(cat "$outcome" 2> /dev/null)" = 75 ]; then
  status=75
  if [ -z "$ended" ]; then
    again='stopped on request'
  elif scontrol show job "$job" | grep -q '^ *JobState=.* Reason=TimeLimit'; then
    again='stopped at its time limit'
  else
    echo "crosslift: job $job was ended from outside; it does not requeue itself"
  fi
elif [ -z "$ended" ] && [ "$status" != 0 ] && [ "$status" != 2 ] && [ "$status" != 3 ]; then
  if ! timeout -k 5 {probe_seconds} srun {probe} true && [ -z "$ended" ]; then again='lost a node'; fi
fi
if [ -n "$again" ]; then
  restarts=${{SLURM_RESTART_COUNT:-0}}
  # Starts in a row that have brought no new step: whatever stops them would stop the next one too.
  starts=0
  if [ "$(last_step)" = "$before" ]; then starts=$(($(cat "$idle" 2> /dev/null || echo 0) + 1)); fi
  echo "$starts" > "$idle"
  if [ "$restarts" -ge {max_requeues} ]; then
    echo "crosslift: job $job $again, {max_requeues} requeues (max_requeues) are used up; the same command goes on" >&2
  elif [ "$starts" -gt {idle_requeues} ]; then
    echo "crosslift: job $job $again; {idle_requeues} requeues have brought no new step (still at ${{before:-0}}), so \
it is not requeued: see above what stops it; the same command goes on" >&2
  elif scontrol requeue "$job"; then
    echo "crosslift: job $job $again and is requeued ($((restarts + 1)) of at most {max_requeues})"
  else
    echo "crosslift: job $job $again, but cannot be requeued here; the same command goes on" >&2
  fi
fi
if [ -n "$cancelled" ] && [ "$status" != 0 ]; then scancel "$job"; fi  # so that Slurm calls it that, and not failed
rm -f "$outcome"
if [ -z "$again" ]; then rm -f "$idle"; fi
exit "$status\""""


def _container(spec: JobSpec) -> list[str]:
    """Words before the node's program: options of srun, or the container's own program."""
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
