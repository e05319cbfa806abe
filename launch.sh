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
GPU=   # "yes" on a machine with an NVIDIA GPU
GROUP= # process group of the launcher and its ranks while they run

usage() {
  cat <<'HELP'
Nextune: fine-tune Qwen3-Next and Qwen3-Coder-Next.

  ./launch.sh [--set key=value ...]              set up, then run the embedded default (recipes/tiny.yaml)
  ./launch.sh RECIPE.yaml [--set key=value ...]  set up, then plan and run that recipe
  ./launch.sh test [--fast|--all] [pytest ...]   set up with the development tools, then format, lint, types and tests
                                                 (--fast stops before the tests, --all adds the slow ones)
  ./launch.sh setup                              only set up
  ./launch.sh --help                             this text

The set-up makes .venv in this checkout with Python 3.11 or newer (PYTHON=/path/to/python picks one); it is done once.
A job that was stopped continues when the same command is given again.
HELP
}

say() { printf '%s\n' "$*"; }
complain() { printf 'launch.sh: %s\n' "$*" >&2; }
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
    *.yaml | *.yml)
      recipe=$1
      shift
      if [[ ! -f $recipe && -f $ROOT/$recipe ]]; then recipe=$ROOT/$recipe; fi
      [[ -f $recipe ]] || fail "no recipe $recipe, neither here nor in $ROOT"
      ;;
    "" | --set | --set=*) ;;
    *) fail "'$1' is neither a command (setup, test) nor a recipe (a .yaml file); ./launch.sh --help lists what is" ;;
  esac
  refuse_other_than_overrides "$@"
  set_up run
  run_job "$recipe" "$@"
}

refuse_other_than_overrides() { # what follows the recipe
  while [[ $# -gt 0 ]]; do
    case $1 in
      --set=*=*) shift ;;
      --set)
        [[ ${2:-} == *=* ]] || fail "--set wants key=value, such as --set optim.lr=1e-4, but got '${2:-nothing}'"
        shift 2
        ;;
      *) fail "after the recipe comes --set key=value, but got '$1'" ;;
    esac
  done
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
  if [[ -e $VENV/bin && ! -e $STAMP ]]; then
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

run_job() { # the recipe, then its overrides
  local job ranks run
  job=(--recipe "$@")
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV TOKENIZERS_PARALLELISM=false
  if [[ -z $GPU || -z ${CUDA_VISIBLE_DEVICES-all} ]]; then export DS_ACCELERATOR=cpu; fi
  ranks=$(finetune ranks "${job[@]}")
  if run=$(finetune finished "${job[@]}" 2>/dev/null); then
    say "This job is complete already."
  else
    finetune plan "${job[@]}"
    train "$ranks" "${job[@]}"
    run=$(finetune finished "${job[@]}") || fail "the training ended, but its run is not complete; the same command" \
      "continues it from its last checkpoint"
    rm -rf "$run/merged" # of an earlier training with fewer steps
  fi
  if [[ $1 -ef $ROOT/recipes/tiny.yaml && ! -e $run/merged ]]; then
    finetune export "$run" --to "$run/merged" --format merged
  fi
  finetune summary "$run"
}

finetune() { # PYTHONPATH and -P: our packages come from this checkout, never from the folder the user stands in
  PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} python -P -m finetune "$@"
}

train() { # number of ranks, then the job
  local where=(--num_gpus "$1") code=0 cores
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
  # The launcher takes the GPUs that CUDA_VISIBLE_DEVICES names only when it is not told a number.
  if [[ ${DS_ACCELERATOR:-} != cpu && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then where=(); fi
  where+=(--master_port "$(free_port)")
  say "Training on $1 rank(s): deepspeed ${where[*]} finetune/train.py ${*:2}"
  trap 'stop_training INT 130' INT
  trap 'stop_training TERM 143' TERM HUP
  set -m # the launcher and its ranks get a process group of their own
  deepspeed -q "${where[@]}" "$ROOT/finetune/train.py" "${@:2}" </dev/null &
  GROUP=$!
  set +m
  wait "$GROUP" || code=$?
  trap - INT TERM HUP
  # When one of its two processes is killed, the launcher leaves the ranks running, and may even end with code 0.
  if group_lives; then
    complain "the launcher ended and left ranks behind; stopping them"
    end_group
    code=$((code ? code : 1))
  fi
  if [[ $code -ne 0 ]]; then
    complain "the training stopped with exit code $code; the same command continues it from its last checkpoint"
    exit "$code"
  fi
}

stop_training() { # the signal's name, the exit code to leave with
  trap 'kill -KILL -- "-$GROUP" 2>/dev/null; exit 130' INT TERM HUP # asked twice: at once
  complain "got SIG$1; stopping the ranks (again: at once)"
  end_group
  complain "stopped; the same command continues the training from its last checkpoint"
  exit "$2"
}

end_group() { # TERM to the launcher and every rank; KILL to those still there after 40 seconds
  local tenths
  kill -TERM -- "-$GROUP" 2>/dev/null || return 0
  for ((tenths = 0; tenths < 400; tenths++)); do
    group_lives || return 0
    sleep 0.1
  done
  kill -KILL -- "-$GROUP" 2>/dev/null || true
}

group_lives() { # whether a process of the group runs; a zombie that nobody collects does not count
  local path stat
  for path in /proc/[0-9]*/stat; do
    read -r stat 2>/dev/null <"$path" || continue
    read -r -a stat <<<"${stat##*) }" # state, parent, group
    if [[ ${stat[2]} == "$GROUP" && ${stat[0]} != Z ]]; then return 0; fi
  done
  return 1
}

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The tests.

run_tests() { # --fast|--all, then pytest's arguments
  local which=(-m "not slow")
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  cd "$ROOT"
  ruff format --check .
  ruff check .
  mypy
  case ${1:-} in
    --fast) return ;;
    --all)
      which=()
      shift
      ;;
  esac
  exec pytest -q "${which[@]}" "$@"
}

main "$@"
