#!/usr/bin/env bash
# Sets up .venv in this checkout, then runs the main job, another recipe, or the tests. `./launch.sh --help` says how.
set -euo pipefail

ROOT=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
VENV=$ROOT/.venv
# Two lines, written last: which Python and folder .venv was made for, and what was installed into it. "unfinished" until
# then, so that an interrupted set-up is seen and made anew.
STAMP=$VENV/set-up
LOG=$VENV/setup.log
TORCH_WITHOUT_GPU=torch==2.13.0
PORT_OF_HOSTS=29500 # where the ranks of several hosts meet, on the first of them
GPU=                # "yes" on a machine with an NVIDIA GPU
GROUP=              # process group of the launcher and its ranks while they run
STOPPED=3           # exit code of `finetune finished` for a run that saved and stopped because it was asked to
SAVE_SECONDS=600    # that ranks asked to stop may take for the step they are in and their checkpoint
ASKED_AT=           # SECONDS when they were asked
OVERRIDES=()        # --set key=value ... of the command line
# The other options of a job, "" when not given; as usage says.
HOSTFILE= NODE_RANK= MASTER_ADDR_GIVEN= MASTER_PORT_GIVEN=
WITH_STDIN= # "yes": the job ends when standard input does, that is when whoever started it has gone

usage() {
  cat <<'HELP'
Nextune: fine-tune Qwen3-Next and Qwen3-Coder-Next.

  ./launch.sh [--set key=value ...]              set up, then run the embedded default (recipes/tiny.yaml)
  ./launch.sh RECIPE.yaml [--set key=value ...]  set up, then plan and run that recipe
  ./launch.sh RECIPE.yaml --hostfile HOSTS ...   the same over the hosts of a file (lines of NAME slots=N), by ssh
  ./launch.sh RECIPE.yaml --hostfile HOSTS --node-rank I ...
                                                 the same without ssh: type it on every host, I its line from 0
  srun ... ./launch.sh RECIPE.yaml ...           the same under SLURM: every task is a rank
  ./launch.sh test [--fast|--all] [pytest ...]   set up with the development tools, then format, lint, types and tests
                                                 (--fast stops before the tests, --all adds the slow ones)
  ./launch.sh docs                               build the documentation site into site/; a warning is an error
  ./launch.sh setup                              only set up
  ./launch.sh --help                             this text

The set-up makes .venv in this checkout with Python 3.11 or newer (PYTHON=/path/to/python picks one); it is done once.
A job that was stopped continues when the same command is given again, on fewer hosts too. Over several hosts
(docs/multi-node.md) the ranks meet at the first one; --master-addr and --master-port say where else.
HELP
}

say() { printf '%s\n' "$*"; }
complain() { printf 'launch.sh: %s\n' "$*" >&2 || true; } # nobody may be listening any more; what follows matters
fail() {
  complain "$@"
  exit 1
}

main() {
  local recipe=$ROOT/recipes/tiny.yaml
  if nvidia-smi -L >/dev/null 2>&1; then GPU=yes; fi
  case ${1:-} in
    -h | --help)
      usage
      return
      ;;
    setup)
      [[ $# -eq 1 ]] || fail "setup takes no arguments, but got: ${*:2}"
      set_up run
      return
      ;;
    test)
      set_up dev
      run_tests "${@:2}"
      return
      ;;
    docs)
      [[ $# -eq 1 ]] || fail "docs takes no arguments, but got: ${*:2}"
      set_up dev
      build_docs "$ROOT/site"
      say "The documentation is in site/index.html."
      return
      ;;
    *.yaml | *.yml)
      recipe=$1
      shift
      if [[ ! -f $recipe && -f $ROOT/$recipe ]]; then recipe=$ROOT/$recipe; fi
      [[ -f $recipe ]] || fail "no recipe $recipe, neither here nor in $ROOT"
      ;;
    "" | --*) ;;
    *) fail "'$1' is neither a command (setup, test, docs) nor a recipe (a .yaml file); ./launch.sh --help lists what is" ;;
  esac
  read_options "$@"
  [[ -n $HOSTFILE ]] || require_slurm_numbers
  if [[ -n $HOSTFILE && -z $NODE_RANK ]]; then
    set_up run
    lead_hosts "$recipe"
  elif [[ -n $HOSTFILE ]] || is_slurm_task; then
    require_set_up # many at once would make it over each other
  else
    set_up run
  fi
  run_job "$recipe"
}

