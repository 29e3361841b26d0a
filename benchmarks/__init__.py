"""Speed against the floor and against peers, as commands; tests never assert a time."""
