"""A line for every ten seconds that one test takes, so that nobody takes a long test for one that hangs."""

import subprocess

# A process of its own: a thread would be seen by the tests of threads and forks.
WATCH = """
while true; do
    if read -r -t "$1" line; then doing=$line SECONDS=0
    elif (($? > 128)); then printf '\\n  %s s: %s\\n' "$SECONDS" "$doing"
    else exit; fi
done
"""


class StillRunning:
    """The plugin; a guest's tests, which are told when they have ended, count as waiting."""

    def __init__(self, seconds=10.0):
        self._seconds, self._watch = seconds, None

    def pytest_sessionstart(self):
        words = ["bash", "-c", f"doing='collecting tests'\n{WATCH}", "watch", str(self._seconds)]
        self._watch = subprocess.Popen(words, stdin=subprocess.PIPE, text=True, bufsize=1)

    def pytest_runtest_logstart(self, nodeid):
        self._say(nodeid)

    def pytest_runtest_logfinish(self):
        self._say("waiting")

    def pytest_unconfigure(self):
        if self._watch:
            self._watch.stdin.close()
            self._watch.wait()

    def _say(self, doing):
        if self._watch.poll() is None:  # who interrupts the tests interrupts it too
            self._watch.stdin.write(f"{doing}\n")
