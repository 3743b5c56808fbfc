#!/bin/bash
# Run a command on two nodes of this machine: network namespaces that a cable (veth) connects, with
# host names node0 and node1.
#
#   unshare -Urnu bash two_nodes.sh WORKING_FOLDER_0 WORKING_FOLDER_1 COMMAND...
#
# $NODE, $ADDRESS and $GLOO_SOCKET_IFNAME are set for the command. Exits with the status of node 0.
set -eu
folder_0=$1 folder_1=$2
shift 2
export FIRST=10.77.0.1

hostname node0
ip link set lo up
(
    export NODE=1 ADDRESS=10.77.0.2 GLOO_SOCKET_IFNAME=cable1
    cd "$folder_1"
    exec unshare -nu bash -c '
        hostname node1
        ip link set lo up
        until ip addr add 10.77.0.2/24 dev cable1 2>/dev/null; do sleep 0.1; done
        ip link set cable1 up
        exec "$@"' node1 "$@"
) &
second=$!
while [ "$(readlink /proc/$second/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add cable0 type veth peer name cable1
ip link set cable1 netns "$second"
ip addr add 10.77.0.1/24 dev cable0
ip link set cable0 up
cd "$folder_0"
status=0
NODE=0 ADDRESS=10.77.0.1 GLOO_SOCKET_IFNAME=cable0 "$@" || status=$?
wait "$second" || status=$?
exit "$status"
