"""Has the nodes of a run wait for each other before run.sh begins it again.

    python launch/together.py SECONDS NODES NODE ADDRESS PORT

Beginning takes long, with torch to import; here the nodes first find out whether they reach each
other. Node 0 listens at ADDRESS:PORT, and says "go" when all others have called. Exit status 1:
they have not within SECONDS.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import suppress


def gather(nodes: int, port: int, end: float) -> str | None:
    """Wait for the other nodes, as node 0; return what is amiss if they do not come."""
    there: dict[int, socket.socket] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=dual) as server:
        while len(there) < nodes - 1 and (left := end - time.monotonic()) > 0:
            with suppress(OSError, ValueError):  # nobody yet, or a stranger
                server.settimeout(left)
                peer, _ = server.accept()
                peer.settimeout(1)
                node = int(peer.recv(10))
                if 0 < node < nodes:
                    there[node] = peer
        missing = [str(node) for node in range(1, nodes) if node not in there]
        for peer in there.values() if not missing else ():
            with suppress(OSError):
                peer.sendall(b"go")
    return f"node {', '.join(missing)} did not call" if missing else None


def call(node: int, address: str, port: int, end: float) -> str | None:
    """Call node 0; return what is amiss if it does not say to go."""
    reason = "it did not answer"
    while (left := end - time.monotonic()) > 0:
        try:
            # Not for longer: each call that is lost on the way is tried again ever more slowly.
            with socket.create_connection((address, port), timeout=min(left, 1)) as peer:
                peer.sendall(str(node).encode())
                peer.settimeout(left)
                if peer.recv(2) == b"go":
                    return None
        except OSError as error:
            reason = str(error)
        time.sleep(0.2)
    return f"node 0 at {address}:{port}: {reason}"


def main(arguments: list[str]) -> int:
    """Run the command line."""
    seconds, nodes, node, address, port = arguments
    end = time.monotonic() + float(seconds)
    try:
        if node == "0":
            amiss = gather(int(nodes), int(port), end)
        else:
            amiss = call(int(node), address, int(port), end)
    except OSError as error:  # another process listens at the port
        amiss = f"port {port}: {error}"
    if amiss:
        print(f"run.sh: the nodes are not together within {seconds} s: {amiss}", file=sys.stderr)
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
