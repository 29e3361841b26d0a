"""Waiting until the servers that run now have followed a move of an alias."""

import time

from registry.records import Alias, Rollout, ServerRecord
from registry.store import Registry

WAIT_SECONDS = 5.0
POLL_SECONDS = 0.05


def wait_for_rollouts(
    registry: Registry, alias: Alias, seconds: float = WAIT_SECONDS
) -> tuple[list[Rollout], list[ServerRecord]]:
    """Return what each live server made of the move, and the servers that said nothing in time.

    A server that already follows a later move of the same alias has followed this one.
    """
    deadline = time.monotonic() + seconds
    while True:
        servers = {server.server_id: server for server in registry.servers()}
        settled = {
            rollout.server_id: rollout
            for rollout in registry.rollouts(alias.name)
            if rollout.alias == alias.alias
            and rollout.event_seq >= alias.event_seq
            and rollout.state != "warming"
        }
        silent = [server for server_id, server in servers.items() if server_id not in settled]
        if not silent or time.monotonic() >= deadline:
            return list(settled.values()), silent
        time.sleep(POLL_SECONDS)
