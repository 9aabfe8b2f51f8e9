#!/usr/bin/env bash
# Several "hosts" on this machine: network namespaces, each with one cable to a switch that has a namespace of its own.
#   hosts.sh up N [RATE]    hosts 1 .. N; RATE, e.g. 100mbit, in each direction of every cable (default: as fast as it goes)
#   hosts.sh exec I CMD...  run CMD on host I, whose hostname is hostI and whose address on eth0 is 10.99.0.I
#   hosts.sh cut I          pull host I's cable out: packets vanish, nobody is told
#   hosts.sh heal I         put it in again
#   hosts.sh down           end what runs on the hosts, and remove them
# HOSTS_PREFIX   of the namespaces' names (default: ebbtide); a set of hosts a prefix
# HOSTS_MTU      of every cable (default: 1500)
# LAB_OWNER      process id: once that process is gone, the hosts are taken down
# Needs root and iproute2.
set -euo pipefail

PREFIX=${HOSTS_PREFIX:-ebbtide}
SWITCH=$PREFIX-switch
NET=10.99.0
MTU=${HOSTS_MTU:-1500}

host() { echo "$PREFIX-host$1"; }

namespaces() {
  ip netns list | cut -d' ' -f1 | grep -E "^$PREFIX-(host[0-9]+|switch)\$" || true
}

# Bytes that a token bucket may send at once. Too few and the timer's grain, not the rate, decides the speed: below
# 128 kB the kernel cuts its 64 kB packets up, which costs more than half of a gigabit. Too many and short messages are
# not slowed at all, so a slow link gets few.
burst() { # RATE
  local number=${1%%[a-z]*} bits
  case $1 in
    *gbit) bits=$((number * 1000000000)) ;;
    *mbit) bits=$((number * 1000000)) ;;
    *kbit) bits=$((number * 1000)) ;;
    *) echo "hosts.sh: RATE = $1: write whole kbit, mbit or gbit" >&2; return 2 ;;
  esac
  local millisecond=$((bits / 8000))
  if [ "$bits" -le 100000000 ]; then echo 16000; else echo $((millisecond > 128000 ? millisecond : 128000)); fi
}

shape() { # NAMESPACE DEVICE RATE BURST
  ip netns exec "$1" tc qdisc replace dev "$2" root tbf rate "$3" burst "$4" latency 20ms
}

plug_in() { # I N RATE BURST
  local name path number
  name=$(host "$1")
  path=/etc/netns/$name
  ip netns add "$name"
  ip -n "$name" link set lo up
  ip -n "$SWITCH" link add "port$1" mtu "$MTU" type veth peer name eth0 mtu "$MTU" netns "$name"
  ip -n "$SWITCH" link set "port$1" master bridge up
  ip -n "$name" address add "$NET.$1/24" dev eth0
  ip -n "$name" link set eth0 up
  # a kernel whose default is BBR paces below the shaped rate; its sysctl cannot be set here, a route's own can
  ip -n "$name" route replace "$NET.0/24" dev eth0 src "$NET.$1" congctl cubic
  mkdir -p "$path" # `ip netns exec` shows these files to the host in place of the machine's own
  {
    echo "127.0.0.1 localhost"
    for number in $(seq "$2"); do echo "$NET.$number host$number"; done
  } >"$path/hosts"
  if [ -n "$3" ]; then
    shape "$name" eth0 "$3" "$4"
    shape "$SWITCH" "port$1" "$3" "$4"
  fi
}

up() { # N [RATE]
  local number bytes=
  [ -z "${2:-}" ] || bytes=$(burst "$2")
  [ -z "$(namespaces)" ] || { echo "hosts.sh: there are hosts of prefix $PREFIX already: down them first" >&2; exit 1; }
  trap '[ $? = 0 ] || down' EXIT
  ip netns add "$SWITCH"
  ip -n "$SWITCH" link add bridge mtu "$MTU" type bridge stp_state 0 mcast_snooping 0
  ip -n "$SWITCH" link set bridge up
  for number in $(seq "$1"); do
    plug_in "$number" "$1" "${2:-}" "$bytes"
  done
  [ -z "${LAB_OWNER:-}" ] || outlive_nobody "$LAB_OWNER"
}

outlive_nobody() { # OWNER
  # while the owner lives nothing is taken down here: it may have put up new hosts of the same names since
  # shellcheck disable=SC2016
  setsid bash -c 'while kill -0 "$1" 2>/dev/null; do [ -e "/run/netns/$2" ] || exit 0; sleep 1; done; exec "$0" down' \
    "$0" "$1" "$SWITCH" </dev/null >/dev/null 2>&1 &
}

down() {
  local name ids
  for name in $(namespaces); do
    ids=$(ip netns pids "$name" 2>/dev/null) || true
    # shellcheck disable=SC2086 # one word an id
    [ -z "$ids" ] || kill -9 $ids 2>/dev/null || true
    ip netns delete "$name" || true
    rm -rf "/etc/netns/$name"
  done
}

case ${1:-} in
  up) up "${@:2}" ;;
  exec)
    # shellcheck disable=SC2016
    exec ip netns exec "$(host "$2")" unshare --uts sh -c 'hostname "$0" && exec "$@"' "host$2" "${@:3}"
    ;;
  cut) ip -n "$SWITCH" link set "port$2" down ;;
  heal) ip -n "$SWITCH" link set "port$2" up ;;
  down) down ;;
  *) sed -n '2,11s/^# //p' "$0" >&2; exit 2 ;;
esac
