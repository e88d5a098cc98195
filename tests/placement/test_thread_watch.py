import threading

from numa_lab.placement.thread_watch import ThreadWatch


def test_the_watch_finds_the_thread_that_computes_and_not_the_one_that_sleeps():
    stop = threading.Event()
    tids = {}

    def busy():
        tids["busy"] = threading.get_native_id()
        while not stop.is_set():
            sum(range(1000))

    def asleep():
        tids["asleep"] = threading.get_native_id()
        stop.wait()

    threads = [threading.Thread(target=busy), threading.Thread(target=asleep)]
    for thread in threads:
        thread.start()
    watch = ThreadWatch()
    stop.wait(0.2)
    watch.look()
    seen = {thread.tid: thread for thread in watch.threads()}
    stop.set()
    for thread in threads:
        thread.join()
    assert tids["busy"] in seen
    assert tids["asleep"] not in seen
    assert set(seen[tids["busy"]].seen) <= set(seen[tids["busy"]].allowed)
