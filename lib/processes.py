"""Work on many files, of which some crash a decoder or hang it: each costs no more than itself."""

import faulthandler
import gc
import os
import signal
from multiprocessing import Pipe, Process, parent_process
from multiprocessing.connection import wait


def in_processes(work, items: list, processes: int, silence: float = 60):
    """Yield (item, work(item, alive)) as they are ready; a text instead where there is no result.

    A ValueError is its text. A process that crashes, or does not call alive() for `silence`
    seconds, costs its one item. So a long film may take its time. An OSError, such as that of a
    full disk, would meet all items: it is raised here.
    """
    waiting, started, busy = items[::-1], {}, {}  # pipe -> process, pipe -> item
    try:
        while waiting or busy:
            while waiting and len(busy) < max(1, processes):
                if len(started) == len(busy):
                    pipe, there = Pipe()
                    process = Process(target=_serve, args=(work, there, silence), daemon=True)
                    process.start()
                    started[pipe] = process
                    there.close()  # so that the end of the process is the end of the pipe
                pipe = (started.keys() - busy.keys()).pop()
                busy[pipe] = waiting.pop()
                pipe.send(busy[pipe])
            for pipe in wait(busy):
                item = busy.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, OSError):
                    process = started.pop(pipe)
                    process.join()
                    result = f"decoding it crashed, or gave no frame for {silence:.0f} s"
                    result += f" (exit code {process.exitcode})"
                if isinstance(result, OSError):
                    raise result
                yield item, result
    finally:
        for process in started.values():
            process.kill()


def _serve(work, pipe, silence: float) -> None:
    gc.freeze()  # garbage of the main process: its decoders would wait for threads it has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    nowhere, parent = open(os.devnull, "w"), parent_process()
    # Ends this process after so many seconds, even inside of a decoder. The next call starts anew.
    alive = lambda: faulthandler.dump_traceback_later(silence, exit=True, file=nowhere)
    while parent.is_alive():
        if pipe.poll(1):
            item = pipe.recv()
            alive()
            try:
                result = work(item, alive)
            except OSError as error:  # a plain one: those of FFmpeg cannot be sent
                result = OSError(str(error))
            except ValueError as error:
                result = str(error)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(result)
