"""A script with WAN's command line that does what the first word of its prompt says, good and bad."""

SOURCE = """
import argparse, os, shutil, subprocess, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("prompt", "save_file"):
    parser.add_argument("--" + name)
given, others = parser.parse_known_args()
videos = Path(__file__).parent
what, target = given.prompt.split()[0], Path(given.save_file)


def start_child(**how):
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)", str(videos)], **how)


def leave(text):
    sys.exit("Traceback (most recent call last):\\n" + text)


if what == "hang":
    target.write_bytes(b"half a video")
    time.sleep(600)
elif what == "fork":
    start_child()
    time.sleep(600)
elif what == "setsid":
    start_child(start_new_session=True)
    time.sleep(600)
elif what == "daemon":
    if os.fork() == 0:
        os.setsid()
        start_child()
        os._exit(0)
    os.wait()
elif what == "deaf":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
elif what == "nothing":
    pass
elif what == "truncated":
    whole = (videos / "good.mp4").read_bytes()
    target.write_bytes(whole[: len(whole) * 2 // 3])
elif what == "flood":
    for _ in range(100):
        sys.stdout.write(("y" * 99 + "\\n") * 10_000)
    sys.exit(3)
elif what == "chatty":
    for _ in range(100):
        sys.stderr.write("y" * 10**6)
    shutil.copyfile(videos / "good.mp4", target)
elif what == "oom":
    leave("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 23.6 GiB.")
elif what == "oom-once":
    if not (videos / "tried").exists():
        (videos / "tried").touch()
        leave("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 23.6 GiB.")
    shutil.copyfile(videos / "good.mp4", target)
elif what == "missing":
    leave("FileNotFoundError: models_t5_umt5-xxl-enc-bf16.pth")
else:
    shutil.copyfile(videos / f"{what}.mp4", target)
"""