read_options() { # what follows the recipe
  while [[ $# -gt 0 ]]; do
    case $1 in
      --set=*=*)
        OVERRIDES+=("$1")
        shift
        continue
        ;;
      --with-stdin)
        WITH_STDIN=yes
        shift
        continue
        ;;
      --set) [[ ${2:-} == *=* ]] || fail "--set wants key=value, such as --set optim.lr=1e-4, but got '${2:-nothing}'" ;;
      --hostfile | --node-rank | --master-addr | --master-port)
        [[ -n ${2:-} && $2 != --* ]] || fail "$1 wants a value, but got '${2:-nothing}'"
        ;;
      *) fail "after the recipe come --set key=value and --hostfile FILE, but got '$1'; ./launch.sh --help lists all" ;;
    esac
    case $1 in
      --set) OVERRIDES+=("$1" "$2") ;;
      --hostfile) HOSTFILE=$(readlink -f "$2") || fail "no hostfile $2" ;;
      --node-rank) NODE_RANK=$2 ;;
      --master-addr) MASTER_ADDR_GIVEN=$2 ;;
      --master-port) MASTER_PORT_GIVEN=$2 ;;
    esac
    shift 2
  done
  [[ -z $NODE_RANK ]] || require_number --node-rank "$NODE_RANK"
  [[ -z $MASTER_PORT_GIVEN ]] || require_number --master-port "$MASTER_PORT_GIVEN"
  [[ -n $HOSTFILE || -z $NODE_RANK$MASTER_ADDR_GIVEN$MASTER_PORT_GIVEN ]] \
    || fail "--node-rank, --master-addr and --master-port go with --hostfile FILE"
}

# Bash executes a command inside a value that it compares as a number, so no value of the environment or the command line
# is compared before this.
require_number() { # the name of a value, the value
  [[ $2 =~ ^(0|[123456789][0123456789]{0,8})$ ]] || fail "$1 is ${2@Q}; it must be a whole number such as 0 or 16"
}

require_slurm_numbers() { # those variables of SLURM that this script reads as numbers
  local name
  [[ -n ${SLURM_PROCID:-} ]] || return 0
  require_number SLURM_STEP_NUM_TASKS "${SLURM_STEP_NUM_TASKS:-1}"
  is_slurm_task || return 0
  for name in SLURM_PROCID SLURM_STEP_NUM_NODES; do require_number "$name" "${!name:-}"; done
  require_number SLURM_LOCALID "${SLURM_LOCALID:-0}"
  require_number SLURM_CPUS_PER_TASK "${SLURM_CPUS_PER_TASK:-1}"
}

is_slurm_task() { # srun started this as one of several tasks; a batch script, or srun --pty bash, is none
  [[ -n ${SLURM_PROCID:-} && ${SLURM_STEP_NUM_TASKS:-1} -gt 1 ]]
}

leads() { # whether this process speaks for the job: the only one, that of the first host, or SLURM's first task
  if [[ -n $HOSTFILE ]]; then
    [[ $NODE_RANK == 0 ]]
  elif is_slurm_task; then
    [[ $SLURM_PROCID == 0 ]]
  fi
}

# The set-up.

set_up() { # run|dev
  local extras=$1 made installed
  if command -v flock >/dev/null; then
    exec 9<"$ROOT" # two launches at once: the second waits here, then finds the work done
    flock 9
  fi
  made=$(sed -n 1p "$STAMP" 2>/dev/null) || made=
  installed=$(sed -n 2p "$STAMP" 2>/dev/null) || installed=
  if [[ $installed == *" dev" ]]; then extras=dev; fi
  if [[ $made == "$(identity)" && $installed == "$(contents "$extras")" ]]; then
    say "Set-up: .venv is up to date."
  else
    if [[ $made != "$(identity)" ]]; then make_venv; fi
    if [[ $extras == dev ]]; then
      pip_install "the dependencies and the development tools" -e "${ROOT}[dev]"
    else
      pip_install "the dependencies" -e "$ROOT"
    fi
    write_stamp "$(identity)" "$(contents "$extras")"
    say "Set-up: done."
  fi
  exec 9<&-
}

