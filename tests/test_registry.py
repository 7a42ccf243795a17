"""The table of implementations: how backends come into it."""

import threading
import time

from jaxzip.ops import registry


def test_threads_wait_for_backends_that_another_loads(monkeypatch):
    begun, done, seen = [], [], []

    class Slow:
        name = "slow"

        def load(self):
            begun.append(threading.get_ident())
            time.sleep(0.1)
            return lambda: done.append(threading.get_ident())

    def load():
        registry.load_backends()
        seen.append(len(done))

    registry.load_backends()  # the real ones, which stay registered
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Slow()])
    registry._load_once.cache_clear()
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1 and seen == [1] * 4
