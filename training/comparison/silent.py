"""Let a process end at once and, by Ctrl-C, without a word, whatever it is importing.

Imported for this effect alone, first of all, by the process that runs are forked from; these have
it from there. Who started them tells of an interruption, once.
"""

import atexit
import gc
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
atexit.register(gc.freeze)  # or its end would look through all of torch's objects, for seconds
