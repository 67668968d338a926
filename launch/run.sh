#!/usr/bin/env bash
# launch/run.sh [--world_size N --node_rank K ...] main.py CONFIG [key=value ...] autoresume=true
#
# composer, for schedulers and for runs that are to come back by themselves.
# SIGTERM, with which a scheduler announces the end, would have composer end at once and leave training
# behind. Here it waits while training saves a checkpoint, and ends with 75, for the scheduler to begin anew.
# After a lost process or node (75) or a kill, the command is given again, at most RUN_RETRIES (3) times in
# a row from the same batch, if all nodes reach each other within RUN_REJOIN (25) seconds.
set -m # a process group for what begins in the background
# Ctrl-C (INT) and a closed terminal (HUP) reach this script alone, so it tells training about them too.
# It sends USR1, because training may have had the scheduler's SIGTERM, and a second one ends it at once.
trap 'told=1; kill -USR1 -- -$! 2>/dev/null' TERM HUP
# shellcheck disable=SC2329 # the trap below calls it
interrupt() {
  if [ "$interrupted" ]; then kill -KILL -- -$! 2>/dev/null; fi
  told=1 interrupted=1
  kill -USR1 -- -$! 2>/dev/null &&
    echo "run.sh: training saves a checkpoint and ends; Ctrl-C again kills it" >&2
}
trap interrupt INT
export RUN_START_FILE # where main.py writes the batch that it begins at, and how nodes find each other
RUN_START_FILE=$(mktemp)
limit="${RUN_RETRIES:-3}" tries=0

together() {
  [ "${nodes:-1}" = 1 ] ||
    python "$(dirname "$0")/together.py" "${RUN_REJOIN:-25}" "$nodes" "$node" "$address" "$port"
}

while true; do
  (trap '' TERM USR1 && exec composer "$@") &
  while kill -0 $! 2>/dev/null; do wait $!; done # a signal ends wait early
  wait $!
  status=$?
  # If composer was killed, what it left behind saves a checkpoint now.
  for _ in {1..300}; do kill -0 -- -$! 2>/dev/null || break; sleep 1; done
  kill -KILL -- -$! 2>/dev/null
  if [ $status != 75 ] && [ $status -le 128 ]; then break; fi
  if [ "$told" ]; then status=75 && break; fi

  read -r start nodes node address port <"$RUN_START_FILE" # as before if it did not begin
  if [ ! "$start" ] && [ $status = 75 ]; then break; fi     # the nodes never came together
  if [ "$start" = "$before" ]; then tries=$((tries + 1)); else tries=1; fi
  before=$start
  reason="exit status $status"
  if [ $status -gt 128 ]; then reason+=" (SIG$(kill -l $((status > 192 ? 256 - status : status))))"; fi
  reason+=", begun at batch ${start:-0}"
  if [ $tries -gt "$limit" ]; then
    echo "run.sh: $reason; given up after $limit retries without a newer checkpoint" >&2
    status=1 && break
  fi
  echo "run.sh: $reason; again, retry $tries of $limit without a newer checkpoint" >&2
  if ! together || [ "$told" ]; then status=75 && break; fi
done
rm "$RUN_START_FILE"
exit $((status == 75 ? ${RUN_STATUS_75:-75} : status))
