"""A plugin with one job type for each thing that a generation can do, good and bad."""

SOURCE = """
import os, signal, sys, time
from attrs import frozen
from ourvidz_core import Artifact, Command, Generation, JobType, OutOfMemory, hookimpl


@frozen(kw_only=True)
class ToyConfig:
    what: str = "draw"
    seconds: float = 0.0
    width: int = 16


@hookimpl
def register_job_types():
    yield JobType(name="toy_image", queue="toy_queue", content_type="image", preset=ToyConfig(), timeout_seconds=5)
    yield JobType(name="toy_brief", queue="toy_queue", content_type="image", preset=ToyConfig(), timeout_seconds=0.5)


@hookimpl
def generate(job, context):
    what, seconds = job.config.what, job.config.seconds
    print("a plugin prints to standard output")
    if what == "sleep":
        from PIL import Image
        steps = max(int(seconds / 0.05), 1)
        for step in range(steps):
            context.progress(step, steps, stage="sleep")
            context.preview(lambda: Image.new("RGB", (640, 320), "red"))
            time.sleep(0.05)
    elif what == "hang":
        time.sleep(3600)
    elif what == "stall":
        context.progress(1, 2)
        time.sleep(3600)
    elif what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        sys.exit(3)
    elif what == "os_exit":
        os._exit(7)
    elif what == "raise":
        raise RuntimeError("the toy broke")
    elif what == "oom":
        raise OutOfMemory("too little of it")
    elif what == "torch_oom":
        class OutOfMemoryError(RuntimeError):
            pass
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    elif what == "sticky":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif what == "nonsense":
        return "three pictures, I promise"
    elif what == "nothing":
        return Generation(artifacts=())
    elif what == "empty":
        path = context.output_path("png")
        path.write_bytes(b"")
        return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))
    elif what == "elsewhere":
        other = __import__("pathlib").Path("/etc/hostname")
        return Generation(artifacts=(Artifact(path=other, media_type="image/png"),))
    elif what == "once":  # dies on the first attempt and remembers it in the engine's temporary directory
        marker = os.path.join(os.environ["TOY_MARKS"], job.id)
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    from PIL import Image
    path = context.output_path("png")
    image = Image.linear_gradient("L").resize((job.config.width, 16)).convert("RGB")
    image.putpixel((0, 0), (job.seed % 256, 0, 0))
    image.save(path)
    context.progress(1, 1)
    return Generation(artifacts=(Artifact(path=path, media_type="image/png", seed=job.seed),), facts={"toy": what})
"""
