"""vLLM's worker on a GPU, which tells more than it does by itself."""

from vllm.v1.worker.gpu_worker import Worker

from trimtab.rollout.engine.worker import reporting


class GpuWorker(reporting(Worker)):
    """Records kept sets and routes natively."""