require_set_up() {
  local installed
  installed=$(sed -n 2p "$STAMP" 2>/dev/null) || installed=
  [[ $(sed -n 1p "$STAMP" 2>/dev/null) == "$(identity)" && $installed =~ ^("$(contents run)"|"$(contents dev)")$ ]] \
    || fail "on $(uname -n): $ROOT is not set up; run ./launch.sh setup there first (under SLURM, for a checkout that" \
      "all nodes share: srun -N1 -n1 ./launch.sh setup)"
}

identity() { # the .venv that is here; not what the stamp says when it was moved or PYTHON now asks for another
  local version
  version=$("$VENV/bin/python" -c 'import platform; print(platform.python_version())' 2>/dev/null) || version=none
  if [[ -n ${PYTHON:-} && $version != "$(usable "$PYTHON")" ]]; then version="other than $PYTHON"; fi
  printf 'python %s in %s' "$version" "$VENV"
}

contents() { # run|dev: what is to be in .venv
  local sum
  sum=$({ cat "$ROOT/pyproject.toml" && printf '%s' "$TORCH_WITHOUT_GPU"; } | sha256sum)
  printf '%s %s' "${sum%% *}" "$1"
}

write_stamp() {
  printf '%s\n' "$@" >"$STAMP.tmp"
  mv "$STAMP.tmp" "$STAMP"
}

