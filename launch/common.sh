# shellcheck shell=bash
# Sourced by the scripts of this folder: --dry-run, clear errors, and `experiment`, which the numbered scripts call.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
export ROOT
DRY_RUN=${DRY_RUN:-}
ARGS=()
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=1 ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) ARGS+=("$argument") ;;
  esac
done
export DRY_RUN

fail() {
  echo "error: $*" >&2
  exit 2
}

# need NAME 'what it is': the environment variable must be set.
need() {
  [[ -n ${!1:-} ]] || fail "$1: got nothing, wanted $2: $1=... $0 ..."
}

# no_flags: the numbered scripts take none, and must not start runs for a misspelt --dry-run.
no_flags() {
  ((${#ARGS[@]} == 0)) || fail "arguments: got ${ARGS[*]}, wanted --dry-run, --help or none"
}

# do_ COMMAND...: prints it, quoted so that it can be pasted, and runs it unless this is a dry run.
do_() {
  local line
  printf -v line '%q ' "$@"
  echo "+ ${line% }" >&2
  [[ -n $DRY_RUN ]] || { have "$1" && "$@"; }
}

# have COMMAND: it must be there.
have() {
  type -t "$1" >/dev/null || fail "$1: got no such command on this machine, wanted it in PATH"
}

# count NAME: the variable must be a number of at least 1.
count() {
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1: got ${!1}, wanted a number"
}

# workdir_of FLAGS...: the run's --workdir, which every launched command must name beside its --config.
workdir_of() {
  local flag
  [[ " $* " == *" --config="* ]] || fail "flags of smdlm.main: got no --config, wanted --config=FILE"
  for flag in "$@"; do
    if [[ $flag == --workdir=?* ]]; then
      flag=${flag#--workdir=}
      echo "${flag/#\~\//$HOME/}" # smdlm.main reads it so
      return
    fi
  done
  fail "flags of smdlm.main: got no --workdir, wanted --workdir=DIR, by which a stopped run is found again"
}

# finished WORKDIR: whether the run there has written its summary.
finished() {
  if [[ $1 == *://* ]]; then
    "${PYTHON:-python}" -m smdlm.tools.finished "$1"
  else
    [[ -e $1/summary.json ]]
  fi
}

# several: adds to `command` what process this is, where COORDINATOR and its companions say so.
several() {
  [[ -n ${COORDINATOR:-}${NUM_PROCESSES:-}${PROCESS_ID:-} ]] || return 0
  need COORDINATOR 'HOST:PORT of process 0'
  need NUM_PROCESSES 'the number of machines'
  need PROCESS_ID 'the number of this machine, from 0'
  command+=(--distributed "--coordinator=$COORDINATOR" "--num_processes=$NUM_PROCESSES" "--process_id=$PROCESS_ID")
}

# trains FLAGS...: whether the command trains, and so is done only when its summary.json is there.
trains() {
  [[ " $* " != *" --mode=eval "* && " $* " != *" --mode=sample "* ]]
}

# experiment FLAGS...: one run of `python -m smdlm.main` where $LAUNCHER says: gpu (this machine), slurm or tpu_pod.
experiment() {
  local launcher=$HERE/${LAUNCHER:-gpu}.sh
  [[ -x $launcher ]] || fail "LAUNCHER: got ${LAUNCHER:-}, wanted gpu, slurm or tpu_pod"
  "$launcher" "$@"
}
