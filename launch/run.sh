#!/usr/bin/env bash
# launch/run.sh [--world_size N --node_rank K ...] main.py CONFIG [key=value ...]
#
# composer for a scheduler that announces the end with SIGTERM. By itself composer would end at once
# and leave training behind; here it waits while training saves a checkpoint and ends with status 75.
set -m # a process group for what begins in the background
# Not SIGTERM again: training may have had it from the scheduler, and ends at once by a second one.
trap 'kill -USR1 -- -$!' TERM
(trap '' TERM USR1 && exec composer "$@") &
wait $!
wait $! # the first wait ends early when SIGTERM comes