make_venv() {
  local python options=()
  if [[ ! -e $STAMP && -n $(find "$VENV" -mindepth 1 ! -path "$STAMP.tmp" -print -quit 2>/dev/null) ]]; then
    fail "$VENV was not made by launch.sh; move it away, then run this command again"
  fi
  find_python
  mkdir -p "$VENV"
  write_stamp unfinished
  find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$STAMP" -exec rm -rf {} +
  if [[ -n $GPU ]] && has_cuda_torch "$python"; then options=(--system-site-packages); fi
  say "Set-up: making .venv with $python (Python $(usable "$python")); the log is $LOG"
  if ! "$python" -m venv "${options[@]}" "$VENV" >>"$LOG" 2>&1 </dev/null; then
    tail -n 15 "$LOG" >&2
    fail "$python could not make a virtual environment in $VENV; set PYTHON to another Python 3.11 or newer"
  fi
  if [[ ${#options[@]} -gt 0 ]]; then
    say "Set-up: keeping the CUDA torch that $python has"
  elif [[ -n $GPU ]]; then
    pip_install "torch for the GPU" torch
  else
    pip_install "$TORCH_WITHOUT_GPU" "$TORCH_WITHOUT_GPU"
  fi
}

pip_install() { # what it is in plain words, then pip's arguments
  say "Set-up: installing $1 (a minute or more)"
  printf '\npip install %s\n' "${*:2}" >>"$LOG"
  if ! "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "${@:2}" \
    >>"$LOG" 2>&1 </dev/null; then
    tail -n 15 "$LOG" >&2
    fail "pip could not install $1; the end of its output is above, all of it in $LOG; mend that and run this again"
  fi
}

find_python() { # sets `python` of the caller
  local candidate tried=() candidates=(python3.11 python3.12 python3.13 python3.14 python3 python)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  python=
  for candidate in "${candidates[@]}"; do
    candidate=$(command -v "$candidate") || continue
    if [[ $candidate == "$VENV"/* || -z $(usable "$candidate") ]]; then
      tried+=("$candidate")
    elif [[ -z $python ]] || { [[ -n $GPU ]] && has_cuda_torch "$candidate" && ! has_cuda_torch "$python"; }; then
      python=$candidate
    fi
  done
  [[ -z $python ]] || return 0
  [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer that can make virtual environments"
  fail "found no Python 3.11 or newer that can make virtual environments (looked at: ${tried[*]:-nothing});" \
    "install python3.11 with its venv module, or set PYTHON to one"
}

usable() { # a Python: prints its version if it is new enough and has the venv module whole, else nothing
  "$1" -c 'import ensurepip, platform, sys, venv
if sys.version_info >= (3, 11): print(platform.python_version())' 2>/dev/null || true
}

has_cuda_torch() { # a Python: whether --system-site-packages would hand on a torch that uses the GPU
  "$1" -c 'import sys, torch
sys.exit(sys.prefix != sys.base_prefix or torch.version.cuda is None)' 2>/dev/null
}

# A job.

lead_hosts() { # the recipe: this same script on every host, each of which then knows which one it is
  local command=(bash "$ROOT/launch.sh" "$(readlink -f "$1")" "${OVERRIDES[@]}" --hostfile "$HOSTFILE" --with-stdin)
  if [[ -n $MASTER_ADDR_GIVEN ]]; then command+=(--master-addr "$MASTER_ADDR_GIVEN"); fi
  if [[ -n $MASTER_PORT_GIVEN ]]; then command+=(--master-port "$MASTER_PORT_GIVEN"); fi
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  exec python -P -m finetune across "$HOSTFILE" "${command[@]}"
}

run_job() { # the recipe
  local job run ranks nodes here first merged model=() shape=() code=0
  job=(--recipe "$1" "${OVERRIDES[@]}")
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV TOKENIZERS_PARALLELISM=false
  if [[ -z $GPU || -z ${CUDA_VISIBLE_DEVICES-all} ]]; then export DS_ACCELERATOR=cpu; fi
  if [[ -n $WITH_STDIN ]]; then end_with_stdin; fi
  if [[ -n $HOSTFILE ]]; then
    first=$(finetune hosts "$HOSTFILE" --node-rank "$NODE_RANK")
    read -r ranks nodes here first <<<"$first"
    require_number "the number of ranks on this host" "$here"
    shape=(--ranks "$ranks" --nodes "$nodes")
  elif is_slurm_task; then
    shape=(--ranks "$SLURM_STEP_NUM_TASKS" --nodes "$SLURM_STEP_NUM_NODES")
  else
    ranks=$(finetune ranks "${job[@]}")
    require_number "the number of ranks that the recipe gives" "$ranks"
  fi
  run=$(finetune finished "${job[@]}" 2>/dev/null) || code=$?
  if [[ $code -eq 0 ]]; then
    leads || return 0
    say "This job is complete already."
  else
    if [[ $code -eq $STOPPED ]] && leads; then rm -f "$run/stopped.json"; fi # says nothing about this start
    plan_job "${job[@]}" "${shape[@]}"
    if [[ -n $HOSTFILE ]]; then
      train "$here" "${job[@]}" -- --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" \
        --master_addr "${MASTER_ADDR_GIVEN:-$first}" --master_port "${MASTER_PORT_GIVEN:-$PORT_OF_HOSTS}"
    elif is_slurm_task; then
      train_task "${job[@]}"
    else
      train "$ranks" "${job[@]}"
    fi
    leads || return 0 # the first host says whether the run is complete
    code=0
    run=$(finetune finished "${job[@]}") || code=$?
    if [[ $code -eq $STOPPED ]]; then leave_stopped; fi
    [[ $code -eq 0 ]] || fail "the training ended, but its run is not complete; the same command continues it from its" \
      "last checkpoint"
  fi
  if [[ $1 -ef $ROOT/recipes/tiny.yaml ]]; then
    # A place of its own. What lies there is replaced where its mark says launch.sh, and kept where it is of this step.
    merged=$run/merged-by-launch
    finetune export "$run" --to "$merged" --format merged --written-by launch.sh
    if [[ -e $merged/nextune-export.json ]]; then model=(--model "$merged"); fi
  fi
  finetune summary "$run" "${model[@]}"
}

finetune() { # PYTHONPATH and -P: our packages come from this checkout, never from the folder the user stands in
  PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} python -P -m finetune "$@"
}

plan_job() { # the job: every host for itself, since none may wait for one on which it does not fit
  local out code=0
  if leads; then
    finetune plan "$@"
  else
    out=$(finetune plan "$@" 2>&1) || code=$?
    if [[ $code -ne 0 ]]; then
      if [[ -n $HOSTFILE || ${SLURM_LOCALID:-0} == 0 ]]; then
        complain "on $(uname -n): $(grep -E 'NOT fit|^nextune' <<<"$out" || printf '%s' "$out")"
      fi
      exit "$code"
    fi
  fi
}

end_with_stdin() { # a process that ends this one as a signal would, when its standard input ends
  trap '' PIPE # who gave it may have gone, and what reads our output with it; there are ranks to stop all the same
  exec 8<&0
  { while read -r -u 8; do :; done && kill -TERM $$; } </dev/null >/dev/null 2>&1 &
  trap "kill $! 2>/dev/null || true" EXIT
  exec 8<&- </dev/null
}

train() { # number of ranks here, then the job; for several hosts also --, and what the launcher is to be told of them
  local ranks=$1 job=() where=() code=0 cores
  shift
  while [[ $# -gt 0 && $1 != -- ]]; do
    job+=("$1")
    shift
  done
  cores=$(nproc)
  require_number "the number of cores" "$cores"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
  if [[ $# -gt 0 ]]; then
    where=("${@:2}")
    say "Training on host $NODE_RANK, $ranks rank(s): deepspeed ${where[*]} finetune/train.py ${job[*]}"
  else
    # The launcher takes the GPUs that CUDA_VISIBLE_DEVICES names only when it is not told a number.
    if [[ ${DS_ACCELERATOR:-} == cpu || -z ${CUDA_VISIBLE_DEVICES:-} ]]; then where=(--num_gpus "$ranks"); fi
    where+=(--master_port "$(free_port)")
    say "Training on $ranks rank(s): deepspeed ${where[*]} finetune/train.py ${job[*]}"
  fi
  trap 'stop_training INT 130' INT
  trap 'stop_training TERM 143' TERM HUP
  trap 'stop_training USR1 138' USR1
  set -m # the launcher and its ranks get a process group of their own
  # Without its own lines: when a rank fails it prints the whole command line, and what the rank said is enough.
  # The ranks end when one of these two processes is gone; the runner keeps the id of the shell that it replaces.
  NEXTUNE_STARTERS="$$ $BASHPID" exec deepspeed --log_level critical "${where[@]}" "$ROOT/finetune/train.py" "${job[@]}" </dev/null &
  GROUP=$!
  set +m
  wait "$GROUP" || code=$?
  trap - INT TERM HUP USR1
  # When one of its two processes is killed, the launcher leaves the ranks running, and may even end with code 0.
  if group_lives; then
    complain "the launcher ended and left ranks behind; stopping them"
    end_group
    code=$((code ? code : 1))
  fi
  report_end "$code" "${job[@]}"
}

train_task() { # the job, on one rank that SLURM started
  local code=0
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}; fi
  if leads; then
    say "Training on $SLURM_STEP_NUM_TASKS ranks that SLURM started: finetune/train.py $*"
  fi
  # SLURM signals every process of a task, the rank too, which saves and ends; here it is only waited for.
  trap : INT TERM HUP USR1
  NEXTUNE_STARTERS=$$ python "$ROOT/finetune/train.py" "$@" </dev/null || code=$?
  trap - INT TERM HUP USR1
  report_end "$code" "$@"
}

report_end() { # the exit code of the training, the job; leaves with it unless it is 0
  if [[ $1 -ne 0 ]]; then
    leave_if_stopped "${@:2}" # the launcher's code is not that of ranks which ended in order
    complain "the training stopped with exit code $1; the same command continues it from its last checkpoint"
    exit "$1"
  fi
}

leave_if_stopped() { # the job: exit code 0 if its run saved and stopped in order
  local code=0
  finetune finished "$@" >/dev/null 2>&1 || code=$?
  if [[ $code -eq $STOPPED ]]; then leave_stopped; fi
}

leave_stopped() {
  if leads; then say "Stopped in order, resumable: the same command continues the training where it stopped."; fi
  exit 0
}

stop_training() { # the signal's name, the exit code to leave with when the ranks did not stop in order
  ASKED_AT=$SECONDS
  trap stop_at_once INT TERM HUP USR1
  complain "got SIG$1; the ranks save and stop, within $((SAVE_SECONDS / 60)) minutes (again: at once)"
  end_group
  # A list of commands must not go on after Ctrl-C as if this one had done its work.
  if [[ $1 != INT ]]; then leave_if_stopped "${job[@]}"; fi
  complain "stopped; the same command continues the training from its last checkpoint"
  exit "$2"
}

stop_at_once() { # asked twice, unless the second is the first by another way: `timeout` signals child and group
  if ((SECONDS - ASKED_AT < 2)); then return; fi
  kill -KILL -- "-$GROUP" 2>/dev/null || true
  complain "stopped at once; the same command continues the training from its last checkpoint"
  exit 130
}

end_group() { # the ranks save and end; then TERM to what is left, and KILL to what is still there after 10 seconds
  local since=$SECONDS told=0 tenths
  # DeepSpeed's launcher would hand on a signal as a second one, and kill the ranks 30 seconds later. They notice when
  # it is gone, and save; TERM is for one that is not training yet.
  signal_members KILL deepspeed.launcher.launch
  signal_members TERM --local_rank=
  while [[ -n $(members --local_rank=) ]] && ((SECONDS - since < SAVE_SECONDS)); do
    if ((SECONDS - since >= told + 30)); then
      told=$((SECONDS - since))
      complain "the ranks have not ended yet, $told s after they were asked to; killed after $SAVE_SECONDS s"
    fi
    sleep 0.2
  done
  kill -TERM -- "-$GROUP" 2>/dev/null || return 0
  for ((tenths = 0; tenths < 100; tenths++)); do
    group_lives || return 0
    sleep 0.1
  done
  kill -KILL -- "-$GROUP" 2>/dev/null || true
}

signal_members() { # the signal, and what a word of their command line starts with
  local member
  for member in $(members "$2"); do kill "-$1" "$member" 2>/dev/null || true; done
}

group_lives() { # whether a process of the group runs
  [[ -n $(members) ]]
}

members() { # ids of the group's processes, with a word of their command line that starts with $1 when it is given
  local path stat words
  for path in /proc/[0-9]*/stat; do
    read -r stat 2>/dev/null <"$path" || continue
    read -r -a stat <<<"${stat##*) }" # state, parent, group
    # A zombie that nobody collects does not count.
    if [[ ${stat[2]} != "$GROUP" || ${stat[0]} == Z ]]; then continue; fi
    path=${path%/stat}
    if [[ -n ${1:-} ]]; then
      mapfile -d '' -t words 2>/dev/null <"$path/cmdline" || continue
      [[ " ${words[*]}" == *" $1"* ]] || continue
    fi
    printf '%s\n' "${path#/proc/}"
  done
}

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The tests.

run_tests() { # --fast|--all, then pytest's arguments
  local which=(-m "not slow") parallel=()
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  cd "$ROOT"
  ruff format --check .
  ruff check .
  mypy
  build_docs "$VENV/site"
  case ${1:-} in
    --fast) return ;;
    --all)
      which=()
      shift
      ;;
  esac
  # Whoever names tests debugs them, one after the other; the whole suite takes two processes, as many as CI has cores.
  if [[ $# -eq 0 ]]; then parallel=(-n 2 --dist worksteal); fi
  exec pytest -q "${which[@]}" "${parallel[@]}" "$@"
}

build_docs() { # the folder to write; quiet but for warnings, which end it
  (cd "$ROOT" && NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true "$VENV/bin/mkdocs" build --quiet --site-dir "$1")
}

main "$@"
