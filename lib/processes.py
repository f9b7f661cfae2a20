"""Work on many files, of which some crash a decoder or hang it: each costs no more than itself."""

import gc
import multiprocessing
import signal
import time
from multiprocessing.connection import wait

SILENCE = 60  # seconds without a frame after which a decoder is taken to hang


def in_processes(work, items: list, processes: int, silence: float = SILENCE):
    """Yield (item, work(item, alive)) as they are ready; a text instead where there is no result.

    A process that crashes, or does not call alive() for `silence` seconds, costs its one item. So
    a long film may take its time.
    """
    waiting, lanes = items[::-1], {}  # lanes: pipe -> process, its item, when it must say more

    def feed(pipe, process) -> None:
        if waiting:
            item = waiting.pop()
            pipe.send(item)
            lanes[pipe] = process, item, time.monotonic() + silence
        else:
            process.kill()

    try:
        for _ in range(min(processes, len(items))):
            feed(*_start(work))
        while lanes:
            for pipe in wait(lanes, 1):
                process, item, _ = lanes.pop(pipe)
                try:
                    done, result = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    feed(*_start(work))
                    yield item, f"decoding it crashed the process (exit code {process.exitcode})"
                    continue
                if done:
                    feed(pipe, process)
                    yield item, result
                else:
                    lanes[pipe] = process, item, time.monotonic() + silence
            for pipe, (process, item, due) in list(lanes.items()):
                if time.monotonic() > due:
                    process.kill()
                    del lanes[pipe]
                    feed(*_start(work))
                    yield item, f"not decoded: no frame for {silence:.0f} s"
    finally:
        for process, *_ in lanes.values():
            process.kill()


def _start(work):
    pipe, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(work, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    return pipe, process


def _serve(work, pipe) -> None:
    gc.freeze()  # garbage of the main process: its decoders would wait for threads it has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    parent, said = multiprocessing.parent_process(), time.monotonic()

    def alive() -> None:
        nonlocal said
        if time.monotonic() - said > 1:
            said = time.monotonic()
            pipe.send((False, None))

    while parent.is_alive():
        if pipe.poll(1):
            pipe.send((True, work(pipe.recv(), alive)))
