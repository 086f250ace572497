"""Pieces of work that end well, badly, with their process, or not at all; importing this costs no time."""

import os
import time


def do(piece: str, greeting: str) -> str:
    if piece == "raise":
        raise RuntimeError("no such luck\nand more")
    if piece == "device":
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    if piece == "exit":
        os._exit(3)
    if piece == "hang":
        time.sleep(600)
    return f"{greeting} {piece}"


def identify(piece: str) -> int:
    """The process's number; it cannot be asked again after "stay"."""
    print(os.getpid(), flush=True)
    if piece == "stay":
        time.sleep(60)
    return os.getpid()
